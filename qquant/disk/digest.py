"""The sha256 of files, read once, in pieces; and of plain data."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from threading import Event

PIECE = 1 << 24  # bytes that are read at a time: between two pieces a thread waits for its turn among Python's others


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    return digest_of(path).hexdigest()


def piece_of(size: int) -> memoryview:
    """Room for a piece of `size` bytes: no more than these, so that small files take little memory, and never none."""
    return memoryview(bytearray(max(1, min(PIECE, size))))


def digest_of(path: Path, stop: Event | None = None) -> hashlib._Hash:
    """The sha256 of a file, to which more may be added; of its beginning where `stop` is set meanwhile."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = piece_of(os.fstat(file.fileno()).st_size)
        while not (stop and stop.is_set()) and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
    return digest


def sha256_of_data(content: object) -> str:
    """Hex sha256 of plain data, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_file_of(path: Path, size: int, sha256: str) -> bool:
    """Whether a file is there, of `size` bytes, with this hex sha256; its bytes are read only where the size fits."""
    return path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256
