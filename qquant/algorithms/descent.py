"""Polish after GPTQ: block coordinate descent on the codes, and the best scales for the codes that result.

GPTQ never revisits a column. With all other columns held, the best answer for a block S of columns is
t = v_S - (v - w) H_{:,S} H_SS^-1; rounding t onto the grid by GPTQ within the block, and keeping it only where it lowers the
loss tr((v - w) H (v - w)'), can only lower that loss. Sweeps alternate between blocks shifted by half a block.

Then, codes kept, the scales of a row's groups that minimise the loss without G solve a small linear system per row,

    A s = b,   A_gh = q_g H_gh q_h',   b_g = q_g H_g: w'        q: codes minus zero points, g, h: groups

and are taken, as float16 stores them, by the rows that gain. A K-quant has two unknowns a super-block, d and dmin, with sub-scale times
code and minus the sub-minimum as what they multiply; its sub-scales and sub-minima are then chosen again, group by group, as the best
integers for the codes. Coordinate descent on GPTQ's objective: CDQuant (arXiv 2406.17542);
closed-form scales: arXiv 2602.02126. Rows that depend on each other: `qquant.algorithms.coupled`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qquant.algorithms.gram import reordered
from qquant.algorithms.grid import Grid, Params, as_scale, value_of
from qquant.algorithms.problem import Problem, Solution, joined
from qquant.devices import policy
from qquant.kernels.gptq_block import gptq_block
from qquant.kernels.group_products import group_products
from qquant.kernels.product import (
    Halves,
    SplitMatrix,
    add_product,
    add_product_to,
    product,
    product_using_up,
    split_in_place,
    split_matrix,
)

BLOCK = 1024  # columns that are visited together: with 128 of them GPTQ-Int4's divergence is 4 to 8 % more
NARROW = 32  # on grids of at most FEW levels, where whole changes are seldom kept: 7 to 11 % less divergence in Q2_K
FEW = 8
WIDE = 16384  # columns from which on no copy of the matrix is kept that saves a little time
PIECE = 64  # rows; products of a few have other bits than among others
SYSTEM = 1 << 26  # values of the systems of scales that are solved at a time


@dataclass(frozen=True)
class Columns:
    """Columns in the order of their blocks, within a block by falling diag(H)."""

    order: Tensor  # int64 [K]
    gram: SplitMatrix  # H, float32 [K, K], in this order
    blocks: list[
        Tensor
    ]  # upper factor of H_SS^-1, H_SS, H_SS^-1 [B, S, S], or halves of these; then those of a narrower last block


def blocks_of(gram: Tensor, shift: bool, grid: Grid, kept: MutableMapping[bool, list[Tensor]] | None = None) -> Columns:
    """Blocks of gram float32 [K, K], positive definite, for codes on `grid`; shifted by half a block, or not.

    `kept`: factors of earlier blocks of the same matrix and grid by `shift`, and these from now on, if the matrix is not wide.
    """
    size = BLOCK if grid.levels > FEW else NARROW
    columns = torch.arange(len(gram), device=gram.device).roll(size // 2 if shift else 0)
    parts = columns.split(size)
    order = torch.cat([part[torch.argsort(gram.diagonal()[part], descending=True, stable=True)] for part in parts])
    gram = reordered(gram, order)
    blocks = kept.get(shift) if kept else None
    if blocks is None:
        blocks = list(_factored(gram, size))
        if kept is not None and len(gram) <= WIDE:
            kept[shift] = blocks
    return Columns(order, split_in_place(gram), blocks)


def in_whole(rows: int) -> int:
    """About as many rows, at least 1, so that none of their pieces is of a few where a matrix has a round number of them."""
    return rows // PIECE * PIECE or max(1, rows)


def swept_together(weight: Tensor) -> int:
    """Weights of [N, K] that are visited at a time: on a card that wide matrices fill already, half as many."""
    sizes = policy(weight.device)
    return sizes.swept // 2 if sizes.apart and weight.shape[1] > WIDE else sizes.swept


def _factored(gram: Tensor, size: int) -> Iterator[Tensor]:
    """Blocks of one size in one batch."""
    spans = [slice(start, min(start + size, len(gram))) for start in range(0, len(gram), size)]
    for same in (spans[:-1], spans[-1:]) if len(gram) % size else (spans,):
        if same:
            inside = torch.stack([gram[span, span] for span in same])
            root = torch.linalg.cholesky(inside.flip(1, 2)).flip(1, 2)
            one = torch.eye(inside.shape[1], device=gram.device).expand_as(inside)
            upper = torch.linalg.solve_triangular(root, one, upper=True)
            yield upper
            for matrix in (inside, upper.mT @ upper):
                split = split_matrix(matrix.flatten(0, 1))
                yield from (x.view(matrix.shape) for x in split.halves or (split.values(),))


def sweep(
    weight: Tensor,
    gram: Tensor,
    codes: Tensor,
    spacing: tuple[Tensor, Tensor],
    grid: Grid,
    shift: bool,
    kept: MutableMapping[bool, list[Tensor]] | None = None,
) -> Tensor:
    """Codes uint8 [N, K] after one pass over all blocks; gram: float32 [K, K], positive definite; `kept`: as of `blocks_of`."""
    columns = blocks_of(gram, shift, grid, kept)
    swept = torch.empty_like(codes)
    rows = in_whole(swept_together(weight) // weight.shape[1])
    for start in range(0, len(weight), rows):
        span = slice(start, min(start + rows, len(weight)))
        levels = (level[span] for level in spacing)
        swept[span, columns.order] = _swept(columns, weight[span], codes[span], levels, grid)
    return swept


def _swept(columns: Columns, weight: Tensor, codes: Tensor, levels: Iterable[Tensor], grid: Grid) -> Tensor:
    """Codes of some rows, their columns in the order of `columns`."""
    step, offset = (level[:, columns.order // grid.width] for level in levels)
    earlier = codes[:, columns.order]
    error = (step * earlier).sub_(offset).sub_(weight[:, columns.order])
    slope = product_using_up(error, columns.gram)
    del error
    fixed = columns.gram, columns.blocks, grid.levels
    return torch.cat([block for block, _ in visit(*fixed, slope, earlier, (step, offset), _row_by_row)], 1)


def visit(
    gram: SplitMatrix,
    factored: Sequence[Tensor],
    count: int,
    slope: Tensor,
    codes: Tensor,
    spacing: tuple[Tensor, Tensor],
    lowers: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes uint8 [N, S] of every block of columns in turn, and by how much their values changed.

    gram, factored: of `Columns`; slope: (v - w) H, float32 [N, K], which is used up; levels: steps and offsets [N, K]; all in its order.
    A change d [N, S] is kept in the rows for which `lowers(d, d H_SS + 2 slope_S)` is true, bool [N, 1].
    """
    size = 3 if gram.halves is None else 1 + 2 * len(gram.halves)
    stacks = [factored[start : start + size] for start in range(0, len(factored), size)]
    each = [parts for stack in stacks for parts in zip(*stack, strict=True)]
    stop = 0
    for (upper, *matrices), earlier, step, offset in zip(
        each, *(_split(x, factored[0].shape[1]) for x in (codes, *spacing)), strict=True
    ):
        inside, inverse = _split_matrices(matrices)
        block, stop = slice(stop, stop + len(upper)), stop + len(upper)
        minus = torch.addcmul(offset, step, earlier.float(), value=-1)  # -v
        target = add_product(minus, slope[:, block], inverse, beta=-1, alpha=-1)
        rounded, _ = gptq_block(target, upper, step, offset, count)
        change = torch.addcmul(minus, step, rounded.float()).sub_(offset)
        keep = lowers(change, add_product(slope[:, block], change, inside, beta=2))
        change.mul_(keep)
        add_product_to(slope[:, stop:], change, gram.part(block, slice(stop, None)))
        yield torch.where(keep, rounded, earlier), change


