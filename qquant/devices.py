"""What differs between the kinds of devices that qquant computes on, in one table; nothing else asks for a kind to choose a size.

    cpu     pieces that stay in the caches, one thread of work, the inputs of blocks in files: memory of one layer
    cuda    pieces that fill the card, reading and writing beside the computation

`named` turns what a user typed into a device. Others (mps, xpu) are refused there by name: no size was measured for them, and sums in
another order would give artifacts whose bytes nobody can repeat.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qquant.errors import EnvironmentMissingError, UsageError
from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class Policy:
    """Sizes of work on one kind of device. None of them changes a result."""

    threads: bool  # whether reading, hashing and writing beside the computation gains anything
    waits: bool  # whether looking at a number costs: results are looked at once a block then
    checksummed: int  # values that are summed at a time
    searched: int  # weights whose group scales are searched at a time, by torch
    coded: int  # values of GGUF rows that are searched or coded at a time
    rounded: int  # values of GGUF rows whose scales are rounded at a time
    energy: int  # values of GGUF rows whose sums of squares are taken at a time
    swept: int  # weights that a sweep visits at a time
    refitted: int  # rows whose scales are solved for at a time, at most
    head_tokens: int  # tokens that take a slice of the output head at a time


POLICIES = {
    "cpu": Policy(
        threads=False,  # they would take cores and memory from the computation
        waits=False,
        checksummed=1 << 20,
        searched=1 << 18,
        coded=1 << 18,
        rounded=1 << 22,
        energy=1 << 20,
        swept=1 << 22,
        refitted=2048,
        head_tokens=1024,
    ),
    "cuda": Policy(
        threads=True,
        waits=True,
        checksummed=1 << 24,
        searched=1 << 24,
        coded=1 << 24,
        rounded=1 << 24,
        energy=1 << 24,
        swept=1 << 27,
        refitted=8192,
        head_tokens=4096,
    ),
}


def policy(device: torch.device) -> Policy:
    """The sizes for a device; those of "cuda" for tensors that only have shapes ("meta")."""
    return POLICIES.get(device.type, POLICIES["cuda"])


def threads_help(device: torch.device) -> bool:
    """Whether threads beside the computation gain anything."""
    return policy(device).threads


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
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return host_memory()


_sharing = 1  # processes of this command on this host


def share_host(processes: int) -> None:
    """Leave so many processes, of which this is one, an equal part of the host's free memory each."""
    global _sharing
    _sharing = processes


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
