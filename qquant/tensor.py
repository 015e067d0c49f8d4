"""The meeting point of formats and algorithms: a grid, its parameters, and codes on it.

A format supplies a `Grid`; fitting it to a weight gives `Params`; an algorithm chooses integer codes. For every grid

    value = step * code - offset        step, offset: one pair per row and sub-group of columns, computed in float32

which carries symmetric and asymmetric uniform grids, and the legacy and K-quant types of GGUF. `dequantize()` is the
definition that packers, kernels and loaders are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


class Params(Protocol):
    """Fitted parameters of a grid, in the numbers that the file will store."""

    def levels(self) -> tuple[Tensor, Tensor]:
        """(step, offset), both float32 [N, K / width]: `value = step * code - offset`."""
        ...


class Grid(Protocol):
    """The values a format can represent, for one weight matrix."""

    @property
    def width(self) -> int:
        """Consecutive input columns that share one (step, offset) pair."""
        ...

    @property
    def levels(self) -> int:
        """Number of codes; codes run from 0 to levels - 1."""
        ...

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Params:
        """Parameters for `weight` float32 [N, K]; `importance` float32 [K] weighs the squared error of each column."""
        ...


@dataclass
class QuantizedTensor:
    """Codes on a grid; rows are output channels."""

    codes: Tensor  # uint8 [N, K]
    params: Params
    grid: Grid

    def dequantize(self) -> Tensor:
        """Float32 [N, K], exactly what every reader of the file must compute."""
        step, offset = self.params.levels()
        width = self.grid.width
        rows, columns = self.codes.shape
        codes = self.codes.view(rows, columns // width, width).float()
        return (codes * step.unsqueeze(-1) - offset.unsqueeze(-1)).view(rows, columns)


def nearest(weight: Tensor, params: Params, grid: Grid) -> Tensor:
    """Codes uint8 [N, K] of the nearest grid values (ties to even) to `weight` float32 [N, K].

    A step of zero means a group that stores one value only: its code is 0.
    """
    step, offset = params.levels()
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // grid.width, grid.width)
    safe = torch.where(step == 0, torch.ones_like(step), step).unsqueeze(-1)
    codes = ((grouped + offset.unsqueeze(-1)) / safe).round_().clamp_(0, grid.levels - 1)
    return codes.masked_fill_((step == 0).unsqueeze(-1), 0).to(torch.uint8).view(rows, columns)
