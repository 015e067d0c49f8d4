"""`qquant::gram`: accumulate the Gram matrix of a stage's inputs, H += X' X, in place.

Activations are 16 bit; the product of two is exact in float32, so the sums alone are rounded and nothing is gained by widening X
first. (The product of two bfloat16 matrices by itself comes back as bfloat16: 1.7e-3 off, which a Hessian does not survive.)
H is symmetric before and after. The order of the additions is fixed: rows of X in order within a tile of H, and one call after
the other, so results depend on the device but not on the run.

On CUDA a Triton kernel computes the tiles on and below the diagonal only, half the work of a full product, strip by strip of GROUP rows of
tiles, so that those at work at a time share what they read. `add_lower` leaves it at that, for `mirror` after many calls; `gram` writes each
tile twice. Float32 inputs are multiplied there by their halves (`qquant.kernels.product`); elsewhere chunks of rows are widened and handed to the BLAS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qquant.errors import InputError
from qquant.kernels.jit import AVAILABLE, INTERPRETED, blocks, jit, kernel, tl
from qquant.kernels.product import add_square

CHUNK = 2048  # rows widened at a time; and summed in the matrix unit, which cuts where its sums should round
GROUP = 8


@torch.library.custom_op("qquant::gram", mutates_args=("h",))
def gram(h: Tensor, x: Tensor) -> None:
    """Add x' x of x [T, K] (bf16, fp16 or fp32) to h float32 [K, K], symmetric.

    Raises:
        InputError: shapes or types that do not fit.
    """
    _check(h, x)
    reference(h, x)


@gram.register_fake
def _(h: Tensor, x: Tensor) -> None:
    return None


def _check(h: Tensor, x: Tensor) -> None:
    columns = x.shape[-1]
    if x.dim() != 2 or h.shape != (columns, columns) or h.dtype != torch.float32:
        raise InputError(f"gram adds x [T, K] to float32 [K, K], not {list(x.shape)} to {h.dtype} {list(h.shape)}")


def reference(h: Tensor, x: Tensor) -> None:
    """The Gram matrix by torch: the definition of `gram`."""
    for rows in x.split(CHUNK):
        as_float32 = rows.float()
        h.addmm_(as_float32.t(), as_float32)


@kernel("T")
def _kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    x_at: tl.tensor,
    h_at: tl.tensor,
    T: tl.tensor,
    K: tl.tensor,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    STRIP: tl.constexpr,
    STAGES: tl.constexpr,
    BOTH: tl.constexpr,  # write each tile above the diagonal, too
    WIDE: tl.constexpr,  # interpreter: multiply in float32
) -> None:
    p = tl.program_id(0)
    i = _triangular(p)  # row of the p-th tile on or below the diagonal, counted row by row
    first = i // STRIP * STRIP  # of the strip's rows, which has its tiles in the same places as a whole
    high = tl.minimum(STRIP, (K + SIDE - 1) // SIDE - first)
    q = p - first * (first + 1) // 2
    if q < first * high:  # left of the diagonal's square, column by column
        i = first + q % high
        j = q // high
    else:
        q -= first * high
        i = _triangular(q)
        j = first + q - i * (i + 1) // 2
        i += first
    a = i * SIDE + tl.arange(0, SIDE)
    b = j * SIDE + tl.arange(0, SIDE)
    t = tl.arange(0, DEPTH)
    inside = (a < K)[:, None] & (b < K)[None, :]
    below = h_at + a.to(tl.int64)[:, None] * K + b[None, :]
    for begin in range(0, T, ROWS):
        end = tl.minimum(begin + ROWS, T)
        row = (begin + t).to(tl.int64)[:, None] * K
        left_at = x_at + row + a[None, :]
        right_at = x_at + row + b[None, :]
        acc = tl.zeros((SIDE, SIDE), tl.float32)
        for start in tl.range(begin, end, DEPTH, num_stages=STAGES):
            there = (start + t < end)[:, None]
            left = tl.load(left_at, mask=there & (a < K)[None, :], other=0.0)
            right = tl.load(right_at, mask=there & (b < K)[None, :], other=0.0)
            left_at += DEPTH * K
            right_at += DEPTH * K
            if WIDE:
                acc += tl.dot(tl.trans(left.to(tl.float32)), right.to(tl.float32), input_precision="ieee")
            else:
                acc = tl.dot(tl.trans(left), right, acc)
        acc += tl.load(below, mask=inside, other=0.0)
        tl.store(below, acc, mask=inside)
    if BOTH and i != j:
        above = h_at + b.to(tl.int64)[:, None] * K + a[None, :]
        tl.store(above, tl.trans(tl.load(below, mask=inside, other=0.0)), mask=(b < K)[:, None] & (a < K)[None, :])


@jit
def _triangular(p: tl.tensor) -> tl.tensor:
    """The largest i with i (i + 1) / 2 <= p."""
    i = ((tl.sqrt(8.0 * p + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    return tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)


def launch(h: Tensor, x: Tensor, both: bool = True) -> None:
    """Run the kernel; arguments as of `gram`, contiguous, x of 16 bit. `both`: above the diagonal, too."""
    rows, columns = x.shape
    side = 128 if columns > 2048 else 64
    tiles = blocks(columns, side)
    _kernel[(tiles * (tiles + 1) // 2,)](
        x,
        h,
        rows,
        columns,
        SIDE=side,
        DEPTH=64,
        ROWS=CHUNK,
        STRIP=GROUP,
        STAGES=4,
        BOTH=both,
        WIDE=INTERPRETED,
        num_warps=8 if side == 128 else 4,
        num_stages=4,
        enable_fp_fusion=True,
    )


def add_lower(h: Tensor, x: Tensor) -> None:
    """`gram` of 16-bit x on a GPU in the part on and below the diagonal alone; what is above is worth nothing until it is mirrored."""
    _check(h, x)
    with torch.cuda.device_of(x):
        launch(h, x.contiguous(), both=False)


def _gram_cuda(h: Tensor, x: Tensor) -> None:
    _check(h, x)
    if x.dtype == torch.float32:
        add_square(h, x)
    elif not h.is_contiguous():
        reference(h, x)
    else:
        with torch.cuda.device_of(x):
            launch(h, x.contiguous())


if AVAILABLE:
    gram.register_kernel("cuda")(_gram_cuda)
