"""A whole format in one file, as a newcomer would add one: another packing, bfloat16 scales, and a tensor that holds a shape.

For a linear with weight [N, K], groups of g input columns (G = K / g):

    packed  uint8 [N, K/2]   column 2c in the high half of byte c, column 2c + 1 in the low half
    steps   bf16  [N, G]     W[n, k] = steps[n, k // g] * (code[n, k] - 8)
    extent  int64 [2]        N and K; no function of the codes, and held against them when it is read

config.json says {"quant_method": "toy", "blocks": {"width": g}}. `registered` adds it to the formats and to the recipe language for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Union, get_args

import torch
from pydantic import Field
from torch import Tensor

from qquant.algorithms.grid import Integers, QuantizedTensor, UniformGrid, UniformParams
from qquant.errors import InputError
from qquant.formats import FORMATS
from qquant.formats.folder import ModelFolder, QuantizedLayout
from qquant.recipe import ArtifactSpec, IntegerArtifact, Recipe, fit
from qquant.recipe.artifacts import Damping, Propagate, Ratios, SolverName, Sweeps, Transform
from qquant.recipe.fields import Whole
from qquant.recipe.model import MODELS

NAME = "toy"
ZERO = 8


class ToyArtifact(IntegerArtifact):
    """Two codes a byte, and a bfloat16 step for each group."""

    format: Literal["toy"] = Field(description="the kind of artifact, whose fields this table has")
    bits: Annotated[Literal[4], Whole] = Field(default=4, description="per weight")
    group_size: Annotated[Literal[16, 32], Whole] = Field(default=32, description="weights that share a step")
    damping: Damping = 0.01
    solver: SolverName = "gptq"
    sweeps: Sweeps = 2
    transform: Transform = "none"
    ratios: Ratios = 20
    propagate: Propagate = True


class ToyParams(UniformParams):
    """Steps in bfloat16, also where a solver chose them again."""

    def with_coefficients(self, coefficients: Sequence[Tensor]) -> ToyParams:
        return ToyParams(coefficients[0].bfloat16(), self.zeros)


class ToyGrid(UniformGrid):
    """The uniform grid with its scale as bfloat16 stores it."""

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> ToyParams:
        found = super().fit(weight, importance)
        return ToyParams(found.scales.bfloat16(), found.zeros)


class ToyLayout(QuantizedLayout):
    suffixes = ("packed", "steps", "extent")
    label = "toy 4 bit"
    kind = "int4"

    def __init__(self, width: int) -> None:
        self.width = width

    def problems(self, shape: tuple[int, int]) -> str | None:
        rows, columns = shape
        return f"[{rows}, {columns}] needs columns divisible by {self.width}" if columns % self.width else None

    def entries(self, shape: tuple[int, int]) -> list[tuple[str, str, tuple[int, ...]]]:
        rows, columns = shape
        return [
            ("packed", "U8", (rows, columns // 2)), ("steps", "BF16", (rows, columns // self.width)), ("extent", "I64", (2,)),
        ]  # fmt: skip

    def pack(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        codes, params = quantized.codes, quantized.params
        assert isinstance(params, UniformParams)
        return {
            "packed": codes[:, ::2] << 4 | codes[:, 1::2],
            "steps": params.scales.contiguous(),
            "extent": torch.tensor(codes.shape, dtype=torch.int64),
        }

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        packed, steps = tensors["packed"], tensors["steps"].float()
        rows, columns = len(packed), 2 * packed.shape[1]
        if tensors["extent"].tolist() != [rows, columns]:
            raise InputError(f"extent is {tensors['extent'].tolist()}; its codes are {[rows, columns]}")
        codes = torch.stack([packed >> 4, packed & 15], dim=2).view(rows, -1, self.width).float()
        return ((codes - ZERO) * steps.unsqueeze(-1)).view(rows, columns)

    def integers(self, tensors: Mapping[str, Tensor]) -> Integers | None:
        return None  # the operators take float16 scales


class Toy(ModelFolder[ToyArtifact]):
    entry = ToyArtifact
    method = NAME
    config_copy = None

    def folder_suffix(self, spec: ToyArtifact) -> str:
        return "Toy"

    def layout(self, spec: ToyArtifact) -> ToyLayout:
        return ToyLayout(spec.group_size)

    def grid(self, spec: ToyArtifact, columns: int) -> ToyGrid:
        return ToyGrid(4, spec.group_size, symmetric=True, search="importance")

    def label(self, spec: ToyArtifact) -> str:
        return f"toy g{spec.group_size}"

    def quantization_config(self, spec: ToyArtifact) -> dict[str, Any]:
        return {"quant_method": NAME, "blocks": {"width": spec.group_size}}

    def read_layout(self, config: Mapping[str, Any], where: str) -> ToyLayout:
        width = (config.get("blocks") or {}).get("width")
        if width not in (16, 32):
            raise InputError(f"{where}: toy blocks of {width!r}; there are those of 16 and 32")
        return ToyLayout(width)


@contextmanager
def registered() -> Iterator[None]:
    """The format is known meanwhile: what its line in FORMATS, and its entry in `ArtifactSpec`, from which MODELS follows, would do."""
    field = Recipe.model_fields["artifacts"]
    known = field.annotation
    entries = (*get_args(get_args(ArtifactSpec)[0]), ToyArtifact)
    FORMATS[NAME], MODELS["ToyArtifact"] = Toy(), ToyArtifact
    _use(tuple[Annotated[Union[entries], Field(discriminator="format")], ...])  # noqa: UP007 - of a tuple
    try:
        yield
    finally:
        del FORMATS[NAME], MODELS["ToyArtifact"]
        _use(known)


def _use(annotation: Any) -> None:
    Recipe.model_fields["artifacts"].annotation = annotation
    Recipe.model_rebuild(force=True)
    fit._schema.cache_clear()
