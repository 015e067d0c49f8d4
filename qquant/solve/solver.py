"""One block of one artifact: every stage's linears are fitted, rounded, packed, read back, and the whole block is written.

A linear whose solved error is worse than round-to-nearest's keeps the latter, and its record says so. The record has the error after
each step, w H w' of what is missing over that of the weights: `rtn` to nearest, `gptq`, `sweeps` of descent with their scale refits,
`coupled` sweeps (which look at the divergence of the model, so this error may rise). Seconds are kept apart: they are no part of the result.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qquant.algorithms import coupled, descent
from qquant.algorithms.awq import Choice, Rounding
from qquant.algorithms.checksum import checksum
from qquant.algorithms.gptq import NotPositiveDefiniteError, factorize, gptq, rounding_weight
from qquant.algorithms.gram import Gram
from qquant.algorithms.grid import Grid, Params, QuantizedTensor, nearest, value_of
from qquant.artifact.draft import Draft
from qquant.errors import QQuantError
from qquant.families import Stage
from qquant.formats import FORMATS
from qquant.solve.moments import Moments
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import narrow, widened, widened_codes, widens

Steps = dict[str, dict[str, float]]  # linear -> step -> error
Rows = Mapping[str, Sequence[Tensor]]  # linear -> curvature of its rows in turn; empty: not known


def unit(layer: int) -> str:
    """The journal's name of a block."""
    return f"block {layer}"


def joined(params: Mapping[str, Params]) -> tuple[Tensor, Tensor]:
    """Steps and offsets of stacked linears."""
    levels = [value.levels() for value in params.values()]
    return torch.cat([step for step, _ in levels]), torch.cat([offset for _, offset in levels])


def stacked(linears: Mapping[str, Tensor]) -> Tensor:
    """The matrices as one; not a copy where there is one."""
    matrices = list(linears.values())
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def solved_once(
    weight: Tensor, linears: Mapping[str, Tensor], gram: Gram, grid: Grid, damping: float
) -> tuple[Tensor, dict[str, Params]]:
    """Codes uint8 [N, K] by GPTQ of `weight`, the stacked linears, and their parameters, searched with GPTQ's own weights.

    Raises:
        NotPositiveDefiniteError: see `factorize`.
    """
    importance = rounding_weight(gram, damping)
    params = {linear: grid.fit(matrix, importance) for linear, matrix in linears.items()}
    return gptq(weight, gram, joined(params), grid, damping), params


def rounding_of(damping: float) -> Rounding:
    """How a search for folded scales foresees what will be written."""

    def cost(gram: Gram) -> Tensor:
        return rounding_weight(replace(gram, factors={}), damping)

    def solve(linears: Mapping[str, Tensor], gram: Gram, grids: Mapping[str, Grid]) -> dict[str, Tensor]:
        values = {}
        for grid in dict.fromkeys(grids.values()):
            same = {linear: weight for linear, weight in linears.items() if grids[linear] == grid}
            codes, params = solved_once(stacked(same), same, gram, grid, damping)
            for linear, part in zip(same, _split(codes, same), strict=True):
                values[linear] = value_of(part, *params[linear].levels(), grid)
        return values

    return Rounding(cost, solve)


def _split(codes: Tensor, linears: Mapping[str, Tensor]) -> list[Tensor]:
    return [part.contiguous() for part in codes.split([len(matrix) for matrix in linears.values()])]


def _nearest(weight: Tensor, grid: Grid, importance: Tensor) -> QuantizedTensor:
    params = grid.fit(weight, importance)
    return QuantizedTensor(nearest(weight, *params.levels(), grid), params, grid)


def _refitted(weight: Tensor, gram: Tensor, codes: Tensor, params: Params, grid: Grid) -> Params:
    """The parameters that suit the codes best: coefficients, integers, and coefficients for these integers."""

    def values(given: Params) -> Tensor:
        return value_of(codes, *given.levels(), grid)

    found = descent.refit(weight, gram, codes, params)
    if not found.integers(codes):
        return found
    return descent.refit(weight, gram, codes, descent.choose_integers(weight, gram, codes, found, values))


def _missing(gram: Gram, found: QuantizedTensor, weight: Tensor) -> float:
    """The output error of a linear, summed over its rows and the calibration tokens."""
    return float(gram.energy(found.dequantize() - weight).sum())


