"""A decoder block by the kernels that the device has: norms, rotary positions and gates in one each, for a pass through many tokens.

Torch reads and writes the activations of a norm nine times and of a rotary embedding six times, which takes as long as a third of the
products. `qquant.kernels.elementwise` rounds where torch does. In float32 the products take most of the time, and are of float16 there
(`qquant.kernels.scaled_half`), which inputs become once for the linears of a stage, and weights once for the samples. Where a gradient
is wanted the operators stay torch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qquant.families import Family, ModelConfig
from qquant.families.decoder import Block, rotary
from qquant.kernels import elementwise
from qquant.kernels.scaled_half import HalfRows, half_rows, scaled_product

TINY = 2.0**-60


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


class HalfBlock(FusedBlock):
    """`Block` in float32 whose products a GPU's tensor cores make, of float16 rows by powers of two."""

    def __init__(self, family: Family, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(family, config, weights, dtype)
        self.halved: dict[str, tuple[Tensor, HalfRows]] = {}  # of one stage: a weight, and what it is multiplied as

    def apply(self, stage: str, x: Tensor) -> list[Tensor]:
        """What each linear of `stage` makes of x [..., in]."""
        linears = self.family.stage(stage).linears
        if self.halved.keys() != set(linears):
            self.halved = {}
        rows = half_rows(x)
        return [self._times(name, rows) for name in linears]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply linear `name` to x [..., in]."""
        return self._times(name, half_rows(x))

    def _times(self, name: str, rows: HalfRows) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        made, halved = self.halved.get(name, (None, None))
        if halved is None or made is not weight:  # weights are replaced as they are solved
            halved = half_rows(weight)
            self.halved[name] = weight, halved
        return scaled_product(rows, halved, self.weights.get(f"{name}.bias"))

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention [B, heads, T, head_dim] of as large queries to keys and values.

        Queries and keys are brought to one size, which leaves their products as they are, and values to 1.
        """
        sizes = [x.abs().amax().clamp(TINY, 1 / TINY) for x in (query, key, value)]
        between, unit = _power((sizes[0] / sizes[1]).sqrt()), _power(sizes[2])
        query, key, value = (x.half() for x in (query / between, key * between, value / unit))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).float().mul_(unit)


def _power(x: Tensor) -> Tensor:
    """The power of two about x."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent)


def block_of(family: Family, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Block:
    """The block of these weights, of all families alike."""
    some = next(iter(weights.values())).new_empty(0, dtype=dtype)
    kind = HalfBlock if some.is_cuda and dtype == torch.float32 else FusedBlock if elementwise.serves(some) else Block
    return kind(family, config, weights, dtype)
