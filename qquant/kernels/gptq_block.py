"""`qquant::gptq_block`: the column loop of GPTQ over one block of columns.

U is the upper Cholesky factor of the inverse Hessian (its diagonal block here), step and offset give every column's grid, fixed
before the loop starts. For the columns j of the block, in order, and for every row at once:

    code_j  = clamp(round((w_j + offset_j) / step_j), 0, levels - 1)       ties to even; 0 where step_j is 0
    value_j = step_j * code_j - offset_j
    error_j = (w_j - value_j) / U_jj
    w_i    -= error_j * U_ji                                               for i > j, inside the block

The caller spreads the block's errors over the columns behind it with one matrix product, W -= error @ U[block, behind].
Reference: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1; rows are independent, so any number of stacked matrices with
the same input is one call.

On the CPU (and wherever Triton is missing) the columns are rows of a transposed copy, so that a step works on contiguous memory,
and the updates beyond the next 16 columns wait until one BLAS call makes them all. The Triton kernel keeps a few rows of the block in the
registers of one warp, and the next columns (a strip of 4 or 8) once more by themselves: a column is found there by a sum over the strip, and only
what the strip needs of an error stands in the chain from one column to the next, with U's row fetched a column ahead. Every value has the
updates of one column after the other, in their order. Both carry w + offset instead of w, so that a step is
code = round(v / step), error = (v - step * code) / U_jj. It takes MAX_COLUMNS at a time; what they leave for the columns after them is one product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from qquant.kernels.jit import AVAILABLE, blocks, jit, kernel, tl

MAX_COLUMNS = 128  # of a launch
STRIP = 16  # columns updated one by one before BLAS updates the rest, on the CPU
FEW = (8, 4)  # rows of a program and columns of its strip, where all programs run at once
MANY = (16, 8)  # the same, where there are more rows than that
CROWD = 6144  # rows from which on there are


@torch.library.custom_op("qquant::gptq_block", mutates_args=())
def gptq_block(w: Tensor, u: Tensor, step: Tensor, offset: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, B] and errors float32 [N, B] of w [N, B], u [B, B], step and offset [N, B], all float32."""
    return reference(w, u, step, offset, levels)


@gptq_block.register_fake
def _(w: Tensor, u: Tensor, step: Tensor, offset: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape, dtype=torch.uint8), w.new_empty(w.shape)


