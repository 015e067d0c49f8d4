"""The arithmetic of a build, counted from shapes, in the kinds that a machine does at different rates.

    forward     multiplications and additions of products in the dtype of the checkpoint
    exact       of products in float32
    factor      of Cholesky factors and triangular systems: K^3 / 3 for L, K^3 for its inverse
    elements    values that elementwise operations make, in tensors that stay in the caches
    large       the same in tensors that do not, and whose memory is asked for anew: up to seven times as slow
    columns     steps of the loop over the columns of a linear, some calls each however few the rows
    cells       weights that go through it
    hashed      bytes whose sha256 is taken
    starts      processes, or parts of one, that import what they compute with

A linear is [N, K], a stage [N, K] of its linears together. Counts of elementwise operations are numbers of passes over a matrix, read off a
profile (tests/bench/LOG.md); those of products and factors are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace

CACHED, FRESH = (
    20,
    23,
)  # log2 of the values of a tensor up to which it stays in the caches, and from which on it does not
FIT = 200  # passes of a search for the scales of groups: 20 candidates, read and rounded
FINALISTS = 4  # scales that are solved with, as in `qquant.algorithms.awq`, and none
COMPARED = 1024  # rows of a matrix, about, that they are compared by
LOOKED = 25  # of everything around a solve: gathered, packed, read back, compared, summed up
SWEPT = 18  # of a sweep of descent
COUPLED = 30  # of a sweep over coupled rows
REFITTED = 3  # for each pair of groups, halved: products of codes with H times codes
PARTS = 8  # subsets of coupled rows, as in `qquant.algorithms.coupled`
BLOCK = 1024  # columns that are visited together, as in `qquant.algorithms.descent`
SPAN = 2048  # rows whose curvature is kept together, as in `qquant.solve.backward`
GROUP = 128  # columns of a group, about
DRIFTED = 50  # passes over a stage's inputs where errors before it are summed up
PASSED = 20  # passes over the inputs of all stages in a forward pass: norms, rotary embedding, gates
ATTENDED = 2.5  # times the arithmetic of attention, which is no product of large matrices
MARKED = 5  # passes over the chances of attention on the way back, where they are written out


@dataclass(frozen=True)
class Work:
    """How much of each kind there is to do."""

    forward: float = 0.0
    exact: float = 0.0
    factor: float = 0.0
    elements: float = 0.0
    large: float = 0.0
    columns: float = 0.0
    cells: float = 0.0
    hashed: float = 0.0
    starts: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in astuple(self)))

    def in_16_bit(self) -> Work:
        """The same where products of activations stay in the dtype of the checkpoint."""
        return replace(self, forward=self.forward + self.exact, exact=0.0)

    @staticmethod
    def of(parts: Iterable[Work]) -> Work:
        """The work of all of them."""
        return sum(parts, Work())


def passes(count: float, size: float) -> Work:
    """The work of `count` values made by elementwise operations, in tensors of `size` values."""
    outside = min(1.0, max(0.0, (math.log2(max(1.0, size)) - CACHED) / (FRESH - CACHED)))
    return Work(elements=count * (1 - outside), large=count * outside)


@dataclass(frozen=True)
class Sizes:
    """What of a device shapes the work; as in `qquant.devices`."""

    swept: int  # weights that a sweep visits at a time
    refitted: int  # rows whose scales are solved for at a time


def solving(linears: Sequence[tuple[int, int]], sweeps: int, curved: bool, sizes: Sizes) -> Work:
    """The work of a stage whose `linears` [N, K] are solved as one matrix; `curved`: rows are coupled."""
    rows, columns = sum(n for n, _ in linears), linears[0][1]
    weights, square = rows * columns, columns**2
    steps = 2 + (sweeps > 0) + (sweeps > 0 and curved)
    whole = Work(exact=2 * (steps + 1) * rows * square) + passes((7 * steps + LOOKED) * weights, weights)
    fitted = passes(2 * FIT * weights, 0)
    gptq = _fed_back(rows, columns) + Work(factor=4 / 3 * columns**3) + passes(6 * square, square)
    visits = [_descent(linears, sizes)] * sweeps + [_coupled(linears, sizes)] * (sweeps * curved)
    return Work.of([whole, fitted, gptq, *visits])


def scaling(linears: Sequence[tuple[int, int]], ratios: int) -> Work:
    """The work of searching scales to fold into a stage: a fit of some rows for each of `ratios`, and a solve for those that look best."""
    some, columns = sum(math.ceil(n / max(1, n // COMPARED)) for n, _ in linears), linears[0][1]
    solved = _fed_back(some, columns) + Work(exact=2 * some * columns**2, factor=4 / 3 * columns**3)
    return passes((ratios + FINALISTS) * FIT * some * columns, 0) + solved * FINALISTS


def _fed_back(rows: int, columns: int) -> Work:
    """GPTQ once through the columns, with the factor at hand."""
    weights = rows * columns
    return Work(exact=weights * columns, columns=columns, cells=weights) + passes(6 * weights, weights)


def _visited(weights: float, columns: int) -> Work:
    """One pass over blocks of columns: a target, whether it is lower, and the slope behind."""
    return Work(exact=weights * (4 * min(BLOCK, columns) + columns), cells=weights)


def _blocks(columns: int) -> Work:
    """The blocks of H in their order, with their factors."""
    wide = min(BLOCK, columns)
    return Work(exact=2 * columns * wide**2, factor=4 / 3 * columns * wide**2) + passes(6 * columns**2, columns**2)


def _descent(linears: Sequence[tuple[int, int]], sizes: Sizes) -> Work:
    rows, columns = sum(n for n, _ in linears), linears[0][1]
    weights = rows * columns
    loops = math.ceil(weights / sizes.swept)
    groups = max(1, columns // GROUP)
    refit = Work(exact=3 * weights * columns, factor=2 / 3 * rows * groups**3)
    refit += passes(REFITTED * weights * groups / 2, min(sizes.refitted, rows) * columns / 2)
    sweep = Work(exact=2 * weights * columns, columns=loops * columns) + passes(SWEPT * weights, weights / loops)
    return Work.of([_blocks(columns), _visited(weights, columns), sweep, refit])


def _coupled(linears: Sequence[tuple[int, int]], sizes: Sizes) -> Work:
    columns = linears[0][1]
    spans = [min(SPAN, rows - start) for rows, _ in linears for start in range(0, rows, SPAN)]
    work = _blocks(columns)
    for span in set(spans):
        count, subset = spans.count(span), span / PARTS
        together = max(1, min(count, sizes.swept // (span * columns)))
        weights = count * span * columns
        roots = 2 * weights * subset + count * PARTS * subset**3 / 3
        loops = math.ceil(count / together) * min(PARTS, span)
        work += Work(exact=4 * weights * columns + 2 * weights * span, factor=roots, columns=loops * columns)
        work += _visited(weights, columns) + passes(COUPLED * weights, together * span * columns / 4)
    return work


def passed(linears: Sequence[tuple[int, int]], inputs: float, heads: float, length: float, exact: bool = False) -> Work:
    """The work of a token through a block; `inputs`: of all stages together, `heads`: values of all heads, `length`: tokens of its sample."""
    products = 2.0 * sum(map(math.prod, linears))
    attention = Work(exact=ATTENDED * 4 * length * heads)
    return attention + Work(elements=PASSED * inputs) + (Work(exact=products) if exact else Work(forward=products))


def drifted(stages: Iterable[tuple[int, int, bool]]) -> Work:
    """The work of a token: sums of an artifact's own stream, of stages [N, K], into the residual stream or not."""
    return Work.of(
        Work(exact=4 * k * k + 2 * n * k * residual) + Work(elements=DRIFTED * k) for n, k, residual in stages
    )


def targeted(rows: int, columns: int) -> Work:
    """The work of what makes up for the errors before a stage [N, K]."""
    work = Work(exact=4 * rows * columns**2, factor=columns**3 / 3) + passes(4 * columns**2, columns**2)
    return work + passes(8 * rows * columns, rows * columns)


def way_back(linears: Sequence[tuple[int, int]], inputs: float, heads: int, wide: int, length: float) -> Work:
    """The work of a token through a block backwards: it runs again, goes back, and G is summed; `heads` of `wide` values."""
    spans = sum(min(SPAN, rows - start) ** 2 for rows, _ in linears for start in range(0, rows, SPAN))
    again = passed(linears, inputs, heads * wide, length)
    marked = passes(2 * MARKED * heads * length, heads * length**2)
    return again * 3 + Work(exact=2 * spans) + marked + Work(elements=8 * sum(rows for rows, _ in linears))
