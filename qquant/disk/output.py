"""The output folder of a build: who may write to it, and what may stand in it.

DIR/<artifact folders>      complete, each with qquant-manifest.json
DIR/calibration/            the tokens that were used, with their provenance
DIR/report.json, report.md, report.html, evidence/
DIR/timings.json            seconds by artifact, stage and block; the only file that differs between equal builds
DIR/losses.json             what each tensor is expected to lose as each type, where a size was asked for
DIR/source.json             which checkpoint, from where, under which licence
DIR/.damaged/               files that were no longer what their manifest says, set aside by a build that made them again
DIR/.partial/               a build in progress, with its lock (lock-N of rank N, if there are several); gone when the build is done
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from qquant.disk.lock import PATIENCE, hold
from qquant.disk.writes import crash_point, failure, rename, told
from qquant.errors import EnvironmentMissingError, InputError, LockedError, QQuantError, UsageError
from qquant.ranks import ALONE, Ranks

PARTIAL = ".partial"
DONE = ".partial.done"  # what is left of a build that is done, while it is removed
DAMAGED = ".damaged"
MANIFEST = "qquant-manifest.json"
TIMINGS = "timings.json"
LOSSES = "losses.json"
OURS = {
    PARTIAL,
    DONE,
    DAMAGED,
    TIMINGS,
    LOSSES,
    "calibration",
    "report.json",
    "evidence",
    "report.md",
    "report.html",
    "source.json",
}


@contextmanager
def claim(out: Path, ranks: Ranks = ALONE, orphans: Collection[str] = ()) -> Iterator[Path]:
    """Hold `out` for one build; yields the folder for unfinished work, which is removed when the build succeeds.

    A rejected input leaves the output folder as it was found. Of several ranks the first claims it for all, and all leave when it has removed
    that folder: then everything is on the disk. `orphans` are names of folders that are ours though they have no manifest.

    Raises:
        UsageError: `out` is a file, or holds what qquant did not write.
        LockedError: another build is writing to it.
        EnvironmentMissingError: it cannot be created or written.
        StoppedError: a write failed in a way that need not last; what is finished is kept.
    """
    require_utf8(out)
    with _claimed(out, orphans) if ranks.first else nullcontext(out / PARTIAL) as partial:
        if ranks.first:
            _await_earlier(partial, out)
        ranks.meet()
        with told(out), nullcontext() if ranks.first else hold(partial / f"lock-{ranks.rank}", out):
            yield partial
            ranks.meet()  # nobody writes into what is removed
    ranks.meet()  # nobody goes before it is: until here each hears of another's end


@contextmanager
def _claimed(out: Path, orphans: Collection[str]) -> Iterator[Path]:
    """Hold `out` as the only process, or the first of several."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; --out takes a folder")
    _only_ours(out, orphans)
    partial = out / PARTIAL
    fresh = [path for path in (out, partial) if not path.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentMissingError(f"{out}: cannot be created: {error.strerror}. Choose another --out") from None
    try:
        with hold(partial / "lock", out):
            shutil.rmtree(out / DONE, ignore_errors=True)
            try:
                yield partial
            except (InputError, UsageError):
                if partial in fresh:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            crash_point("before removing the partial folder")
            rename(partial, out / DONE)
            crash_point("while removing the partial folder")
            shutil.rmtree(out / DONE)
    except QQuantError:
        if out in fresh and out.is_dir() and not os.listdir(out):
            out.rmdir()
        raise
    except OSError as error:
        raise failure(error, out) from error


def _await_earlier(partial: Path, out: Path) -> None:
    """Wait until the last rank of an earlier build in `out`, whose first one is gone, has noticed that and ended.

    Raises:
        LockedError: one is still there after PATIENCE seconds.
    """
    until = time.monotonic() + PATIENCE
    for path in sorted(partial.glob("lock-*")):
        while path.exists():
            try:
                with hold(path, out):
                    path.unlink()
            except LockedError:
                if time.monotonic() > until:
                    raise
                time.sleep(PATIENCE / 40)


def require_utf8(path: Path) -> None:
    """Raise UsageError if a path is no UTF-8, or holds NUL: libraries that write below it do not take it."""
    try:
        text = str(path.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{str(path)!r}: is not UTF-8. Choose another --out") from None
    if b"\0" in text:
        raise UsageError(f"{str(path)!r}: holds a NUL. Choose another --out")


def _only_ours(out: Path, orphans: Collection[str]) -> None:
    if not out.is_dir():
        return
    for path in sorted(out.iterdir()):
        if (
            path.name not in {*OURS, *orphans}
            and not _temporary(path)
            and not empty(path)
            and not (path / MANIFEST).is_file()
        ):
            raise UsageError(
                f"{path}: was not made by qquant. Choose an empty or new folder for --out, or move it away"
            )


def empty(path: Path) -> bool:
    """Whether it is a folder that holds nothing, and so is nobody's."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _temporary(path: Path) -> bool:
    """Whether a killed `write_synced` left it."""
    return path.name.startswith(".") and path.name.endswith(".tmp") and path.name[1:-4] in OURS
