"""Products of float32 matrices, on a GPU by its tensor cores.

A tensor core multiplies TF32: float32 with 10 of its 23 bits after the point. A float32 x is h + l, h with the upper 10 of these bits
(a mask), l = x - h (exact), and

    a b = ah bh + (al bh + ah bl) + al bl        the last term, at most 2^-20 of the first, is left out

The two in brackets are 2^-10 of the first, so their factors may be bfloat16, which is multiplied twice as fast: 2^-17 of the sum of all
magnitudes at worst, where sums of thousands of float32 terms are off by about as much. Together they take a third of the time of a product that is
multiplied in float32 (51 TFLOP/s on an H200; TF32 some 300, bfloat16 700). TF32 alone, whose factors are off by 2^-11 at random, does
for sums of squares that are compared or reported and for corrections that are damped anyway, not for slopes that a nearly singular
matrix is divided into. Ootomo and Yokota 2022 (arXiv 2203.03341).

Sums over tokens of bfloat16 numbers lose nothing where each product is exact in float32 and added up there: `add_products`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qquant.kernels.jit import AVAILABLE, blocks, kernel, tl

PIECE = 1 << 22  # values that are halved at a time, by torch
STRIP = 1 << 12  # rows of a symmetric product at a time
ROWS = 1 << 11  # of a square's factor, whose halves are in memory at a time
UPPER = -(1 << 13)  # of a float32's bits: sign, exponent, 10 bits after the point


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Have products of float32 on a GPU be of TF32 within it: one product, not three."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def add_products(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Total [N, K] + a' b of a [T, N] and b [T, K], float32; on a GPU 16-bit factors are multiplied as they are."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)
        return total
    with tensor_cores():
        return total.addmm_(a.float().T, b.float())


class Halves(NamedTuple):
    """A matrix in the parts that are multiplied."""

    upper: Tensor  # h, float32
    upper16: Tensor  # h, bfloat16
    lower16: Tensor  # l, bfloat16


@dataclass(frozen=True)
class SplitMatrix:
    """A matrix that is multiplied with: as it is or, on a GPU, its halves."""

    matrix: Tensor | None  # None: its halves are there
    halves: Halves | None = None

    def part(self, rows: slice, columns: slice) -> SplitMatrix:
        """Some of its rows and columns."""
        if self.halves is None:
            return SplitMatrix(self.values()[rows, columns])
        return SplitMatrix(None, Halves(*(x[rows, columns] for x in self.halves)))

    def values(self) -> Tensor:
        """The matrix where it is as it is."""
        assert self.matrix is not None
        return self.matrix


def split_matrix(matrix: Tensor) -> SplitMatrix:
    """`matrix` as the second factor of products; it stays as it is."""
    return SplitMatrix(None, halves(matrix)) if matrix.is_cuda else SplitMatrix(matrix)


def split_in_place(matrix: Tensor) -> SplitMatrix:
    """A contiguous matrix that is used up as the second factor of products: two of them in memory, not three."""
    return SplitMatrix(None, halves(matrix, matrix)) if matrix.is_cuda else SplitMatrix(matrix)


def product(a: Tensor, b: SplitMatrix) -> Tensor:
    """The product of float32 [..., M, K] and [K, N], about as precise as float32 is."""
    if b.halves is None:
        return a @ b.values()
    return multiplied(halves(a.flatten(0, -2)), b.halves).view(*a.shape[:-1], -1)


def product_using_up(a: Tensor, b: SplitMatrix) -> Tensor:
    """The product of float32 [..., M, K] and [K, N] with an `a` that is contiguous and used up: less in memory by as much."""
    if b.halves is None:
        return a @ b.values()
    flat = a.flatten(0, -2)
    return multiplied(halves(flat, flat), b.halves).view(*a.shape[:-1], -1)


def add_square(total: Tensor, x: Tensor) -> None:
    """Total [K, K] += x' x of x [T, K], float32, as precise; `total` is symmetric before and after."""
    add_lower_square(total, x)
    mirror(total)


def add_lower_square(total: Tensor, x: Tensor) -> None:
    """`add_square` in strips on and below the diagonal alone; what is above is worth nothing until it is `mirror`ed."""
    for rows in x.split(ROWS):
        split = halves(rows)
        for span in _strips(len(total)):
            left = Halves(*(half[:, span].T for half in split))
            right = Halves(*(half[:, : span.stop] for half in split))
            strip = total[span, : span.stop]
            with tensor_cores():
                strip.addmm_(left.upper, right.upper)
            _add_lower(strip, left, right, 1)