def reference(w: Tensor, u: Tensor, step: Tensor, offset: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The loop by torch: the definition of `gptq_block`."""
    columns = w.shape[1]
    zero_step = step == 0
    degenerate = zero_step.t().contiguous() if bool(zero_step.any()) else None
    work = (w + offset).t().contiguous()
    steps = torch.where(zero_step, torch.ones_like(step), step).t().contiguous()
    codes, errors = torch.empty_like(work), torch.empty_like(work)  # errors: before the division by U_jj
    spread = u / u.diagonal().unsqueeze(1)
    each = zip(*(x.unbind() for x in (work, steps, codes, errors)), strict=True)
    for start in range(0, columns, STRIP):
        end = min(start + STRIP, columns)
        strip, factors = work[start:end], spread[start:end, start:end]
        for j, (value, one, code, error) in enumerate(islice(each, end - start)):
            torch.div(value, one, out=code).round_().clamp_(0, levels - 1)
            if degenerate is not None:
                code.masked_fill_(degenerate[start + j], 0)
            torch.addcmul(value, one, code, value=-1, out=error)
            if start + j + 1 < end:
                strip[j + 1 :].addr_(factors[j, j + 1 :], error, alpha=-1)
        if end < columns:
            work[end:].addmm_(spread[start:end, end:].t(), errors[start:end], alpha=-1)
    errors /= u.diagonal().unsqueeze(1)
    return codes.t().to(torch.uint8, memory_format=torch.contiguous_format), errors.t().contiguous()


@jit
def _quantize(column: tl.tensor, step: tl.tensor, TOP: tl.constexpr) -> tl.tensor:
    level = tl.where(step == 0.0, 0.0, column / tl.where(step == 0.0, 1.0, step))
    level = tl.minimum(tl.maximum(level, 0.0), TOP)
    return (level + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum keeps no fraction; ties to even


@kernel("N")
def _kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    w_at: tl.tensor,
    u_at: tl.tensor,
    step_at: tl.tensor,
    offset_at: tl.tensor,
    codes_at: tl.tensor,
    errors_at: tl.tensor,
    w_row: tl.tensor,  # values from one row to the next, here and below
    u_row_length: tl.tensor,
    step_row: tl.tensor,
    offset_row: tl.tensor,
    codes_row: tl.tensor,
    errors_row: tl.tensor,
    N: tl.tensor,
    TOP: tl.constexpr,  # the last level
    B: tl.constexpr,
    WIDTH: tl.constexpr,  # B, or the next power of two
    BR: tl.constexpr,
    STRIP: tl.constexpr,  # of B
) -> None:
    n = tl.program_id(0) * BR + tl.arange(0, BR)
    row = tl.minimum(n, N - 1).to(tl.int64)
    c = tl.arange(0, WIDTH)
    s = tl.arange(0, STRIP)
    v = tl.load(w_at + (row * w_row)[:, None] + c[None, :], mask=(c < B)[None, :], other=0.0)
    v += tl.load(offset_at + (row * offset_row)[:, None] + c[None, :], mask=(c < B)[None, :], other=0.0)
    step_at += row * step_row
    strips = tl.arange(0, WIDTH // STRIP)[None, :, None]
    u_row = tl.load(u_at + c, mask=c < B, other=0.0)
    u_strip = tl.load(u_at + s)
    pivot = tl.load(u_at)
    steps = tl.load(step_at[:, None] + s[None, :])
    for start in range(0, B, STRIP):
        after = tl.minimum(start + STRIP, B - STRIP)  # the next strip, whose values are fetched before they are needed
        strip = tl.sum(tl.where(strips == start // STRIP, tl.reshape(v, (BR, WIDTH // STRIP, STRIP)), 0.0), 1)
        codes = tl.zeros((BR, STRIP), tl.float32)
        next_steps = tl.load(step_at[:, None] + (after + s)[None, :])
        for k in tl.static_range(STRIP):
            j = tl.minimum(start + k + 1, B - 1)
            next_row = tl.load(u_at + j * u_row_length + c, mask=c < B, other=0.0)
            next_strip = tl.load(u_at + j * u_row_length + (start if k + 1 < STRIP else after) + s)
            next_pivot = tl.load(u_at + j * (u_row_length + 1))
            here = (s == k)[None, :]
            column = tl.sum(tl.where(here, strip, 0.0), 1)
            step = tl.sum(tl.where(here, steps, 0.0), 1)
            code = _quantize(column, step, TOP)
            error = (column - step * code) / pivot
            left = strip - error[:, None] * tl.where(s > k, u_strip, 0.0)[None, :]
            strip = tl.where(here, error[:, None], left)
            codes = tl.where(here, code[:, None], codes)
            v = v - error[:, None] * u_row[None, :]
            u_row, u_strip, pivot = next_row, next_strip, next_pivot
        inside = (n < N)[:, None]
        tl.store(errors_at + (row * errors_row)[:, None] + (start + s)[None, :], strip, mask=inside)
        tl.store(codes_at + (row * codes_row)[:, None] + (start + s)[None, :], codes.to(tl.uint8), mask=inside)
        steps = next_steps


def launch(
    w: Tensor, u: Tensor, step: Tensor, offset: Tensor, levels: int, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as of `gptq_block`, of which rows are contiguous. `out`: where codes and errors go."""
    rows, columns = w.shape
    codes, errors = out or (w.new_empty(w.shape, dtype=torch.uint8), w.new_empty(w.shape))
    width = max(16, 1 << (columns - 1).bit_length())
    together, strip = FEW if rows < CROWD else MANY
    _kernel[(blocks(rows, together),)](
        w,
        u,
        step,
        offset,
        codes,
        errors,
        w.stride(0),
        u.stride(0),
        step.stride(0),
        offset.stride(0),
        codes.stride(0),
        errors.stride(0),
        rows,
        TOP=levels - 1,
        B=columns,
        WIDTH=width,
        BR=together,
        STRIP=math.gcd(strip, columns),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return codes, errors


def in_strips(
    work: Callable[[Tensor, Tensor, Tensor, Tensor, int, tuple[Tensor, Tensor]], object],
    w: Tensor,
    u: Tensor,
    step: Tensor,
    offset: Tensor,
    levels: int,
) -> tuple[Tensor, Tensor]:
    """`gptq_block` by `work`, which takes no more than MAX_COLUMNS."""
    columns = w.shape[1]
    u, step, offset = (x if x.stride(1) == 1 else x.contiguous() for x in (u, step, offset))
    left = w.clone(memory_format=torch.contiguous_format) if columns > MAX_COLUMNS or w.stride(1) != 1 else w
    codes, errors = w.new_empty(w.shape, dtype=torch.uint8), w.new_empty(w.shape)
    for start in range(0, columns, MAX_COLUMNS):
        stop = min(start + MAX_COLUMNS, columns)
        some = slice(start, stop)
        into = codes[:, some], errors[:, some]
        work(left[:, some], u[some, some], step[:, some], offset[:, some], levels, into)
        if stop < columns:
            left[:, stop:].addmm_(into[1], u[some, stop:], alpha=-1)
    return codes, errors


def _gptq_block_cuda(w: Tensor, u: Tensor, step: Tensor, offset: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(w):
        return in_strips(launch, w, u, step, offset, levels)


if AVAILABLE:
    gptq_block.register_kernel("cuda")(_gptq_block_cuda)
