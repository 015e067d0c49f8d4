"""A stream of an artifact's own: every linear makes up for the errors before it.

An artifact with `propagate` walks on a stream of its own, which begins with its own embedding, if that is codes, and runs through its own
quantized linears beside the 16-bit one (both in
float32 for 8 bits, which stray less than bfloat16 is rounded). Every
linear then has the target that makes up for the errors before it, as far as its own input x~ can tell them:

    W <- W + SHARE (W sum_t s_t (x - x~) x~'  +  sum_t s_t (r - r~) x~') (H~ + RIDGE mean(diag H~) I)^-1

with x its input and r the residual stream that its output is added to (second term: o and down), both without quantization. The first
term alone is GPTAQ's (arXiv 2504.02692), the sequential target Qronos's (arXiv 2505.11695).

The 16-bit stream passes through the block beside it. Where nobody needs its statistics before, it is taken through here and nowhere
else, and they are taken on the way (`Carried`).

Several ranks that build one artifact run the samples in turn; the sums of a stage are made by several of them (`drift`), and go to
all, who solve its linears together, or to the first, which solves them (`sharing.divisible`). All know what was found: the next stage waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from qquant.algorithms import coupled
from qquant.algorithms.descent import WIDE
from qquant.algorithms.gram import Gram, NotFiniteError
from qquant.algorithms.sharing import rows_of
from qquant.artifact.draft import Draft
from qquant.devices import free_memory, policy
from qquant.errors import NumericalError
from qquant.exchange import ALONE, Exchange
from qquant.families import Stage
from qquant.families.decoder import Block
from qquant.families.forward import StageInput
from qquant.kernels.product import tensor_cores
from qquant.kernels.triangular import Upper
from qquant.plan.room import passages_bytes, passages_stay
from qquant.solve.block import View, transform
from qquant.solve.drift import Drift, Inputs, drift
from qquant.solve.moments import Moments
from qquant.solve.sharing import divisible, solve_stage
from qquant.solve.solver import Solver, unit
from qquant.solve.stream import STATES, Piece, Stream, all_finite, require_finite
from qquant.source.padding import without_padding

Passage = Generator[StageInput[Tensor], None, None]  # of a piece through a block
SHARE = 0.7  # of the correction for errors before a linear
RIDGE = 0.2  # of the mean of diag(H~)


@dataclass(frozen=True)
class Carried:
    """The 16-bit stream, where it goes through a block with an artifact's own, and empty sums for its statistics, if they are wanted."""

    stream: Stream
    grams: Mapping[str, Gram]
    moments: Moments


def carry(view: View, carried: Carried, stream: Stream, draft: Draft) -> bool:
    """Solve a block on the artifact's own stream, and move both streams on; False where something is not finite: nothing has changed then.

    Only for an artifact whose block is neither there nor transformed.
    """
    for gram in carried.grams.values():
        gram.clear()
    try:
        solver = Solver(view.checkpoint, draft, view.layer, carried.moments, alone=True)
        _propagated(view, {}, carried.stream.by_piece, stream, solver, (), carried)
    except NotFiniteError:
        return False
    return True


def own_block(  # noqa: PLR0913  each is of another thing
    view: View,
    grams: Mapping[str, Gram],
    before: Mapping[Piece, Tensor],
    stream: Stream,
    draft: Draft,
    moments: Moments,
    overflowed: Collection[int],
    carried: Carried | None = None,
) -> None:
    """Solve a block on the artifact's own stream; in float32 where it is not finite in the stream's dtype.

    `overflowed`: samples that went through the 16-bit block in float32. `carried`: the stream that `before` is of, which is to go through
    the block as well; for a draft as for `carry`.
    """
    for attempt in (view, replace(view, dtype=torch.float32)):
        try:
            solver = Solver(view.checkpoint, draft, view.layer, moments, alone=True)
            _propagated(attempt, grams, before, stream, solver, overflowed, carried)
        except NotFiniteError as failure:
            if attempt.dtype == torch.float32:
                raise NumericalError(
                    f"block {view.layer} of {draft.plan.name}: activations are not finite in float32 either: {failure}"
                ) from None
        else:
            return


