"""Polish over coupled rows: coordinate descent on the codes for a loss that knows which outputs count together.

With the curvature G of the outputs (`qquant.solve.curvature`) the loss is tr(G (v - w) H (v - w)') and rows depend on each other. The rows of
one G are taken in PARTS interleaved subsets R, so that strongly coupled neighbours are in different ones, the columns in blocks S, as
in `qquant.algorithms.descent`. With everything else held, the best answer for a subset and a block is

    t = v_RS - P_S H_SS^-1,    P = G_RR^-1 G_R: (v - w) H

which GPTQ rounds within the block; d = rounded - v_RS is kept, as a whole, where it lowers the loss: tr(G_RR d (d H_SS + 2 P_S)') < 0.
As long as only rows of R change, P changes by d H_S: like the slope of rows that depend on no others.

Matrices G of one size do not depend on each other: as many of them as fit into memory are taken together, as one batch.

Of several ranks each has all rows of the slope (v - w) H for some columns, and visits some rows of R in all columns: P is handed from columns to
rows, and the changes d of a block S, with d H_SS + 2 P_S, from each to all, who judge them alike and move their slopes on.

A curvature of rows and columns: YAQA (arXiv 2505.22988).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qquant.algorithms.descent import WIDE, Columns, blocks_of, swept_together, visit
from qquant.algorithms.grid import Grid
from qquant.algorithms.problem import Problem, Solution, joined
from qquant.algorithms.sharing import columns_of, rows_of, turned
from qquant.devices import policy
from qquant.exchange import ALONE, Exchange
from qquant.kernels.product import Halves, SplitMatrix, product, product_using_up
from qquant.kernels.replay import Replay

PARTS = 8  # subsets of coupled rows
DAMPING = 0.05  # of the mean of diag(G)


def sweep(  # noqa: PLR0913  what `descent.sweep` takes, G, and with whom
    weight: Tensor,
    gram: Tensor,
    codes: Tensor,
    spacing: tuple[Tensor, Tensor],
    grid: Grid,
    shift: bool,
    rows: Iterable[Tensor],
    exchange: Exchange = ALONE,
    kept: MutableMapping[bool, list[Tensor]] | None = None,
) -> Tensor:
    """Codes uint8 [N, K] after one pass over all rows and columns of weight float32 [N, K].

    gram: float32 [K, K], positive definite; levels: steps and offsets [N, K / width]; `rows`: G of consecutive rows in turn,
    float32 [n, n] each, N rows together. Rows whose G is zero keep their codes. All ranks of `exchange` have the same arguments, and get the same.
    """
    columns = blocks_of(gram, shift, grid, kept)
    if len(gram) > WIDE:
        visited.forget()  # memory is short beside such a matrix
    swept = codes.clone()
    for spans, matrices in _batches(rows, weight):
        places = torch.cat([torch.arange(span.start, span.stop, device=weight.device) for span in spans])
        step, offset = (level[places][:, columns.order // grid.width] for level in spacing)
        earlier = codes[places][:, columns.order]
        error = (step * earlier).sub_(offset).sub_(weight[places][:, columns.order])
        batch = len(spans)
        error = error.view(batch, -1, error.shape[1])
        ranks = _Ranks(exchange, columns) if exchange.world > 1 else None
        slope = ranks.slope(error) if ranks else product_using_up(error, columns.gram)
        del error
        batched = [x.view(batch, -1, x.shape[1]) for x in (earlier, step, offset)]
        move = ranks.swept if ranks else _swept
        visited_codes = move(columns, matrices, grid.levels, slope, *batched).flatten(0, 1)
        swept[places] = torch.empty_like(visited_codes).index_copy_(1, columns.order, visited_codes)
        del step, offset, earlier, slope, batched, visited_codes  # before the next are made
    return swept


def _batches(rows: Iterable[Tensor], weight: Tensor) -> Iterator[tuple[list[slice], Tensor]]:
    """Spans of rows whose G have one size, and these G [B, n, n], as many as fit; without those that are zero."""
    start = 0
    waiting: dict[int, list[tuple[slice, Tensor]]] = {}
    for matrix in rows:
        span = slice(start, start + len(matrix))
        start = span.stop
        same = waiting.setdefault(len(matrix), [])
        if bool(matrix.diagonal().mean() > 0):
            same.append((span, matrix))
        if same and (len(same) + 1) * len(matrix) * weight.shape[1] > swept_together(weight):
            yield [span for span, _ in same], torch.stack([matrix for _, matrix in same])
            same.clear()
    for same in waiting.values():
        if same:
            yield [span for span, _ in same], torch.stack([matrix for _, matrix in same])


def _swept(
    columns: Columns, matrices: Tensor, count: int, slope: Tensor, codes: Tensor, step: Tensor, offset: Tensor
) -> Tensor:
    """Codes [B, n, K] of a batch, its columns in the order of `columns`; slope: (v - w) H, which is used up."""
    batch, _, width = slope.shape
    for subset, inside, pulled in _subsets(matrices, slope):
        pull = pulled.flatten(0, 1)
        earlier, steps, offsets = (x[:, subset].flatten(0, 1) for x in (codes, step, offset))
        of_rows = pull, inside, earlier, steps, offsets
        if columns.gram.halves is None or width > WIDE:  # a recording keeps another copy of the matrix
            visited_codes, change = _visited(count, *of_rows, columns.gram, columns.blocks)
        else:
            visited_codes, change = visited(count, *of_rows, *columns.gram.halves, *columns.blocks)
        slope[:, subset] += product(change, columns.gram).view(batch, -1, width)
        codes[:, subset] = visited_codes.view(batch, -1, width)
    return codes


def _subsets(matrices: Tensor, slope: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every subset R of the rows of matrices [B, n, n] in turn, G_RR [B, r, r], and P [B, r, K] for the slope [B, n, K] as it is then."""
    rows = matrices.shape[1]
    matrices = matrices + DAMPING * torch.diag_embed(
        matrices.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, rows)
    )
    for first in range(min(PARTS, rows)):
        subset = torch.arange(first, rows, PARTS, device=slope.device)
        mix = matrices[:, subset]
        inside = mix[:, :, subset]
        root = torch.linalg.cholesky_ex(inside).L
        yield subset, inside, _pull(root, mix, slope)


