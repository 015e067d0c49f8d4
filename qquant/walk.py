"""The walk: once through the decoder blocks, every artifact from the same pass.

For each block the calibration tokens run through its 16-bit weights sample by sample; the input of each stage goes into that
stage's Gram matrix, and the output is the next block's input. Then, for each artifact that does not have this block yet,

    transform (AWQ)  ->  fit the format's grid  ->  round  ->  pack, read back  ->  write in place, journal

On a GPU a thread of each artifact does the last step, one block behind. Activations have the dtype of the checkpoint (float16
checkpoints are computed in float32: float16 overflows); what happens where they are not finite, or memory is short, is in `stream`.
Only one block and its Gram matrices are in memory, besides one hidden state per calibration token.

With a `curvature` the tokens of a Gram matrix are weighted, and codes are polished for the KL divergence of the whole model.

An artifact with `propagate` walks on a stream of its own, which runs through its own quantized linears beside the 16-bit one (both in
float32 for 8 bits, which stray less than bfloat16 is rounded). Every
linear then has the target that makes up for the errors before it, as far as its own input x~ can tell them:

    W <- W + SHARE (W sum_t s_t (x - x~) x~'  +  sum_t s_t (r - r~) x~') (H~ + RIDGE mean(diag H~) I)^-1

with x its input and r the residual stream that its output is added to (second term: o and down), both without quantization. The first
term alone is GPTAQ's (arXiv 2504.02692), the sequential target Qronos's (arXiv 2505.11695).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from threading import Event

import torch
from torch import Tensor

from qquant import background
from qquant.algorithms import coupled
from qquant.algorithms.awq import Transformed, awq
from qquant.algorithms.gptq import NotPositiveDefiniteError
from qquant.algorithms.gram import Gram, NotFiniteError
from qquant.algorithms.grid import Grid, finite
from qquant.artifact.draft import Draft, Filling
from qquant.background import ahead
from qquant.curvature import BlockCurvature, Curvature, measure, spread
from qquant.errors import NumericalError, StoppedError
from qquant.families import Stage
from qquant.families.decoder import HEAD_ROWS, Block
from qquant.formats import FORMATS
from qquant.kernels.product import tensor_cores
from qquant.moments import Moments
from qquant.recipe.limits import is_fine, kind_of
from qquant.solver import Rows, Solver, rounding_of, unit
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import narrow
from qquant.source.safetensors_file import SIZES
from qquant.stream import STATES, Stream

Progress = Callable[[str, int, int], None]  # (what, done, of)
Passage = Generator[tuple[str, Tensor], None, None]  # of a sample through a block
Inputs = tuple[int, Tensor, Tensor]  # of a stage: place of the sample, without quantization, with it
STREAM_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float32, "F32": torch.float32}
REST = "rest"
SHARE = 0.7  # of the correction for errors before a linear
RIDGE = 0.2  # of the mean of diag(H~)


def quantize(
    checkpoint: Checkpoint,
    samples: Sequence[Tensor],
    drafts: Sequence[Draft],
    moments: Moments,
    device: torch.device,
    progress: Progress,
    curvature_tokens: int = 0,
) -> None:
    """Fill every draft, and `moments`. `samples`: int token ids [T] each, possibly of different lengths.

    With `curvature_tokens` the solvers minimise the KL divergence of the model, as measured on so many tokens; with 0 the output
    error of each linear.

    Raises:
        NumericalError: an activation is not finite.
        EnvironmentMissingError: there is not enough memory for one sample.
    """
    source = narrow(checkpoint)
    dtype = STREAM_DTYPES[checkpoint.dtype]
    copied = [draft for draft in drafts if copies(draft, checkpoint)]
    rests = partial(_write_rests, checkpoint, copied, torch.device("cpu"))
    layers = checkpoint.config.layers
    waiting = [draft for draft in drafts if any(unit(layer) not in draft.units for layer in range(layers))]
    measured = all(moments.load(layer) is not None for layer in range(layers))
    curvature = None
    with background.beside(rests, background.pays(device)) as written:
        if curvature_tokens and any(solves(draft) for draft in waiting):
            chosen = {place: samples[place] for place in spread([len(sample) for sample in samples], curvature_tokens)}
            curvature = measure(source, chosen, moments.folder / "curvature", dtype, device, progress)
        written()  # two units of a draft are not journalled at once
    with ExitStack() as writers:
        for draft in reversed(drafts):  # they end in their order
            writers.enter_context(draft.behind(background.pays(device)))
        _write_rests(checkpoint, [draft for draft in drafts if draft not in copied], device, Event())
        if waiting or (drafts and not measured):
            _walk(checkpoint, samples, waiting, moments, device, progress, curvature)


def _walk(
    checkpoint: Checkpoint,
    samples: Sequence[Tensor],
    waiting: Sequence[Draft],
    moments: Moments,
    device: torch.device,
    progress: Progress,
    curvature: Curvature | None,
) -> None:
    """Once through the blocks, for drafts that do not have all of them."""
    source = narrow(checkpoint)
    dtype = STREAM_DTYPES[checkpoint.dtype]
    layers = checkpoint.config.layers
    start = Stream.start(checkpoint, samples, dtype, device)
    places = list(curvature.lengths) if curvature else list(range(len(samples)))  # what a stream of its own runs on
    shared = [draft for draft in waiting if not propagates(draft)]
    near = [draft for draft in waiting if propagates(draft) and not fine(draft, dtype)]
    close = [draft for draft in waiting if propagates(draft) and fine(draft, dtype)]
    wide = (
        Stream.start(checkpoint, [samples[place] for place in places], torch.float32, device)
        if close
        else Stream([], device)
    )
    own = [(Stream([start.hidden[place] for place in places], device), draft) for draft in near]
    own += [(Stream(list(wide.hidden), device), draft) for draft in close]
    with ahead(source.block, range(layers), background.pays(device)) as blocks:
        for layer in range(layers):
            weights = {name: value.to(device) for name, value in next(blocks).items()}
            view = View(checkpoint, layer, weights, dtype, curvature.block(layer, device) if curvature else None)
            before = {place: start.hidden[place] for place in places if near}
            grams = _shared(view, start, shared, near + close, moments)
            if not any(transforms(draft) for draft in near + close):
                grams.clear()
            exact = view, before, start.wide
            exact_wide = replace(view, dtype=torch.float32), dict(zip(places, wide.hidden, strict=False)), ()
            for stream, draft in own:
                given, before, overflowed = exact_wide if draft in close else exact
                stream.spare(layer, partial(_own_block, given, grams, before, stream, (draft, moments), overflowed))
            if close:
                wide.advance(layer, exact_wide[0].block(), {})
            progress("quantize", layer + 1, layers)
    coupled.visited.forget()


def fine(draft: Draft, dtype: torch.dtype) -> bool:
    """Whether an artifact strays less from the checkpoint than activations of `dtype` are rounded: float32 then shows by how much."""
    return dtype != torch.float32 and is_fine(kind_of(draft.plan.spec))


def propagates(draft: Draft) -> bool:
    """Whether an artifact is calibrated on its own stream."""
    return bool(getattr(draft.plan.spec, "propagate", False)) and solves(draft)


def solves(draft: Draft) -> bool:
    """Whether the codes of an artifact are chosen with feedback."""
    spec = draft.plan.spec
    return getattr(spec, "rounding", getattr(spec, "solver", "")) == "gptq"


def transforms(draft: Draft) -> bool:
    """Whether an artifact's weights change before they are solved."""
    return bool(getattr(draft.plan.spec, "transform", "none") != "none")


