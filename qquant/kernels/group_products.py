"""`qquant::group_products`: the matrices of the least-squares problems for the scales of a linear's rows.

    A[n, i, g, j, h] = b_i,ng H_gh b_j,nh'        g, h: groups of `width` columns; i, j: bases

for every row n by itself, of bases b float32 [N, K] each (the codes minus their zero points; a K-quant has two bases) and H float32
[K, K], symmetric. `qquant.algorithms.descent` solves A s = b.

On the CPU a group of a basis is multiplied with all of H behind it, and the product with the other basis is summed group by group. On
CUDA such a product, N x K values for every group, would be written and read four times; the Triton kernel multiplies tiles
of a group and sums them where they are. Tensor cores multiply halves of 11 bits: with d_k powers of two near the roots of diag(H), so that
channels of all sizes keep their digits, b d = b1 + b2 and H_kl / (d_k d_l) = h1 + h2,

    b H = (b2 h1 + b1 h2 + b1 h1) d         the term that is left out is at most 2^-22 of the first

and codes up to 2048 (b2 = 0) are multiplied exactly. Groups of 256 are two of 128 each; widths that are no power of two from 16 to 256
are left to torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qquant.errors import InputError
from qquant.kernels.jit import AVAILABLE, INTERPRETED, blocks, kernel, tl
from qquant.kernels.product import product, split_matrix

WIDTHS = (16, 32, 64, 128)
TOP = 3  # the exponent of the largest d: codes below 2^12 times that, and H of about 1, fit into float16, which ends at 2^16
ROWS = 128
SPAN = 18  # exponents of d: what is smaller by more loses digits of no weight
PIECE = 1 << 26  # values that are halved at a time


@torch.library.custom_op("qquant::group_products", mutates_args=("system",))
def group_products(system: Tensor, bases: Sequence[Tensor], h: Tensor, width: int) -> None:
    """Fill A, float32 [N, bases, K / width, bases, K / width].

    Raises:
        InputError: shapes or types that do not fit.
    """
    _check(system, bases, h, width)
    reference(system, bases, h, width)


@group_products.register_fake
def _(system: Tensor, bases: Sequence[Tensor], h: Tensor, width: int) -> None:
    return None


def _check(system: Tensor, bases: Sequence[Tensor], h: Tensor, width: int) -> None:
    columns = h.shape[-1]
    groups = columns // width
    wanted = {(len(system), columns)}
    fits = {tuple(basis.shape) for basis in bases} == wanted and h.shape == (columns, columns)
    fits = fits and columns == groups * width and system.shape[1:] == (len(bases), groups, len(bases), groups)
    if not fits or {x.dtype for x in (system, h, *bases)} != {torch.float32}:
        raise InputError(
            f"group_products takes float32 bases [N, K], [K, K] and [N, B, G, B, G] for groups of {width}, not "
            f"{', '.join(f'{x.dtype} {list(x.shape)}' for x in (*bases, h, system))}"
        )


def reference(system: Tensor, bases: Sequence[Tensor], h: Tensor, width: int) -> None:
    """The definition of `group_products`, by torch."""
    split = split_matrix(h)
    for group in range(h.shape[1] // width):
        inside, rest = slice(group * width, (group + 1) * width), slice(group * width, None)
        block = split.part(inside, rest)
        for row, basis in enumerate(bases):
            spread = product(basis[:, inside], block)
            for other, against in enumerate(bases):
                sums = (spread * against[:, rest]).view(len(basis), -1, width).sum(-1)
                system[:, row, group, other, group:] = sums
                system[:, other, group:, row, group] = sums


@kernel("N")
def _kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    q_at: tl.tensor,
    r_at: tl.tensor,
    upper_at: tl.tensor,
    lower_at: tl.tensor,
    d_at: tl.tensor,
    unit_at: tl.tensor,
    out_at: tl.tensor,  # A of q and r
    mirrored_at: tl.tensor,  # A of r and q
    N: tl.tensor,
    K: tl.tensor,
    out_row: tl.tensor,  # values from one row to the next, and from one group
    out_group: tl.tensor,
    W: tl.constexpr,
    BR: tl.constexpr,
    WIDE: tl.constexpr,  # interpreter: multiply in float32
) -> None:
    g = tl.program_id(1)  # those with most to do begin first
    n = tl.program_id(0) * BR + tl.arange(0, BR)
    row = tl.minimum(n, N - 1).to(tl.int64)
    w = tl.arange(0, W)
    unit = tl.load(unit_at)
    q = tl.load(q_at + (row * K)[:, None] + (g * W + w)[None, :]) * tl.load(d_at + g * W + w)[None, :]
    q1 = q.to(tl.float16)
    q2 = (q - q1.to(tl.float32)).to(tl.float16)
    h_at = (g * W + w).to(tl.int64)[:, None] * K + w[None, :]
    out_at += row * out_row
    mirrored_at += row * out_row
    for h in range(g, K // W):
        upper = tl.load(upper_at + h_at + h * W)
        lower = tl.load(lower_at + h_at + h * W)
        if WIDE:
            spread = tl.dot(q2.to(tl.float32), upper.to(tl.float32), input_precision="ieee")
            spread += tl.dot(q1.to(tl.float32), lower.to(tl.float32), input_precision="ieee")
            spread += tl.dot(q1.to(tl.float32), upper.to(tl.float32), input_precision="ieee")
        else:
            spread = tl.dot(q2, upper)
            spread = tl.dot(q1, lower, spread)
            spread = tl.dot(q1, upper, spread)
        r = tl.load(r_at + (row * K)[:, None] + (h * W + w)[None, :]) * tl.load(d_at + h * W + w)[None, :]
        sums = tl.sum(spread * r, 1) * unit
        tl.store(out_at + g * out_group + h, sums, mask=n < N)
        tl.store(mirrored_at + h * out_group + g, sums, mask=n < N)


def halves(h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h1, h2, d / c, c^2) of the head of this file, c the power of two that makes the largest d / c 2^TOP: float16 [K, K] each, float32 [K] and [1].

    H is positive semidefinite. Nobody waits for the device.
    """
    upper, lower = (torch.empty(h.shape, dtype=torch.float16, device=h.device) for _ in range(2))
    exponent = torch.frexp(h.diagonal())[1].div(2, rounding_mode="floor")
    exponent = torch.maximum(exponent, exponent.max() - SPAN)
    step = max(1, PIECE // h.shape[1])
    for rows, own, first, second in zip(*(x.split(step) for x in (h, exponent, upper, lower)), strict=True):
        scaled = torch.ldexp(torch.ldexp(rows, -own.unsqueeze(1)), -exponent)
        first.copy_(scaled)
        second.copy_(scaled.sub_(first))
    lift = TOP - exponent.max()
    d = torch.ldexp(torch.ones_like(exponent, dtype=h.dtype), exponent + lift)
    return upper, lower, d, torch.ldexp(h.new_ones(1), -2 * lift.view(1))


def launch(system: Tensor, bases: Sequence[Tensor], h: Tensor, width: int) -> None:
    """Run the kernel; arguments as of `group_products`, contiguous."""
    rows, columns = bases[0].shape
    split = halves(h)
    for i, q in enumerate(bases):
        for j, r in enumerate(bases):
            out, mirrored = system[:, i, :, j], system[:, j, :, i]
            _kernel[(blocks(rows, ROWS), columns // width)](
                q,
                r,
                *split,
                out,
                mirrored,
                rows,
                columns,
                *out.stride()[:2],
                W=width,
                BR=ROWS,
                WIDE=INTERPRETED,
                num_warps=8,
                num_stages=2,
            )


def _group_products_cuda(system: Tensor, bases: Sequence[Tensor], h: Tensor, width: int) -> None:
    _check(system, bases, h, width)
    bases, (rows, count, groups, *_) = [basis.contiguous() for basis in bases], system.shape
    with torch.cuda.device_of(system):
        if width in WIDTHS and system.is_contiguous():
            launch(system, bases, h.contiguous(), width)
        elif width == 2 * WIDTHS[-1]:
            parts = system.new_empty(rows, count, 2 * groups, count, 2 * groups)
            launch(parts, bases, h.contiguous(), WIDTHS[-1])
            system.copy_(parts.view(rows, count, groups, 2, count, groups, 2).sum((3, 6)))
        else:
            reference(system, bases, h, width)


if AVAILABLE:
    group_products.register_kernel("cuda")(_group_products_cuda)
