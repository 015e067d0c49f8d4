"""The steps of a block, fused: one launch adds and norms, one rotates and writes the cache, one gates (`qquant.kernels.between`).

Linears that share an input are one product, whose slices are never cut apart where the next step wants all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qquant.families import Family, ModelConfig
from qquant.kernels.between import add_norm, gate


@dataclass(frozen=True)
class Layer:
    """The weights of one block."""

    norms: Mapping[str, Tensor]  # by the stage that they stand before
    linears: Mapping[str, nn.Module | Sequence[nn.Module]]  # by stage: one fused, or several side by side
    widths: Mapping[str, Sequence[int]]  # by stage: outputs of each linear
    vectors: Mapping[str, Tensor]  # everything else, by name

    @classmethod
    def of(
        cls,
        family: Family,
        config: ModelConfig,
        index: int,
        linears: Mapping[str, nn.Module | Sequence[nn.Module]],
        vector: Callable[[str], Tensor],
    ) -> Layer:
        """Block `index` of a model with its `linears` by stage; `vector` gives a norm or another vector by its name in the model."""
        prefix, shapes = family.block.format(index), family.linear_shapes(config, index)
        return cls(
            norms={stage.name: vector(prefix + stage.norm) for stage in family.stages if stage.norm},
            linears=linears,
            widths={stage.name: [shapes[linear][0] for linear in stage.linears] for stage in family.stages},
            vectors={v.name: vector(prefix + v.name) for stage in family.stages for v in stage.vectors},
        )


class _Outputs(Sequence[Tensor]):
    """What the linears of a stage gave, which were one product; it is cut only for who asks for a part."""

    def __init__(self, joined: Tensor, widths: Sequence[int]) -> None:
        self.joined, self.widths = joined, widths

    def __len__(self) -> int:
        return len(self.widths)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.joined.split(list(self.widths), dim=-1))

    def __getitem__(self, index: Any) -> Any:
        return self.joined.split(list(self.widths), dim=-1)[index]


def _joined(outputs: Sequence[Tensor]) -> Tensor:
    if isinstance(outputs, _Outputs):
        return outputs.joined
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), dim=-1)


@dataclass(frozen=True)
class Sum:
    """A residual stream [M, hidden], and what is added to it as soon as somebody reads it."""

    x: Tensor
    y: Tensor | None = None


@dataclass
class Fused:
    """The operators of one block: sums go with the norm after them, rotation with the cache."""

    layer: Layer
    epsilon: float
    rotate: Callable[[Tensor], Tensor]  # fused queries, keys and values -> queries
    mix: Callable[[Tensor], Tensor]  # the attention
    read: tuple[Sum, Tensor] | None = None  # a stream that was added up, and its sum

    def normed(self, stage: str, x: Sum) -> Tensor:
        """The sum of the stream through the norm before `stage`; the sum is kept for who adds to it."""
        total, h = add_norm(x.x, x.y, self.layer.norms[stage], self.epsilon)
        self.read = x, total
        return h

    def apply(self, stage: str, x: Tensor) -> Sequence[Tensor]:
        """What the linears of `stage` make of x [M, in]."""
        linear = self.layer.linears[stage]
        if isinstance(linear, nn.Module):
            widths = self.layer.widths[stage]
            return (linear(x),) if len(widths) == 1 else _Outputs(linear(x), widths)
        return [module(x) for module in linear]

    def head_norm(self, name: str, x: Tensor) -> Tensor:
        """Each head of x through the norm whose weight is vector `name`."""
        weight = self.layer.vectors[name]
        return add_norm(x.reshape(-1, len(weight)), None, weight, self.epsilon)[1].view(x.shape)

    def attend(self, heads: Sequence[Tensor]) -> Tensor:
        """The attention, after keys and values went into the cache."""
        return self.mix(self.rotate(_joined(heads)))

    def gated(self, pair: Sequence[Tensor]) -> Tensor:
        """The product of silu(first) and second."""
        return gate(_joined(pair))

    def add(self, x: Sum, y: Tensor) -> Sum:
        """A sum that nobody has made yet."""
        if self.read and self.read[0] is x:
            return Sum(self.read[1], y)
        return Sum(x.x if x.y is None else x.x + x.y, y)
