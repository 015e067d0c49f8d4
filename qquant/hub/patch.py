"""One setting in all sibling repositories: every change is shown first, then made in one guarded commit each.

The manifest's hash of the file changes in the same commit, so that `qquant verify` still holds. What vouched for the old bytes goes:
the files' entries in the provenance statement, and the signature, which would no longer verify.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qquant.errors import PublishError, UsageError
from qquant.hub.failures import CHANGED, reported
from qquant.hub.huggingface import HuggingFace
from qquant.hub.trees import holds, operations
from qquant.output import MANIFEST
from qquant.provenance import REPORT, Payload, as_json


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
        place = document
        for key in self.keys[:-1]:
            place = place.get(key) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise PublishError(
                f"{where}: {self.file} has no mapping {'.'.join(self.keys[:-1])}. Nothing was changed in it"
            )
        last = self.keys[-1]
        if last in place and place[last] == self.value and type(place[last]) is type(self.value):
            return content
        place[last] = self.value
        end = b"\n" if content.endswith(b"\n") else b""
        return json.dumps(document, indent=2, ensure_ascii=False).encode() + end


@dataclass(frozen=True)
class Change:
    """What a setting changes in one repository."""

    repository: str
    diff: str  # empty: nothing
    commit: str | None = None


def patch(
    client: HuggingFace, setting: Setting, patterns: Sequence[str], show: Callable[[Change], bool]
) -> list[Change]:
    """Change one setting in every repository that a pattern (ORG/NAME with * and ?) matches; one commit each.

    All changes are computed before the first is made; `show` sees each one and says whether to make it. The manifest's hash of the
    file changes in the same commit, so that `qquant verify` still holds. What already has the value is left alone.

    Raises:
        PublishError: a repository lacks the file or cannot be changed; the message says which ones were.
    """
    done: list[str] = []
    with reported(done, CHANGED):
        names = _matching(client, patterns)
        if not names:
            raise UsageError(f"{', '.join(patterns)}: matches no repository")
        planned = [(name, *_patched(client, name, setting)) for name in names]
        changes = []
        for name, head, files, diff in planned:
            change = Change(name, diff)
            if show(change) and diff:
                change = Change(name, diff, _commit_patch(client, name, head, files, setting))
                done.append(name)
            changes.append(change)
    return changes


def _matching(client: HuggingFace, patterns: Sequence[str]) -> list[str]:
    owners = dict.fromkeys(pattern.split("/")[0] for pattern in patterns)
    if any("/" not in pattern for pattern in patterns) or any(set("*?[") & set(owner) for owner in owners):
        raise UsageError("--repos: must be OWNER/PATTERN; the owner is a name")
    found: list[str] = []
    for owner in owners:
        listed = client.attempt(f"{owner}: repositories", partial(_models, client, owner))
        found += [info.id for info in listed]
    return sorted(name for name in found if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _models(client: HuggingFace, owner: str) -> list[Any]:
    return list(client.api.list_models(author=owner))


def _patched(client: HuggingFace, name: str, setting: Setting) -> tuple[str, dict[str, bytes], str]:
    """(head, new contents by file, unified diff) of one repository."""
    head = client.refs(name)["main"]
    there = client.tree(name, head)
    if setting.file not in there:
        raise PublishError(f"{name}: has no {setting.file}")
    old = client.download(name, head, setting.file)
    new = setting.apply(old, name)
    if new == old:
        return head, {}, ""
    files = {setting.file: new}
    if MANIFEST in there:
        files[MANIFEST] = _patched_manifest(json.loads(client.download(name, head, MANIFEST)), setting, new)
    lines = difflib.unified_diff(
        old.decode().splitlines(),
        new.decode().splitlines(),
        f"{name}/{setting.file}",
        f"{name}/{setting.file}",
        lineterm="",
    )
    return head, files, "\n".join(lines)


def _patched_manifest(manifest: dict[str, Any], setting: Setting, content: bytes) -> bytes:
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for entry in manifest["artifacts"].values():
        if setting.file in entry["files"]:
            entry["files"][setting.file] = facts
    manifest.setdefault("patches", []).append(
        {"file": setting.file, "key": ".".join(setting.keys), "value": setting.value, **facts}
    )
    return as_json(manifest)


def _commit_patch(client: HuggingFace, name: str, head: str, files: Mapping[str, bytes], setting: Setting) -> str:
    payloads = {file: Payload.of(content) for file, content in files.items()}

    def send() -> str:
        now = client.refs(name)["main"]
        tree = client.tree(name, now)
        if all(holds(payload, tree.get(file)) for file, payload in payloads.items()):
            return now
        made = client.api.create_commit(
            name,
            operations(payloads, ()),
            commit_message=f"Set {'.'.join(setting.keys)} in {setting.file}",
            parent_commit=head,
        )
        return str(made.oid)

    return client.attempt(f"{name}: commit", send)
