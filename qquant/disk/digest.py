"""The sha256 of files: read once, in pieces."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    return digest_of(path).hexdigest()


def digest_of(path: Path) -> hashlib._Hash:
    """The sha256 of a file, to which more may be added."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def is_file_of(path: Path, size: int, sha256: str) -> bool:
    """Whether a file is there, of `size` bytes, with this hex sha256; its bytes are read only where the size fits."""
    return path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256
