"""Systems with a triangular matrix, block by block, so that a GPU's tensor cores do most of them (`qquant.kernels.product`).

    X R = B      X_j = (B_j - sum_{i<j} X_i R_ij) R_jj^-1         R upper; j: blocks of BLOCK columns in turn
    X R' = B     X_j = (B_j - sum_{i>j} X_i R_ji') R_jj^-T        from the last to the first

The inverses of the blocks on the diagonal are explicit. Libraries multiply such systems in float32, at a third of the pace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qquant.kernels.product import add_product_to, product, split_matrix

BLOCK = 1024


def solve_upper(right: Tensor, upper: Tensor, triangular: bool = False) -> Tensor:
    """X of X R = B for B float32 [N, K], which X takes the place of, and R float32 [K, K].

    `triangular`: B is upper triangular, as X is then, and [K, K].
    """
    for block in _blocks(len(upper)):
        rows, later = slice(0, block.stop if triangular else None), slice(block.stop, None)
        solved = product(right[rows, block], split_matrix(_inverse(upper[block, block])))
        right[rows, block] = solved
        if block.stop < len(upper):
            add_product_to(right[rows, later], solved, split_matrix(_by_rows(upper[block, later])), alpha=-1)
    return right


def solve_upper_transposed(right: Tensor, upper: Tensor) -> Tensor:
    """X of X R' = B; arguments as of `solve_upper`."""
    for block in reversed(_blocks(len(upper))):
        earlier = slice(0, block.start)
        solved = product(right[:, block], split_matrix(_inverse(upper[block, block]).mT.contiguous()))
        right[:, block] = solved
        if block.start:
            add_product_to(right[:, earlier], solved, split_matrix(_by_rows(upper[earlier, block].mT)), alpha=-1)
    return right


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _inverse(upper: Tensor) -> Tensor:
    one = torch.eye(len(upper), device=upper.device)
    return torch.linalg.solve_triangular(upper, one, upper=True).contiguous()
