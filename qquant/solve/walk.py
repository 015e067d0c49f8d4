"""The walk: once through the decoder blocks, every artifact from the same pass.

For each block the calibration tokens run through its 16-bit weights; the input of each stage goes into that
stage's Gram matrix, and the output is the next block's input. Then, for each artifact that does not have this block yet,

    transform (AWQ)  ->  fit the format's grid  ->  round  ->  pack, read back  ->  write in place, journal

On a GPU a thread of each artifact does the last step, one block behind. Activations have the dtype of the checkpoint (float16
checkpoints are computed in float32: float16 overflows); what happens where they are not finite, or memory is short, is in `stream`.
Only one block and its Gram matrices are in memory, besides one hidden state per calibration token.

Several ranks measure the curvature together. Then each walks for drafts of its own, or all walk for the same (`sharing`): samples are run
in turn, sums have an owner each, and the first rank writes. The first keeps the moments.

With a `curvature` the tokens of a Gram matrix are weighted, codes are polished for the KL divergence of the whole model, and embedding
and head are solved before the blocks (`outside`). Samples on which no gradient was measured count with weight 1, which is the mean of
the measured ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from threading import Event

import torch
from torch import Tensor

from qquant import background, devices
from qquant.algorithms import coupled
from qquant.algorithms.awq import Transformed
from qquant.algorithms.gram import Gram
from qquant.artifact.draft import Draft
from qquant.exchange import ALONE, Exchange, opened
from qquant.families import Stage
from qquant.progress import Progress
from qquant.solve import sharing
from qquant.solve.block import View, copies, transform
from qquant.solve.curvature import Curvature, measure, spread
from qquant.solve.layers import Layers
from qquant.solve.moments import Moments
from qquant.solve.outside import lacking, solve_tables, write_unsolved
from qquant.solve.propagate import Carried, carry, own_block
from qquant.solve.solver import Rows, Solver, drafted, unit
from qquant.solve.stream import STREAM_DTYPES, Stream, make_room
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import without_padding


def quantize(  # noqa: PLR0913  each is of another thing
    checkpoint: Checkpoint,
    samples: Sequence[Tensor],
    drafts: Sequence[Draft],
    moments: Moments,
    blocks: Layers,
    progress: Progress,
    curvature_tokens: int = 0,
    together: bool = False,
) -> None:
    """Fill every draft, and `moments`. `samples`: int token ids [T] each, possibly of different lengths. `blocks`: the checkpoint's, without padding.

    `together`: all ranks have the same drafts, which the first writes; else each has its own.

    With `curvature_tokens` the solvers minimise the KL divergence of the model, as measured on so many tokens; with 0 the output
    error of each linear.

    Raises:
        NumericalError: an activation is not finite.
        EnvironmentMissingError: there is not enough memory for one sample.
    """
    source, device = without_padding(checkpoint), blocks.device
    dtype = STREAM_DTYPES[checkpoint.dtype]
    ranks = moments.ranks
    mine = [draft for draft in drafts if ranks.first or not together]  # that this rank writes
    copied = [
        draft for draft in mine if copies(draft, checkpoint)
    ]  # what no stream begins with is written beside all else
    found = [draft for draft in mine if draft not in copied]
    begins = [draft for draft in found if draft.plan.spec.own_stream]  # a stream of its own with what is found
    others = [draft for draft in found if draft not in begins]
    solved = curvature_tokens > 0
    beside = devices.threads_help(device)
    layers = checkpoint.config.layers
    waiting = [draft for draft in drafts if any(unit(layer) not in draft.units for layer in range(layers))]
    unmeasured = any(moments.lacks(layer) for layer in range(layers))
    curvature = None

    def write(stop: Event) -> None:
        write_unsolved(checkpoint, copied, solved, torch.device("cpu"), beside, stop)

    with (
        opened(ranks, device) as exchange,
        _writing([*copied, *others], device),
        background.start_early(write, beside) as written,
    ):
        asked = [
            draft for draft in drafts if draft.plan.spec.feedback and (draft in waiting or lacking(checkpoint, draft))
        ]
        work = ranks.gather([bool(asked), bool(drafts)])  # of every rank
        if solved and any(measures for measures, _ in work):
            measured = {
                sample: samples[sample] for sample in spread([len(sample) for sample in samples], curvature_tokens)
            }
            scratch = moments.folder / "curvature"
            curvature = measure(source, measured, scratch, dtype, device, progress, blocks, exchange)
        blocks.take_head()  # of a curvature that was there already
        with _writing(begins, device):
            write_unsolved(checkpoint, found, solved, device, beside, Event())
            if curvature is not None:
                solve_tables(checkpoint, mine, curvature.tables(device), device, progress)
        if together:
            ranks.meet()  # an embedding that is codes begins a stream
            unmeasured = ranks.once(lambda: unmeasured)
        with _writing(begins, device):
            if waiting or (unmeasured and any(owns for _, owns in work)):
                group = exchange if together else ALONE
                _walk(checkpoint, samples, waiting, moments, blocks, progress, curvature, group)
        written()


@contextmanager
def _writing(drafts: Sequence[Draft], device: torch.device) -> Iterator[None]:
    """A thread of each draft writes meanwhile, where that helps; all is written at the end."""
    with ExitStack() as writers:
        for draft in reversed(drafts):  # they end in their order
            writers.enter_context(draft.write_behind(device))
        yield


def _own_stream(
    checkpoint: Checkpoint, draft: Draft, exact: Stream, samples: Sequence[Tensor], dtype: torch.dtype
) -> Stream:
    """The beginning of an artifact's own stream: `exact`, or what its own embedding gives."""
    if copies(draft, checkpoint):
        return exact.branch()
    return Stream.start(drafted(draft), samples, dtype, exact.device, exact.exchange)