@dataclass(frozen=True)
class View:
    """One block of the checkpoint, and what is known of it."""

    checkpoint: Checkpoint
    layer: int
    weights: Mapping[str, Tensor]  # in the checkpoint's dtype
    dtype: torch.dtype  # of activations
    curvature: BlockCurvature | None

    def block(self, weights: Mapping[str, Tensor] | None = None) -> Block:
        """The block with its own weights, or with others."""
        source = narrow(self.checkpoint)
        return Block(source.family, source.config, weights or self.weights, self.dtype)

    def add(self, gram: Gram, stage: str, x: Tensor, index: int) -> None:
        """Add the input of a stage for sample `index` to its Gram matrix, weighted where a curvature was measured."""
        if self.curvature is None:
            gram.add(x)
        elif index in self.curvature.weights[stage]:
            gram.add(x, self.curvature.weights[stage][index])
        else:
            gram.watch(x)

    def grams(self, device: torch.device) -> dict[str, Gram]:
        """Empty accumulators, by stage."""
        shapes = self.checkpoint.family.linear_shapes(narrow(self.checkpoint).config)
        stages = self.checkpoint.family.stages
        return {stage.name: Gram.zeros(shapes[stage.linears[0]][1], device) for stage in stages}

    def rows(self, transformed: Transformed) -> Rows:
        """The curvature of every linear's rows after a transform; nothing where it was not measured."""
        return self.curvature.rows.divided(transformed.divided) if self.curvature else {}


def copies(draft: Draft, checkpoint: Checkpoint) -> bool:
    """Whether an artifact stores the embedding as numbers, and not as codes that have to be found."""
    return draft.plan.grids[checkpoint.family.embedding].upper() in SIZES