def mirror(total: Tensor) -> None:
    """Put what is below the diagonal of [K, K] above it, too."""
    for span in _strips(len(total)):
        square = total[span, span]
        square.copy_(square.tril() + square.tril(-1).T)
        total[: span.start, span] = total[span, : span.start].T


def _strips(columns: int) -> list[slice]:
    return [slice(start, min(start + STRIP, columns)) for start in range(0, columns, STRIP)]


def add_product(total: Tensor, a: Tensor, b: SplitMatrix, beta: float = 1, alpha: float = 1) -> Tensor:
    """Beta total + alpha a b of float32 [M, N], [M, K] and [K, N], as precise; a new tensor."""
    if b.halves is None:
        return torch.addmm(total, a, b.values(), beta=beta, alpha=alpha)
    split = halves(a)
    with tensor_cores():
        sums = torch.addmm(total, split.upper, b.halves.upper, beta=beta, alpha=alpha)
    _add_lower(sums, split, b.halves, alpha)
    return sums


def add_product_to(total: Tensor, a: Tensor, b: SplitMatrix, alpha: float = 1) -> None:
    """Total += alpha a b, in place, as precise."""
    if b.halves is None:
        total.addmm_(a, b.values(), alpha=alpha)
        return
    split = halves(a)
    with tensor_cores():
        total.addmm_(split.upper, b.halves.upper, alpha=alpha)
    _add_lower(total, split, b.halves, alpha)


def multiplied(a: Halves, b: Halves) -> Tensor:
    """The product of [M, K] and [K, N] by the formula at the head of this file."""
    return _multiply(a, b, torch.empty(len(a.upper), b.upper.shape[1], device=a.upper.device))


def _multiply(a: Halves, b: Halves, into: Tensor) -> Tensor:
    with tensor_cores():
        torch.mm(a.upper, b.upper, out=into)
    _add_lower(into, a, b, 1)
    return into


def _add_lower(total: Tensor, a: Halves, b: Halves, alpha: float) -> None:
    """Add the two terms in brackets."""
    for left, right in ((a.lower16, b.upper16), (a.upper16, b.lower16)):
        if total.is_cuda:
            torch.addmm(total, left, right, out_dtype=torch.float32, alpha=alpha, out=total)
        else:
            total.addmm_(left.float(), right.float(), alpha=alpha)


def halves(x: Tensor, upper: Tensor | None = None) -> Halves:
    """The halves of x float32 [M, K], whose rows are contiguous; the upper one goes into `upper`, which may be x itself."""
    upper = torch.empty(x.shape, device=x.device) if upper is None else upper
    upper16, lower16 = (torch.empty(x.shape, dtype=torch.bfloat16, device=x.device) for _ in range(2))
    if AVAILABLE and x.is_cuda and x.stride(-1) == 1 and x.dim() == 2:
        with torch.cuda.device_of(x):
            launch(x, Halves(upper, upper16, lower16))
    else:
        step = max(1, PIECE // max(1, x.shape[-1]))
        for rows, *parts in zip(*(each.split(step) for each in (x, upper, upper16, lower16)), strict=True):
            high = (rows.contiguous().view(torch.int32) & UPPER).view(torch.float32)
            parts[2].copy_(rows - high)
            parts[1].copy_(high)
            parts[0].copy_(high)
    return Halves(upper, upper16, lower16)


@kernel("K")
def _kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    x_at: tl.tensor,
    upper_at: tl.tensor,
    upper16_at: tl.tensor,
    lower16_at: tl.tensor,
    x_row: tl.tensor,  # values from one row to the next
    K: tl.tensor,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + row * x_row + k, mask=k < K)
    upper = (x.to(tl.int32, bitcast=True) & MASK).to(tl.float32, bitcast=True)
    at = row * K + k
    tl.store(upper16_at + at, upper.to(tl.bfloat16), mask=k < K)
    tl.store(lower16_at + at, (x - upper).to(tl.bfloat16), mask=k < K)
    tl.store(upper_at + at, upper, mask=k < K)


def launch(x: Tensor, into: Halves) -> None:
    """Run the kernel: the halves of x [M, K], whose rows are contiguous, into contiguous tensors."""
    rows, columns = x.shape
    block = min(1024, max(32, 1 << (columns - 1).bit_length()))
    _kernel[(rows, blocks(columns, block))](
        x, *into, x.stride(0), columns, BLOCK=block, MASK=UPPER, num_warps=max(1, block // 256)
    )