def _inside(value: Tensor, shape: Sequence[int]) -> Tensor:
    """The part of a stored matrix that is not padding."""
    return value[: shape[0], : shape[1]]


def _trimmed(value: Tensor, shape: Sequence[int]) -> Tensor:
    """A stored tensor without its padding."""
    return value[: shape[0]] if len(shape) == 1 else _inside(value, shape)


@dataclass(frozen=True)
class _Curvatures(Iterable[Tensor]):
    """The curvature of the rows of stacked linears in turn; read for every pass, since it is as large as they are."""

    linears: Mapping[str, Tensor]
    rows: Rows

    def __iter__(self) -> Iterator[Tensor]:
        for linear, matrix in self.linears.items():
            yield from _covering(self.rows[linear], len(matrix))


def _curvatures(linears: Mapping[str, Tensor], rows: Rows) -> Iterable[Tensor]:
    """Kept on a GPU, which has room for it."""
    found = _Curvatures(linears, rows)
    return list(found) if next(iter(linears.values())).is_cuda else found


def _covering(parts: Sequence[Tensor], rows: int) -> list[Tensor]:
    """The curvature of a linear's rows, and zeros for rows of padding."""
    missing = rows - sum(len(part) for part in parts)
    return [*parts, parts[0].new_zeros(missing, missing)] if missing else list(parts)


def _widened_gram(gram: Gram, columns: int) -> Gram:
    """The statistics with channels that were always zero."""
    matrix = widened(gram.matrix, (columns, columns))
    if matrix is gram.matrix:
        return gram
    absolute, squares = widened(gram.absolute, (columns,)), widened(gram.squares, (columns,))
    return Gram(matrix, absolute, squares, gram.tokens, gram.largest)


