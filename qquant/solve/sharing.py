"""The 16-bit stream on several ranks that build the same artifacts, and what does not wait for a stream of an artifact's own.

    forward pass     samples in turn; other ranks get sums by column, and of the inputs of a stage those that own its H
    H                each stage's is made by one rank, its owner: the terms of one rank alone, in their order
    solve            of an artifact that follows the 16-bit stream, by the owner of the stage; the first rank writes the block
                     of one with a stream of its own, whose stages wait for each other, by linears, on a CPU: rows do not depend on what
                     is stacked with them but where G couples them, which it does within a linear alone

Where folded scales are searched, which needs every H of a block, all ranks get all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from qquant.algorithms.gram import Gram, NotFiniteError
from qquant.devices import policy
from qquant.disk.records import to_plain, typed
from qquant.exchange import Parcels
from qquant.families import Stage
from qquant.kernels.column_sums import column_sums
from qquant.ranks import dealt
from qquant.report.solved import LinearRecord
from qquant.solve.block import View
from qquant.solve.drift import apart, together
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


def solve_stage(
    stage: Stage,
    targets: Mapping[str, Tensor],
    gram: Gram | None,
    rows: Rows,
    solver: Solver,
    view: View,
    stream: Stream,
) -> dict[str, Tensor]:
    """What `Solver.solve` gives, on the first rank, which alone has `targets` and `gram`; linears are shared out where their bits allow it."""
    exchange = stream.exchange
    grids = solver.grids({linear: view.weights[f"{linear}.weight"] for linear in stage.linears})
    divisible = exchange.world > 1 and len(grids) > 1 and None not in grids.values() and policy(stream.device).split
    if not divisible:
        return solver.solve(stage, targets, gram, rows) if gram is not None else {}
    began = time.perf_counter()
    hands = dealt({linear: float(len(view.weights[f"{linear}.weight"])) for linear in grids}, exchange.world)
    tokens, largest = exchange.say([gram.tokens, gram.largest] if gram else None)[0]
    parcels: list[Sequence[Tensor]] = [()] * exchange.world
    if gram:
        sums = gram.matrix, gram.absolute, gram.squares
        parcels = [[*sums, *(targets[f"{linear}.weight"] for linear in hand)] if hand else () for hand in hands]
    part, mine, values = solver.part(), hands[exchange.rank], dict[str, Tensor]()
    given = exchange.deliver(parcels)[0]
    if mine:
        weights = {f"{linear}.weight": weight for linear, weight in zip(mine, given[3:], strict=True)}
        linears = tuple(row for row in stage.rows if row.name in mine)
        values = part.solve(
            replace(stage, rows=linears), weights, Gram(given[0], given[1], given[2], tokens, largest), rows
        )
    said = exchange.say([list(part.tensors), [to_plain(entry) for entry in part.record]])
    received = exchange.to_first([*part.tensors.values(), *(values[linear] for linear in mine)])
    if not exchange.first:
        return {}
    solved: dict[str, Tensor] = {}
    records: dict[str, LinearRecord] = {}
    for (names, entries), hand, parcel in zip(said, hands, received, strict=True):
        solver.tensors.update(zip(names, parcel, strict=False))
        solved |= dict(zip(hand, parcel[len(names) :], strict=True))
        for entry in entries:
            record = typed(LinearRecord, entry, "a rank")
            records[record.name] = record
    in_order = [linear for grid in dict.fromkeys(grids.values()) for linear in grids if grids[linear] == grid]
    solver.record += [records[f"{solver.prefix}{linear}.weight"] for linear in in_order]
    solver.seconds[solver.prefix + stage.name] = round(time.perf_counter() - began, 4)
    return solved
