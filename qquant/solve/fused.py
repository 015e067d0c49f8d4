"""A decoder block by the kernels that the device has: norms, rotary positions and gates in one each, for a pass through many tokens.

Torch reads and writes the activations of a norm nine times and of a rotary embedding six times, which takes as long as a third of the
products. `qquant.kernels.elementwise` rounds where torch does. In float32 the products take most of the time, and are of halves there
(`qquant.kernels.product`), which are made once for the linears of a stage, and once for the samples. Where a gradient is wanted the
operators stay torch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qquant.families import Family, ModelConfig
from qquant.families.decoder import Block, rotary
from qquant.kernels import elementwise
from qquant.kernels.product import stretched, stretched_product


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


class SplitBlock(FusedBlock):
    """`Block` in float32 whose products a GPU's tensor cores make, of halves."""

    def __init__(self, family: Family, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(family, config, weights, dtype)
        held = {name: value for name, value in weights.items() if value.dtype == torch.bfloat16}
        self.exact = {name: (self.weights[name], value) for name, value in held.items()}  # that bfloat16 holds
        self.stretched: dict[str, tuple[Tensor, Tensor]] = {}  # of one stage: a weight and its halves

    def apply(self, stage: str, x: Tensor) -> list[Tensor]:
        """What each linear of `stage` makes of x [..., in]."""
        linears = self.family.stage(stage).linears
        if self.stretched.keys() != set(linears):
            self.stretched = {}
        parts = stretched(x)
        return [self._times(name, parts) for name in linears]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply linear `name` to x [..., in]."""
        return self._times(name, stretched(x))

    def _times(self, name: str, parts: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        made, halves = self.stretched.get(name, (None, None))
        if halves is None or made is not weight:  # weights are replaced as they are solved
            wide, exact = self.exact.get(f"{name}.weight", (None, weight))
            halves = torch.cat([exact, exact], 1) if wide is weight else stretched(weight, 2)
            self.stretched[name] = weight, halves
        y = stretched_product(parts, halves)
        return y if bias is None else y.add_(bias)


def block_of(family: Family, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Block:
    """The block of these weights, of all families alike."""
    some = next(iter(weights.values())).new_empty(0, dtype=dtype)
    kind = SplitBlock if some.is_cuda and dtype == torch.float32 else FusedBlock if elementwise.serves(some) else Block
    return kind(family, config, weights, dtype)
