"""Polish after GPTQ: block coordinate descent on the codes, and the best scales for the codes that result.

GPTQ never revisits a column. With all other columns held, the best answer for a block S of columns is
t = v_S - (v - w) H_{:,S} H_SS^-1; rounding t onto the grid by GPTQ within the block, and keeping it only where it lowers the
loss tr((v - w) H (v - w)'), can only lower that loss. Sweeps alternate between blocks shifted by half a block.

Where the curvature G of the outputs is known (`qquant.curvature`), the loss is tr(G (v - w) H (v - w)') and rows depend on each
other. Rows are then taken in PARTS interleaved subsets R, so that strongly coupled neighbours are in different ones; with the rest
held, t = v_RS - G_RR^-1 (G_R: (v - w) H_:S) H_SS^-1, and a block of columns of a subset is kept or left as a whole.

Then, codes kept, the scales of a row's groups that minimise the loss without G solve a small linear system per row,

    A s = b,   A_gh = q_g H_gh q_h',   b_g = q_g H_g: w'        q: codes minus zero points, g, h: groups

and are taken, as float16 stores them, by the rows that gain. A K-quant has two unknowns a super-block, d and dmin, with sub-scale times
code and minus the sub-minimum as what they multiply; its sub-scales and sub-minima are then chosen again, group by group, as the best
integers for the codes. Coordinate descent on GPTQ's objective: CDQuant (arXiv 2406.17542);
a curvature of rows and columns: YAQA (arXiv 2505.22988); closed-form scales: arXiv 2602.02126.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qquant.kernels.gptq_block import gptq_block
from qquant.tensor import Grid, Params, as_scale

BLOCK = 64
PARTS = 8  # subsets of coupled rows
ROW_DAMPING = 0.05  # of the mean of diag(G)
ROWS = 2048  # rows that are swept, or whose scales are solved for, at a time; fewer
SYSTEM = 1 << 26  # where their systems together have more values than this


def damped(gram: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) * I, float32 [K, K]."""
    result = gram.clone()
    diagonal = result.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal.add_(damping * mean + (diagonal == 0) * mean)
    return result


def sweep(
    weight: Tensor,
    gram: Tensor,
    codes: Tensor,
    levels: tuple[Tensor, Tensor],
    grid: Grid,
    shift: bool,
    rows: Sequence[Tensor] | None = None,
) -> Tensor:
    """Codes uint8 [N, K] after one pass over all blocks; gram: float32 [K, K], positive definite.

    `rows`: G of consecutive rows in turn, float32 [n, n] each, N rows together; None: rows are independent.
    """
    columns = torch.arange(weight.shape[1], device=weight.device).roll(BLOCK // 2 if shift else 0)
    order = torch.cat(
        [part[torch.argsort(gram.diagonal()[part], descending=True, stable=True)] for part in columns.split(BLOCK)]
    )
    gram = gram[order][:, order]
    blocks = [_factored(gram, start) for start in range(0, len(order), BLOCK)]
    swept = torch.empty_like(codes)
    start = 0
    independent: list[Tensor | None] = [None] * -(-len(weight) // ROWS)
    for matrix in independent if rows is None else rows:
        span = slice(start, min(start + (ROWS if matrix is None else len(matrix)), len(weight)))
        step, offset = (level[span].repeat_interleave(grid.width, dim=1)[:, order] for level in levels)
        target = weight[span][:, order]
        swept[span, order] = _swept_rows(
            target, gram, codes[span][:, order], (step, offset), grid.levels, blocks, matrix
        )
        start = span.stop
    return swept


def _swept_rows(
    weight: Tensor,
    gram: Tensor,
    codes: Tensor,
    levels: tuple[Tensor, Tensor],
    count: int,
    blocks: Sequence[tuple[slice, Tensor, Tensor]],
    matrix: Tensor | None,
) -> Tensor:
    """`sweep` of rows that depend on no others; columns in the order of the blocks, levels [N, K], `matrix` their G."""
    step, offset = levels
    value = step * codes.float() - offset
    slope = (value - weight) @ gram
    for chosen, mix in [(slice(0, len(weight)), None)] if matrix is None else _subsets(matrix):
        for block, inside, upper in blocks:
            old = value[chosen, block]
            pull = slope[chosen, block] if mix is None else mix.pull(slope[:, block])
            target = old - (pull @ upper.T) @ upper
            steps, offsets = step[chosen, block].contiguous(), offset[chosen, block].contiguous()
            found, _ = gptq_block(target, upper, steps, offsets, count)
            new = steps * found.float() - offsets
            better = _cost(new - target, inside, mix) < _cost(old - target, inside, mix)
            change = torch.where(better, new - old, torch.zeros_like(new))
            codes[chosen, block] = torch.where(better, found, codes[chosen, block])
            value[chosen, block] += change
            slope[chosen] += change @ gram[block]
    return codes


def _factored(gram: Tensor, start: int) -> tuple[slice, Tensor, Tensor]:
    """A block of columns, its part of H, and the upper factor of the inverse of that."""
    block = slice(start, min(start + BLOCK, len(gram)))
    inside = gram[block, block]
    root = torch.linalg.cholesky(inside.flip(0, 1)).flip(0, 1)
    return block, inside, torch.linalg.solve_triangular(root, torch.eye(len(inside), device=gram.device), upper=True)


class _Coupled:
    """Every PARTS-th row from `first`, solved together among the rows that G couples them with."""

    def __init__(self, matrix: Tensor, first: int) -> None:
        self.mix = matrix[first::PARTS]
        self.inside = self.mix[:, first::PARTS]
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.inside))

    def pull(self, slope: Tensor) -> Tensor:
        """G_RR^-1 G_R: slope, for the slope of all coupled rows."""
        return self.inverse @ (self.mix @ slope)


