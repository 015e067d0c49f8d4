"""The walk: once through the decoder blocks, every artifact from the same pass.

For each block the calibration tokens run through its 16-bit weights sample by sample; the input of each stage goes into that
stage's Gram matrix, and the output is the next block's input. Then, for each artifact that does not have this block yet,

    transform (AWQ)  ->  fit the format's grid  ->  round  ->  pack, read back  ->  write in place, journal

Activations have the dtype of the checkpoint (float16 checkpoints are computed in float32: float16 overflows); what happens where they
are not finite, or memory is short, is in `stream`. Only one block and its Gram matrices are in memory, besides one hidden state per calibration token. An artifact with `propagate` walks on a
stream of its own, which runs through its own quantized linears.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qquant.algorithms import ROUNDERS, descent
from qquant.algorithms.awq import Transformed, awq
from qquant.algorithms.gptq import NotPositiveDefiniteError, factorize, rounding_weight
from qquant.artifact import Draft
from qquant.checkpoint import Checkpoint
from qquant.decoder import HEAD_ROWS, Block, embed
from qquant.errors import NumericalError, QQuantError
from qquant.families import Stage
from qquant.formats import FORMATS
from qquant.moments import Moments
from qquant.padding import narrow, widened, widened_codes, widens
from qquant.stats import Gram, NotFiniteError
from qquant.stream import Stream
from qquant.tensor import Grid, Params, QuantizedTensor, UniformParams, checksum, nearest

Progress = Callable[[str, int, int], None]  # (what, done, of)
STREAM_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float32, "F32": torch.float32}
REST = "rest"


def quantize(
    checkpoint: Checkpoint,
    samples: Sequence[Tensor],
    drafts: Sequence[Draft],
    moments: Moments,
    device: torch.device,
    progress: Progress,
) -> None:
    """Fill every draft, and `moments`. `samples`: int token ids [T] each, possibly of different lengths.

    Raises:
        NumericalError: an activation is not finite.
        EnvironmentMissingError: there is not enough memory for one sample.
    """
    for draft in drafts:
        if REST not in draft.units:
            draft.write(REST, _rest(checkpoint, draft), [])
    source = narrow(checkpoint)
    dtype = STREAM_DTYPES[checkpoint.dtype]
    layers = checkpoint.config.layers
    waiting = [draft for draft in drafts if any(_unit(layer) not in draft.units for layer in range(layers))]
    measured = all(moments.load(layer) is not None for layer in range(layers))
    if not waiting and (measured or not drafts):
        return
    start = Stream([embed(checkpoint, sample, dtype).to(device) for sample in samples], device)
    streams = [(start, [draft for draft in waiting if not getattr(draft.plan.spec, "propagate", False)])]
    streams += [(start.copy(), [draft]) for draft in waiting if getattr(draft.plan.spec, "propagate", False)]
    for layer in range(layers):
        weights = {name: value.to(device) for name, value in source.block(layer).items()}
        for stream, followers in streams:
            block = Block(source.family, source.config, weights, dtype)
            if stream is start:
                _shared(checkpoint, layer, weights, block, stream, followers, moments)
            else:
                _propagated(checkpoint, layer, weights, block, stream, followers[0], moments)
        progress("quantize", layer + 1, layers)


def _unit(layer: int) -> str:
    return f"block {layer}"


def _rest(checkpoint: Checkpoint, draft: Draft) -> Iterator[tuple[str, int, Tensor]]:
    """The tensors outside the blocks, in slices of rows."""
    family, config = checkpoint.family, checkpoint.config
    names = [family.embedding, family.final_norm, *([] if config.tied else [family.head])]
    store = FORMATS[draft.plan.format].store
    for name in names:
        offset = 0
        rows = checkpoint.tensors[name].shape[0]
        step = rows if name == family.final_norm else HEAD_ROWS
        for start in range(0, rows, step):
            value = checkpoint.tensor(name) if step == rows else checkpoint.rows(name, start, min(start + step, rows))
            for stored, piece in store(draft.plan, name, value, None).items():
                yield stored, offset, piece
                offset += piece.numel() * piece.element_size()


def _shared(
    checkpoint: Checkpoint,
    layer: int,
    weights: Mapping[str, Tensor],
    block: Block,
    stream: Stream,
    drafts: Sequence[Draft],
    moments: Moments,
) -> None:
    todo = [draft for draft in drafts if _unit(layer) not in draft.units]
    shapes = checkpoint.family.linear_shapes(narrow(checkpoint).config)
    device = stream.device
    grams = (
        {stage.name: Gram.zeros(shapes[stage.linears[0]][1], device) for stage in checkpoint.family.stages}
        if todo or moments.load(layer) is None
        else {}
    )
    stream.advance(layer, block, grams)
    if grams:
        moments.save(layer, grams)

    def solve(draft: Draft) -> None:
        transformed = _transform(checkpoint, draft, layer, weights, grams)
        solver = Solver(checkpoint, draft, layer, moments)
        for stage in checkpoint.family.stages:
            solver.solve(stage, transformed.weights, transformed.grams[stage.name])
        solver.record += [{"name": solver.prefix + choice.stage, "awq": vars(choice)} for choice in transformed.choices]
        solver.finish(transformed.weights, stream.wide)

    for draft in todo:
        stream.spare(layer, partial(solve, draft))


def _transform(
    checkpoint: Checkpoint, draft: Draft, layer: int, weights: Mapping[str, Tensor], grams: Mapping[str, Gram]
) -> Transformed:
    spec, prefix = draft.plan.spec, checkpoint.family.block.format(layer)
    if getattr(spec, "transform", "none") == "none":
        return Transformed({name: value.float() for name, value in weights.items()}, dict(grams))

    def grid_for(linear: str, shape: tuple[int, int]) -> Grid:
        grid = FORMATS[spec.format].grid_for(draft.plan, f"{prefix}{linear}.weight", shape[1])
        assert grid is not None
        return grid

    return awq(checkpoint.family, checkpoint.config, weights, grams, grid_for, spec.ratios)


def _propagated(
    checkpoint: Checkpoint,
    layer: int,
    weights: Mapping[str, Tensor],
    block: Block,
    stream: Stream,
    draft: Draft,
    moments: Moments,
) -> None:
    """Solve stage by stage, each on inputs that came through the stages already quantized."""
    shapes = checkpoint.family.linear_shapes(narrow(checkpoint).config)
    full = {name: value.float() for name, value in weights.items()}
    solver = Solver(checkpoint, draft, layer, moments)
    if _unit(layer) in draft.units:
        block.weights |= {name: value.to(block.weights[name]) for name, value in solver.stored().items()}
        stream.advance(layer, block, {})
        return
    passes = [block.stages(x) for x in stream.hidden]
    for stage in checkpoint.family.stages:
        gram = Gram.zeros(shapes[stage.linears[0]][1], stream.device)
        try:
            for sample in passes:
                gram.add(next(sample)[1])
        except NotFiniteError as failure:
            raise NumericalError(f"block {layer}: {stage.name} of {draft.plan.name}: {failure}") from None
        for linear, value in solver.solve(stage, full, gram).items():
            block.weights[f"{linear}.weight"] = value.to(block.weights[f"{linear}.weight"])
    stream.hidden = [next(sample)[1] for sample in passes]
    solver.finish(full)


def joined(params: Mapping[str, Params]) -> tuple[Tensor, Tensor]:
    """Steps and offsets of stacked linears."""
    levels = [value.levels() for value in params.values()]
    return torch.cat([step for step, _ in levels]), torch.cat([offset for _, offset in levels])


def _split(codes: Tensor, linears: Mapping[str, Tensor]) -> list[Tensor]:
    return [part.contiguous() for part in codes.split([len(matrix) for matrix in linears.values()])]


def _nearest(weight: Tensor, grid: Grid, importance: Tensor) -> QuantizedTensor:
    params = grid.fit(weight, importance)
    return QuantizedTensor(nearest(weight, *params.levels(), grid), params, grid)


def _inside(value: Tensor, shape: Sequence[int]) -> Tensor:
    """The part of a stored matrix that is not padding."""
    return value[: shape[0], : shape[1]]


def _widened_gram(gram: Gram, columns: int) -> Gram:
    """The statistics with channels that were always zero."""
    matrix, absolute = widened(gram.matrix, (columns, columns)), widened(gram.absolute, (columns,))
    return gram if matrix is gram.matrix else Gram(matrix, absolute, gram.tokens, gram.largest)


class Solver:
    """Solves the stages of one block for one artifact, and writes the block when all are done."""

    def __init__(self, checkpoint: Checkpoint, draft: Draft, layer: int, moments: Moments) -> None:
        self.checkpoint = checkpoint
        self.moments = moments
        self.draft = draft
        self.format = FORMATS[draft.plan.format]
        self.layer = layer
        self.prefix = checkpoint.family.block.format(layer)
        self.shapes = checkpoint.family.linear_shapes(checkpoint.config)  # as stored; solved without padding
        self.tensors: dict[str, Tensor] = {}
        self.record: list[dict[str, Any]] = []

    def solve(self, stage: Stage, weights: Mapping[str, Tensor], gram: Gram) -> dict[str, Tensor]:
        """Quantize the linears of a stage; their float32 values as readers will see them."""
        values: dict[str, Tensor] = {}
        linears = {linear: weights[f"{linear}.weight"] for linear in stage.linears}
        grids = {
            linear: self.format.grid_for(self.draft.plan, self._name(linear), weight.shape[1])
            for linear, weight in linears.items()
        }
        for grid in dict.fromkeys(grids.values()):
            same = {linear: weight for linear, weight in linears.items() if grids[linear] == grid}
            values |= self._store(same, gram) if grid is None else self._round(same, gram, grid)
        return {linear: _inside(value, weights[f"{linear}.weight"].shape) for linear, value in values.items()}

    def _name(self, linear: str) -> str:
        return f"{self.prefix}{linear}.weight"

    def _store(self, linears: Mapping[str, Tensor], gram: Gram) -> dict[str, Tensor]:
        values = {}
        for linear, weight in linears.items():
            importance = self.moments.importance(self.checkpoint.family.gguf_name(self._name(linear)), gram)
            shape = self.shapes[linear]
            wide = widened(weight, shape), widened(importance, shape[1:])
            stored = self.format.store(self.draft.plan, self._name(linear), *wide)
            values[linear] = self._keep(linear, stored)
            energy = float(gram.energy(weight).sum()) or 1.0
            error = float(gram.energy(_inside(values[linear], weight.shape) - weight).sum()) / energy
            self._note(linear, values[linear], gram, error=error)
        return values

    def _round(self, linears: Mapping[str, Tensor], gram: Gram, grid: Grid) -> dict[str, Tensor]:
        """Solve linears of one grid as one stacked matrix; a linear that ends worse than round-to-nearest keeps the latter."""
        if not widens(grid, len(gram.absolute)):
            linears = {linear: widened(matrix, self.shapes[linear]) for linear, matrix in linears.items()}
            gram = _widened_gram(gram, max(self.shapes[linear][1] for linear in linears))
        weight = torch.cat(list(linears.values()))
        plain = {linear: _nearest(matrix, grid, gram.importance) for linear, matrix in linears.items()}
        solved, damping, fallback = plain, None, None
        if getattr(self.draft.plan.spec, "rounding", "gptq") == "gptq":
            try:
                solved = self._solved(linears, weight, gram, grid)
                damping = factorize(gram, self.draft.plan.spec.damping).damping
            except NotPositiveDefiniteError as failure:
                fallback = f"rtn: {failure}"
        values = {}
        for linear, matrix in linears.items():
            total = float(gram.energy(matrix).sum()) or 1.0
            errors = [float(gram.energy(way[linear].dequantize() - matrix).sum()) / total for way in (solved, plain)]
            chosen, note = solved[linear], fallback
            if errors[1] < errors[0]:
                chosen, note = plain[linear], f"rtn: solved error {errors[0]:.3g} was not below {errors[1]:.3g}"
            chosen = widened_codes(chosen, self.shapes[linear])
            value = self._keep(linear, self.format.pack(self.draft.plan, self._name(linear), chosen))
            if not torch.equal(value, chosen.dequantize()):
                raise QQuantError(f"{self._name(linear)}: the packed tensor dequantizes to other values than its codes")
            values[linear] = value
            facts = {"error": min(errors), "rtn_error": errors[1], "damping": damping, "fallback": note}
            facts["damping_asked"] = getattr(self.draft.plan.spec, "damping", None)
            self._note(linear, value, gram, **facts)
        return values

    def _solved(
        self, linears: Mapping[str, Tensor], weight: Tensor, gram: Gram, grid: Grid
    ) -> dict[str, QuantizedTensor]:
        """GPTQ on scales searched with its own weights, then `sweeps` of descent and scale refits."""
        spec = self.draft.plan.spec
        importance = rounding_weight(gram, spec.damping)
        params = {linear: grid.fit(matrix, importance) for linear, matrix in linears.items()}
        codes = ROUNDERS["gptq"](weight, gram, joined(params), grid, spec.damping)
        damped = descent.damped(gram.matrix, spec.damping)
        for count in range(getattr(spec, "sweeps", 0)):
            codes = descent.sweep(weight, damped, codes, joined(params), grid, shift=count % 2 == 1)
            for (linear, matrix), part in zip(linears.items(), _split(codes, linears), strict=True):
                fitted = params[linear]
                if isinstance(fitted, UniformParams):
                    params[linear] = descent.refit(matrix, damped, part, fitted, grid)
        return {
            linear: QuantizedTensor(part, params[linear], grid)
            for linear, part in zip(linears, _split(codes, linears), strict=True)
        }

    def _keep(self, linear: str, stored: Mapping[str, Tensor]) -> Tensor:
        self.tensors |= {name: value.cpu() for name, value in stored.items()}
        return self.format.restore(self.draft.plan, self._name(linear), stored)

    def _note(self, linear: str, value: Tensor, gram: Gram, **facts: Any) -> None:
        self.record.append(
            {
                "name": self._name(linear),
                "checksum": checksum(value),
                "tokens": gram.tokens,
                "inputs": len(gram.absolute),
                "dead": gram.dead,
                "largest": gram.largest,
                **facts,
            }
        )

    def stored(self) -> dict[str, Tensor]:
        """The float32 linears of this block as an earlier run wrote them."""
        path = next(self.draft.folder / file.name for file in self.draft.plan.files if file.tensors)
        source = self.format.read(path if path.suffix == ".gguf" else self.draft.folder)
        shapes = self.checkpoint.family.linear_shapes(narrow(self.checkpoint).config)
        return {
            f"{linear}.weight": _inside(source.tensor(self._name(linear)), shape) for linear, shape in shapes.items()
        }

    def finish(self, weights: Mapping[str, Tensor], wide: Collection[int] = ()) -> None:
        """Write the block: solved linears, and the norms and biases of `weights`; `wide` samples were computed in float32."""
        if wide:
            self.record.append({"name": self.prefix.rstrip("."), "float32_samples": len(wide)})
        linears = {f"{linear}.weight" for linear in self.checkpoint.family.linears}
        for name, value in weights.items():
            if name not in linears:
                self.tensors |= self.format.store(self.draft.plan, self.prefix + name, value.cpu(), None)
        self.draft.write(_unit(self.layer), ((name, 0, value) for name, value in self.tensors.items()), self.record)
