"""`qquant verify`: is a finished folder what its manifest says, and are its numbers those that were solved for?

    hashes      every file of the manifest is there, of its size, with its sha256; names are plain
    structure   headers and configs: every tensor that the config implies, in its shape and type, and nothing beyond the file
    values      tensors dequantized again and compared with the digests that the build recorded; no NaN, no infinity
                SAMPLED linears of each artifact, chosen by their names; with `deep`, every tensor

Files that no manifest names are told, and are no part of the artifact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qquant.algorithms.checksum import checksum
from qquant.algorithms.grid import finite
from qquant.artifact.manifest import (
    ADDED,
    REPORT,
    ArtifactEntry,
    named_files,
    read_manifest,
    read_report,
    require_judged,
    verify_files,
)
from qquant.disk.output import MANIFEST
from qquant.errors import InputError, UsageError
from qquant.formats import FORMATS
from qquant.report.solved import checksums
from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

SAMPLED = 4  # linears of an artifact whose values are computed again


DOWNLOADS = (
    Path(".cache/huggingface"),
    Path(".git"),
)  # what `hf download --local-dir` and `git clone` keep beside the files
FOLDERS = "give an artifact folder of `qquant build`, or a release folder"
ATTRIBUTES = ".gitattributes"  # in every repository of the hub


@dataclass(frozen=True)
class Verified:
    """What was looked at, and what is not part of it."""

    size: int  # bytes that were hashed
    tensors: int  # whose values were scanned
    digests: int  # of them, compared with a recorded digest
    unlisted: tuple[str, ...]


def hashes(folder: Path) -> int:
    """Bytes of the files of `folder`, after each was hashed; needs no torch.

    Raises:
        UsageError: it has no manifest.
        InputError: a file is missing or differs, or is a link.
    """
    if not (folder / MANIFEST).is_file():
        inside = sorted(str(file.parent) for file in folder.glob(f"*/{MANIFEST}"))
        what = f"name the folders in it: qquant verify {' '.join(inside)}" if inside else FOLDERS
        raise UsageError(f"{folder}: holds no {MANIFEST}; {what}")
    return verify_files(folder)


def unlisted(folder: Path) -> tuple[str, ...]:
    """Files below `folder` that its manifest does not name; what `publish` adds to a release, and what a download leaves, is known."""
    manifest = read_manifest(folder)
    named = named_files([manifest]) | {MANIFEST}
    if manifest.release:
        named |= ADDED
    paths = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    present = {str(path) for path in paths if not any(path.is_relative_to(kept) for kept in DOWNLOADS)}
    return tuple(sorted(present - named - {ATTRIBUTES}))


def verify(folder: Path, deep: bool = False) -> Verified:
    """Look at a finished folder from its bytes to its values.

    Raises:
        UsageError: it has no manifest.
        InputError: a file, a tensor or a value is not what it should be.
    """
    size = hashes(folder)
    if (folder / REPORT).is_file():
        require_judged(folder, read_report(folder / REPORT))
    scanned = compared = 0
    for name, entry in read_manifest(folder).artifacts.items():
        recorded = checksums(entry.layers)
        artifact_format = FORMATS[_format(folder, name, entry)]
        source = artifact_format.read(artifact_format.path_of(folder, entry.files))
        for tensor in source.family.shapes(source.config) if deep else _sample(recorded):
            value = source.tensor(tensor)
            if not finite(value):
                raise InputError(f"{folder}: {name}: {tensor} holds NaN or infinity")
            scanned += 1
            if tensor in recorded:
                compared += 1
                _compare(f"{folder}: {name}: {tensor}", value, recorded[tensor])
    return Verified(size, scanned, compared, unlisted(folder))


def _compare(where: str, value: torch.Tensor, recorded: str) -> None:
    if checksum(value) != recorded:
        raise InputError(f"{where}: dequantizes to other values than the build recorded; the manifest was changed")


def _format(folder: Path, name: str, entry: ArtifactEntry) -> str:
    if entry.format not in FORMATS:
        raise InputError(f"{folder / MANIFEST}: {name} has format {entry.format[:40]!r}")
    return entry.format


def _sample(names: Mapping[str, str]) -> Iterator[str]:
    """Some names, the same ones every time, from all over the model."""
    return iter(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:SAMPLED])