def _write_rests(checkpoint: Checkpoint, drafts: Sequence[Draft], device: torch.device, stop: Event) -> None:
    """Write what lies outside the blocks of every draft that does not have it. Raises StoppedError where `stop` is set meanwhile."""
    for draft in drafts:
        if REST not in draft.units:
            filling = Filling(draft, REST)
            for name, offset, piece in _rest(checkpoint, draft, device, stop):
                draft.later(partial(filling.put, name, offset, piece.cpu()))
            draft.later(partial(filling.close, []))


def _rest(checkpoint: Checkpoint, draft: Draft, device: torch.device, stop: Event) -> Iterator[tuple[str, int, Tensor]]:
    """The tensors outside the blocks, in slices of rows."""
    family, config = checkpoint.family, checkpoint.config
    names = [family.embedding, family.final_norm, *([] if config.tied else [family.head])]
    store = FORMATS[draft.plan.format].store
    for name in names:
        offset = 0
        rows = checkpoint.tensors[name].shape[0]
        step = rows if name == family.final_norm else HEAD_ROWS
        for start in range(0, rows, step):
            if stop.is_set():
                raise StoppedError(f"{draft.plan.name}: {name} is not written to its end")
            value = checkpoint.tensor(name) if step == rows else checkpoint.rows(name, start, min(start + step, rows))
            for stored, piece in store(draft.plan, name, value.to(device), None).items():
                yield stored, offset, piece
                offset += piece.numel() * piece.element_size()


def _shared(
    view: View, stream: Stream, drafts: Sequence[Draft], others: Sequence[Draft], moments: Moments
) -> dict[str, Gram]:
    """Move the 16-bit stream on, solve the block for every draft that follows it; the block's statistics, if any draft needs them."""
    layer, family = view.layer, view.checkpoint.family
    todo = [draft for draft in drafts if unit(layer) not in draft.units]
    needed = todo or moments.load(layer) is None or any(unit(layer) not in draft.units for draft in others)
    grams = view.grams(stream.device) if needed else {}
    stream.advance(layer, view.block(), grams, view.add)
    if grams:
        moments.save(layer, grams)

    def solve(draft: Draft) -> None:
        solver = Solver(view.checkpoint, draft, layer, moments)
        transformed = _transform(view, draft, grams)
        rows = view.rows(transformed)
        for stage in family.stages:
            solver.solve(stage, transformed.weights, transformed.grams[stage.name], rows)
        solver.finish(transformed.weights, transformed.choices, stream.wide)

    for draft in todo:
        stream.spare(layer, partial(solve, draft))
    return grams


def _transform(view: View, draft: Draft, grams: Mapping[str, Gram]) -> Transformed:
    checkpoint, spec, prefix = view.checkpoint, draft.plan.spec, view.checkpoint.family.block.format(view.layer)
    if not transforms(draft):
        return Transformed(dict(view.weights), dict(grams))

    def grid_for(linear: str, shape: tuple[int, int]) -> Grid:
        grid = FORMATS[spec.format].grid_for(draft.plan, f"{prefix}{linear}.weight", shape[1])
        assert grid is not None
        return grid

    given = checkpoint.family, checkpoint.config, view.weights, grams, grid_for, spec.ratios
    if not solves(draft):
        return awq(*given)
    try:
        return awq(*given, rounding_of(spec.damping))
    except NotPositiveDefiniteError:  # what is written will be rounded too
        return awq(*given)


def _own_block(
    view: View,
    grams: Mapping[str, Gram],
    before: Mapping[int, Tensor],
    stream: Stream,
    target: tuple[Draft, Moments],
    overflowed: Collection[int],
) -> None:
    """Solve a block on the artifact's own stream; in float32 where it is not finite in the stream's dtype.

    `overflowed`: samples that went through the 16-bit block in float32.
    """
    draft, moments = target
    for wide in (view, replace(view, dtype=torch.float32)):
        try:
            solver = Solver(view.checkpoint, draft, view.layer, moments, alone=True)
            _propagated(wide, grams, before, stream, solver, overflowed)
        except NotFiniteError as failure:
            if wide.dtype == torch.float32:
                raise NumericalError(
                    f"block {view.layer} of {draft.plan.name}: activations are not finite in float32 either: {failure}"
                ) from None
        else:
            return