def _walk(  # noqa: PLR0913  each is of another thing
    checkpoint: Checkpoint,
    samples: Sequence[Tensor],
    waiting: Sequence[Draft],
    moments: Moments,
    blocks: Layers,
    progress: Progress,
    curvature: Curvature | None,
    exchange: Exchange,
) -> None:
    """Go once through the blocks, for drafts that do not have all of them."""
    dtype, device = STREAM_DTYPES[checkpoint.dtype], blocks.device
    layers = checkpoint.config.layers
    start = Stream.start(checkpoint, samples, dtype, device, exchange)
    shared = [draft for draft in waiting if not draft.plan.spec.own_stream]
    apart = [draft for draft in waiting if draft.plan.spec.own_stream]
    # 8 bits stray less from the checkpoint than activations of a 16-bit dtype are rounded: float32 then shows by how much.
    at_dtype = [draft for draft in apart if dtype == torch.float32 or not draft.plan.spec.eight_bit]
    at_float32 = [draft for draft in apart if dtype != torch.float32 and draft.plan.spec.eight_bit]
    start32 = Stream.start(checkpoint, samples, torch.float32, device, exchange) if at_float32 else None
    own = [_Own(draft, _own_stream(checkpoint, draft, start, samples, dtype)) for draft in at_dtype]
    if start32:
        own += [
            _Own(draft, _own_stream(checkpoint, draft, start32, samples, torch.float32), True) for draft in at_float32
        ]
    make_room([start, *([start32] if start32 else []), *(one.stream for one in own)])
    streams = _Streams(start, start32, shared, own, moments)
    measured = curvature.blocks(range(layers), device) if curvature else nullcontext(repeat(None))
    solved = _solved_before(waiting, layers)
    progress.advance("resume" if solved else "quantize", 0, solved or layers)
    with blocks.walk(range(layers)) as forth, measured as factors:
        for layer in range(layers):
            streams.move(View(checkpoint, layer, next(forth), dtype, next(factors), progress))
            devices.return_freed(device)
            if layer < solved:
                progress.advance("resume", layer + 1, solved)
            if layer + 1 >= solved:
                progress.advance("quantize", layer + 1, layers)
            progress.check_stop()
    coupled.visited.forget()


def _solved_before(waiting: Sequence[Draft], layers: int) -> int:
    """Blocks that an interrupted build solved for every draft: streams go through them, which takes a small part of solving them."""
    lacking = [layer for layer in range(layers) if any(unit(layer) not in draft.units for draft in waiting)]
    return min(lacking, default=0)


@dataclass(frozen=True)
class _Own:
    """An artifact with a stream of its own; the streams of some are float32."""

    draft: Draft
    stream: Stream
    in_float32: bool = False


