"""A decoder block whose norms, rotary positions and gates are one kernel each, where the device has such: a pass through many tokens.

Torch reads and writes the activations of a norm nine times and of a rotary embedding six times, which takes as long as a third of the
products. `qquant.kernels.elementwise` rounds where torch does. Where a gradient is wanted, and in float32, the operators stay torch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qquant.families import Family, ModelConfig
from qquant.families.decoder import Block, rotary
from qquant.kernels import elementwise


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


def block_of(family: Family, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Block:
    """The block of these weights, of all families alike."""
    fused = elementwise.serves(next(iter(weights.values())).new_empty(0, dtype=dtype))
    return (FusedBlock if fused else Block)(family, config, weights, dtype)
