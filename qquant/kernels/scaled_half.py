"""Products of float32 activations in float16, each row by a power of two of its own: `half_rows`, `scaled_product`.

A float16 number has 11 bits, three more than bfloat16, and is multiplied as fast on a GPU; but it ends at 65504, and below 2^-14 it loses bits.
Divided by a power of two that brings its largest value to between 2^14 and 2^15, a row of any size fits: what it loses is 2^-11 of each value,
and of those that are 2^-28 of the largest or less.

    x = s h       s 2^k by row, h float16 [K]           x w' = s (h g') r    for w = r g by its rows

So a pass costs what one in bfloat16 costs, with an eighth of its rounding. Three products of bfloat16 halves (2^-16) took 2.5 times as long,
for int8 artifacts of the same KL divergence (tests/bench/LOG.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qquant.kernels.jit import AVAILABLE, blocks, kernel, tl

TOP = 14  # exponent that the largest value of a row gets
LEAST = (
    TOP - 126
)  # of a row's largest value, where it keeps its own: float32 has no smaller power of two with all its bits
BLOCK = 4096  # values of a row that are converted at a time
WIDTH = 1024  # and of a product that are scaled


class HalfRows(NamedTuple):
    """A float32 matrix [..., K] as float16 and powers of two."""

    values: Tensor  # float16 [..., K]
    scale: Tensor  # float32 [..., 1]


def half_rows(x: Tensor) -> HalfRows:
    """Float32 x [..., K]; what is not finite stays so."""
    flat = x.flatten(0, -2).contiguous()
    if AVAILABLE and x.is_cuda:
        values = torch.empty(flat.shape, dtype=torch.float16, device=x.device)
        scale = torch.empty(len(flat), 1, device=x.device)
        with torch.cuda.device_of(x):
            launch_rows(flat, values, scale)
    else:
        top = flat.abs().amax(1, keepdim=True)
        exponent = torch.where(top > 0, torch.frexp(top).exponent - 1, LEAST).clamp(min=LEAST)
        scale = torch.ldexp(torch.ones_like(top), exponent - TOP)
        values = (flat / scale).half()
    return HalfRows(values.view(x.shape), scale.view(*x.shape[:-1], 1))


def scaled_product(x: HalfRows, weight: HalfRows, bias: Tensor | None) -> Tensor:
    """Float32 [..., N] of x [..., K] and weight [N, K], and bias float32 [N]."""
    flat, shape = x.values.flatten(0, -2), x.values.shape[:-1]
    if AVAILABLE and flat.is_cuda:
        y = torch.mm(flat, weight.values.T, out_dtype=torch.float32)
        with torch.cuda.device_of(y):
            launch_scaled(y, x.scale, weight.scale, bias)
    else:
        y = (flat.float() @ weight.values.float().T) * x.scale.view(-1, 1) * weight.scale.view(1, -1)
        y = y if bias is None else y + bias
    return y.view(*shape, -1)


@kernel()
def _rows_kernel(
    x_at: tl.tensor, values_at: tl.tensor, scale_at: tl.tensor, K: tl.tensor, BLOCK: tl.constexpr, TOP: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        top = tl.maximum(top, tl.abs(tl.load(x_at + row * K + start + k, mask=start + k < K, other=0.0)))
    bits = tl.max(top, 0).to(tl.int32, bitcast=True)
    exponent = tl.maximum((bits >> 23) & 255, TOP + 1) - TOP  # with the bias of float32
    tl.store(scale_at + row, (exponent << 23).to(tl.float32, bitcast=True))
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    for start in range(0, K, BLOCK):
        x = tl.load(x_at + row * K + start + k, mask=start + k < K, other=0.0)
        tl.store(values_at + row * K + start + k, (x * inverse).to(tl.float16), mask=start + k < K)


def launch_rows(x: Tensor, values: Tensor, scale: Tensor) -> None:
    """Run the kernel: x [M, K], values [M, K] and scale [M, 1], contiguous."""
    rows, columns = x.shape
    block = min(BLOCK, max(32, 1 << (columns - 1).bit_length()))
    _rows_kernel[(rows,)](x, values, scale, columns, BLOCK=block, TOP=TOP, num_warps=max(1, min(8, block // 256)))


@kernel()
def _scaled_kernel(
    y_at: tl.tensor,
    row_at: tl.tensor,
    column_at: tl.tensor,
    bias_at: tl.tensor,
    N: tl.tensor,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    y = tl.load(y_at + row * N + n, mask=n < N)
    y = y * tl.load(row_at + row) * tl.load(column_at + n, mask=n < N)
    if BIAS:
        y += tl.load(bias_at + n, mask=n < N)
    tl.store(y_at + row * N + n, y, mask=n < N)


def launch_scaled(y: Tensor, row: Tensor, column: Tensor, bias: Tensor | None) -> None:
    """Run the kernel: y [M, N] times row [M, 1] and column [N, 1], and bias [N], in place; all contiguous."""
    rows, columns = y.shape
    width = min(WIDTH, max(32, 1 << (columns - 1).bit_length()))
    _scaled_kernel[(rows, blocks(columns, width))](
        y,
        row,
        column,
        column if bias is None else bias.contiguous(),
        columns,
        WIDTH=width,
        BIAS=bias is not None,
        num_warps=max(1, width // 256),
    )
