"""What of a repository a hub has already, by the hashes in its tree: sha256 of large files, git ids of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qquant.artifact.manifest import Payload
from qquant.release.repository import Repository


def lacking(repository: Repository, there: Mapping[str, str]) -> list[str]:
    """Files of `repository` that are not, or not with these bytes, in a tree."""
    return [name for name, payload in repository.files.items() if not holds(payload, there.get(name))]


def holds(payload: Payload, oid: str | None) -> bool:
    """Whether a tree's entry has these bytes."""
    if oid is None:
        return False
    return oid == (payload.sha256 if len(oid) == 64 else payload.git_oid())


def operations(added: Mapping[str, Payload], removed: Sequence[str]) -> list[Any]:
    """The client's operations for one commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [CommitOperationAdd(name, payload.path or payload.content) for name, payload in added.items()]
    return [*additions, *(CommitOperationDelete(name) for name in removed)]
