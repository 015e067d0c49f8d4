"""`qquant doctor`: whether this machine can build, found out by trying.

    versions    Python, torch, triton, the libraries that read what we write
    memory      of the host, within the limit of its control group; of each GPU
    folder      the file system of --out: create, preallocate, write, sync, rename over, sync the folder, lock, hard link; room
    numbers     operators and a product in float32 on the device against float64 on the CPU: a GPU that rounds to TF32, or is broken,
                shows here
    hub         whether a token is there; never the token, and nothing is sent
    ranks       under a launcher: who they are, a sum by gloo and by NCCL, and whether --out is one folder to all: what one writes and renames
                the others read, what one locks the others cannot

A finding is ok, a warning (the build works, with a loss that is named) or a failure (exit status 6). Nothing is left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from qquant import __version__
from qquant.disk import writes
from qquant.exchange import BY_HOST, shares_card
from qquant.kernels import jit
from qquant.kernels.gptq_block import gptq_block
from qquant.kernels.gram import gram
from qquant.kernels.group_search import group_search
from qquant.ranks import Ranks

OK, WARNING, FAILURE = "ok", "warning", "failure"
LIBRARIES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "gguf", "huggingface_hub", "numpy")
ROOM = 1 << 30  # bytes below which a folder is warned about
WAIT = 60  # seconds for a sum over all ranks
LATE = 10.0  # seconds that a name may take to another machine
EXACT = 1e-5  # relative error that float32 stays below


@dataclass(frozen=True)
class Finding:
    """One thing that was tried."""

    name: str
    state: str
    text: str


def examine(out: Path, device: torch.device) -> Iterator[Finding]:
    """Everything that can be found out without a network."""
    yield Finding("qquant", OK, f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield Finding("libraries", OK, ", ".join(_versions()))
    yield from _memory(device)
    yield from folder(out)
    yield from numbers(device)
    yield _hub()


def _versions() -> Iterator[str]:
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield f"{name} {importlib.metadata.version(name)}"


def _memory(device: torch.device) -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(limit.read_text()))
    yield Finding("memory", OK if total >= 4 << 30 else WARNING, f"{total / 1e9:.1f} GB")
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        yield Finding("GPU", OK, f"{facts.name}: {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    path = jit.path("gram", device)
    yield Finding("kernels", OK, f"on {device}: {path}")


# --- the file system ----------------------------------------------------------------------------------------------------


def folder(out: Path) -> Iterator[Finding]:
    """What the file system of `out` does, tried in a temporary folder there."""
    nearest = out.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        yield Finding("folder", FAILURE, f"{nearest}: is no folder")
        return
    free = shutil.disk_usage(nearest).free
    yield Finding("room", OK if free >= ROOM else WARNING, f"{nearest}: {free / 1e9:.1f} GB free")
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".qquant-doctor-") as name:
            for title, attempt, need in ATTEMPTS:
                yield _tried(title, attempt, Path(name), need)
    except OSError as error:
        yield Finding("folder", FAILURE, f"{nearest}: {error.strerror}. Choose another --out")


def _tried(title: str, attempt: Callable[[Path], None], scratch: Path, need: str) -> Finding:
    try:
        attempt(scratch)
    except OSError as error:
        return Finding(title, need, f"{error.strerror or error}")
    return Finding(title, OK, "works")


def _write(scratch: Path) -> None:
    writes.create(scratch / "file", 1 << 20, b"first")
    writes.put(scratch / "file", 1 << 19, b"middle")
    writes.sync(scratch / "file")
    data = (scratch / "file").read_bytes()
    if len(data) != 1 << 20 or not data.startswith(b"first") or data[1 << 19 :][:6] != b"middle":
        raise OSError("what was written is not what is read back")


def _preallocate(scratch: Path) -> None:
    descriptor = os.open(scratch / "room", os.O_WRONLY | os.O_CREAT)
    try:
        os.posix_fallocate(descriptor, 0, 1 << 20)
    finally:
        os.close(descriptor)


def _rename(scratch: Path) -> None:
    (scratch / "new").write_bytes(b"new")
    (scratch / "old").write_bytes(b"old")
    writes.sync(scratch / "new")
    writes.rename(scratch / "new", scratch / "old")
    (scratch / "a").mkdir()
    writes.rename(scratch / "a", scratch / "b")
    if (scratch / "old").read_bytes() != b"new" or (scratch / "new").exists() or not (scratch / "b").is_dir():
        raise OSError("a rename did not replace the old file")


def _lock(scratch: Path) -> None:
    first, second = (os.open(scratch / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    try:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        raise OSError("two locks were given for one file")
    finally:
        os.close(first)
        os.close(second)


def _link(scratch: Path) -> None:
    (scratch / "one").write_bytes(b"")
    os.link(scratch / "one", scratch / "two")


ATTEMPTS: tuple[tuple[str, Callable[[Path], None], str], ...] = (  # title, attempt, what it means if it fails
    ("write and sync", _write, FAILURE),
    ("rename and sync", _rename, FAILURE),
    ("lock", _lock, FAILURE),
    ("preallocate", _preallocate, WARNING),
    ("hard links", _link, WARNING),
)


# --- ranks --------------------------------------------------------------------------------------------------------------


def group(out: Path, device: torch.device, ranks: Ranks, alone: Sequence[Finding]) -> list[Finding]:
    """What several ranks find of each other, each finding as bad as the worst; then what others than the first found `alone`."""
    mine = [
        _collective("gloo", torch.device("cpu"), ranks),
        *([_between_cards(device, ranks)] if device.type == "cuda" else []),
        *_shared(out, ranks),
    ]
    said = ranks.gather([vars(finding) for finding in mine])
    where = [f"{rank} is {ranks.where(rank)}" for rank in range(ranks.world)]
    findings = [Finding("ranks", OK, "; ".join(where))]
    for number, finding in enumerate(said[0]):
        bad = [(rank, theirs[number]) for rank, theirs in enumerate(said) if theirs[number]["state"] != OK]
        text = "; ".join(f"rank {rank}: {one['text']}" for rank, one in bad)
        findings.append(Finding(finding["name"], bad[0][1]["state"], text) if bad else Finding(**finding))
    apart = ranks.gather([vars(finding) for finding in alone if finding.state != OK])
    for rank, theirs in enumerate(apart[1:], 1):
        findings += [Finding(f"rank {rank}: {one['name']}", one["state"], one["text"]) for one in theirs]
    return findings


def _between_cards(device: torch.device, ranks: Ranks) -> Finding:
    """A sum by NCCL; where ranks share a card what is done instead."""
    if shares_card(device, ranks):
        return Finding("sum by nccl", WARNING, f"was not tried: {BY_HOST}")
    return _collective("nccl", device, ranks)


def _collective(backend: str, device: torch.device, ranks: Ranks) -> Finding:
    """A sum over all ranks. Builds and checks of today do without."""
    from torch import distributed

    title = f"sum by {backend}"
    try:
        began = time.monotonic()
        distributed.init_process_group(
            backend,
            store=ranks.apart(backend),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=timedelta(seconds=WAIT),
        )
        value = torch.full((1 << 20,), ranks.rank + 1.0, device=device)
        distributed.all_reduce(value)
        right = bool((value == ranks.world * (ranks.world + 1) / 2).all())
        took = time.monotonic() - began
    except (RuntimeError, ValueError) as error:
        return Finding(title, WARNING, str(error).strip().splitlines()[0])
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return Finding(title, OK, f"right on {device.type}, {took:.1f} s") if right else Finding(title, WARNING, "is wrong")


def _shared(out: Path, ranks: Ranks) -> Iterator[Finding]:
    """Whether a folder that the first rank makes beside `out` is the same to all; every step is one for all ranks."""
    nearest = out.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    made = ranks.once(lambda: _scratch(nearest))
    try:
        for title, attempt in (("folder of all ranks", _seen), ("lock across ranks", _locked)):
            problem = "the first rank cannot write there" if not made else attempt(Path(made), ranks)
            yield Finding(title, FAILURE if problem else OK, f"{nearest}: {problem}" if problem else "works")
    finally:
        ranks.meet()
        if made and ranks.first:
            shutil.rmtree(made, ignore_errors=True)


def _scratch(nearest: Path) -> str:
    try:
        return tempfile.mkdtemp(dir=nearest, prefix=".qquant-doctor-")
    except OSError:
        return ""


def _seen(made: Path, ranks: Ranks) -> str:
    """What is wrong with names that one rank gives and all read; "" for nothing."""
    problem = _told(partial(_name, made, ranks.rank))
    ranks.meet()
    late = time.monotonic() + LATE
    names = {f"rank-{rank}" for rank in range(ranks.world)}
    while not problem and not all((made / name).is_file() for name in names) and time.monotonic() < late:
        time.sleep(0.1)
    lacking = sorted(name for name in names if not (made / name).is_file() or (made / name).read_text() != name)
    return problem or (f"{lacking[0]}'s file is not seen: give all ranks one file system" if lacking else "")


def _name(made: Path, rank: int) -> None:
    (made / f"new-{rank}").write_text(f"rank-{rank}")
    writes.sync(made / f"new-{rank}")
    writes.rename(made / f"new-{rank}", made / f"rank-{rank}")


def _locked(made: Path, ranks: Ranks) -> str:
    """What is wrong with a lock of the first rank; "" for nothing."""
    taken: list[int] = []
    problem = _told(lambda: taken.append(_lock_of(made))) if ranks.first else ""
    ranks.meet()
    if not ranks.first:
        with contextlib.suppress(BlockingIOError):
            problem = _told(lambda: taken.append(_lock_of(made))) or "two ranks were given one lock"
    ranks.meet()
    for descriptor in taken:
        os.close(descriptor)
    return problem


def _lock_of(made: Path) -> int:
    descriptor = os.open(made / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _told(attempt: Callable[[], object]) -> str:
    """What the system says of an attempt that fails; BlockingIOError, which may be right, is raised."""
    try:
        attempt()
    except BlockingIOError:
        raise
    except OSError as error:
        return f"{error.strerror or error}"
    return ""


# --- numbers ------------------------------------------------------------------------------------------------------------


def numbers(device: torch.device) -> Iterator[Finding]:
    """Operators on `device` against the CPU."""
    made = torch.Generator().manual_seed(0)
    x, w = torch.randn(96, 128, generator=made), torch.randn(64, 128, generator=made)
    truth = x.double() @ w.double().T
    yield _close("product in float32", (x.to(device) @ w.to(device).T).cpu(), truth)
    total = torch.zeros(128, 128, device=device)
    gram(total, x.to(device))
    yield _close("Gram matrix", total.cpu(), x.double().T @ x.double())
    importance = x.square().mean(0)
    here, there = (group_search(w.to(d), importance.to(d), 32, 16, True) for d in (torch.device("cpu"), device))
    yield _same("search for scales", [(a, b.cpu()) for a, b in zip(here, there, strict=True)])
    upper = torch.linalg.cholesky(x.T @ x + torch.eye(128)).T.contiguous()
    step = here[0].repeat_interleave(32, 1)
    offset = torch.full_like(step, 8.0) * step
    inputs = (w, upper, step, offset)
    one, two = (gptq_block(*(value.to(d) for value in inputs), 16) for d in (torch.device("cpu"), device))
    yield _same("error feedback", [(one[0], two[0].cpu())])


def _close(title: str, value: torch.Tensor, truth: torch.Tensor) -> Finding:
    error = float((value.double() - truth).abs().max() / truth.abs().max())
    return Finding(title, OK if error < EXACT else FAILURE, f"relative error {error:.1e} (allowed {EXACT:.0e})")


def _same(title: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Finding:
    """Equal but for ties: one value in a thousand may differ."""
    share = max(float((a != b).float().mean()) for a, b in pairs)
    return Finding(title, OK if share < 0.001 else FAILURE, f"{share:.2%} of the values differ from the CPU's")


def _hub() -> Finding:
    import huggingface_hub  # the door to the hub; costs half a second

    there = huggingface_hub.get_token() is not None
    return Finding("hub", OK, "a token is there" if there else "no token; publishing needs one (`hf auth login`)")
