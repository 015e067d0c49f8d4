"""The sha256 of files, read once, in pieces; and of plain data.

A file may be hashed by a process of its own (`sha256_apart`), which waits for no turn among this one's threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Event

PIECE = 1 << 24  # bytes that are read at a time: between two pieces a thread waits for its turn among Python's others
LOOK = 0.1  # seconds between looks at whether a process is still wanted
PROGRAM = """
import hashlib, sys
with open(sys.argv[1], "rb", buffering=0) as file:
    print(hashlib.file_digest(file, "sha256").hexdigest())
"""


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


def sha256_until(path: Path, stop: Event) -> str:
    """Hex sha256 of a file, worth nothing where `stop` is set meanwhile."""
    return digest_of(path, stop).hexdigest()


def sha256_apart(path: Path, stop: Event) -> str:
    """`sha256_until` by a process of its own; by this one where there can be none, or it has nothing to say."""
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, os.fspath(path)]
    quiet = subprocess.DEVNULL
    try:
        child = subprocess.Popen(command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet)
    except OSError:
        return sha256_until(path, stop)
    with child:
        while not stop.is_set():
            try:
                said = child.communicate(timeout=LOOK)[0].decode().strip()
            except subprocess.TimeoutExpired:
                continue
            return said if child.returncode == 0 else sha256_until(path, stop)
        child.kill()
    return ""


def sha256_of_data(content: object) -> str:
    """Hex sha256 of plain data, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_file_of(path: Path, size: int, sha256: str) -> bool:
    """Whether a file is there, of `size` bytes, with this hex sha256; its bytes are read only where the size fits."""
    return path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256
