"""Polish over coupled rows: coordinate descent on the codes for a loss that knows which outputs count together.

With the curvature G of the outputs (`qquant.curvature`) the loss is tr(G (v - w) H (v - w)') and rows depend on each other. The rows of
one G are taken in PARTS interleaved subsets R, so that strongly coupled neighbours are in different ones, the columns in blocks S, as
in `qquant.algorithms.descent`. With everything else held, the best answer for a subset and a block is

    t = v_RS - P H_SS^-1,    P = G_RR^-1 G_R: (v - w) H_:S

which GPTQ rounds within the block; d = rounded - v_RS is kept, as a whole, where it lowers the loss: tr(G_RR d (d H_SS + 2 P)') < 0.

Matrices G of one size do not depend on each other: as many of them as fit into memory are taken together, as one batch.
A curvature of rows and columns: YAQA (arXiv 2505.22988).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from qquant.algorithms.descent import BLOCK, VALUES, Columns, blocks_of
from qquant.kernels.gptq_block import gptq_block
from qquant.tensor import Grid

PARTS = 8  # subsets of coupled rows
DAMPING = 0.05  # of the mean of diag(G)


def sweep(
    weight: Tensor,
    gram: Tensor,
    codes: Tensor,
    levels: tuple[Tensor, Tensor],
    grid: Grid,
    shift: bool,
    rows: Iterable[Tensor],
) -> Tensor:
    """Codes uint8 [N, K] after one pass over all rows and columns of weight float32 [N, K].

    gram: float32 [K, K], positive definite; levels: steps and offsets [N, K / width]; `rows`: G of consecutive rows in turn,
    float32 [n, n] each, N rows together. Rows whose G is zero keep their codes.
    """
    columns = blocks_of(gram, shift)
    swept = codes.clone()
    for spans, matrices in _batches(rows, weight):
        chosen = torch.cat([torch.arange(span.start, span.stop, device=weight.device) for span in spans])
        step, offset = (level[chosen].repeat_interleave(grid.width, dim=1)[:, columns.order] for level in levels)
        given = (weight[chosen][:, columns.order], codes[chosen][:, columns.order], step, offset)
        batched = [x.view(len(spans), -1, x.shape[1]) for x in given]
        found = _swept(columns, matrices, grid.levels, *batched).flatten(0, 1)
        swept[chosen] = torch.empty_like(found).index_copy_(1, columns.order, found)
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
        if same and (len(same) + 1) * len(matrix) * weight.shape[1] > VALUES[weight.device.type]:
            yield [span for span, _ in same], torch.stack([matrix for _, matrix in same])
            same.clear()
    for same in waiting.values():
        if same:
            yield [span for span, _ in same], torch.stack([matrix for _, matrix in same])


def _swept(
    columns: Columns, matrices: Tensor, count: int, weight: Tensor, codes: Tensor, step: Tensor, offset: Tensor
) -> Tensor:
    """Codes [B, n, K] of a batch, its columns in the order of `columns`."""
    batch, rows, width = weight.shape
    subsets = [torch.arange(first, rows, PARTS, device=weight.device) for first in range(min(PARTS, rows))]
    order = torch.cat(subsets)
    matrices = matrices[:, order][:, :, order]
    matrices += DAMPING * torch.diag_embed(matrices.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, rows))
    slope = (step * codes - offset - weight)[:, order] @ columns.gram
    start = 0
    for subset in subsets:
        part = slice(start, start + len(subset))
        start = part.stop
        inside = matrices[:, part, part].contiguous()
        mix = torch.cholesky_solve(matrices[:, part], torch.linalg.cholesky(inside))
        steps, offsets, known = (_split(x[:, subset].flatten(0, 1)) for x in (step, offset, codes))
        found = []
        for place, (block, within, inverse, upper) in enumerate(columns.blocks):
            old = torch.addcmul(-offsets[place], steps[place], known[place].float())
            pull = (mix @ slope[:, :, block]).flatten(0, 1)
            target = torch.addmm(old, pull, inverse, alpha=-1)
            rounded, _ = gptq_block(target, upper, steps[place], offsets[place], count)
            change = torch.addcmul(-offsets[place], steps[place], rounded.float()).sub_(old)
            costs = (inside @ change.view(batch, len(subset), -1)).flatten(0, 1)
            costs.mul_(torch.addmm(pull, change, within, beta=2))
            lower = (costs.view(batch, -1).sum(1) < 0).repeat_interleave(len(subset)).unsqueeze(1)
            change.mul_(lower)
            found.append(torch.where(lower, rounded, known[place]))
            slope[:, part] += (change @ columns.gram[block]).view(batch, len(subset), width)
        codes[:, subset] = torch.cat(found, 1).view(batch, len(subset), width)
    return codes


def _split(x: Tensor) -> list[Tensor]:
    """The columns of x [R, K] in blocks, contiguous each."""
    whole = x.shape[1] // BLOCK * BLOCK
    pieces = list(x[:, :whole].view(len(x), -1, BLOCK).transpose(0, 1).contiguous().unbind())
    return [*pieces, x[:, whole:].contiguous()] if whole < x.shape[1] else pieces
