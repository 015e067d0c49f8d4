"""What a repository of a release holds, and where it came from: read from the output folder of a build.

    DIR/report.json                       verdicts: only artifacts that passed, or carry a waiver, go on
    DIR/<folder>/qquant-manifest.json     the files of those artifacts, each hashed again before it is trusted
    DIR/source.json                       the checkpoint: hub id, revision, licence and language of its card

    one folder -> one `Repository`: those files, the manifest cut to them (with a `release` entry: base model, licence, tag),
    and the report cut to them.

    with_statements adds               qquant-bom.cdx.json      CycloneDX 1.6 bill of materials: model, base model, data, tools
                                       qquant-provenance.json   in-toto statement with a SLSA predicate: sha256 of every file,
                                                                recipe, inputs; no times, so the same build gives the same bytes
    sign adds                          model.sig                OpenSSF model signature over all of it (extra `sign`)

Files that no manifest names (a temporary file of a killed process, notes) are never part of a release.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qquant.artifact.manifest import REPORT, Payload, verified
from qquant.disk.output import MANIFEST
from qquant.errors import GateFailedError, InputError, UsageError
from qquant.plan.asked import CHAT, proposed
from qquant.source.checkpoint import Checkpoint
from qquant.source.hub import card_head
from qquant.source.untrusted import read_json

SOURCE = "source.json"
CARD_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags")
PASSED = ("pass", "waived")


@dataclass(frozen=True)
class Repository:
    """One repository to publish: its name without the namespace, and every file."""

    name: str
    files: Mapping[str, Payload]
    manifest: Mapping[str, Any]
    report: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """sha256 over names and hashes of all files: the same release has the same digest."""
        lines = [f"{name} {self.files[name].sha256}" for name in sorted(self.files)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(payload.size for payload in self.files.values())

    def with_files(self, added: Mapping[str, bytes]) -> Repository:
        """The same with more files."""
        files = dict(self.files) | {name: Payload.of(content) for name, content in added.items()}
        return Repository(self.name, files, self.manifest, self.report)


@dataclass(frozen=True)
class Release:
    """The repositories of a build, and the artifacts that may not be published, with the reason."""

    repositories: tuple[Repository, ...]
    refused: Mapping[str, str] = field(default_factory=dict)


def as_json(content: Mapping[str, Any]) -> bytes:
    """As every JSON file of a release is written."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def source_facts(
    checkpoint: Checkpoint, reference: str, parallel: Mapping[str, Mapping[str, list[int]]]
) -> dict[str, Any]:
    """What later steps need to know of a checkpoint when it is no longer at hand; `parallel` as in `Plan`."""
    licence = next((path for path in checkpoint.side_files if path.name.startswith("LICENSE")), None)
    return {
        "schema": "qquant-source-1",
        "model": checkpoint.name,
        "base_model": reference if checkpoint.revision else None,
        "revision": checkpoint.revision,
        "chat": proposed(checkpoint.path).name == CHAT,
        "card": card_facts(checkpoint.path / "README.md"),
        "tensor_parallel": dict(parallel),
        "licence_file": {"name": licence.name, "text": licence.read_text("utf-8", "replace")} if licence else None,
    }


def card_facts(path: Path) -> dict[str, Any]:
    """Licence, language and tags of a card's YAML head; empty where there is no card, or no readable head."""
    head = card_head(path)
    return {key: head[key] for key in CARD_KEYS if key in head}


def read_release(folder: Path, only: Sequence[str] = ()) -> Release:
    """Every repository that may be published from the output folder of a build; all bytes are hashed and compared.

    Raises:
        UsageError: not the output of a build, or `only` names something it does not hold.
        InputError: a file differs from its manifest, or the report belongs to another build.
        GateFailedError: no artifact may be published.
    """
    report = read_report(folder / REPORT)
    source = read_json(folder / SOURCE) if (folder / SOURCE).is_file() else {}
    verdicts = {artifact["name"]: artifact for artifact in report["artifacts"]}
    manifests = {path.parent: read_json(path) for path in sorted(folder.glob(f"*/{MANIFEST}"))}
    known = [name for manifest in manifests.values() for name in manifest["artifacts"]]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise UsageError(f"--only {unknown[0]}: {folder} holds {', '.join(known) or 'no artifacts'}")
    refused: dict[str, str] = {}
    repositories = []
    for place, manifest in manifests.items():
        allowed = {}
        for name, entry in manifest["artifacts"].items():
            if only and name not in only:
                continue
            reason = _refusal(entry, verdicts.get(name), report)
            if reason:
                refused[name] = reason
            else:
                allowed[name] = entry
        if allowed:
            repositories.append(_repository(place, {**manifest, "artifacts": allowed}, report, source))
    if not repositories:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
        raise GateFailedError(f"{folder}: nothing may be published{reasons}")
    return Release(tuple(repositories), refused)


def read_report(path: Path) -> dict[str, Any]:
    """A report.json.

    Raises:
        UsageError: there is none.
        InputError: it is not one.
    """
    if not path.is_file():
        raise UsageError(f"{path}: not found. Publish the output folder of a finished `qquant build`")
    report = read_json(path)
    if report.get("schema") != "qquant-report-1" or not isinstance(report.get("artifacts"), list):
        raise InputError(f"{path}: schema is {report.get('schema')!r}; this version publishes qquant-report-1")
    return report


def _refusal(entry: Mapping[str, Any], verdict: Mapping[str, Any] | None, report: Mapping[str, Any]) -> str | None:
    if verdict is None:
        return f"{REPORT} has no verdict on it; run the same `qquant build` again"
    checkpoint = report.get("conditions", {}).get("checkpoint")
    built_from = entry.get("inputs", {}).get("checkpoint")
    if checkpoint and built_from and checkpoint != built_from:
        return f"{REPORT} judged another checkpoint ({checkpoint[:12]}) than it was built from ({built_from[:12]})"
    outcome = verdict["verdict"]["outcome"]
    if outcome in PASSED:
        return None
    return "; ".join([f"verdict {outcome}", *map(str, verdict["verdict"].get("reasons", ()))])


def _repository(
    place: Path, manifest: Mapping[str, Any], report: Mapping[str, Any], source: Mapping[str, Any]
) -> Repository:
    files = {}
    for entry in manifest["artifacts"].values():
        for name, facts in entry["files"].items():
            files[name] = verified(place, name, facts)
    licence = source.get("licence_file")
    if licence and licence["name"] not in files:
        files[licence["name"]] = Payload.of(licence["text"].encode())
    facts = {key: source.get(key) for key in ("base_model", "revision", "chat", "card")}
    parallel = [sizes for name, sizes in (source.get("tensor_parallel") or {}).items() if name in manifest["artifacts"]]
    if parallel:  # a folder holds one such artifact
        facts["tensor_parallel"] = parallel[0]
    rows = [
        {**artifact, "path": place.name}  # not where it lay on the machine that built it
        for artifact in report["artifacts"]
        if artifact["name"] in manifest["artifacts"]
    ]
    return Repository(
        place.name, files, {**manifest, "release": {"repository": place.name, **facts}}, {**report, "artifacts": rows}
    )


def complete(repository: Repository, facts: Mapping[str, Any]) -> Repository:
    """The repository with its manifest and report as files; `facts` (tag, owner, base model) join the manifest's release entry."""
    known = {key: value for key, value in facts.items() if value is not None}
    manifest = {**repository.manifest, "release": {**repository.manifest["release"], **known}}
    finished = Repository(repository.name, repository.files, manifest, repository.report)
    return finished.with_files({MANIFEST: as_json(manifest), REPORT: as_json(repository.report)})