def _propagated(
    view: View,
    grams: Mapping[str, Gram],
    before: Mapping[int, Tensor],
    stream: Stream,
    solver: Solver,
    overflowed: Collection[int],
) -> None:
    """Solve stage by stage, each on inputs that came through the stages already quantized.

    `before`: the input of the 16-bit block, by the place of the samples that `stream` runs on.
    """
    layer, family = view.layer, view.checkpoint.family
    if unit(layer) in solver.draft.units:
        device = stream.device
        stream.advance(layer, view.block({name: value.to(device) for name, value in solver.stored().items()}), {})
        return
    transformed = _transform(view, solver.draft, grams)
    rows = view.rows(transformed)
    exact = view.block(transformed.weights)
    own = view.block(exact.weights)  # the same tensors, until they are solved
    kept = stream.hidden[0].dtype
    rest = [
        (x.to(stream.device, view.dtype), y.to(stream.device, view.dtype))
        for x, y in zip(before.values(), stream.hidden, strict=True)
    ]
    passes = {place: [exact.stages(x), own.stages(y)] for place, (x, y) in zip(before, rest, strict=True)}
    _, output, _, down = family.stages
    for stage in family.stages:
        inputs: Iterable[Inputs] = _inputs(passes, last=stage is down)
        if stage is output:
            inputs = list(inputs)
        gram, targets = _targets(view, stage, transformed.weights, inputs, rest if stage in (output, down) else ())
        if stage is down:
            rest.clear()  # nothing in memory that the solver could use
        for linear, value in solver.solve(stage, targets, gram, rows).items():
            own.weights[f"{linear}.weight"] = value.to(own.weights[f"{linear}.weight"])
        del gram, targets
        if stage is output:
            linear = stage.linears[0]
            rest = [
                (r + exact.linear(linear, x), q + own.linear(linear, y))
                for (r, q), (_, x, y) in zip(rest, inputs, strict=True)
            ]
    hidden = [next(sample)[1].to(kept) for (sample,) in passes.values()]
    if not all(finite(y) for y in hidden):
        raise NotFiniteError(f"its output is not finite in {kept}")
    if stream.relief >= STATES:
        hidden = [y.cpu() for y in hidden]
    solver.finish(transformed.weights, transformed.choices, range(len(hidden)) if view.dtype != kept else overflowed)
    stream.hidden = hidden


def _inputs(passes: Mapping[int, list[Passage]], last: bool) -> Iterator[Inputs]:
    """The next stage's inputs (x, x~) of every sample in turn; nothing is asked of the first passage after the `last` stage, and it is dropped."""
    for place, both in passes.items():
        own = both[-1]
        exact = next(both.pop(0) if last else both[0])[
            1
        ]  # closing is not enough: Python up to 3.12.3 keeps what a closed generator held
        yield place, exact, next(own)[1]


def _targets(
    view: View,
    stage: Stage,
    weights: Mapping[str, Tensor],
    inputs: Iterable[Inputs],
    rest: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Gram, dict[str, Tensor]]:
    """H~ of a stage, and its weights with what makes up for the errors before them, float32."""
    columns = weights[f"{stage.linears[0]}.weight"].shape[1]
    gram, cross, missing = _drift(view, stage.name, columns, inputs, rest)
    targets = {f"{linear}.weight": weights[f"{linear}.weight"].float() for linear in stage.linears}
    with tensor_cores():
        lacking = {
            name: weight @ cross if missing is None else weight @ cross + missing for name, weight in targets.items()
        }
    del cross, missing
    factor = _ridge(gram)
    for name, weight in targets.items():
        targets[name] = weight + SHARE * _against(lacking.pop(name), factor)
    return gram, targets


def _drift(
    view: View, stage: str, columns: int, inputs: Iterable[Inputs], rest: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Gram, Tensor, Tensor | None]:
    """H~, sum s (x - x~) x~' [K, K], and sum s (r - r~) x~' [N, K] of a stage, from its inputs (x, x~) and residuals (r, r~)."""
    device = next(iter(view.weights.values())).device
    gram = Gram.zeros(columns, device)
    cross = torch.zeros_like(gram.matrix)
    missing = torch.zeros(rest[0][0].shape[1], columns, device=device) if rest else None
    for index, (place, x, y) in enumerate(inputs):
        view.add(gram, stage, y, place)
        wide = y.float()
        weighted = wide if view.curvature is None else wide * view.curvature.weights[stage][place].unsqueeze(1)
        with tensor_cores():
            cross.addmm_((x.float() - wide).T, weighted)
            if missing is not None:
                r, q = rest[index]
                missing.addmm_((r.float() - q.float()).T, weighted)
    return gram, cross, missing


def _ridge(gram: Gram) -> Tensor:
    """The lower factor of H + RIDGE mean(diag H) I."""
    damped = gram.matrix.clone()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(RIDGE * mean + (mean == 0))
    return torch.linalg.cholesky(damped)


def _against(correction: Tensor, factor: Tensor) -> Tensor:
    """`correction` (L L')^-1."""
    return torch.cholesky_solve(correction.T, factor).T