@dataclass
class _Ranks:
    """This rank of several that sweep a batch together."""

    exchange: Exchange
    columns: Columns
    spans: list[slice] = field(init=False)  # of columns, by rank

    def __post_init__(self) -> None:
        self.spans = columns_of(len(self.columns.order), self.exchange)

    @property
    def gram(self) -> Tensor:
        """This rank's columns of H."""
        return self.columns.gram.values()[:, self.spans[self.exchange.rank]]

    def slope(self, error: Tensor) -> Tensor:
        """This rank's columns of `error` H, [B, n, ...]."""
        return error @ self.gram

    def swept(
        self, columns: Columns, matrices: Tensor, count: int, slope: Tensor, codes: Tensor, step: Tensor, offset: Tensor
    ) -> Tensor:
        """What `_swept` gives, for the `slope` of this rank's columns."""
        batch, visits, subsets = len(codes), list[Tensor](), list[tuple[Tensor, list[slice]]]()
        for subset, inside, pulled in _subsets(matrices, slope):
            shares = rows_of(len(subset), self.exchange)
            pull = turned(pulled, shares, self.exchange)
            mine = subset[shares[self.exchange.rank]]
            spacing = step[:, mine].flatten(0, 1), offset[:, mine].flatten(0, 1)
            judge, earlier = _Judge(self.exchange, inside), codes[:, mine].flatten(0, 1)
            given = columns.gram, columns.blocks, count, pull.flatten(0, 1), earlier, spacing, judge.lowers
            visits.append(torch.cat([block for block, _ in visit(*given)], 1).view(batch, len(mine), codes.shape[2]))
            slope[:, subset] += (torch.cat(judge.changes, 2).flatten(0, 1) @ self.gram).view(
                batch, len(subset), slope.shape[2]
            )
            subsets.append((subset, shares))
        for rank, parcel in enumerate(self.exchange.share(visits)):
            for (subset, shares), rows in zip(subsets, parcel, strict=True):
                codes[:, subset[shares[rank]]] = rows
        return codes


