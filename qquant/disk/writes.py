"""Every write to an output folder: create, fill in place, sync, rename, and what a failure of the file system means.

Nothing becomes visible under its final name before it is whole: bytes are written to a temporary name and synced, then renamed, then
the folder that holds the name is synced. `crash_point` marks the places between which a build can die; tests stop it there.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qquant.errors import EnvironmentMissingError, QQuantError, StoppedError

PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINTR, errno.EAGAIN}  # the same command may well continue
UNSUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def crash_point(point: str) -> None:
    """A named place on the way to a finished build."""


def failure(error: OSError, out: Path) -> QQuantError:
    """What a failed call to the file system is to the user."""
    where = error.filename or out
    if error.errno not in PASSING:
        return EnvironmentMissingError(
            f"{where}: {error.strerror}. What is finished is kept; the same command continues"
        )
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    room = f" ({shutil.disk_usage(there).free:,} bytes are free)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return StoppedError(f"{where}: {error.strerror}{room}. What is finished is kept; the same command continues")


@contextmanager
def told(out: Path) -> Iterator[None]:
    """Meanwhile a failed call to the file system is what it is to the user of `out`.

    Raises:
        StoppedError: the disk is full or failing, which may pass.
        EnvironmentMissingError: anything else.
    """
    try:
        yield
    except OSError as error:
        raise failure(error, out) from error


def sync(path: Path) -> None:
    """Flush a file or directory to the disk. A sync that failed is not tried again: the bytes may be lost."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, each name on the disk before something is put into it."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def rename(old: Path, new: Path) -> None:
    """Rename a synced file or folder, and sync the folder of the new name."""
    os.rename(old, new)
    crash_point("after a rename")
    sync(new.parent)


def put(path: Path, position: int, data: memoryview | bytes) -> None:
    """Write `data` at `position` of an existing file."""
    view = memoryview(data)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        while view:
            count = _again(os.pwrite, descriptor, view[: 1 << 30], position)
            position += count
            view = view[count:]
    finally:
        os.close(descriptor)


def create(path: Path, size: int, head: bytes) -> None:
    """A synced file of `size` bytes, all of them taken from the disk now, that begins with `head`."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        if size and hasattr(os, "posix_fallocate"):
            try:
                _again(os.posix_fallocate, descriptor, 0, size)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    put(path, 0, head)
    sync(path)


def copy(source: Path, path: Path) -> None:
    """A synced copy of a small file."""
    content = source.read_bytes()
    create(path, len(content), content)


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file whole: temporary sibling, sync, rename, sync the folder."""
    write_pieces(path, [content])


def write_pieces(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    """Write a file whole from its pieces, as `write_synced` does."""
    temporary = path.with_name(f".{path.name}.tmp")
    first, *rest = pieces
    create(temporary, sum(map(len, pieces)), bytes(first))
    position = len(first)
    for piece in rest:
        put(temporary, position, piece)
        position += len(piece)
    if rest:
        sync(temporary)
    crash_point("before a rename")
    rename(temporary, path)


def _again(call: Callable[..., Any], *arguments: object) -> Any:
    """`call`, once more when a signal came first."""
    while True:
        try:
            return call(*arguments)
        except InterruptedError:
            continue


def finite(value: Any) -> Any:
    """JSON has no infinity: what is not finite becomes text."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case Mapping():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
    return value
