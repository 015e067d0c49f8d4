"""What the forward pass of a block is made of, so that each family writes it once and whoever runs it says how each step is done.

    def forward(ops, x):
        h = ops.normed("qkv", x)                      what is left of the residual stream after a stage's norm
        yield StageInput("qkv", h)                    the linears of the stage are read after this, so they may be replaced
        a = ops.attend(ops.apply("qkv", h))
        yield StageInput("o", a, x)                   x: what the output of the stage is added to
        ...
        return x                                      the residual stream after the block

It is run by `decoder.Block` (a sequence at a time, stage by stage: calibration and fidelity), by `checks.decoding` (many answers with a
cache) and by `runtime.stepping` (fused, in captured graphs). The residual stream is a tensor, or what an operator makes of it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Stream = TypeVar("Stream")


class StageInput(NamedTuple, Generic[Stream]):
    """A stage is about to read `x` [..., in]; `residual` is what its output is added to, where it is."""

    stage: str  # "": the block is over, and `x` its output
    x: Tensor
    residual: Stream | None = None


class Operators(Protocol[Stream]):
    """The steps of a block. Tensors are [..., features], a token in every row; heads lie side by side in the features."""

    def normed(self, stage: str, x: Stream) -> Tensor:
        """The residual stream through the norm before `stage`."""
        ...

    def apply(self, stage: str, x: Tensor) -> Sequence[Tensor]:
        """What each linear of `stage` makes of x, in the order of the table."""
        ...

    def head_norm(self, name: str, x: Tensor) -> Tensor:
        """Each head of x through the norm whose weight [head] is the block's vector `name`."""
        ...

    def attend(self, heads: Sequence[Tensor]) -> Tensor:
        """Queries, keys and values through rotary embedding and causal attention, with what was read before."""
        ...

    def gated(self, pair: Sequence[Tensor]) -> Tensor:
        """silu(first) * second."""
        ...

    def add(self, x: Stream, y: Tensor) -> Stream:
        """The residual stream with the output of a stage."""
        ...


Passage = Generator[StageInput[Stream], None, Stream]  # of a sample through a block


def through(passage: Passage[Stream]) -> Stream:
    """The residual stream after a block whose stages nobody watches."""
    while True:
        try:
            next(passage)
        except StopIteration as end:
            output: Stream = end.value
            return output
