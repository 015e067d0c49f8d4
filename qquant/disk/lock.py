"""One build at a time per folder: an exclusive lock on DIR/.partial/lock, with its owner written inside.

    {"host", "boot", "pid", "start", "beat"}     beat: a number that the owner raises every BEAT seconds

The kernel's lock (flock) goes with its process, so a killed build leaves a free one. Where it is free and names an owner, the owner
must be provably dead before it is taken over, since some file systems lock within one machine only, or not at all:

    same host, same boot      no process has this pid and this start time
    same host, another boot   dead
    another host              its beat stands still for PATIENCE seconds

Nobody reads a clock of another machine, or a file's time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qquant import processes
from qquant.errors import EnvironmentMissingError, LockedError

BEAT = 5.0  # seconds
PATIENCE = 20.0  # seconds
LIMIT = 4096  # bytes of the file that are read


def identity() -> dict[str, Any]:
    """This process, as it signs its lock."""
    return processes.identity() | {"beat": 0}


def _owner(descriptor: int) -> dict[str, Any] | None:
    try:
        owner = json.loads(os.pread(descriptor, LIMIT, 0))
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and isinstance(owner.get("pid"), int) else None


def _lives(owner: dict[str, Any], descriptor: int) -> bool:
    """Whether `owner`, whose lock this process could take, may be at work all the same."""
    us = identity()
    if owner.get("host") != us["host"]:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            time.sleep(min(BEAT, PATIENCE) / 5)
            now = _owner(descriptor)
            if now is not None and now.get("beat") != owner.get("beat"):
                return True
        return False
    if owner.get("boot") != us["boot"] or owner["pid"] == us["pid"]:
        return False
    return processes.start_of(owner["pid"]) in (owner.get("start"), "")


def _try(path: Path, out: Path) -> int | None:
    """A descriptor that holds the lock; None if the file was replaced meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:  # the folder was finished and removed in this moment
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = _owner(descriptor)
        if owner is not None and _lives(owner, descriptor):
            raise BlockingIOError(errno.EAGAIN, "")
        if not path.exists() or os.stat(path).st_ino != os.fstat(descriptor).st_ino:
            os.close(descriptor)
            return None
        return descriptor
    except BlockingIOError:
        owner = _owner(descriptor) or {}
        os.close(descriptor)
        who = f" (process {owner.get('pid')} on {owner.get('host')})" if owner else ""
        raise LockedError(f"{out}: another build is writing to it{who}. Wait for it, or choose another --out") from None
    except OSError as error:
        os.close(descriptor)
        raise EnvironmentMissingError(
            f"{path}: cannot be locked: {error.strerror}. Choose an --out whose file system has locks"
        ) from None


@contextmanager
def hold(path: Path, out: Path) -> Iterator[None]:
    """Hold the lock at `path` for the output folder `out`.

    Raises:
        LockedError: another build holds it.
        EnvironmentMissingError: the file system has no locks.
    """
    descriptor = None
    while descriptor is None:
        descriptor = _try(path, out)
    us, stop = identity(), threading.Event()

    def sign() -> None:
        text = json.dumps(us).encode()
        os.pwrite(descriptor, text.ljust(LIMIT // 8), 0)

    def beat() -> None:
        while not stop.wait(BEAT):
            us["beat"] += 1
            with contextlib.suppress(OSError):  # a full disk is for the build to tell
                sign()

    thread = threading.Thread(target=beat, daemon=True, name="qquant-lock")
    try:
        sign()
        thread.start()
        yield
    finally:
        stop.set()
        if thread.ident:
            thread.join()
        os.close(descriptor)