@dataclass
class _Judge:
    """What ranks agree on: which changes [B, r, S] of a subset are kept, of whose rows each has some."""

    exchange: Exchange
    inside: Tensor  # G_RR [B, r, r]
    changes: list[Tensor] = field(default_factory=list)  # of all rows, by blocks of columns

    def lowers(self, change: Tensor, gain: Tensor) -> Tensor:
        """Whether changes of this rank's rows [B r', S] lower the loss, as `descent.visit` asks."""
        batch = len(self.inside)
        rows = len(change) // batch
        parcels = self.exchange.share([torch.stack((change, gain)).view(2, batch, rows, change.shape[1])])
        changed, gained = torch.cat([parcel[0] for parcel in parcels], 2)
        keep = (self.inside @ changed).mul_(gained).sum((1, 2)) < 0
        self.changes.append(changed * keep.view(-1, 1, 1))
        return keep.repeat_interleave(rows).unsqueeze(1)


def _pull(root: Tensor, mix: Tensor, slope: Tensor) -> Tensor:
    """P = (L L')^-1 mix slope, [B, r, K], for L [B, r, r], mix [B, r, n], slope [B, n, K]; on a card by L^-1, of which little is solved."""
    if policy(slope.device).by_blocks:
        one = torch.eye(root.shape[1], device=root.device).expand_as(root)
        inverse = torch.linalg.solve_triangular(root, one, upper=False)
        return (inverse.mT @ (inverse @ mix)) @ slope
    half = torch.linalg.solve_triangular(root, mix @ slope, upper=False)
    return torch.linalg.solve_triangular(root.mT, half, upper=True)


def step(problem: Problem, solution: Solution | None) -> Solution:
    """The solution after as many sweeps over coupled rows as of descent, where the curvature of rows is known; its error in H alone may rise."""
    assert solution is not None
    if problem.rows is None or not problem.settings.sweeps:
        return solution
    codes, spacing = solution.codes, joined(solution.params)
    for count in range(problem.settings.sweeps):
        with problem.damped() as gram:
            shift = count % 2 == 1
            of_ranks = problem.rows, problem.exchange, problem.kept
            codes = sweep(problem.weight, gram, codes, spacing, problem.grid, shift, *of_ranks)
    return replace(solution, codes=codes)


@Replay
def visited(  # noqa: PLR0913  a recording takes tensors
    count: int,
    pull: Tensor,
    inside: Tensor,
    codes: Tensor,
    step: Tensor,
    offset: Tensor,
    upper: Tensor,
    upper16: Tensor,
    lower16: Tensor,
    *factored: Tensor,
) -> tuple[Tensor, Tensor]:
    """Codes and changes [B n, K] of subsets of rows with G_RR `inside` [B, n, n]; `pull`: P, then halves of H, the rest as of `descent.visit`."""
    gram = SplitMatrix(None, Halves(upper, upper16, lower16))
    return _visited(count, pull, inside, codes, step, offset, gram, factored)


def _visited(  # noqa: PLR0913  what `visited` takes, and a matrix that may be halves
    count: int,
    pull: Tensor,
    inside: Tensor,
    codes: Tensor,
    step: Tensor,
    offset: Tensor,
    gram: SplitMatrix,
    factored: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    batch, rows, _ = inside.shape

    def lowers(change: Tensor, gain: Tensor) -> Tensor:
        costs = (inside @ change.view(batch, rows, -1)).mul_(gain.view(batch, rows, -1))
        return (costs.sum((1, 2)) < 0).repeat_interleave(rows).unsqueeze(1)

    blocks, changes = zip(*visit(gram, factored, count, pull.clone(), codes, (step, offset), lowers), strict=True)
    return torch.cat(blocks, 1), torch.cat(changes, 1)
