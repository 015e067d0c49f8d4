"""Products of float32 matrices, on a GPU by its tensor cores.

A tensor core multiplies TF32: float32 with 10 of its 23 bits after the point. A float32 x is h + l, h with the upper 10 of these bits
(a mask), l = x - h (exact), and

    a b = ah bh + (al bh + ah bl) + al bl        the last term, at most 2^-20 of the first, is left out

Three such products together are about as good as float32 sums are, and take less than half the time of one that is multiplied in float32 (51
TFLOP/s on an H200, TF32 some 400). A single one, whose factors are off by 2^-11 at random, does for sums of squares that are compared
or reported and for corrections that are damped anyway, not for slopes that a nearly singular matrix is divided into.
Ootomo and Yokota 2022 (arXiv 2203.03341).

Sums over tokens of bfloat16 numbers lose nothing where each product is exact in float32 and added up there: `add_products`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

UPPER = -(1 << 13)  # of a float32's bits: sign, exponent, 10 bits after the point


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Within it, products of float32 on a GPU are of TF32: one product, not three."""
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


@dataclass(frozen=True)
class SplitMatrix:
    """A matrix that is multiplied with often; its halves h and l once they are needed, on a GPU."""

    matrix: Tensor | None  # None: its halves have to do
    halves: tuple[Tensor, Tensor] | None = None

    def part(self, rows: slice, columns: slice) -> SplitMatrix:
        """Some of its rows and columns."""
        halves = self.halves and (self.halves[0][rows, columns], self.halves[1][rows, columns])
        return SplitMatrix(None if self.matrix is None else self.matrix[rows, columns], halves)

    def values(self) -> Tensor:
        """The matrix itself, a new one where only its halves are there."""
        if self.matrix is not None:
            return self.matrix
        assert self.halves is not None
        return self.halves[0] + self.halves[1]


def split_matrix(matrix: Tensor) -> SplitMatrix:
    """`matrix` as the second factor of several products."""
    return SplitMatrix(matrix, halves(matrix) if matrix.is_cuda else None)


def split_in_place(matrix: Tensor) -> SplitMatrix:
    """The same of a matrix that is used up: two of them in memory, not three."""
    if not matrix.is_cuda:
        return SplitMatrix(matrix)
    upper = _upper(matrix)
    return SplitMatrix(None, (upper, matrix.sub_(upper)))


def product(a: Tensor, b: SplitMatrix) -> Tensor:
    """The product of float32 [..., M, K] and [K, N], about as precise as float32 is."""
    return a @ b.values() if b.halves is None else three(a, b.halves)


def add_product(total: Tensor, a: Tensor, b: SplitMatrix, beta: float = 1, alpha: float = 1) -> Tensor:
    """Beta total + alpha a b of float32 [M, N], [M, K] and [K, N], as precise; a new tensor."""
    if b.halves is None:
        return torch.addmm(total, a, b.values(), beta=beta, alpha=alpha)
    upper, lower = halves(a)
    with tensor_cores():
        total = torch.addmm(total, lower, b.halves[0], beta=beta, alpha=alpha)
        return total.addmm_(upper, b.halves[1], alpha=alpha).addmm_(upper, b.halves[0], alpha=alpha)


def add_product_to(total: Tensor, a: Tensor, b: SplitMatrix, alpha: float = 1) -> None:
    """Total += alpha a b, in place, as precise."""
    if b.halves is None:
        total.addmm_(a, b.values(), alpha=alpha)
        return
    upper, lower = halves(a)
    with tensor_cores():
        for left, right in ((lower, 0), (upper, 1), (upper, 0)):
            total.addmm_(left, b.halves[right], alpha=alpha)


def product_using_up(a: Tensor, b: SplitMatrix) -> Tensor:
    """The same of an `a` that is contiguous and not needed any more: less in memory by as much."""
    if b.halves is None:
        return a @ b.values()
    upper = _upper(a)
    return _three((upper.flatten(0, -2), a.sub_(upper).flatten(0, -2)), b.halves).view(*a.shape[:-1], -1)


def three(a: Tensor, b: tuple[Tensor, Tensor]) -> Tensor:
    """The product with h + l by the formula at the head of this file."""
    return _three(halves(a.flatten(0, -2)), b).view(*a.shape[:-1], -1)


def _three(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    upper, lower = a
    with tensor_cores():
        return (lower @ b[0]).addmm_(upper, b[1]).addmm_(upper, b[0])


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """(h, l) of the head of this file; h + l = x."""
    upper = _upper(x)
    return upper, x - upper


def _upper(x: Tensor) -> Tensor:
    return (x.contiguous().view(torch.int32) & UPPER).view(torch.float32)
