"""What differs between the kinds of devices that qquant computes on, in one table; nothing else asks for a kind to choose a size.

    cpu     pieces that stay in the caches, one thread of work, the inputs of blocks in files: memory of one layer
    cuda    pieces that fill the card, reading and writing beside the computation

`named` turns what a user typed into a device. Others (mps, xpu) are refused there by name: no size was measured for them, and sums in
another order would give artifacts whose bytes nobody can repeat.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qquant.errors import EnvironmentMissingError, UsageError
from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


READERS = 8


@dataclass(frozen=True)
class Policy:
    """Sizes of work on one kind of device. None of them changes a result but `together`, `spread`, `by_blocks` and `answered`."""

    threads: bool  # whether reading, hashing and writing beside the computation gains anything
    apart: bool  # whether it has memory of its own besides the host's
    waits: bool  # whether looking at a number costs: results are looked at once a block then
    split: bool  # whether rows of a product have the bits that they have among others: then ranks may share them out
    together: int  # tokens of samples of one length that go through a block at once; they change the last bits of what it gives
    spread: int  # columns whose errors GPTQ spreads over those behind them at once, in another order of sums
    by_blocks: bool  # whether triangular systems are solved block by block, most of it as products
    checksummed: int  # values that are summed at a time
    searched: int  # weights whose group scales are searched at a time, by torch
    coded: int  # values of GGUF rows that are searched or coded at a time
    rounded: int  # values of GGUF rows whose scales are rounded at a time
    energy: int  # values of GGUF rows whose sums of squares are taken at a time
    swept: int  # weights that a sweep visits at a time
    refitted: int  # rows whose scales are solved for at a time, at most
    answered: int  # questions that are answered at once, at most; it moves the last bits of logits
    head_tokens: int  # tokens that take a slice of the output head at a time


POLICIES = {
    "cpu": Policy(
        threads=False,  # they would take cores and memory from the computation
        apart=False,
        waits=False,
        split=True,
        together=1,
        spread=128,
        by_blocks=False,
        checksummed=1 << 20,
        searched=1 << 18,
        coded=1 << 18,
        rounded=1 << 22,
        energy=1 << 20,
        swept=1 << 22,
        refitted=2048,
        answered=8,
        head_tokens=1024,
    ),
    "cuda": Policy(
        threads=True,
        apart=True,
        waits=True,
        split=False,  # cuBLAS chooses by the whole shape
        together=8192,
        spread=1024,
        by_blocks=True,
        checksummed=1 << 24,
        searched=1 << 24,
        coded=1 << 24,
        rounded=1 << 24,
        energy=1 << 24,
        swept=1 << 27,
        refitted=8192,
        answered=64,
        head_tokens=4096,
    ),
}


def policy(device: torch.device) -> Policy:
    """The sizes for a device; those of "cuda" for tensors that only have shapes ("meta")."""
    return POLICIES.get(device.type, POLICIES["cuda"])


def threads_help(device: torch.device) -> bool:
    """Whether threads beside the computation gain anything."""
    return policy(device).threads


def readers(device: torch.device) -> int:
    """Threads that read files for a device: one of them fills 1.2 GB of new memory a second. On a CPU they would only share its cores."""
    return min(READERS, cores()) if threads_help(device) else 1


def named(name: str | torch.device, option: str = "--device") -> torch.device:
    """The device that a user named: "auto", "cpu", "cuda", "cuda:1"; `option` is what the error calls it.

    Raises:
        UsageError: it is no device, or of a kind that qquant does not compute on.
        EnvironmentMissingError: there is no such CUDA device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{option} {name}: not a device; give cpu, cuda, cuda:1, or auto") from None
    if device.type not in POLICIES:
        raise UsageError(f"{option} {name}: qquant computes on {' and '.join(POLICIES)} only; give cpu, cuda, or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentMissingError(
            f"{option} {name}: this torch ({torch.__version__}) sees no {'such ' if torch.cuda.is_available() else ''}CUDA device. "
            f"Use {option} cpu"
        )
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that may be taken on a device without taking them from anybody: of the CPU, what the kernel says is available."""
    if device.type == "cuda":
        return _free_on_card(device)
    return host_memory()


def return_freed(device: torch.device) -> None:
    """Give the system back what was freed on a device that computes in the host's memory; for between two pieces of work.

    GNU's allocator keeps freed pieces below 32 MB, scattered among those in use. Returning them takes 5 ms and saves 0.1 to 0.2 GB of what
    a layer of 0.5B takes; having none (M_MMAP_THRESHOLD of 1 MB) saves as much again, and the build takes 13 % longer.
    """
    if not policy(device).apart and (trim := _malloc_trim()):
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """The function of GNU's allocator; None where there is another."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies a dtype quickly on this CPU: without instructions for bfloat16 it takes both kinds of 16 bits one by one."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def staging(size: int, device: torch.device) -> torch.Tensor:
    """Host memory uint8 [size] from which a GPU copies by itself, at eight times the pace of other memory."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def to_host(values: Mapping[str, torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that waits for contiguous copies of `values` in host memory, which a GPU makes while the caller goes on."""
    if not any(value.is_cuda for value in values.values()):
        copies = {name: value.cpu().contiguous() for name, value in values.items()}
        return lambda: copies
    copies = {name: torch.empty(value.shape, dtype=value.dtype, pin_memory=True) for name, value in values.items()}
    for name, value in values.items():
        copies[name].copy_(value, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> dict[str, torch.Tensor]:
        copied.synchronize()
        return copies

    return wait


def _free_on_card(device: torch.device) -> int:
    """What the card has left and torch holds in reserve, within the share of the card that this process was given."""
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    spare = torch.cuda.memory_reserved(device) - used
    share = torch.cuda.get_per_process_memory_fraction(torch.empty(0, device=device).device)  # which has a number
    return int(min(free + spare, share * total - used))


_sharing = 1  # processes of this command on this host


def share_host(processes: int) -> None:
    """Leave so many processes, of which this is one, an equal part of the host's free memory and cores each."""
    global _sharing
    _sharing = processes


def cores() -> int:
    """CPU cores that this process may use, at least 1."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, here // _sharing)


def host_memory() -> int:
    """Bytes of the host that may be taken by this process, as its kernel says."""
    return _available() // _sharing


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
