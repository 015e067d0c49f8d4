"""One setting in all sibling repositories: every change is shown first, then made in one guarded commit each.

The hashes in the manifest and the bill of materials change in the same commit, so that `qquant verify` still holds. What vouched for
the old bytes goes with them: the files' entries in the provenance statement, and a signature, which would no longer hold.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qquant.artifact.manifest import BOM, REPORT, SIGNATURE, STATEMENT, FileFacts, Manifest, Patch, Payload
from qquant.disk.output import MANIFEST
from qquant.errors import PublishError, UsageError
from qquant.release.hub.failures import CHANGED, reported
from qquant.release.hub.huggingface import HuggingFace
from qquant.release.hub.trees import holds, operations
from qquant.release.repository import as_json


@dataclass(frozen=True)
class Setting:
    """One value of one JSON file, as `FILE:KEY=VALUE` says it; dots in KEY go into mappings, VALUE is JSON or plain text."""

    file: str
    keys: tuple[str, ...]
    value: Any

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Raise UsageError unless `text` has that form."""
        match = re.fullmatch(r"([\w.-]+\.json):([\w.-]+)=(.*)", text, re.DOTALL)
        if match is None or match[1] in (MANIFEST, REPORT):
            raise UsageError(
                f"{text!r}: must be FILE.json:KEY=VALUE, such as generation_config.json:pad_token_id=151643"
            )
        try:
            value = json.loads(match[3])
        except ValueError:
            value = match[3]
        return cls(match[1], tuple(match[2].split(".")), value)

    def apply(self, content: bytes, where: str) -> bytes:
        """The file with this value; the very same bytes if it has it already."""
        try:
            document = json.loads(content)
        except ValueError:
            raise PublishError(f"{where}: {self.file} is not valid JSON. Nothing was changed in it") from None
        inner = document
        for key in self.keys[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            raise PublishError(
                f"{where}: {self.file} has no mapping {'.'.join(self.keys[:-1])}. Nothing was changed in it"
            )
        last = self.keys[-1]
        if last in inner and inner[last] == self.value and type(inner[last]) is type(self.value):
            return content
        inner[last] = self.value
        end = b"\n" if content.endswith(b"\n") else b""
        return json.dumps(document, indent=2, ensure_ascii=False).encode() + end


@dataclass(frozen=True)
class _Patch:
    """What one commit would do to `name`, if main is still at `head`."""

    name: str
    head: str
    files: Mapping[str, bytes]
    removed: tuple[str, ...] = ()
    diff: str = ""


@dataclass(frozen=True)
class RepositoryChange:
    """What a setting changes in one repository."""

    repository: str
    diff: str  # empty: nothing
    commit: str | None = None


def patch(
    client: HuggingFace, setting: Setting, patterns: Sequence[str], show: Callable[[RepositoryChange], bool]
) -> list[RepositoryChange]:
    """Change one setting in every repository that a pattern (ORG/NAME with * and ?) matches; one commit each.

    All changes are computed before the first is made; `show` sees each one and says whether to make it. The manifest's hash of the
    file changes in the same commit, so that `qquant verify` still holds. What already has the value is left alone.

    Raises:
        PublishError: no repository has the file, or one cannot be changed; the message says which ones were.
    """
    done: list[str] = []
    with reported(done, CHANGED):
        names = _matching(client, patterns)
        if not names:
            raise UsageError(f"{', '.join(patterns)}: matches no repository")
        planned = [one for name in names if (one := _patched(client, name, setting))]
        if not planned:
            raise PublishError(f"{', '.join(names)}: none has a {setting.file}")
        changes = []
        for one in planned:
            change = RepositoryChange(one.name, one.diff)
            if show(change) and one.diff:
                change = RepositoryChange(one.name, one.diff, _commit(client, one, setting))
                done.append(one.name)
            changes.append(change)
    return changes


def _matching(client: HuggingFace, patterns: Sequence[str]) -> list[str]:
    owners = dict.fromkeys(pattern.split("/")[0] for pattern in patterns)
    if any("/" not in pattern for pattern in patterns) or any(set("*?[") & set(owner) for owner in owners):
        raise UsageError("--repos: must be OWNER/PATTERN; the owner is a name")
    names: list[str] = []
    for owner in owners:
        listed = client.attempt(f"{owner}: repositories", partial(_models, client, owner))
        names += [info.id for info in listed]
    return sorted(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _models(client: HuggingFace, owner: str) -> list[Any]:
    return list(client.api.list_models(author=owner))


def _patched(client: HuggingFace, name: str, setting: Setting) -> _Patch | None:
    """None, which is said, for a repository without the file: a GGUF sibling has no configs."""
    head = client.refs(name)["main"]
    there = client.tree(name, head)
    if setting.file not in there:
        client.say(f"{name}: has no {setting.file}; left as it is")
        return None
    old = client.download(name, head, setting.file)
    new = setting.apply(old, name)
    if new == old:
        return _Patch(name, head, {})
    files = {setting.file: new}
    if MANIFEST in there:
        files[MANIFEST] = _manifest(client.manifest(name, head), setting, new, old).to_json()
    for file, patched in ((BOM, _bill), (STATEMENT, _statement)):
        if file in there:
            files[file] = as_json(patched(json.loads(client.download(name, head, file)), setting, files))
    removed = (SIGNATURE,) if SIGNATURE in there else ()
    where = f"{name}/{setting.file}"
    lines = list(difflib.unified_diff(old.decode().splitlines(), new.decode().splitlines(), where, where, lineterm=""))
    lines += [f"{name}/{file}: goes, it was made over the old bytes" for file in removed]
    return _Patch(name, head, files, removed, "\n".join(lines))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _manifest(manifest: Manifest, setting: Setting, new: bytes, old: bytes) -> Manifest:
    facts = FileFacts(len(new), _sha256(new))
    entries = {
        name: replace(entry, files={**entry.files, setting.file: facts}) if setting.file in entry.files else entry
        for name, entry in manifest.artifacts.items()
    }
    made = Patch(setting.file, ".".join(setting.keys), setting.value, facts.bytes, facts.sha256, _sha256(old))
    return replace(manifest, artifacts=entries, patches=(*manifest.patches, made))


def _bill(bill: dict[str, Any], _: Setting, files: Mapping[str, bytes]) -> dict[str, Any]:
    for component in bill["metadata"]["component"]["components"]:
        if component["name"] in files:
            component["hashes"] = [{"alg": "SHA-256", "content": _sha256(files[component["name"]])}]
    return bill


def _statement(statement: dict[str, Any], _: Setting, files: Mapping[str, bytes]) -> dict[str, Any]:
    statement["subject"] = [subject for subject in statement["subject"] if subject["name"] not in files]
    return statement


def _commit(client: HuggingFace, planned: _Patch, setting: Setting) -> str:
    payloads = {file: Payload.of(content) for file, content in planned.files.items()}

    def send() -> str:
        now = client.refs(planned.name)["main"]
        tree = client.tree(planned.name, now)
        if all(holds(payload, tree.get(file)) for file, payload in payloads.items()):
            return now
        made = client.api.create_commit(
            planned.name,
            operations(payloads, planned.removed),
            commit_message=f"Set {'.'.join(setting.keys)} in {setting.file}",
            parent_commit=planned.head,
        )
        return str(made.oid)

    return client.attempt(f"{planned.name}: commit", send)
