"""The 16-bit stream on several ranks that build the same artifacts, and what does not wait for a stream of an artifact's own.

    forward pass     samples in turn; other ranks get sums by column, and of the inputs of a stage those that own its H
    H                each stage's is made by one rank, its owner: the terms of one rank alone, in their order
    solve            of an artifact that follows the 16-bit stream, by the owner of the stage; the first rank writes the block
                     of one with a stream of its own, whose stages wait for each other, each by all ranks on a CPU, where the rows of
                     a product have the bits that they have among others (`qquant.algorithms.sharing`)

Where folded scales are searched, which needs every H of a block, all ranks get all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from qquant.algorithms.gram import Gram, NotFiniteError
from qquant.algorithms.sharing import shares
from qquant.devices import policy
from qquant.disk.records import to_plain, typed
from qquant.exchange import ALONE, Parcels
from qquant.families import Stage
from qquant.kernels.column_sums import column_sums
from qquant.report.solved import LinearRecord
from qquant.solve.block import View
from qquant.solve.drift import Drift, apart, together
from qquant.solve.solver import Rows, Solver
from qquant.solve.stream import Stream, require_finite

Owners = Mapping[str, int]  # stage -> rank


def owners(view: View, stream: Stream) -> Owners:
    """Which rank makes H of each stage, and solves it; by about what that takes."""
    costs = {}
    for stage in view.checkpoint.family.stages:
        shapes = [view.weights[f"{linear}.weight"].shape for linear in stage.linears]
        costs[stage.name] = float(sum(rows for rows, _ in shapes) * shapes[0][1] ** 2)
    return stream.exchange.owners(costs)


def advance(view: View, stream: Stream, owned: Owners) -> dict[str, Gram]:
    """Run every sample through the block; the statistics of its stages' inputs, each with its matrix on its owner alone.

    Raises:
        NumericalError: activations are not finite in float32 either.
        ShortMemoryError: there is not enough memory for one sample.
    """
    rank = stream.exchange.rank
    stream.overflowed = set()
    inputs = view.inputs
    grams = {stage: Gram.zeros(columns, stream.device) for stage, columns in inputs.items() if owned.get(stage) == rank}
    grams |= {
        stage: Gram.zeros(columns, stream.device, matrix=False)
        for stage, columns in inputs.items()
        if stage not in grams
    }
    grams = {stage: grams[stage] for stage in inputs}
    for gram in grams.values():
        gram.unseen = []
    mine = [stage for stage in inputs if owned.get(stage) == rank]
    for index, parcel in stream.exchange.in_turn(len(stream.every), _giving(view, stream, owned)):
        piece, coming = stream.every[index], iter(parcel)
        for stage in inputs:
            grams[stage].add_sums(apart(next(coming)), stream.tokens(index))
        for stage in mine:
            x = next(coming)
            grams[stage].add_products(x, view.token_weights(stage, piece, len(x) // len(piece)))
    for gram in grams.values():
        gram.settle()
    require_finite(view.layer, {stage: grams[stage] for stage in mine})
    return grams


def _giving(view: View, stream: Stream, owned: Owners) -> Callable[[int], Parcels]:
    """What moves a sample on, and gives what the ranks need of it."""
    block, world = view.block(), stream.exchange.world

    def give(index: int) -> Parcels:
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def observe(stage: str, x: Tensor) -> None:
            if stage not in seen:
                rows = x.flatten(0, -2)
                sums = column_sums(rows)
                if not bool(sums[2].isfinite()):
                    raise NotFiniteError("the input of a stage is not finite")
                seen[stage] = rows, together(sums)

        place = index // world
        stream.hidden[place] = stream.with_less_memory(
            view.layer, lambda: stream.through(view.layer, block, place, observe)
        )
        sums = [seen[stage][1] for stage in view.inputs]
        return [
            [*sums, *(seen[stage][0] for stage in view.inputs if owned.get(stage) == rank)] for rank in range(world)
        ]

    return give


def to_all(grams: Mapping[str, Gram], owned: Owners, stream: Stream) -> None:
    """Give every rank every matrix."""
    exchange = stream.exchange
    parcels = exchange.share([grams[stage].matrix for stage in grams if owned[stage] == exchange.rank])
    coming = [iter(parcel) for parcel in parcels]
    for stage, gram in grams.items():
        gram.matrix = next(coming[owned[stage]])


def solve(
    stages: Sequence[Stage], solve_one: Callable[[Stage], Solver], owned: Owners, stream: Stream
) -> Iterator[tuple[dict[str, Tensor], list[LinearRecord], dict[str, float]]]:
    """What was found of every stage, in order, on the first rank: tensors to be stored, records, seconds.

    `solve_one`: solves a stage, on its owner.
    """
    exchange = stream.exchange
    solved = {stage.name: solve_one(stage) for stage in stages if owned[stage.name] == exchange.rank}
    said = exchange.say(
        {
            name: [list(one.tensors), [to_plain(entry) for entry in one.record], one.seconds]
            for name, one in solved.items()
        }
    )
    parcels = exchange.to_first([value for one in solved.values() for value in one.tensors.values()])
    if not exchange.first:
        return
    coming = [iter(parcel) for parcel in parcels]
    for stage in stages:
        names, records, seconds = said[owned[stage.name]][stage.name]
        tensors = {name: next(coming[owned[stage.name]]).cpu() for name in names}
        yield tensors, [typed(LinearRecord, entry, "a rank") for entry in records], seconds


def divisible(stage: Stage, solver: Solver, view: View, stream: Stream) -> bool:
    """Whether the ranks of a stream can solve a stage together, in the bits of one; all must ask alike."""
    if stream.exchange.world == 1 or not policy(stream.device).split:
        return False
    grids = solver.grids({linear: view.weights[f"{linear}.weight"] for linear in stage.linears})
    return None not in grids.values() and shares(view.inputs[stage.name], stream.exchange)


def solve_stage(
    stage: Stage, targets: Mapping[str, Tensor], sums: Drift | None, rows: Rows, solver: Solver, stream: Stream
) -> Sequence[Tensor]:
    """The values of the linears of a stage on all ranks, who solve it together, or have those of the first, which alone has `sums` then."""
    exchange = stream.exchange
    everywhere = all(exchange.say(sums is not None))
    solved = solver.solve(stage, targets, sums.gram, rows, exchange if everywhere else ALONE) if sums else {}
    values = [solved[linear] for linear in stage.linears if linear in solved]
    return values if everywhere else exchange.from_rank(0, values)
