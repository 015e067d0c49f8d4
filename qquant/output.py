"""The output folder of a build: who may write to it, and what is allowed to stand in it.

DIR/<artifact folders>      complete, each with qquant-manifest.json
DIR/calibration/            the tokens that were used, with their provenance
DIR/report.json, report.md, report.html, evidence/
DIR/source.json             which checkpoint, from where, under which licence
DIR/.partial/               a build in progress, with its lock; gone when the build is done
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from qquant.errors import EnvironmentMissingError, InputError, LockedError, UsageError

PARTIAL = ".partial"
MANIFEST = "qquant-manifest.json"
OURS = {PARTIAL, "calibration", "report.json", "evidence", "report.md", "report.html", "source.json"}


@contextmanager
def claim(out: Path) -> Iterator[Path]:
    """Hold `out` for one build; yields the folder for unfinished work, which is removed when the build succeeds.

    A rejected input leaves the output folder as it was found.

    Raises:
        UsageError: `out` is a file, or holds what qquant did not write.
        LockedError: another build is writing to it.
        EnvironmentMissingError: it cannot be created or written.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; --out takes a folder")
    _only_ours(out)
    partial = out / PARTIAL
    fresh = [path for path in (out, partial) if not path.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentMissingError(f"{out}: cannot be created: {error.strerror}. Choose another --out") from None
    lock = filelock.FileLock(partial / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise LockedError(f"{out}: another build is writing to it. Wait for it, or choose another --out") from None
    try:
        yield partial
        shutil.rmtree(partial)
    except (InputError, UsageError):
        for path in fresh[-1:]:
            shutil.rmtree(path, ignore_errors=True)
        if out in fresh and out.is_dir() and not os.listdir(out):
            out.rmdir()
        raise
    except OSError as error:
        raise EnvironmentMissingError(
            f"{error.filename or out}: {error.strerror}. What is finished is kept; the same command continues"
        ) from error
    finally:
        lock.release()


def _only_ours(out: Path) -> None:
    if not out.is_dir():
        return
    for path in sorted(out.iterdir()):
        if path.name not in OURS and not (path / MANIFEST).is_file():
            raise UsageError(
                f"{path}: was not made by qquant. Choose an empty or new folder for --out, or move it away"
            )


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file whole: temporary sibling, sync, rename, sync the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync(path.parent)