def _propagated(
    view: View,
    grams: Mapping[str, Gram],
    before: Mapping[Piece, Tensor],
    stream: Stream,
    solver: Solver,
    overflowed: Collection[int],
    carried: Carried | None = None,
) -> None:
    """Solve stage by stage, each on inputs that came through the stages already quantized.

    `before`: the input of the 16-bit block, by the pieces of the samples that `stream` runs on.
    """
    layer, family, exchange = view.layer, view.checkpoint.family, stream.exchange
    if unit(layer) in solver.draft.units:
        device = stream.device
        stream.advance(layer, view.block({name: value.to(device) for name, value in solver.stored().items()}), {})
        return
    transformed = transform(view, solver.draft, grams)
    rows = view.rows(transformed)
    exact = view.block(transformed.weights)
    own = view.block(exact.weights)  # the same tensors, until they are solved
    kept = stream.dtype
    transformed.grams.clear()  # what is solved here has statistics of its own
    ways = _Ways(exact, own, before, stream, bool(carried), _anew(view, stream, 1 + bool(carried)))
    seen: Mapping[str, Gram] = carried.grams if carried else {}
    for number, stage in enumerate(family.stages):
        view.at(solver.draft, stage)
        if view.inputs[stage.name] > WIDE:
            coupled.visited.forget()  # memory is short beside such matrices
        everywhere = divisible(stage, solver, view, stream)
        sums = drift(view, stage, ways.inputs(number), stream, seen.get(stage.name), everywhere)
        targets: dict[str, Tensor] = {}
        if sums is not None:
            targets = _targets(stage, transformed.weights, sums, exchange if everywhere else ALONE)
            targets |= {name: transformed.weights[name] for name in targets if solver.copies(name)}
        values = solve_stage(stage, targets, sums, rows, solver, stream)
        del targets
        del sums
        for linear, value in zip(stage.linears, values, strict=True):
            own.weights[f"{linear}.weight"] = value.to(own.weights[f"{linear}.weight"])
        del values
    hidden = list(ways.outputs(own, kept))
    moved = list(ways.outputs(exact, kept)) if carried else []
    if not all(exchange.say(all_finite([*hidden, *moved]))):
        raise NotFiniteError(f"its output is not finite in {kept}")
    if carried:
        require_finite(layer, seen)
        carried.stream.hidden, carried.stream.overflowed = moved, set()
        if seen:
            carried.moments.save(layer, seen)
    in_float32 = sum(exchange.say(len(overflowed)))
    if exchange.first:
        every = sum(map(len, stream.every))
        solver.finish(transformed.weights, transformed.choices, in_float32 if view.dtype == kept else every)
    stream.hidden = hidden


def _anew(view: View, stream: Stream, onward: int) -> bool:
    """Whether memory is too short for what every piece holds between two stages; `onward`: ways that go on to the end."""
    tokens = sum(x.shape[:-1].numel() for x in stream.hidden)
    config, itemsize = without_padding(view.checkpoint).config, torch.empty((), dtype=view.dtype).itemsize
    held = passages_bytes(view.checkpoint.family, config, tokens, itemsize, onward)
    return stream.pressure >= STATES or not passages_stay(held, free_memory(stream.device))


