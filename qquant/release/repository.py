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
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qquant.artifact.manifest import (
    LICENCES,
    OTHER_MAKING,
    REPORT,
    ArtifactEntry,
    Manifest,
    ParallelSizes,
    Payload,
    ReleaseEntry,
    manifest_of,
    read_report,
    records,
    verified,
)
from qquant.disk.output import MANIFEST
from qquant.disk.records import shortened, to_plain, typed
from qquant.errors import GateFailedError, InputError, UsageError
from qquant.plan.asked import CHAT, proposed
from qquant.report.record import ArtifactReport, Report
from qquant.source.checkpoint import Checkpoint
from qquant.source.hub import card_head
from qquant.source.untrusted import read_json

SOURCE, SOURCE_SCHEMA = "source.json", "qquant-source-1"
CARD_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags")
PASSED = ("pass", "waived")
NOT_THERE = f"{REPORT} judged it, and it is in no manifest; run the same `qquant build` again"
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class Repository:
    """One repository to publish: its name without the namespace, and every file."""

    name: str
    files: Mapping[str, Payload]
    manifest: Manifest
    report: Report

    @property
    def release(self) -> ReleaseEntry:
        """What it will be published as."""
        return self.manifest.release or ReleaseEntry(self.name)

    @property
    def first(self) -> ArtifactEntry:
        """The repository's first artifact: what is the same for all of them is said there."""
        return next(iter(self.manifest.artifacts.values()))

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
        """This repository with more files."""
        files = dict(self.files) | {name: Payload.of(content) for name, content in added.items()}
        return replace(self, files=files)


@dataclass(frozen=True)
class Release:
    """The repositories of a build, and the artifacts that may not be published, with the reason."""

    repositories: tuple[Repository, ...]
    refused: Mapping[str, str] = field(default_factory=dict)


def as_json(content: Mapping[str, Any]) -> bytes:
    """Bytes of a JSON file as every one of a release is written."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class LicenceFile:
    """The licence beside the checkpoint, word by word."""

    name: str
    text: str


@dataclass(frozen=True)
class ReleaseSource:
    """source.json: what later steps need to know of a checkpoint when it is no longer at hand."""

    model: str = ""
    base_model: str | None = None  # hub id
    revision: str | None = None
    chat: bool | None = None  # by its template; None: not known
    card: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)  # licence, language, tags
    tensor_parallel: Mapping[str, ParallelSizes] = field(default_factory=dict)  # as in `Plan`
    licence_file: LicenceFile | None = None
    checkpoint: str = ""  # sha256 of what was quantized: config, weights, adapter

    @classmethod
    def of(cls, checkpoint: Checkpoint, parallel: Mapping[str, Mapping[str, list[int]]]) -> ReleaseSource:
        """The facts of a checkpoint that is being built from; `parallel` as in `Plan`."""
        licence = next((path for path in checkpoint.side_files if path.name in LICENCES), None)
        return cls(
            model=checkpoint.name,
            base_model=checkpoint.reference if checkpoint.revision else None,
            revision=checkpoint.revision,
            chat=proposed(checkpoint.path).name == CHAT,
            card=card_facts(checkpoint.path / "README.md"),
            tensor_parallel={
                name: ParallelSizes(**{key: tuple(sizes) for key, sizes in by.items()}) for name, by in parallel.items()
            },
            licence_file=LicenceFile(licence.name, licence.read_text("utf-8", "replace")) if licence else None,
            checkpoint=checkpoint.content_hash(),
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> ReleaseSource:
        """The facts of a record; `where` is the file, for messages.

        Raises:
            InputError: it is of another kind, or a field is not what it should be.
        """
        if content.get("schema") != SOURCE_SCHEMA:
            raise InputError(f"{where}: is not a record that this version of qquant understands")
        facts = typed(cls, dict(content), where)
        if facts.base_model is not None and not HUB_ID.fullmatch(facts.base_model):
            raise InputError(f"{where}: base_model: {shortened(facts.base_model)} is not an id of a hub")
        if facts.licence_file and facts.licence_file.name not in LICENCES:
            raise InputError(
                f"{where}: licence_file.name: {shortened(facts.licence_file.name)} is not one of {', '.join(LICENCES)}"
            )
        return facts

    def to_json(self) -> bytes:
        """The bytes of the record's file."""
        return as_json({"schema": SOURCE_SCHEMA, **to_plain(self)})


def card_facts(path: Path) -> dict[str, str | tuple[str, ...]]:
    """Licence, language and tags of a card's YAML head; empty where there is no card, or no readable head."""
    head = card_head(path)
    facts: dict[str, str | tuple[str, ...]] = {}
    for key in CARD_KEYS:
        value = head.get(key)
        if isinstance(value, str):
            facts[key] = value
        elif isinstance(value, list | tuple):
            facts[key] = tuple(str(item) for item in value if isinstance(item, str | int | float))
    return facts