def _subsets(matrix: Tensor) -> Iterator[tuple[slice, _Coupled]]:
    """The subsets of the rows that `matrix` [N, N] couples; none where it is zero."""
    mean = matrix.diagonal().mean()
    if bool(mean > 0):
        damped = matrix + ROW_DAMPING * mean * torch.eye(len(matrix), device=matrix.device)
        for first in range(min(PARTS, len(matrix))):
            yield slice(first, None, PARTS), _Coupled(damped, first)


def _cost(error: Tensor, inside: Tensor, mix: _Coupled | None) -> Tensor:
    """The loss of errors [R, S] from their target: of every row, [R, 1]; of coupled rows, of all together."""
    if mix is None:
        return ((error @ inside) * error).sum(1, keepdim=True)
    return ((mix.inside @ error) * (error @ inside)).sum()


def refit(weight: Tensor, gram: Tensor, codes: Tensor, params: Params) -> Params:
    """The coefficients (scales; d and dmin) that minimise the loss for these codes, for the rows that gain by them."""
    factors = params.factors(codes)
    old = torch.cat([coefficients for coefficients, _ in factors], 1)
    new = old.clone()
    rows = max(1, min(ROWS, SYSTEM // old.shape[1] ** 2))
    for start in range(0, len(weight), rows):
        part = slice(start, min(start + rows, len(weight)))
        system, right = _normal_equations(
            [basis[part] for _, basis in factors], weight[part] @ gram, gram, old.shape[1]
        )
        diagonal = system.diagonal(dim1=1, dim2=2)
        used = diagonal > 0
        diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True) + 1e-30)
        found = torch.where(used, as_scale(torch.linalg.solve(system, right)), old[part])
        gain = _loss(system, right, old[part]) - _loss(system, right, found)
        new[part] = torch.where((gain > 0).unsqueeze(1), found, old[part])
    return params.with_factors(list(new.split([coefficients.shape[1] for coefficients, _ in factors], dim=1)))


def _normal_equations(bases: Sequence[Tensor], target: Tensor, gram: Tensor, unknowns: int) -> tuple[Tensor, Tensor]:
    """A [R, U, U] and b [R, U] of the coefficients of `bases` [R, K] each."""
    rows, columns = target.shape
    each = unknowns // len(bases)
    width = columns // each

    def summed(product: Tensor) -> Tensor:
        return product.view(rows, each, width).sum(-1)

    right = torch.cat([summed(basis * target) for basis in bases], 1)
    system = torch.empty(rows, unknowns, unknowns, device=target.device)
    for place in range(unknowns):
        basis, inside = bases[place // each], slice(place % each * width, (place % each + 1) * width)
        spread = basis[:, inside] @ gram[inside]
        system[:, place] = torch.cat([summed(spread * other) for other in bases], 1)
    return system, right


def choose_integers(
    weight: Tensor, gram: Tensor, codes: Tensor, params: Params, levels: Callable[[Params], Tensor]
) -> Params:
    """Sub-scales and sub-minima chosen again, group by group, for these codes: the best integer with the others held.

    `levels`: the values float32 [N, K] of some params with these codes.
    """
    for name in [integers.name for integers in params.integers(codes)]:
        integers = next(integers for integers in params.integers(codes) if integers.name == name)
        slope = (levels(params) - weight) @ gram
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


def _loss(system: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """S A s' - 2 b s' of each row."""
    wide = scale.float()
    return ((system @ wide.unsqueeze(-1)).squeeze(-1) * wide).sum(1) - 2 * (right * wide).sum(1)