@dataclass
class _Ways:
    """Every piece on its two ways through a block, stage by stage.

    They stand where the last stage left them or, `anew`, begin again for every stage: twice the time, and memory of one piece.
    """

    exact: Block
    own: Block
    before: Mapping[Piece, Tensor]
    stream: Stream
    onward: bool  # whether the one without quantization goes on to the end, too
    anew: bool
    passes: dict[Piece, list[Passage]] = field(default_factory=dict)  # those that stand

    def _begun(self, *blocks: Block) -> Iterator[tuple[Piece, list[Passage]]]:
        device = self.stream.device
        for (piece, x), y in zip(self.before.items(), self.stream.hidden, strict=True):
            begin = {self.exact: x, self.own: y}
            yield piece, [block.stages(begin[block].to(device, block.dtype)) for block in blocks]

    def inputs(self, number: int) -> Iterator[Inputs]:
        """What every piece brings to stage `number`; to be asked for in their order, and each to its end."""
        if self.anew:
            for piece, both in self._begun(self.exact, self.own):
                yield Inputs(piece, *(next(islice(way, number, None)) for way in both))
        else:
            self.passes = self.passes or dict(self._begun(self.exact, self.own))
            last = number == len(self.own.family.stages) - 1
            yield from _inputs(self.passes, last, self.onward)

    def outputs(self, block: Block, dtype: torch.dtype) -> Iterator[Tensor]:
        """What a block makes of every piece, where the stream has its states."""
        place = torch.device("cpu") if self.stream.pressure >= STATES else self.stream.device
        if self.anew:
            for _, (way,) in self._begun(block):
                yield next(islice(way, len(block.family.stages), None)).x.to(place, dtype)
        else:
            for both in self.passes.values():
                yield next(both[0 if block is self.exact else -1]).x.to(place, dtype)


def _inputs(passes: Mapping[Piece, list[Passage]], last: bool, onward: bool) -> Iterator[Inputs]:
    """The next stage's inputs of every piece in turn.

    After the `last` stage the first passage goes to its end at once where it goes `onward`, since an output is smaller than what it is made
    of; else nothing is asked of it any more, and it is dropped.
    """
    for piece, both in passes.items():
        own = both[-1]
        # Closing is not enough: Python up to 3.12.3 keeps what a closed generator held.
        yield Inputs(piece, next(both.pop(0) if last and not onward else both[0]), next(own))
        if last and onward:
            both[0] = _passed(next(both[0]))


def _passed(output: StageInput[Tensor]) -> Passage:
    """A passage of which the output is left."""
    yield output


def _targets(stage: Stage, weights: Mapping[str, Tensor], sums: Drift, exchange: Exchange) -> dict[str, Tensor]:
    """The weights of a stage with what makes up for the errors before them, float32; of `sums` H~ alone is left. Ranks have some rows of each."""
    names = [f"{linear}.weight" for linear in stage.linears]
    whole = torch.cat([weights[name] for name in names]).float()  # they are solved as one matrix
    targets = dict(zip(names, whole.split([len(weights[name]) for name in names]), strict=True))
    spans = {name: rows_of(len(weight), exchange) for name, weight in targets.items()}
    lacking = {}
    with tensor_cores():
        for name, weight in targets.items():
            mine = spans[name][exchange.rank]
            lacking[name] = weight[mine] @ sums.cross
            if sums.residuals is not None:
                lacking[name] = lacking[name] + sums.residuals[mine]
    del sums.cross, sums.residuals
    against = _against(_ridge(sums.gram))
    for name, weight in targets.items():
        for span, (correction,) in zip(spans[name], exchange.share([against(lacking.pop(name))]), strict=True):
            weight[span] += SHARE * correction
    return targets


def _ridge(gram: Gram) -> Tensor:
    """The lower factor of H + RIDGE mean(diag H) I."""
    damped = gram.matrix.mT.contiguous().mT  # in the layout that is factored in place
    mean = damped.diagonal().mean()
    damped.diagonal().add_(RIDGE * mean + (mean == 0))
    return torch.linalg.cholesky(damped, out=damped)


def _against(factor: Tensor) -> Callable[[Tensor], Tensor]:
    """What multiplies a correction, which it may use up, by (L L')^-1."""
    if policy(factor.device).by_blocks:
        upper = Upper(factor.mT)
        return lambda correction: upper.solve_transposed(upper.solve(correction))
    return lambda correction: torch.cholesky_solve(correction.T, factor).T
