"""One block of one artifact: every stage's linears are solved, packed, read back, and the whole block is written.

The record of a linear has the error after each step of its solver (`qquant.recipe.solvers`), and why it has what the first step found,
where it does. Seconds are kept apart: they are no part of the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qquant.algorithms.awq import Choice, Rounding
from qquant.algorithms.checksum import checksum
from qquant.algorithms.gptq import factorize, on_searched_scales
from qquant.algorithms.gram import Gram
from qquant.algorithms.grid import Grid, value_of
from qquant.algorithms.problem import Problem, solve, unstacked
from qquant.artifact.draft import Draft
from qquant.devices import return_freed, to_host
from qquant.errors import QQuantError
from qquant.exchange import ALONE, Exchange
from qquant.families import Stage
from qquant.families.weights import WeightSource
from qquant.formats import FORMATS
from qquant.report.solved import BlockRecord, LinearRecord, ScaleChoice, Solved
from qquant.solve.moments import Moments
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import pads_codes, without_padding, zero_padded, zero_padded_codes

Rows = Mapping[str, Sequence[Tensor]]  # linear -> curvature of its rows in turn; empty: not known


def unit(layer: int) -> str:
    """The journal's name of a block."""
    return f"block {layer}"


def rounding_of(damping: float) -> Callable[[Gram], Rounding]:
    """How a search for folded scales foresees what will be written for inputs; raises NotPositiveDefiniteError where it cannot."""

    def of(gram: Gram) -> Rounding:
        inverse, tokens = factorize(replace(gram, cholesky={}), damping), gram.tokens  # the sums may go

        def solve(linears: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> dict[str, Tensor]:
            values = {}
            for grid in dict.fromkeys(grids.values()):
                same = {linear: weight for linear, weight in linears.items() if grids[linear] == grid}
                codes, params = on_searched_scales(same, inverse, tokens, grid)
                for linear, code in unstacked(same, codes).items():
                    values[linear] = value_of(code, *params[linear].step_and_offset(), grid)
            return values

        return Rounding(inverse.cost(tokens), solve)

    return of


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


def _curvatures(linears: Mapping[str, Tensor], rows: Rows) -> Iterable[Tensor] | None:
    """The curvature of each linear's rows in turn, None without; a list on a GPU, which has room for it."""
    if not rows:
        return None
    curvatures = _Curvatures(linears, rows)
    return list(curvatures) if next(iter(linears.values())).is_cuda else curvatures


def _covering(parts: Sequence[Tensor], rows: int) -> list[Tensor]:
    """The curvature of a linear's rows, and zeros for rows of padding."""
    short = rows - sum(len(matrix) for matrix in parts)
    return [*parts, parts[0].new_zeros(short, short)] if short else list(parts)


def padded_gram(gram: Gram, columns: int) -> Gram:
    """The statistics with channels that were always zero."""
    matrix = zero_padded(gram.matrix, (columns, columns))
    if matrix is gram.matrix:
        return gram
    absolute, squares = zero_padded(gram.absolute, (columns,)), zero_padded(gram.squares, (columns,))
    return Gram(matrix, absolute, squares, gram.tokens, gram.largest)


def drafted(draft: Draft) -> WeightSource:
    """What a draft holds so far; only tensors of units that are journalled may be asked for."""
    layout = FORMATS[draft.plan.format]
    return layout.read(layout.path_of(draft.folder, [file.name for file in draft.plan.files]))


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
        self.arrived: dict[str, Tensor] = {}
        self.coming: list[Callable[[], dict[str, Tensor]]] = []  # to the host, what an earlier call of `_keep` sent
        self.record: list[Solved] = []
        self.seconds: dict[str, float] = {}  # by stage; of the whole block when it is written
        self.began = time.perf_counter()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What was solved so far, packed, on the host."""
        while self.coming:
            self.arrived |= self.coming.pop(0)()
        return self.arrived

    def solve(
        self, stage: Stage, weights: Mapping[str, Tensor], gram: Gram, rows: Rows, exchange: Exchange = ALONE
    ) -> dict[str, Tensor]:
        """Quantize the linears of a stage, of any dtype; their float32 values as readers will see them.

        Ranks of `exchange` have the same arguments, and get the same; the first keeps what will be stored.
        """
        began = time.perf_counter()
        values: dict[str, Tensor] = {}
        linears = {linear: weights[f"{linear}.weight"].float() for linear in stage.linears}
        grids = self.grids(linears)
        for grid in dict.fromkeys(grids.values()):
            same = {linear: weight for linear, weight in linears.items() if grids[linear] == grid}
            values |= self._store(same, gram) if grid is None else self._round(same, gram, grid, rows, exchange)
        return_freed(gram.absolute.device)
        self.seconds[self.prefix + stage.name] = round(time.perf_counter() - began, 4)
        return {linear: _inside(value, weights[f"{linear}.weight"].shape) for linear, value in values.items()}

    def grids(self, linears: Mapping[str, Tensor]) -> dict[str, Grid | None]:
        """The grid of each linear; None: the format's own quantizer stores it."""
        return {
            linear: self.format.grid_for(self.draft.plan, self._name(linear), weight.shape[1])
            for linear, weight in linears.items()
        }

    def copies(self, name: str) -> bool:
        """Whether the artifact holds a tensor of the block as numbers, which make up for nothing."""
        return self.draft.plan.stored[self.prefix + name].numbers

    def _name(self, linear: str) -> str:
        return f"{self.prefix}{linear}.weight"

    def _store(self, linears: Mapping[str, Tensor], gram: Gram) -> dict[str, Tensor]:
        values = {}
        for linear, weight in linears.items():
            importance = self.moments.importance(self.checkpoint.family.gguf_name(self._name(linear)), gram)
            shape = self.shapes[linear]
            padded = zero_padded(weight, shape), zero_padded(importance, shape[1:])
            stored = self.format.store(self.draft.plan, self._name(linear), *padded)
            values[linear] = self._keep(linear, stored)
            # By the sums of squares: a Gram matrix is weighted only where another artifact is solved beside this one.
            energy = float((weight.square() @ gram.squares).sum()) or 1.0
            error = float(((_inside(values[linear], weight.shape) - weight).square() @ gram.squares).sum()) / energy
            self._note(linear, values[linear], gram, error=error)
        return values

    def _round(
        self, linears: Mapping[str, Tensor], gram: Gram, grid: Grid, rows: Rows, exchange: Exchange
    ) -> dict[str, Tensor]:
        """Solve linears of one grid as one stacked matrix, and pack what was found."""
        if not pads_codes(grid, len(gram.absolute)):
            linears = {linear: zero_padded(matrix, self.shapes[linear]) for linear, matrix in linears.items()}
            gram = padded_gram(gram, max(self.shapes[linear][1] for linear in linears))
        spec = self.draft.plan.spec
        problem = Problem(linears, gram, grid, spec, _curvatures(linears, rows), self.alone, exchange)
        solution = solve(problem, spec.steps)
        values = {}
        for linear, quantized in solution.quantized(problem).items():
            padded = zero_padded_codes(quantized, self.shapes[linear])
            if not exchange.first:
                values[linear] = padded.dequantize()
                continue
            value = self._keep(linear, self.format.pack(self.draft.plan, self._name(linear), padded))
            if not torch.equal(value, padded.dequantize()):
                raise QQuantError(f"{self._name(linear)}: the packed tensor dequantizes to other values than its codes")
            values[linear] = value
            self._note(linear, value, gram, **solution.facts(linear), damping_asked=spec.damping)
        return values

    def _keep(self, linear: str, stored: Mapping[str, Tensor]) -> Tensor:
        self.coming.append(to_host(stored))
        return self.format.restore(self.draft.plan, self._name(linear), stored)

    def _note(self, linear: str, value: Tensor, gram: Gram, **facts: Any) -> None:
        self.record.append(
            LinearRecord(
                name=self._name(linear),
                checksum=checksum(value),
                tokens=gram.tokens,
                inputs=len(gram.absolute),
                dead=gram.dead,
                largest=gram.largest,
                **facts,
            )
        )

    def stored(self) -> dict[str, Tensor]:
        """The tensors of this block as an earlier run wrote them, float32."""
        source = drafted(self.draft)
        shapes = self.checkpoint.family.block_shapes(without_padding(self.checkpoint).config, self.layer)
        return {name.removeprefix(self.prefix): _trimmed(source.tensor(name), shape) for name, shape in shapes.items()}

    def finish(self, weights: Mapping[str, Tensor], choices: Sequence[Choice] = (), overflowed: int = 0) -> None:
        """Have the draft write the block: solved linears, and the norms and biases of `weights`, all of them on the host.

        Into the record go `choices` of a transform, and how many samples were computed in float32 (`overflowed`).
        """
        if overflowed:
            self.record.append(BlockRecord(self.prefix.rstrip("."), overflowed))
        self.record += [BlockRecord(self.prefix + one.stage, awq=ScaleChoice(**vars(one))) for one in choices]
        self.seconds[self.prefix.rstrip(".")] = round(time.perf_counter() - self.began, 4)
        linears = {f"{linear}.weight" for linear in self.checkpoint.family.linears}
        for name, value in weights.items():
            if name not in linears:
                self.tensors.update(self.format.store(self.draft.plan, self.prefix + name, value.cpu(), None))
        pieces = [(name, 0, value) for name, value in self.tensors.items()]
        self.draft.submit(partial(self.draft.write, unit(self.layer), pieces, self.record, self.seconds))
