"""`qquant::column_sums`: what AWQ and importance matrices need of a stage's inputs, in one pass over X.

    sum_t |x_tk|,  sum_t x_tk^2  float32 [K],  and the largest |x|, NaN where X holds NaN

On CUDA a Triton kernel reads X once; each program sums PART rows of SIDE columns, and its sums are added up afterwards, in a fixed order.
In torch it takes seven passes, which together cost a block of calibration as much as its matrix products. Elsewhere torch it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qquant.errors import InputError
from qquant.kernels.jit import AVAILABLE, blocks, kernel, tl

SIDE = 64  # columns of a program
PART = 256  # rows of a program
DEPTH = 32  # rows of it at a time


@torch.library.custom_op("qquant::column_sums", mutates_args=())
def column_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of |x| and of x^2 by column, float32 [K], and the largest |x|, float32 [], for x [T, K] of any float dtype, T > 0.

    Raises:
        InputError: x is not a matrix with rows.
    """
    _check(x)
    return reference(x)


@column_sums.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    empty = x.new_empty(x.shape[1], dtype=torch.float32)
    return empty, empty.clone(), x.new_empty((), dtype=torch.float32)


def _check(x: Tensor) -> None:
    if x.dim() != 2 or len(x) == 0:
        raise InputError(f"column_sums takes x [T, K] with T > 0, not {list(x.shape)}")


def reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`column_sums` in torch."""
    as_float32 = x.float()
    magnitude = as_float32.abs()
    return magnitude.sum(0), as_float32.square().sum(0), magnitude.max()


@kernel("T")
def _kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    x_at: tl.tensor,
    absolute_at: tl.tensor,
    squares_at: tl.tensor,
    largest_at: tl.tensor,
    T: tl.tensor,
    K: tl.tensor,
    SIDE: tl.constexpr,
    PART: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    k = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    part = tl.program_id(1)
    absolute = tl.zeros((DEPTH, SIDE), tl.float32)
    squares = tl.zeros((DEPTH, SIDE), tl.float32)
    largest = tl.zeros((DEPTH, SIDE), tl.float32)
    for start in range(0, PART, DEPTH):
        t = part * PART + start + tl.arange(0, DEPTH)
        there = (t < T)[:, None] & (k < K)[None, :]
        x = tl.load(x_at + t.to(tl.int64)[:, None] * K + k[None, :], mask=there, other=0.0).to(tl.float32)
        magnitude = tl.abs(x)
        absolute += magnitude
        squares += x * x
        largest = tl.maximum(largest, magnitude)
    out = part.to(tl.int64) * K + k
    tl.store(absolute_at + out, tl.sum(absolute, 0), mask=k < K)
    tl.store(squares_at + out, tl.sum(squares, 0), mask=k < K)
    tl.store(largest_at + out, tl.max(largest, 0), mask=k < K)


def launch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel on contiguous x; its parts added up."""
    rows, columns = x.shape
    parts = blocks(rows, PART)
    absolute = torch.empty((parts, columns), dtype=torch.float32, device=x.device)
    squares, largest = torch.empty_like(absolute), torch.empty_like(absolute)
    _kernel[(blocks(columns, SIDE), parts)](
        x, absolute, squares, largest, rows, columns, SIDE=SIDE, PART=PART, DEPTH=DEPTH, num_warps=4
    )
    total = absolute.sum(0)
    # The largest of numbers and NaN is a number in the kernel; their sum is not.
    return total, squares.sum(0), torch.where(total.isnan().any(), torch.nan, largest.max())


def _column_sums_cuda(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(x)
    with torch.cuda.device_of(x):
        return launch(x.contiguous())


if AVAILABLE:
    column_sums.register_kernel("cuda")(_column_sums_cuda)
