"""An artifact's tensors as the modules of `linears`: fused where they share an input and a layout, dense where no kernel fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from qquant.algorithms.grid import Integers
from qquant.errors import InputError
from qquant.families.decoder import HEAD_ROWS
from qquant.families.weights import WeightSource
from qquant.formats import ArtifactSource
from qquant.kernels import cpu_int4
from qquant.kernels.unpack import check_group
from qquant.runtime.linears import CpuQuantLinear, DenseLinear, QuantEmbedding, QuantLinear, RuntimeLinear
from qquant.source.checkpoint import Checkpoint


def _half(weight: Integers) -> tuple[Integers, str]:
    """The weight with float16 scales, and a note if that moved one."""
    if weight.scales.dtype == torch.float16:
        return weight, ""
    scales = weight.scales.half()
    moved = ((scales.double() - weight.scales.double()).abs() / weight.scales.double().abs().clamp_min(1e-30)).max()
    note = f", scales rounded to fp16 (by up to {float(moved):.1e})" if bool(moved > 0) else ""
    return Integers(weight.codes, scales, weight.zeros, weight.bits, weight.order), note


def _together(weights: Sequence[Integers]) -> Integers | None:
    """One matrix of all rows, or None if their groups differ."""
    first = weights[0]
    for weight in weights[1:]:
        same_order = (weight.order is None and first.order is None) or (
            weight.order is not None and first.order is not None and torch.equal(weight.order, first.order)
        )
        if weight.bits != first.bits or weight.scales.shape[1] != first.scales.shape[1] or not same_order:
            return None
    zeros = None
    if any(weight.zeros is not None for weight in weights):
        zeros = torch.cat(
            [
                torch.full_like(weight.scales, 1 << (first.bits - 1), dtype=torch.float32)
                if weight.zeros is None
                else weight.zeros
                for weight in weights
            ]
        )
    codes, scales = (torch.cat([getattr(weight, name) for weight in weights]) for name in ("codes", "scales"))
    return Integers(codes, scales, zeros, first.bits, first.order)


def _fits(weight: Integers) -> bool:
    columns = weight.codes.shape[1]
    try:
        check_group(columns, columns // weight.scales.shape[1], weight.bits)
    except InputError:
        return False
    return True


class Loader:
    """Reads one artifact tensor by tensor into modules on a device."""

    def __init__(self, source: WeightSource, device: torch.device, dtype: torch.dtype) -> None:
        self.artifact = None if isinstance(source, Checkpoint) else cast(ArtifactSource, source)  # there is no third
        if self.artifact is not None and device.type != "cpu":
            self.artifact = source = self.artifact.on(device)  # unpacked where it is needed
        self.source, self.device, self.dtype = source, device, dtype
        self.biases = set(source.family.shapes(source.config))

    def vector(self, name: str) -> Tensor:
        """A norm or a bias, in the dtype of the activations."""
        return self.source.tensor(name).to(device=self.device, dtype=self.dtype)

    def matrix(self, name: str, rows: int, columns: int) -> Tensor:
        """A dequantized matrix, a slice of float32 rows at a time."""
        out = torch.empty((rows, columns), dtype=self.dtype, device=self.device)
        if self.artifact is not None and self.integers(name) is not None:  # folders read quantized weights whole
            return out.copy_(self.source.tensor(name))
        for start in range(0, rows, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, rows)
            out[start:stop] = self.source.rows(name, start, stop)
        return out

    def integers(self, name: str) -> Integers | None:
        """What the operators take, if they take it."""
        integers = self.artifact.integers(name, self.device) if self.artifact else None
        return integers if integers is not None and _fits(integers) else None

    def stored_as(self, names: Sequence[str]) -> str:
        """What the file holds of some tensors, in words for people."""
        if self.artifact is None:
            assert isinstance(self.source, Checkpoint)
            return self.source.dtype.lower()
        return ", ".join(dict.fromkeys(self.artifact.stored_as(name) for name in names))

    def fused(self, modules: Sequence[str], shapes: Sequence[tuple[int, int]]) -> list[RuntimeLinear]:
        """One linear of all `modules`, or one of each where they do not go together."""
        names = [f"{module}.weight" for module in modules]
        biases = [self.vector(f"{module}.bias") if f"{module}.bias" in self.biases else None for module in modules]
        weights = [self.integers(name) for name in names]
        if len(names) > 1 and len({weight is None for weight in weights}) > 1:
            return self._apart(modules, shapes)
        bias = None if all(bias is None for bias in biases) else torch.cat([_given(b) for b in biases])
        if weights[0] is None:
            joined = torch.empty((sum(rows for rows, _ in shapes), shapes[0][1]), dtype=self.dtype, device=self.device)
            start = 0
            for name, (rows, columns) in zip(names, shapes, strict=True):
                joined[start : start + rows] = self.matrix(name, rows, columns)
                start += rows
            return [DenseLinear(joined, bias, self.stored_as(names))]
        halves = [_half(_given(weight)) for weight in weights]
        together = _together([weight for weight, _ in halves])
        if together is None:
            return self._apart(modules, shapes)
        return [self.quantized(together, bias, self.stored_as(names) + max(note for _, note in halves))]

    def linears(self, layer: int) -> dict[str, list[RuntimeLinear]]:
        """The linears of a block by stage, fused where they go together."""
        family = self.source.family
        shapes, prefix = family.linear_shapes(self.source.config, layer), family.block.format(layer)
        return {
            stage.name: self.fused([prefix + name for name in stage.linears], [shapes[name] for name in stage.linears])
            for stage in family.stages
        }

    def _apart(self, modules: Sequence[str], shapes: Sequence[tuple[int, int]]) -> list[RuntimeLinear]:
        return [self.fused([module], [shape])[0] for module, shape in zip(modules, shapes, strict=True)]

    def quantized(self, weight: Integers, bias: Tensor | None, stored: str) -> RuntimeLinear:
        """The module for this device."""
        (rows, columns), groups = weight.codes.shape, weight.scales.shape[1]
        if self.device.type == "cpu" and cpu_int4.available(rows, columns, columns // groups):
            return CpuQuantLinear(weight, bias, stored)
        return QuantLinear(weight, bias, stored)

    def embedding(self) -> nn.Module:
        """The token embedding."""
        name, config = self.source.family.embedding, self.source.config
        weight = self.integers(name)
        if weight is not None:
            return QuantEmbedding(_half(weight)[0], self.dtype)
        table = nn.Embedding(1, 1, device="meta")
        table.weight = nn.Parameter(self.matrix(name, config.vocab, config.hidden), requires_grad=False)
        table.num_embeddings, table.embedding_dim = config.vocab, config.hidden
        return table

    def head(self, embedding: nn.Module) -> RuntimeLinear:
        """The output head; a tied 16-bit one shares the embedding's memory."""
        name, config = self.source.family.head, self.source.config
        if config.tied and isinstance(embedding, nn.Embedding):
            return DenseLinear(embedding.weight.data, None, self.stored_as([self.source.family.embedding]))
        return self.fused([name.removesuffix(".weight")], [(config.vocab, config.hidden)])[0]

    def embedding_and_head(self) -> tuple[nn.Module, RuntimeLinear]:
        """The token embedding and the output head."""
        embedding = self.embedding()
        return embedding, self.head(embedding)


def _given(value: Any) -> Any:
    assert value is not None
    return value
