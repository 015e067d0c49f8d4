"""What a finished folder says of itself: its manifest, and its files held against it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qquant.disk.output import MANIFEST
from qquant.errors import InputError, UsageError
from qquant.source.untrusted import read_json, require_regular

REPORT = "report.json"
BOM, STATEMENT, SIGNATURE = "qquant-bom.cdx.json", "qquant-provenance.json", "model.sig"
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
ADDED = frozenset(
    {"README.md", REPORT, BOM, STATEMENT, SIGNATURE, *LICENCES}
)  # to a build's folder, by `publish` and `sign`


@dataclass(frozen=True)
class Payload:
    """One file of a repository: on disk, or in memory."""

    size: int
    sha256: str
    path: Path | None = None
    content: bytes = b""

    @classmethod
    def of(cls, content: bytes) -> Payload:
        """A file in memory."""
        return cls(len(content), hashlib.sha256(content).hexdigest(), None, content)

    def read(self) -> bytes:
        """All bytes; meant for small files."""
        return self.path.read_bytes() if self.path else self.content

    def git_oid(self) -> str:
        """The id git gives to these bytes as a blob."""
        digest = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        digest.update(self.read())
        return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified(place: Path, name: str, facts: Mapping[str, Any]) -> Payload:
    path = place / name
    if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
        raise InputError(f"{place / MANIFEST}: {name!r} is not a file of this folder")
    if (
        not path.is_file()
        or require_regular(path).stat().st_size != facts["bytes"]
        or sha256_of(path) != facts["sha256"]
    ):
        raise InputError(
            f"{path}: does not match {MANIFEST}; the file is missing, was changed or damaged. Build it again"
        )
    return Payload(facts["bytes"], facts["sha256"], path)


def verify_files(folder: Path) -> int:
    """Bytes of the files that the manifest of `folder` names, after each was hashed and compared.

    Raises:
        InputError: a file is missing or differs, or there is no manifest.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("schema") != "qquant-manifest-1":
        raise InputError(f"{folder / MANIFEST}: not a manifest that this version of qquant understands")
    facts = [item for entry in manifest["artifacts"].values() for item in entry["files"].items()]
    return sum(verified(folder, name, expected).size for name, expected in facts)


def named_files(manifests: Iterable[Mapping[str, Any]]) -> set[str]:
    """Every file that manifests name."""
    return {name for manifest in manifests for entry in manifest["artifacts"].values() for name in entry["files"]}


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder.

    Raises:
        UsageError: there is none, so the folder is not ours.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"{folder}: already exists and was not made by qquant (no {MANIFEST}). Choose another --out, or move it away"
        )
    manifest = read_json(path)
    if manifest.get("schema") != "qquant-manifest-1" or not isinstance(manifest.get("artifacts"), dict):
        raise InputError(f"{path}: not a manifest that this version of qquant understands")
    return manifest