@dataclass(frozen=True)
class _Streams:
    """Everything that goes through the blocks; what is known of a block is forgotten after it."""

    start: Stream  # of the checkpoint
    start32: Stream | None  # the same in float32
    shared: Sequence[Draft]  # artifacts that follow `start`
    own: Sequence[_Own]
    moments: Moments

    def move(self, view: View) -> None:
        """Move all streams through the next block, and solve it for every artifact."""
        before = self.start.by_piece if any(not one.in_float32 for one in self.own) else {}
        carrier = self._carried(view)
        others = [one.draft for one in self.own]
        grams = {} if carrier else _shared(view, self.start, self.shared, others, self.moments)
        reference = view, before, self.start.overflowed
        reference32 = replace(view, dtype=torch.float32), self.start32.by_piece if self.start32 else {}, ()
        last32 = self._last_in_float32(view)
        for number, one in enumerate(self.own):
            if not any(after.draft.plan.spec.transforms for after in self.own[number:]):
                grams.clear()
            if one.draft is carrier:
                continue
            against, inputs, overflowed = reference32 if one.in_float32 else reference
            carried = Carried(self.start32, {}, self.moments) if self.start32 and one is last32 else None
            work = partial(own_block, against, grams, inputs, one.stream, one.draft, self.moments, overflowed, carried)
            one.stream.with_less_memory(view.layer, work)
        if self.start32 and not last32:
            self.start32.advance(view.layer, reference32[0].block(), {})

    def _last_in_float32(self, view: View) -> _Own | None:
        """The last to be solved in float32, which takes the stream in float32 along; None where it is there, or transformed."""
        there = [one for one in self.own if one.in_float32]
        if not there or unit(view.layer) in there[-1].draft.units or there[-1].draft.plan.spec.transforms:
            return None
        return there[-1]

    def _carried(self, view: View) -> Draft | None:
        """The draft that was solved and took the 16-bit stream along; None where one of all needs its statistics before."""
        behind = [
            draft for draft in [*(one.draft for one in self.own), *self.shared] if unit(view.layer) not in draft.units
        ]
        if not behind or any(draft.plan.spec.transforms or not draft.plan.spec.own_stream for draft in behind):
            return None
        for one in self.own:
            if one.draft in behind and not one.in_float32:
                wanted = any(one.stream.exchange.say(self.moments.lacks(view.layer)))
                grams = view.grams(one.stream.device, matrices=False) if wanted else {}
                work = partial(carry, view, Carried(self.start, grams, self.moments), one.stream, one.draft)
                return one.draft if one.stream.with_less_memory(view.layer, work) else None
        return None


def _shared(
    view: View, stream: Stream, drafts: Sequence[Draft], others: Sequence[Draft], moments: Moments
) -> dict[str, Gram]:
    """Move the 16-bit stream on, solve the block for every draft that follows it; the block's statistics, if any draft needs them."""
    layer, family = view.layer, view.checkpoint.family
    todo = [draft for draft in drafts if unit(layer) not in draft.units]
    scaled = [draft for draft in others if draft.plan.spec.transforms and unit(layer) not in draft.units]
    if stream.exchange.world > 1:
        return _shared_by_ranks(view, stream, todo, scaled, moments)
    needed = todo or scaled or moments.lacks(layer)
    grams = view.grams(stream.device, matrices=bool(todo or scaled)) if needed else {}
    stream.advance(layer, view.block(), grams, view.add)
    if grams:
        moments.save(layer, grams)

    def solve(draft: Draft) -> None:
        solver = Solver(view.checkpoint, draft, layer, moments)
        transformed = transform(view, draft, grams)
        rows = view.rows(transformed)
        for stage in family.stages:
            view.at(draft, stage)
            solver.solve(stage, transformed.weights, transformed.grams[stage.name], rows)
        solver.finish(transformed.weights, transformed.choices, len(stream.overflowed))

    for draft in todo:
        stream.with_less_memory(layer, partial(solve, draft))
    return grams


def _shared_by_ranks(
    view: View, stream: Stream, todo: Sequence[Draft], scaled: Sequence[Draft], moments: Moments
) -> dict[str, Gram]:
    """What `_shared` does, with all ranks of the stream's; of the statistics matrices only where a draft needs all of them."""
    layer, exchange, stages = view.layer, stream.exchange, view.checkpoint.family.stages
    if not any(exchange.say(bool(todo or scaled or moments.lacks(layer)))):
        stream.advance(layer, view.block(), {})
        return {}
    owned = sharing.owners(view, stream)
    grams = sharing.advance(view, stream, owned if todo or scaled else {})
    if any(draft.plan.spec.transforms for draft in (*todo, *scaled)):
        sharing.to_all(grams, owned, stream)
    moments.save(layer, grams)
    overflowed = sum(exchange.say(len(stream.overflowed)))
    for draft in todo:
        transformed = transform(view, draft, grams)
        rows = view.rows(transformed)

        def solve_one(
            stage: Stage, draft: Draft = draft, transformed: Transformed = transformed, rows: Rows = rows
        ) -> Solver:
            view.at(draft, stage)
            solver = Solver(view.checkpoint, draft, layer, moments)
            solver.solve(stage, transformed.weights, transformed.grams[stage.name], rows)
            return solver

        gathered = Solver(view.checkpoint, draft, layer, moments)
        for tensors, record, seconds in sharing.solve(stages, solve_one, owned, stream):
            gathered.tensors.update(tensors)
            gathered.record += record
            gathered.seconds |= seconds
        if exchange.first:
            gathered.finish(transformed.weights, transformed.choices, overflowed)
    return grams
