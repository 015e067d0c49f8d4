"""Polish after GPTQ: block coordinate descent on the codes, and the best scales for the codes that result.

GPTQ never revisits a column. With all other columns held, the best answer for a block S of columns is
t = v_S - (v - w) H_{:,S} H_SS^-1; rounding t onto the grid by GPTQ within the block, and keeping it only for the rows whose
loss it lowers, can only lower the loss tr((v - w) H (v - w)'). Sweeps alternate between blocks shifted by half a block.

Then, codes kept, the scales of a row's groups that minimise the same loss solve a small linear system per row,

    A s = b,   A_gh = q_g H_gh q_h',   b_g = q_g H_g: w'        q: codes minus zero points, g, h: groups

and are taken, as float16 stores them, by the rows that gain. Coordinate descent on GPTQ's objective: CDQuant (arXiv 2406.17542);
closed-form scales: arXiv 2602.02126.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qquant.kernels.gptq_block import gptq_block
from qquant.tensor import Grid, UniformParams, as_scale, value_of

BLOCK = 64
ROWS = 2048  # rows whose scales are solved for at a time


def damped(gram: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) * I, float32 [K, K]."""
    result = gram.clone()
    diagonal = result.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal.add_(damping * mean + (diagonal == 0) * mean)
    return result


def sweep(
    weight: Tensor, gram: Tensor, codes: Tensor, levels: tuple[Tensor, Tensor], grid: Grid, shift: bool
) -> Tensor:
    """Codes after one pass over all blocks; gram: float32 [K, K], positive definite; codes uint8 [N, K]."""
    step, offset = levels
    value = value_of(codes, step, offset, grid)
    slope = (value - weight) @ gram
    codes = codes.clone()
    columns = torch.arange(weight.shape[1], device=weight.device).roll(BLOCK // 2 if shift else 0)
    for start in range(0, len(columns), BLOCK):
        block = columns[start : start + BLOCK]
        block = block[torch.argsort(gram.diagonal()[block], descending=True, stable=True)]
        inside = gram[block][:, block]
        root = torch.linalg.cholesky(inside.flip(0, 1)).flip(0, 1)
        upper = torch.linalg.solve_triangular(root, torch.eye(len(block), device=weight.device), upper=True)
        target = value[:, block] - (slope[:, block] @ upper.T) @ upper
        group = block // grid.width
        chosen, _ = gptq_block(target, upper, step[:, group], offset[:, group], grid.levels)
        new = step[:, group] * chosen.float() - offset[:, group]
        before, after = value[:, block] - target, new - target
        better = (((after @ inside) * after).sum(1) < ((before @ inside) * before).sum(1)).unsqueeze(1)
        change = torch.where(better, new - value[:, block], torch.zeros_like(new))
        codes[:, block] = torch.where(better, chosen, codes[:, block])
        value[:, block] += change
        slope.addmm_(change, gram[block])
    return codes


def refit(weight: Tensor, gram: Tensor, codes: Tensor, params: UniformParams, grid: Grid) -> UniformParams:
    """The scales that minimise the loss for these codes, for the rows that gain by them."""
    scales = params.scales.clone()
    rows, groups = scales.shape
    for start in range(0, rows, ROWS):
        part = slice(start, min(start + ROWS, rows))
        old = scales[part]
        signed = codes[part].float() - params.zeros[part].repeat_interleave(grid.width, dim=1)
        target = weight[part] @ gram
        right = (signed * target).view(len(old), groups, grid.width).sum(-1)
        system = torch.empty(len(old), groups, groups, device=weight.device)
        for group in range(groups):
            inside = slice(group * grid.width, (group + 1) * grid.width)
            spread = (signed[:, inside] @ gram[inside]) * signed
            system[:, group] = spread.view(len(old), groups, grid.width).sum(-1)
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True) + 1e-30)
        new = as_scale(torch.linalg.solve(system, right))
        gain = _loss(system, right, old) - _loss(system, right, new)
        scales[part] = torch.where((gain > 0).unsqueeze(1), new, old)
    return UniformParams(scales, params.zeros)


def _loss(system: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """S A s' - 2 b s' of each row."""
    wide = scale.float()
    return ((system @ wide.unsqueeze(-1)).squeeze(-1) * wide).sum(1) - 2 * (right * wide).sum(1)