def read_release(folder: Path, only: Sequence[str] = ()) -> Release:
    """Every repository that may be published from the output folder of a build; all bytes are hashed and compared.

    Raises:
        UsageError: not the output of a build, or `only` names something it does not hold.
        InputError: a file differs from its manifest, or the report belongs to another build.
        GateFailedError: no artifact may be published.
    """
    if not (folder / REPORT).is_file():
        raise UsageError(f"{folder / REPORT}: not found. Publish the output folder of a finished `qquant build`")
    report = read_report(folder / REPORT)
    place = folder / SOURCE
    if not place.is_file():
        raise InputError(f"{place}: not found, so nobody can say what was quantized. Run the same `qquant build` again")
    source = ReleaseSource.from_json(read_json(place), str(place))
    rows = {row.name: row for row in report.artifacts}
    manifests = {path.parent: manifest_of(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}"))}
    known = [name for manifest in manifests.values() for name in manifest.artifacts]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise UsageError(f"--only {unknown[0]}: {folder} holds {', '.join(known) or 'no artifacts'}")
    refused: dict[str, str] = {}
    repositories = []
    for place, manifest in manifests.items():
        allowed, making = {}, records(place)
        for name, entry in manifest.artifacts.items():
            if only and name not in only:
                continue
            reason = _refusal(entry, making[name], rows.get(name), report, source)
            if reason:
                refused[name] = reason
            else:
                allowed[name] = entry
        if allowed:
            repositories.append(_repository(place, replace(manifest, artifacts=allowed), report, source))
    refused |= {} if only else dict.fromkeys((name for name in rows if name not in known), NOT_THERE)
    if not repositories:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
        raise GateFailedError(f"{folder}: nothing may be published{reasons}")
    return Release(tuple(repositories), refused)


def _refusal(
    entry: ArtifactEntry, record: str, row: ArtifactReport | None, report: Report, source: ReleaseSource
) -> str | None:
    if row is None:
        return f"{REPORT} has no verdict on it; run the same `qquant build` again"
    checkpoint, built_from = report.conditions.inputs.get("checkpoint"), entry.inputs.get("checkpoint")
    if checkpoint and built_from and checkpoint != built_from:
        return f"{REPORT} judged another checkpoint ({checkpoint[:12]}) than it was built from ({built_from[:12]})"
    if source.checkpoint and built_from and source.checkpoint != built_from:
        return f"{SOURCE} is about another checkpoint ({source.checkpoint[:12]}) than it was built from ({built_from[:12]})"
    if row.sha256 != entry.digest:
        judged = f"judged other bytes ({row.sha256[:12]})" if row.sha256 else "does not say which bytes it judged"
        return f"{REPORT} {judged}; the folder's are {entry.digest[:12]}; run the same `qquant build` again"
    if row.record and row.record != record:
        return f"{MANIFEST} {OTHER_MAKING}"
    if row.verdict.outcome in PASSED:
        return None
    return "; ".join([f"verdict {row.verdict.outcome}", *row.verdict.reasons])


def _repository(folder: Path, manifest: Manifest, report: Report, source: ReleaseSource) -> Repository:
    files = {name: verified(folder, name, facts) for name, facts in manifest.files.items()}
    licence = source.licence_file
    if licence and licence.name not in files:
        files[licence.name] = Payload.of(licence.text.encode())
    parallel = next((by for name, by in source.tensor_parallel.items() if name in manifest.artifacts), None)
    release = ReleaseEntry(
        folder.name, source.base_model, source.revision, chat=source.chat, card=source.card, tensor_parallel=parallel
    )
    rows = tuple(
        replace(row, path=folder.name)  # not where it lay on the machine that built it
        for row in report.artifacts
        if row.name in manifest.artifacts
    )
    return Repository(folder.name, files, replace(manifest, release=release), replace(report, artifacts=rows))


def complete(
    repository: Repository, tag: str | None = None, namespace: str | None = None, base_model: str | None = None
) -> Repository:
    """The repository with its manifest and report as files; what is given joins the manifest's release entry."""
    release = repository.release
    release = replace(
        release,
        tag=tag or release.tag,
        namespace=namespace or release.namespace,
        base_model=base_model or release.base_model,
    )
    finished = replace(repository, manifest=replace(repository.manifest, release=release))
    return finished.with_files({MANIFEST: finished.manifest.to_json(), REPORT: finished.report.to_json().encode()})


def sizes_with_earlier(planned: Mapping[str, Mapping[str, list[int]]], out: Path) -> dict[str, Mapping[str, list[int]]]:
    """Tensor-parallel sizes of the planned artifacts, and of those that are in `out` and were left alone."""
    path = out / SOURCE
    earlier = ReleaseSource.from_json(read_json(path), str(path)).tensor_parallel if path.is_file() else {}
    there = {name: {key: list(sizes) for key, sizes in vars(by).items()} for name, by in earlier.items()}
    return {**there, **planned}
