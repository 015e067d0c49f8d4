"""One block of the backward pass: gradients by its input from those by its output, and what is kept of those at its linears.

    |g_t|^2 of each stage       of every token, in the order of the samples
    G = sum_t g_t g_t'          of at most ROWS rows of a linear at a time: what lies outside these blocks of its diagonal is left out

Several ranks run the samples in turn. Each G is summed by one of them, to whom the columns of these rows travel; the first gets all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qquant.errors import NumericalError
from qquant.exchange import Exchange, Parcels
from qquant.families import Family, ModelConfig
from qquant.families.decoder import Block
from qquant.kernels.gram import gram
from qquant.solve.stream import all_finite

REMEDY = "set calibration.objective to output"
FLASH = "FlashAttention"  # in the name of its node on the way back
ROWS = 2048  # rows of a linear whose curvature is kept together


class Watched(Block):
    """A block that reports the gradient of every linear's output."""

    def __init__(self, family: Family, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(family, config, weights, dtype)
        self.gradients: dict[str, Tensor] = {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = super().linear(name, x)
        y.register_hook(lambda gradient: self.gradients.__setitem__(name, gradient))
        return y

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention whose gradients are added in an order that does not change from run to run."""
        mixed = super().mixed(query, key, value)
        node = mixed.grad_fn
        while node is not None and FLASH not in node.name():  # widths that it has not are padded and cut
            node = node.next_functions[0][0]
        if node is not None:
            node.register_prehook(lambda _: _in_one_order(True))
            node.register_hook(lambda *_: _in_one_order(False))
        return mixed


def _in_one_order(asked: bool) -> None:
    """Ask torch for operators that are repeatable.

    For the time of flash attention alone: it heeds nothing less, and cuBLAS, which is repeatable on one stream, would refuse to multiply.
    """
    torch.use_deterministic_algorithms(asked)


@contextmanager
def _repeatable(x: Tensor) -> Iterator[None]:
    """Attention to x whose gradients `Watched` can have in one order: flash attention's on a GPU in 16 bit, plain products' elsewhere."""
    on_card = x.is_cuda and x.dtype != torch.float32
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if on_card else SDPBackend.MATH):
            yield
    finally:
        if on_card:
            _in_one_order(False)


def backward(
    block: Watched, layer: int, inputs: Sequence[Tensor], gradients: Sequence[Tensor], count: int, exchange: Exchange
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients by the input of a block from those by its output; on the first rank what goes into the block's file.

    `inputs`, `gradients`: of this rank's samples among `count`.
    """
    family, device = block.family, next(iter(block.weights.values())).device
    parts = {
        (name, index): rows
        for stage in family.stages
        for name in stage.linears
        for index, rows in enumerate(_spans(len(block.weights[f"{name}.weight"])))
    }
    costs = {f"{name} {index:04d}": float((rows.stop - rows.start) ** 2) for (name, index), rows in parts.items()}
    owners = exchange.owners(costs)
    owned = [
        [(name, rows) for (name, index), rows in parts.items() if owners[f"{name} {index:04d}"] == rank]
        for rank in range(exchange.world)
    ]
    totals = [
        torch.zeros(rows.stop - rows.start, rows.stop - rows.start, device=device) for _, rows in owned[exchange.rank]
    ]
    weights: list[list[Tensor]] = []
    before: list[Tensor] = []

    def give(_: int) -> Parcels:
        x, gradient = inputs[len(before)], gradients[len(before)]
        leaf = x.clone().requires_grad_()
        with _repeatable(leaf):
            block.forward(leaf).backward(gradient)
        assert leaf.grad is not None
        before.append(leaf.grad)
        by_linear = {name: gradient.flatten(0, -2) for name, gradient in block.gradients.items()}
        block.gradients.clear()
        weights.append([_squares([by_linear[name] for name in stage.linears]) for stage in family.stages])
        parcels = [[by_linear[name][:, rows] for name, rows in wanted] for wanted in owned]
        return parcels

    for _, pieces in exchange.in_turn(count, give):
        for total, piece in zip(totals, pieces, strict=True):
            gram(total, piece.contiguous())
    factors = _factors(family, owned, totals, weights, count, exchange)
    if not all_finite(list(factors.values())):
        raise NumericalError(f"block {layer}: gradients are not finite in {block.dtype}; {REMEDY}")
    return before, factors


def _squares(gradients: Sequence[Tensor]) -> Tensor:
    """|g_t|^2 over all of them, float32 [T]."""
    return reduce(torch.add, (gradient.float().square().sum(1) for gradient in gradients))


def _spans(rows: int) -> list[slice]:
    """Rows of a linear whose curvature is kept together."""
    return [slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS)]


def _factors(
    family: Family,
    owned: Sequence[Sequence[tuple[str, slice]]],
    totals: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor]],
    count: int,
    exchange: Exchange,
) -> dict[str, Tensor]:
    """The content of a block's file, on the first rank; nothing elsewhere.

    `totals`: G of the rows that this rank of `owned` has; `weights`: by sample of this rank's, |g|^2 of each stage.
    """
    parts = [[_mean_one(total, total.diagonal()).bfloat16(), total.diagonal().sum()] for total in totals]
    said = exchange.to_first([x for sample in weights for x in sample] + [x for part in parts for x in part])
    if not exchange.first:
        return {}
    world, stages = exchange.world, family.stages
    samples = [len(range(rank, count, world)) for rank in range(world)]
    by_stage = [
        torch.cat([said[index % world][len(stages) * (index // world) + place] for index in range(count)])
        for place in range(len(stages))
    ]
    stored = {f"weights {stage.name}": _mean_one(values) for stage, values in zip(stages, by_stage, strict=True)}
    rows: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for rank, wanted in enumerate(owned):
        received = iter(said[rank][len(stages) * samples[rank] :])
        for name, span in wanted:
            rows.setdefault(name, {})[span.start // ROWS] = next(received), next(received)
    for name in (name for stage in stages for name in stage.linears):
        parts_of_linear = [rows[name][index] for index in range(len(rows[name]))]
        stored |= {f"rows {name} {index:04d}": part for index, (part, _) in enumerate(parts_of_linear)}
        spread = torch.stack([total for _, total in parts_of_linear]).sum().view(1)
        stored[f"scale {name}"] = spread / len(by_stage[0])
    return stored


def _mean_one(value: Tensor, of: Tensor | None = None) -> Tensor:
    """`value` over the mean of `of` (of itself); zeros stay as they are."""
    mean = (value if of is None else of).mean()
    return value / torch.where(mean == 0, torch.ones_like(mean), mean)
