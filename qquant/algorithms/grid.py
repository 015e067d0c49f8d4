"""The meeting point of formats and algorithms: a grid, its parameters, and codes on it.

A format supplies a `Grid`; fitting it to a weight gives `Params`; an algorithm chooses integer codes. For every grid

    value = step * code - offset        step, offset: one pair per row and sub-group of columns, computed in float32

which carries symmetric and asymmetric uniform grids, and the legacy and K-quant types of GGUF. `dequantize()` is the
definition that packers, kernels and loaders are tested against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.kernels import group_search as search
else:
    torch, search = lazy("torch"), lazy("qquant.kernels.group_search")


class Params(Protocol):
    """Fitted parameters of a grid, in the numbers that the file will store."""

    def step_and_offset(self) -> tuple[Tensor, Tensor]:
        """(step, offset), both float32 [N, K / width]: `value = step * code - offset`."""
        ...

    def linear_form(self, codes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(coefficients float16 [N, S], basis float32 [N, K]) for codes uint8 [N, K]; K / S columns share a coefficient.

        The values are the sum of coefficient times basis.
        """
        ...

    def with_coefficients(self, coefficients: Sequence[Tensor]) -> Params:
        """These parameters with other coefficients, in the order of `linear_form`."""
        ...

    def integers(self, codes: Tensor) -> list[Multipliers]:
        """Small integers among the parameters that may be chosen again, for codes uint8 [N, K]."""
        ...

    def with_integers(self, name: str, values: Tensor) -> Params:
        """These parameters with other integers `name`."""
        ...

    def stored(self) -> Mapping[str, Tensor]:
        """All tensors by name, [N, ...] each."""
        ...

    def with_stored(self, stored: Mapping[str, Tensor]) -> Params:
        """The same kind of parameters of other rows, from their tensors."""
        ...


@dataclass(frozen=True)
class Multipliers:
    """Multipliers [N, G] that multiply groups of columns: one more of them adds `unit` float32 [N, K] to the values."""

    name: str
    values: Tensor
    unit: Tensor
    lowest: int
    highest: int


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
        return value_of(self.codes, *self.params.step_and_offset(), self.grid)


@dataclass(frozen=True)
class Integers:
    """A weight as the operators of a runtime take it: value = scale * (code - zero), in the numbers that the file stores."""

    codes: Tensor  # uint8 [N, K]
    scales: Tensor  # [N, G], of the file's dtype
    zeros: Tensor | None  # float32 [N, G], whole numbers; None: 2^(bits-1) everywhere
    bits: int  # 4 or 8: the width that codes are held in
    order: Tensor | None = None  # int64 [K]: the input column of every column of `codes`; None: their own


def nearest(weight: Tensor, step: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """Codes uint8 [N, K] of the nearest grid values (ties to even) to `weight` float32 [N, K]; step, offset [N, K / width].

    A step of zero means a group that stores one value only: its code is 0.
    """
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // grid.width, grid.width)
    safe = torch.where(step == 0, torch.ones_like(step), step).unsqueeze(-1)
    codes = ((grouped + offset.unsqueeze(-1)) / safe).round_().clamp_(0, grid.levels - 1)
    return codes.masked_fill_((step == 0).unsqueeze(-1), 0).to(torch.uint8).view(rows, columns)


def value_of(codes: Tensor, step: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """Float32 [N, K]: step * code - offset."""
    rows, columns = codes.shape
    grouped = codes.view(rows, columns // grid.width, grid.width).float()
    return (grouped * step.unsqueeze(-1) - offset.unsqueeze(-1)).view(rows, columns)


@dataclass
class UniformParams:
    """One scale and one integer zero point per row and group: value = scale * (code - zero)."""

    scales: Tensor  # float16 [N, G]
    zeros: Tensor  # float32 [N, G], whole numbers

    def step_and_offset(self) -> tuple[Tensor, Tensor]:
        """The step is the scale, the offset scale * zero; both products are exact in float32."""
        step = self.scales.float()
        return step, step * self.zeros

    def linear_form(self, codes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The scales, and codes less zeros."""
        width = codes.shape[1] // self.scales.shape[1]
        return [(self.scales, codes.float() - self.zeros.repeat_interleave(width, dim=1))]

    def with_coefficients(self, coefficients: Sequence[Tensor]) -> UniformParams:
        """These parameters with other scales."""
        return UniformParams(coefficients[0], self.zeros)

    def integers(self, codes: Tensor) -> list[Multipliers]:
        """An empty list: zeros stay where the search put them."""
        del codes
        return []

    def with_integers(self, name: str, values: Tensor) -> UniformParams:
        """Raise AssertionError: there are no multipliers to change."""
        raise AssertionError(f"{name}: {values.shape}")

    def stored(self) -> dict[str, Tensor]:
        """Scales and zeros."""
        return {"scales": self.scales, "zeros": self.zeros}

    def with_stored(self, stored: Mapping[str, Tensor]) -> UniformParams:
        """These parameters with other scales and zeros."""
        return replace(self, **stored)


@dataclass(frozen=True)
class UniformGrid:
    """2^bits equally spaced values per group of `width` columns, with a float16 scale.

    Symmetric: the zero point is 2^(bits-1) and the scale may be negative (full range: the largest element of a group can sit
    on the extra level -2^(bits-1)). Asymmetric: an integer zero point within the code range.
    """

    bits: int
    width: int
    symmetric: bool
    search: str  # "minmax" or "importance"

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> UniformParams:
        """Scales and zeros for weight float32 [N, K].

        "minmax" covers the range of every group; "importance" searches the scale (and zero) with the least squared error
        weighted by importance float32 [K] (ones if None), evaluated with the scale as float16 stores it.
        """
        if self.search == "minmax":
            return self._cover(weight)
        scales, zeros = search.group_search(
            weight,
            torch.ones_like(weight[0]) if importance is None else importance,
            self.width,
            self.levels,
            self.symmetric,
        )
        return UniformParams(scales, zeros)

    def _cover(self, weight: Tensor) -> UniformParams:
        grouped = weight.view(len(weight), -1, self.width)
        top = self.levels - 1
        if self.symmetric:
            scales = as_scale(2 * grouped.abs().amax(-1) / top)
            return UniformParams(scales, torch.full_like(scales, self.levels // 2, dtype=torch.float32))
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = as_scale((high - low) / top)
        return UniformParams(scales, (-low / scales.float()).round().clamp(0, top))


def as_scale(scale: Tensor) -> Tensor:
    """float16 scale that is finite and not zero; 1 where the group holds only zeros."""
    limit = torch.finfo(torch.float16).max
    half = scale.clamp(-limit, limit).half()
    tiny = torch.finfo(torch.float16).smallest_normal
    half = torch.where((half == 0) & (scale != 0), torch.full_like(half, tiny).copysign(half), half)
    return torch.where(scale == 0, torch.ones_like(half), half)


def finite(value: Tensor) -> bool:
    """Whether `value` holds neither NaN nor infinity. Extremes carry both, and are found far faster than elements are tested."""
    return not value.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(value))
