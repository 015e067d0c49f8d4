"""GPTQ with static groups and static activation order (Frantar et al. 2022, arXiv 2210.17323).

Minimise ||(W - Q) X||^2 = tr((W - Q) H (W - Q)') one input column at a time: round column j onto its grid, then move the
columns not yet rounded by the least-squares amount that compensates the error,

    e_j = (w_j - q_j) / U_jj,    w_k <- w_k - e_j U_jk  (k > j),    U upper Cholesky factor of (H + damping)^-1.

Groups are static: scales are fitted before the loop and already rounded as the file stores them. Columns are visited in
order of falling diag(H) (activation order), but codes stay where they were, so the file needs no permutation.

    U without an inverse: reverse rows and columns of H, factor L L', reverse back to R R' with R upper; then U = R^-1.

A matrix that is not positive definite climbs a damping ladder; `factorize` raises when the ladder ends, and the solver
rounds to nearest and says so. Channels that were never active get an identity row: they are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qquant.algorithms.gram import Gram, NotPositiveDefiniteError, reordered
from qquant.algorithms.grid import Grid, Params
from qquant.algorithms.problem import Problem, Solution, joined, stacked
from qquant.devices import policy
from qquant.kernels.gptq_block import gptq_block
from qquant.kernels.product import add_product_to, split_matrix
from qquant.kernels.triangular import Upper

PIECE = 1 << 22  # values that are turned round at a time
LADDER = (1, 2, 5, 10, 100)  # times the damping asked for


@dataclass(frozen=True)
class InverseFactor:
    """U of the damped Gram matrix in activation order."""

    upper: Tensor  # float32 [K, K]
    order: Tensor  # int64 [K]: columns by falling diag(H)
    damping: float  # what it took, relative to the mean of diag(H)

    def cost(self, tokens: int) -> Tensor:
        """What a squared rounding error of each column costs GPTQ, 1 / U_jj^2, float32 [K], a token of `tokens`.

        GPTQ's loss is the sum of e_j^2 = (w_j - q_j)^2 / U_jj^2: the part of column j that the columns after it cannot make up for.
        This, and not diag(H), is the weight with which its scales should be searched.
        """
        weights = self.upper.new_empty(len(self.order))
        weights[self.order] = 1 / self.upper.diagonal().square()
        return weights / max(1, tokens)


def factorize(gram: Gram, damping: float) -> InverseFactor:
    """U of H + damping * mean(diag H) * I, remembered in `gram` for the next artifact.

    Raises:
        NotPositiveDefiniteError: the whole ladder failed.
    """
    if damping in gram.cholesky:
        return gram.cholesky[damping]  # type: ignore[return-value]  # only this function fills it
    diagonal = gram.matrix.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    mean = float(diagonal.mean()) or 1.0
    for step in LADDER:
        root = _root(gram.matrix, order.flip(0), damping * step * mean, mean)
        if root is not None:
            factor = InverseFactor(_inverse(root), order, damping * step)
            gram.cholesky[damping] = factor
            return factor
    raise NotPositiveDefiniteError(f"not positive definite at {damping * LADDER[-1]:g} damping")


def _root(matrix: Tensor, backwards: Tensor, damping: float, dead: float) -> Tensor | None:
    """R of the head of this file, where channels that were never active have `dead` on the diagonal; None if there is none."""
    buffer = reordered(matrix, backwards, transposed=True)
    damped = buffer.mT  # in the layout that is factored in place
    damped.diagonal().add_(damping + (damped.diagonal() == 0) * dead)
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    lower, info = torch.linalg.cholesky_ex(damped, out=(damped, info))
    if int(info) != 0 or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    _reverse(buffer.view(-1))
    return lower


def _inverse(upper: Tensor) -> Tensor:
    """R^-1 of R upper, which has the layout of `_root`; one more matrix in memory."""
    one = torch.eye(len(upper), device=upper.device)
    if policy(upper.device).by_blocks:
        return Upper(upper).solve(one, triangular=True)
    inverse = one.mT  # in the layout that is solved in place
    torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
    return inverse


def _reverse(values: Tensor) -> None:
    """Turn values round in place; of a square matrix that is rows and columns."""
    count = len(values)
    for start in range(0, count // 2, PIECE):
        stop = min(start + PIECE, count // 2)
        front, back = values[start:stop], values[count - stop : count - start]
        turned = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(turned)


def gptq(weight: Tensor, inverse: InverseFactor, spacing: tuple[Tensor, Tensor], grid: Grid) -> Tensor:
    """Codes uint8 [N, K] for weight float32 [N, K] on the grid's fitted levels, errors fed back through `inverse`."""
    order, upper = inverse.order, inverse.upper
    step, offset = spacing
    group = order // grid.width
    work = weight[:, order]
    columns = weight.shape[1]
    codes = torch.empty_like(work, dtype=torch.uint8)
    size = policy(weight.device).spread
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        inside = group[start:stop]
        codes[:, start:stop], error = gptq_block(
            work[:, start:stop].contiguous(),
            upper[start:stop, start:stop].contiguous(),
            step[:, inside],
            offset[:, inside],
            grid.levels,
        )
        if stop < columns:
            add_product_to(work[:, stop:], error, split_matrix(upper[start:stop, stop:]), alpha=-1)
    natural = torch.empty_like(codes)
    natural[:, order] = codes
    return natural


def on_searched_scales(
    linears: Mapping[str, Tensor], inverse: InverseFactor, tokens: int, grid: Grid
) -> tuple[Tensor, dict[str, Params]]:
    """Codes uint8 [N, K] of the stacked linears, and their parameters, searched with the weights of `InverseFactor.cost`."""
    importance = inverse.cost(tokens)
    params = {linear: grid.fit(matrix, importance) for linear, matrix in linears.items()}
    return gptq(stacked(linears), inverse, joined(params), grid), params


def step(problem: Problem, earlier: Solution | None) -> Solution:
    """GPTQ on searched scales; what was found before does not matter.

    Raises:
        NotPositiveDefiniteError: see `factorize`.
    """
    gram = problem.gram
    inverse = factorize(gram, problem.settings.damping)
    codes, params = on_searched_scales(problem.linears, inverse, gram.tokens, problem.grid)
    if problem.alone:
        gram.cholesky.clear()
    return Solution(codes, params, inverse.damping, earlier.steps if earlier else {})
