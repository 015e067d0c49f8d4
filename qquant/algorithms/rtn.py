"""Round to nearest: every weight by itself. The fallback, and the yardstick that a solver must beat."""

from __future__ import annotations

from torch import Tensor

from qquant.algorithms.gram import Gram
from qquant.algorithms.grid import Grid, nearest


def rtn(weight: Tensor, gram: Gram, levels: tuple[Tensor, Tensor], grid: Grid, damping: float) -> Tensor:
    """Codes uint8 [N, K] of the nearest grid values to weight float32 [N, K]; `gram` and `damping` are not used."""
    del gram, damping
    return nearest(weight, *levels, grid)
