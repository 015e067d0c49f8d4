"""A checkpoint with a wider MLP and the same function, so that groups divide among tensor-parallel ranks.

    gate, up   [I, hidden] -> [I', hidden]   new rows are zero:     silu(0) * 0 = 0
    down       [hidden, I] -> [hidden, I']   new columns are zero

config.json says I'. Qwen published its 14B (13696 -> 14336) and 32B (27392 -> 27648) this way. Calibration and solver work on the
model as it is, and what they found is widened when it is packed, by codes that mean zero (symmetric: 2^(b-1), asymmetric: the zero
point). So a GPTQ or AWQ artifact is that of the unpadded model bit for bit, and exactly zero beside it. The block types of GGUF are
quantized by rows that end in zeros, as llama-quantize would quantize the padded model.

A tensor-parallel rank of T holds I' / T channels, which have to be whole groups: T divides I' / group (`parallel_sizes`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qquant.algorithms.grid import QuantizedTensor, UniformGrid, UniformParams
from qquant.errors import InputError
from qquant.families import ModelConfig
from qquant.recipe import ArtifactSpec, Recipe
from qquant.resources import lazy
from qquant.source.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.algorithms.grid import Grid
else:
    torch = lazy("torch")

RANKS = (1, 2, 4, 8)
WIDEST = max(RANKS)


@dataclass(eq=False)
class PaddedCheckpoint(Checkpoint):
    """The view; `config` and `raw_config` hold the padded size."""

    unpadded: int = 0  # intermediate size of the files

    @property
    def narrow(self) -> ModelConfig:
        """The numbers of the model without padding."""
        return replace(self.config, intermediate=self.unpadded)

    def tensor(self, name: str, into: Tensor | None = None) -> Tensor:
        """The tensor with its zero rows or columns."""
        return zero_padded(super().tensor(name, into), self._shape(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of the padded matrix."""
        here, shape = self._info(name).shape[0], self._shape(name)
        real = super().rows(name, min(start, here), min(stop, here))
        return zero_padded(real, (max(0, min(stop, shape[0]) - start), *shape[1:]))

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name` with the padding."""
        layer = self.family.layer_of(name)
        return self._info(name).shape if layer is None else self.family.block_shapes(self.config, layer)[name]


def padded(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """`checkpoint` as `recipe.pad_intermediate` wants it; itself where nothing is to be padded."""
    size = padded_size(checkpoint.config.intermediate, recipe.pad_intermediate, recipe.artifacts)
    if size == checkpoint.config.intermediate:
        return checkpoint
    key = checkpoint.family.padded_by
    if not key:
        raise InputError(
            f"recipe {recipe.name}: pad_intermediate is {recipe.pad_intermediate}, but the MLPs of {checkpoint.family.model_type!r} "
            "have widths that config.json does not give in one number. Remove pad_intermediate"
        )
    return checkpoint.become(
        PaddedCheckpoint,
        config=replace(checkpoint.config, intermediate=size),
        raw_config=dict(checkpoint.raw_config) | {key: size},
        fingerprint=hashlib.sha256(f"{checkpoint.fingerprint} padded to {size}".encode()).hexdigest(),
        unpadded=checkpoint.config.intermediate,
    )


def without_padding(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without padding."""
    if not isinstance(checkpoint, PaddedCheckpoint):
        return checkpoint
    return checkpoint.become(Checkpoint, config=checkpoint.narrow)


def zero_padded(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A matrix (or vector) with zeros after its rows and columns, up to `shape`."""
    amounts = [
        size for have, want in zip(reversed(value.shape), reversed(shape), strict=True) for size in (0, want - have)
    ]
    return torch.nn.functional.pad(value, amounts) if any(amounts) else value


def pads_codes(grid: Grid | None, columns: int) -> bool:
    """Whether `zero_padded_codes` can pad what was solved on `grid`; else the solver has to see the zeros."""
    return isinstance(grid, UniformGrid) and columns % grid.width == 0


def zero_padded_codes(quantized: QuantizedTensor, shape: tuple[int, int]) -> QuantizedTensor:
    """Codes on a `UniformGrid` with new rows and columns that mean zero."""
    grid, params = quantized.grid, quantized.params
    rows, columns = quantized.codes.shape
    if (rows, columns) == shape:
        return quantized
    assert isinstance(grid, UniformGrid)
    assert isinstance(params, UniformParams)
    if grid.width == columns:
        grid = replace(grid, width=shape[1])
    zero = grid.levels // 2 if grid.symmetric else 0
    groups = (shape[0], shape[1] // grid.width)
    codes = torch.full(shape, zero, dtype=torch.uint8, device=quantized.codes.device)
    scales = torch.ones(groups, dtype=params.scales.dtype, device=codes.device)
    zeros = torch.full(groups, float(zero), device=codes.device)
    inside = slice(0, params.scales.shape[1])
    if grid is not quantized.grid:  # one group a row, which has its own zero point
        codes[:rows] = params.zeros.to(torch.uint8)
    codes[:rows, :columns] = quantized.codes
    scales[:rows, inside], zeros[:rows, inside] = params.scales, params.zeros
    return QuantizedTensor(codes, UniformParams(scales, zeros), grid)


def padded_size(intermediate: int, wanted: int | str, artifacts: Sequence[ArtifactSpec]) -> int:
    """The size after padding. "auto": the smallest on which 8 ranks hold whole groups of every artifact."""
    if wanted == "none":
        return intermediate
    unit = int(wanted) if wanted != "auto" else WIDEST * math.lcm(*(spec.group for spec in artifacts))
    return math.ceil(intermediate / unit) * unit
