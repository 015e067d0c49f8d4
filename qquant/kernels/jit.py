"""The door to Triton, which comes with CUDA builds of torch and not with CPU builds.

Every operator of this folder is a `torch.library` operator whose default is plain torch, right on any device; its Triton
kernel stands beside it and is registered for CUDA where Triton is installed. So this folder imports and works without
Triton, and `path` says which of the two runs.

Under `TRITON_INTERPRET=1` Triton runs kernels on CPU tensors, one program after another. What it cannot do there (bf16
arithmetic, inline assembly) each kernel avoids by a constexpr switch; INTERPRETED says which world this process is in.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qquant.errors import UsageError

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None
    tl = gdc = TensorDescriptor = None

__all__ = [
    "AVAILABLE",
    "INTERPRETED",
    "TensorDescriptor",
    "blocks",
    "capability",
    "gdc",
    "jit",
    "kernel",
    "path",
    "starts_early",
    "tl",
]

AVAILABLE: bool = triton is not None
INTERPRETED: bool = AVAILABLE and bool(triton.knobs.runtime.interpret)
ON_CUDA = {
    "wq_mm": "triton",
    "many_rows": "triton",
    "dequant": "triton",
    "gptq_block": "triton",
    "group_search": "triton (torch for Gram blocks and groups of more than 256 columns)",
    "group_products": "triton (torch for other widths than 16 to 256)",
    "gram": "triton (torch for float32 inputs)",
    "column_sums": "triton",
}


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` for device functions; the bare function, never to be called, where Triton is missing."""
    return triton.jit(function) if AVAILABLE else function


def kernel(*sizes: str) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` for kernels whose integer arguments `sizes` are not worth a compilation for every special value."""
    return triton.jit(do_not_specialize=list(sizes)) if AVAILABLE else lambda function: function


TABLE = Path(__file__).with_name("table.json")  # launch choices that were measured, and whether with early starts
early: bool | None = None  # whether kernels may start early; None: as the table was measured


@functools.lru_cache
def _measured_early() -> bool:
    return bool(json.loads(TABLE.read_text())["early"])


def starts_early(device: torch.device) -> bool:
    """Whether kernels of this device may start before the one before them is done, and wait where they need its results.

    Hopper and later can (programmatic dependent launch); in a captured graph the start of one kernel then hides behind the end
    of another.
    """
    wanted = _measured_early() if early is None else early
    return wanted and device.type == "cuda" and torch.version.hip is None and capability(device) >= (9, 0)


@functools.lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def blocks(size: int, block: int) -> int:
    """Programs of `block` elements that cover `size`."""
    return -(-size // block)


def kept_in(device: torch.device) -> Path | None:
    """The folder where compiled kernels of a device are kept for later processes; None where none are compiled."""
    return Path(triton.knobs.cache.dir) if AVAILABLE and device.type == "cuda" else None


def kept(folder: Path) -> frozenset[str]:
    """The names of the compiled kernels in such a folder."""
    return frozenset(path.parent.name for path in folder.glob("*/*.cubin"))


def path(op: str, device: torch.device | str) -> str:
    """The name of the implementation of operator `op` that runs for tensors on `device`.

    Raises:
        UsageError: no such operator.
    """
    if op not in ON_CUDA:
        raise UsageError(f"no operator {op!r}; there are {', '.join(ON_CUDA)}")
    return ON_CUDA[op] if AVAILABLE and torch.device(device).type == "cuda" else "torch reference"