def _split_matrices(parts: Sequence[Tensor]) -> tuple[SplitMatrix, SplitMatrix]:
    """Two matrices, or the halves of two."""
    if len(parts) == 2:
        return SplitMatrix(parts[0]), SplitMatrix(parts[1])
    return SplitMatrix(None, Halves(*parts[:3])), SplitMatrix(None, Halves(*parts[3:]))


def _row_by_row(change: Tensor, gain: Tensor) -> Tensor:
    return (change * gain).sum(1, keepdim=True) < 0


def _split(x: Tensor, size: int) -> list[Tensor]:
    """The columns of x [N, K] in blocks of `size`, contiguous each."""
    even = x.shape[1] // size * size
    pieces = list(x[:, :even].reshape(len(x), even // size, size).transpose(0, 1).contiguous().unbind())
    return [*pieces, x[:, even:].contiguous()] if even < x.shape[1] else pieces


def refit(weight: Tensor, gram: Tensor, codes: Tensor, params: Params) -> Params:
    """The coefficients (scales; d and dmin) that minimise the loss for these codes, for the rows that gain by them."""
    linear_form = params.linear_form(codes)
    old = torch.cat([coefficients for coefficients, _ in linear_form], 1)
    new = old.clone()
    rows = in_whole(min(policy(weight.device).refitted, SYSTEM // old.shape[1] ** 2))
    for start in range(0, len(weight), rows):
        span = slice(start, min(start + rows, len(weight)))
        bases = [basis[span] for _, basis in linear_form]
        system, right = _normal_equations(bases, product(weight[span], split_matrix(gram)), gram, old.shape[1])
        diagonal = system.diagonal(dim1=1, dim2=2)
        used = diagonal > 0
        diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True) + 1e-30)
        solved = torch.where(used, as_scale(torch.linalg.solve_ex(system, right).result), old[span])
        gain = _loss(system, right, old[span]) - _loss(system, right, solved)
        new[span] = torch.where((gain > 0).unsqueeze(1), solved, old[span])
    return params.with_coefficients(list(new.split([coefficients.shape[1] for coefficients, _ in linear_form], dim=1)))


def _normal_equations(bases: Sequence[Tensor], target: Tensor, gram: Tensor, unknowns: int) -> tuple[Tensor, Tensor]:
    """A [R, U, U] and b [R, U] of the coefficients of `bases` [R, K] each."""
    rows, columns = target.shape
    each = unknowns // len(bases)
    right = torch.cat([(basis * target).view(rows, each, -1).sum(-1) for basis in bases], 1)
    system = torch.empty(rows, len(bases), each, len(bases), each, device=target.device)
    group_products(system, bases, gram, columns // each)
    return system.view(rows, unknowns, unknowns), right


def choose_integers(
    weight: Tensor, gram: Tensor, codes: Tensor, params: Params, values_of: Callable[[Params], Tensor]
) -> Params:
    """Sub-scales and sub-minima chosen again, group by group, for these codes: the best integer with the others held.

    `levels`: the values float32 [N, K] of some params with these codes.
    """
    for name in [integers.name for integers in params.integers(codes)]:
        integers = next(integers for integers in params.integers(codes) if integers.name == name)
        slope = product(values_of(params) - weight, split_matrix(gram))
        values = integers.values.float()
        width = weight.shape[1] // values.shape[1]
        for group in range(values.shape[1]):
            inside = slice(group * width, (group + 1) * width)
            unit = integers.unit[:, inside]
            curve = ((unit @ gram[inside, inside]) * unit).sum(1)
            step = -(unit * slope[:, inside]).sum(1) / curve.clamp(min=1e-30)
            best = (values[:, group] + step).round().clamp(integers.lowest, integers.highest)
            change = torch.where(curve > 0, best - values[:, group], torch.zeros_like(best))
            values[:, group] += change
            slope.addmm_(unit * change.unsqueeze(1), gram[inside])
        params = params.with_integers(name, values.to(integers.values.dtype))
    return params


def step(problem: Problem, solution: Solution | None) -> Solution:
    """`sweeps` of descent over the codes, each followed by a refit of the parameters."""
    assert solution is not None
    if not problem.settings.sweeps:
        return solution
    codes, params = solution.codes, dict(solution.params)
    for count in range(problem.settings.sweeps):
        with problem.damped() as gram:
            shift = count % 2 == 1
            codes = sweep(problem.weight, gram, codes, joined(params), problem.grid, shift, problem.kept)
            for linear, part in problem.split(codes).items():
                params[linear] = _refitted(problem, gram, linear, part, params[linear])
    return replace(solution, codes=codes, params=params)


def _refitted(problem: Problem, gram: Tensor, linear: str, codes: Tensor, params: Params) -> Params:
    """The parameters that suit the codes best: coefficients, integers, and coefficients for these integers."""
    weight = problem.linears[linear]

    def values(params: Params) -> Tensor:
        return value_of(codes, *params.step_and_offset(), problem.grid)

    refitted = refit(weight, gram, codes, params)
    if not refitted.integers(codes):
        return refitted
    return refit(weight, gram, codes, choose_integers(weight, gram, codes, refitted, values))


def _loss(system: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """S A s' - 2 b s' of each row."""
    coefficients = scale.float()
    return ((system @ coefficients.unsqueeze(-1)).squeeze(-1) * coefficients).sum(1) - 2 * (right * coefficients).sum(1)