class Solver:
    """Solves the stages of one block for one artifact, and writes the block when all are done."""

    def __init__(self, checkpoint: Checkpoint, draft: Draft, layer: int, moments: Moments, alone: bool = False) -> None:
        self.checkpoint = checkpoint
        self.alone = alone  # no other artifact is solved on the same statistics
        self.moments = moments
        self.draft = draft
        self.format = FORMATS[draft.plan.format]
        self.layer = layer
        self.prefix = checkpoint.family.block.format(layer)
        self.shapes = checkpoint.family.linear_shapes(checkpoint.config, layer)  # as stored; solved without padding
        self.tensors: dict[str, Tensor] = {}
        self.record: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}  # by stage; of the whole block when it is written
        self.began = time.perf_counter()

    def solve(self, stage: Stage, weights: Mapping[str, Tensor], gram: Gram, rows: Rows) -> dict[str, Tensor]:
        """Quantize the linears of a stage, of any dtype; their float32 values as readers will see them."""
        began = time.perf_counter()
        values: dict[str, Tensor] = {}
        linears = {linear: weights[f"{linear}.weight"].float() for linear in stage.linears}
        grids = {
            linear: self.format.grid_for(self.draft.plan, self._name(linear), weight.shape[1])
            for linear, weight in linears.items()
        }
        for grid in dict.fromkeys(grids.values()):
            same = {linear: weight for linear, weight in linears.items() if grids[linear] == grid}
            values |= self._store(same, gram) if grid is None else self._round(same, gram, grid, rows)
        self.seconds[self.prefix + stage.name] = round(time.perf_counter() - began, 4)
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
            # By the sums of squares: a Gram matrix is weighted only where another artifact is solved beside this one.
            energy = float((weight.square() @ gram.squares).sum()) or 1.0
            error = float(((_inside(values[linear], weight.shape) - weight).square() @ gram.squares).sum()) / energy
            self._note(linear, values[linear], gram, error=error)
        return values

    def _round(self, linears: Mapping[str, Tensor], gram: Gram, grid: Grid, rows: Rows) -> dict[str, Tensor]:
        """Solve linears of one grid as one stacked matrix; a linear that ends worse than round-to-nearest keeps the latter."""
        if not widens(grid, len(gram.absolute)):
            linears = {linear: widened(matrix, self.shapes[linear]) for linear, matrix in linears.items()}
            gram = _widened_gram(gram, max(self.shapes[linear][1] for linear in linears))
        plain = {linear: _nearest(matrix, grid, gram.importance) for linear, matrix in linears.items()}
        solved, damping, fallback = plain, None, None
        steps: Steps = {linear: {"rtn": _missing(gram, plain[linear], matrix)} for linear, matrix in linears.items()}
        if self.draft.plan.spec.feedback:
            try:
                damping = factorize(gram, self.draft.plan.spec.damping).damping
                solved, later = self._solved(linears, gram, grid, rows)
                steps = {linear: steps[linear] | later[linear] for linear in linears}
            except NotPositiveDefiniteError as failure:
                fallback = f"rtn: {failure}"
        values = {}
        for linear, matrix in linears.items():
            total = float(gram.energy(matrix).sum()) or 1.0
            errors = {step: error / total for step, error in steps[linear].items()}
            last, first = list(errors.values())[-1], errors["rtn"]
            chosen, note = solved[linear], fallback
            if first < last:
                chosen, note = plain[linear], f"rtn: solved error {last:.3g} was not below {first:.3g}"
            chosen = widened_codes(chosen, self.shapes[linear])
            value = self._keep(linear, self.format.pack(self.draft.plan, self._name(linear), chosen))
            if not torch.equal(value, chosen.dequantize()):
                raise QQuantError(f"{self._name(linear)}: the packed tensor dequantizes to other values than its codes")
            values[linear] = value
            facts = {"error": min(first, last), "steps": errors, "damping": damping, "fallback": note}
            facts["damping_asked"] = self.draft.plan.spec.damping
            self._note(linear, value, gram, **facts)
        return values

    def _solved(
        self, linears: Mapping[str, Tensor], gram: Gram, grid: Grid, rows: Rows
    ) -> tuple[dict[str, QuantizedTensor], Steps]:
        """GPTQ on scales searched with its own weights, `sweeps` of descent and scale refits, and as many over coupled rows."""
        spec = self.draft.plan.spec
        sweeps = spec.sweeps
        weight = stacked(linears)
        codes, params = solved_once(weight, linears, gram, grid, spec.damping)
        if self.alone:
            gram.factors.clear()
        steps: Steps = {linear: {} for linear in linears}

        def parts() -> dict[str, QuantizedTensor]:
            split = zip(linears, _split(codes, linears), strict=True)
            return {linear: QuantizedTensor(part, params[linear], grid) for linear, part in split}

        def note(step: str) -> None:
            for linear, part in parts().items():
                steps[linear][step] = _missing(gram, part, linears[linear])

        note("gptq")
        damped = descent.damped(gram.matrix, spec.damping)
        for count in range(sweeps):
            codes = descent.sweep(weight, damped, codes, joined(params), grid, shift=count % 2 == 1)
            for (linear, matrix), part in zip(linears.items(), _split(codes, linears), strict=True):
                params[linear] = _refitted(matrix, damped, part, params[linear], grid)
        if sweeps:
            note("sweeps")
        if rows and sweeps:
            known = _curvatures(linears, rows)
            for count in range(sweeps):
                codes = coupled.sweep(weight, damped, codes, joined(params), grid, count % 2 == 1, known)
            note("coupled")
        return parts(), steps

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
        """The tensors of this block as an earlier run wrote them, float32."""
        path = self.format.path_of(self.draft.folder, [file.name for file in self.draft.plan.files])
        source = self.format.read(path)
        shapes = self.checkpoint.family.block_shapes(narrow(self.checkpoint).config, self.layer)
        return {name.removeprefix(self.prefix): _trimmed(source.tensor(name), shape) for name, shape in shapes.items()}

    def finish(self, weights: Mapping[str, Tensor], choices: Sequence[Choice] = (), wide: Collection[int] = ()) -> None:
        """Have the draft write the block: solved linears, and the norms and biases of `weights`, all of them on the host.

        Into the record go `choices` of a transform, and how many samples were computed in float32 (`wide`).
        """
        if wide:
            self.record.append({"name": self.prefix.rstrip("."), "float32_samples": len(wide)})
        self.record += [{"name": self.prefix + choice.stage, "awq": vars(choice)} for choice in choices]
        self.seconds[self.prefix.rstrip(".")] = round(time.perf_counter() - self.began, 4)
        linears = {f"{linear}.weight" for linear in self.checkpoint.family.linears}
        for name, value in weights.items():
            if name not in linears:
                self.tensors |= self.format.store(self.draft.plan, self.prefix + name, value.cpu(), None)
        pieces = [(name, 0, value) for name, value in self.tensors.items()]
        self.draft.later(partial(self.draft.write, unit(self.layer), pieces, self.record, self.seconds))
