"""A decoder block by the kernels that the device has: norms, rotary positions and gates in one each, for a pass through many tokens.

Torch reads and writes the activations of a norm nine times and of a rotary embedding six times, which takes as long as a third of the
products. `qquant.kernels.elementwise` rounds where torch does. In float32 the products take most of the time, and are of halves there
(`qquant.kernels.product`). Where a gradient is wanted the operators stay torch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qquant.families import Family, ModelConfig
from qquant.families.decoder import Block, rotary
from qquant.kernels import elementwise
from qquant.kernels.product import product_transposed


class FusedBlock(Block):
    """`Block` by fewer kernels."""

    def __init__(self, family: Family, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(family, config, weights, dtype)
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}

    def normed(self, stage: str, x: Tensor) -> Tensor:
        """The residual stream x [..., T, hidden] through the norm before `stage`."""
        return elementwise.rms_norm(x, self.weights[self.family.stage(stage).norm], self.config.epsilon)

    def turned(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key [..., heads, T, head_dim] at their positions; what is given is used up."""
        length = query.shape[-2]
        if length not in self.tables:
            self.tables[length] = rotary(self.config, length, query.device, query.dtype)
        turned = [
            elementwise.rotate(x.view(-1, *x.shape[-3:]), *self.tables[length]).view(x.shape) for x in (query, key)
        ]
        return turned[0], turned[1]

    def gated(self, pair: Sequence[Tensor]) -> Tensor:
        """silu(first) * second."""
        return elementwise.gate(*pair)


class SplitBlock(Block):
    """`Block` in float32 whose products a GPU's tensor cores make."""

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply linear `name` to x [..., in]."""
        y, bias = product_transposed(x, self.weights[f"{name}.weight"]), self.weights.get(f"{name}.bias")
        return y if bias is None else y.add_(bias)


def block_of(family: Family, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Block:
    """The block of these weights, of all families alike."""
    some = next(iter(weights.values())).new_empty(0, dtype=dtype)
    kind = FusedBlock if elementwise.serves(some) else SplitBlock if some.is_cuda and dtype == torch.float32 else Block
    return kind(family, config, weights, dtype)
