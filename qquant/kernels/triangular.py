"""Systems with a triangular matrix, block by block, so that a GPU's tensor cores do most of them (`qquant.kernels.product`).

    X R = B      X_j = (B_j - sum_{i<j} X_i R_ij) R_jj^-1         R upper; j: blocks of BLOCK columns in turn
    X R' = B     X_j = (B_j - sum_{i>j} X_i R_ji') R_jj^-T        from the last to the first

The inverses of the blocks on the diagonal are explicit. Libraries multiply such systems in float32, at a third of the pace.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qquant.kernels.product import add_product_to, product, split_matrix

BLOCK = 1024


@dataclass(frozen=True)
class Upper:
    """R float32 [K, K], upper triangular, and what systems with it have in common: several may be solved."""

    matrix: Tensor
    inverses: dict[int, Tensor] = field(default_factory=dict)  # of blocks on the diagonal, by their first row

    def solve(self, right: Tensor, triangular: bool = False) -> Tensor:
        """X of X R = B for B float32 [N, K], which X takes the place of.

        `triangular`: B is upper triangular, as X is then, and [K, K].
        """
        for block in self._blocks():
            rows, later = slice(0, block.stop if triangular else None), slice(block.stop, None)
            solved = product(right[rows, block], split_matrix(self._inverse(block)))
            right[rows, block] = solved
            if block.stop < len(self.matrix):
                behind = split_matrix(_by_rows(self.matrix[block, later]))
                add_product_to(right[rows, later], solved, behind, alpha=-1)
        return right

    def solve_transposed(self, right: Tensor) -> Tensor:
        """X of X R' = B; arguments as of `solve`."""
        for block in reversed(self._blocks()):
            earlier = slice(0, block.start)
            solved = product(right[:, block], split_matrix(self._inverse(block).mT.contiguous()))
            right[:, block] = solved
            if block.start:
                before = split_matrix(_by_rows(self.matrix[earlier, block].mT))
                add_product_to(right[:, earlier], solved, before, alpha=-1)
        return right

    def _blocks(self) -> list[slice]:
        count = len(self.matrix)
        return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]

    def _inverse(self, block: slice) -> Tensor:
        if block.start not in self.inverses:
            upper = self.matrix[block, block]
            one = torch.eye(len(upper), device=upper.device)
            self.inverses[block.start] = torch.linalg.solve_triangular(upper, one, upper=True).contiguous()
        return self.inverses[block.start]


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
