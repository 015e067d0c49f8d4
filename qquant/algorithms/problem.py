"""A solver: Problem -> Solution, by the steps that a recipe's word stands for (`qquant.recipe.solvers`).

A problem is linears that share an input and a grid, solved as one stacked matrix; a step gets it with what the step before found, and
gives codes and parameters. After each step the error is noted, e H e' of the difference e over w H w' of the weights. A linear that ends
worse than after the first step keeps what it had then; where H cannot be factorised, all of them do.

Several ranks that have the same problem (`exchange`) take a part of the stacked rows each in steps whose rows do not depend on each other, and
get what the others found: all have the same solution then, in the bits of one rank (`qquant.algorithms.sharing`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from qquant.algorithms.gram import Gram, NotPositiveDefiniteError, with_damping
from qquant.algorithms.grid import Grid, Params, QuantizedTensor
from qquant.algorithms.sharing import rows_of
from qquant.devices import free_memory, policy
from qquant.exchange import ALONE, Exchange
from qquant.recipe.solvers import STEPS

FACTORS = 20 * 1024  # bytes of a column's, in blocks of 1,024: 4 of the upper factor, 8 of the halves of each matrix
KEPT = 1 / 32  # of what is free on a card


class SolverSettings(Protocol):
    """What steps read of an artifact's entry: a setting of a new step is a property here, and a field of every entry."""

    @property
    def damping(self) -> float:
        """Added to the diagonal of H, as a share of its mean."""
        ...

    @property
    def sweeps(self) -> int:
        """Passes of coordinate descent."""
        ...


@dataclass
class Problem:
    """Linears of one grid that share an input."""

    linears: Mapping[str, Tensor]  # float32 [n, K] each
    gram: Gram
    grid: Grid
    settings: SolverSettings
    rows: Iterable[Tensor] | None = None  # curvature [n, n] of the stacked rows in turn; None: not known
    alone: bool = False  # nothing else is solved on the same statistics
    exchange: Exchange = ALONE  # ranks that have the same problem, and share it out
    known: dict[str, float] | None = field(default=None, init=False)  # what `energy` found
    kept: dict[bool, list[Tensor]] | None = field(default=None, init=False)  # of sweeps (`descent.blocks_of`), by ranks

    def __post_init__(self) -> None:
        """Ranks, of which each would factor all blocks of H for itself in every sweep, keep them, and so does a card that has room."""
        if self.exchange.world > 1 or keeps_blocks(self.gram.absolute):
            self.kept = {}

    @cached_property
    def mine(self) -> Problem:
        """This rank's rows of the problem; all of it, where there is one rank."""
        if self.exchange.world == 1:
            return self
        linears = {linear: self.linears[linear][span] for linear, span in self._parts(self.exchange.rank).items()}
        mine = Problem(linears, self.gram, self.grid, self.settings, None, self.alone)
        mine.kept = self.kept
        return mine

    @cached_property
    def _spans(self) -> list[slice]:
        """The stacked rows of each rank; where there are too few, some have what the first has, too."""
        spans = rows_of(sum(map(len, self.linears.values())), self.exchange)
        return [span if span.start < span.stop else spans[0] for span in spans]

    def _parts(self, rank: int) -> dict[str, slice]:
        """The rows of each linear that a rank has some of."""
        span, stop, parts = self._spans[rank], 0, {}
        for linear, matrix in self.linears.items():
            start, stop = stop, stop + len(matrix)
            inside = slice(max(span.start, start) - start, min(span.stop, stop) - start)
            if inside.start < inside.stop:
                parts[linear] = inside
        return parts

    def of_mine(self, solution: Solution) -> Solution:
        """This rank's rows of a solution."""
        if self.exchange.world == 1:
            return solution
        params = {
            linear: with_rows(solution.params[linear], span) for linear, span in self._parts(self.exchange.rank).items()
        }
        return replace(solution, codes=solution.codes[self._spans[self.exchange.rank]], params=params)

    def of_all(self, mine: Solution) -> Solution:
        """The solution whose rows the ranks found."""
        if self.exchange.world == 1:
            return mine
        first = next(iter(mine.params.values()))
        given = [mine.codes, *(value for params in mine.params.values() for value in params.stored().values())]
        pieces: dict[str, list[list[Tensor]]] = {linear: [] for linear in self.linears}
        codes = []
        for rank, parcel in enumerate(self.exchange.share(given)):
            if rank == 0 or self._spans[rank] != self._spans[0]:
                values = iter(parcel)
                codes.append(next(values))
                for linear in self._parts(rank):
                    pieces[linear].append([next(values) for _ in first.stored()])
        params = {
            linear: first.with_stored(dict(zip(first.stored(), map(torch.cat, zip(*parts, strict=True)), strict=True)))
            for linear, parts in pieces.items()
        }
        return replace(mine, codes=torch.cat(codes), params=params)

    def energies(self, differences: Mapping[str, Tensor]) -> dict[str, float]:
        """Linear -> e H e' of `differences` e that belong to `mine`, summed over all rows and the calibration tokens."""
        rows = torch.cat([self.gram.energy(matrix) for matrix in differences.values()])
        return {linear: float(value.sum()) for linear, value in self.split(self._of_all_rows(rows)).items()}

    def _of_all_rows(self, values: Tensor) -> Tensor:
        """Values [N] of which this rank has those of its rows."""
        if self.exchange.world == 1:
            return values
        parcels = self.exchange.share([values])
        kept = [rank for rank, span in enumerate(self._spans) if rank == 0 or span != self._spans[0]]
        return torch.cat([parcels[rank][0] for rank in kept])

    @cached_property
    def weight(self) -> Tensor:
        """The linears as one matrix, float32 [N, K]."""
        return stacked(self.linears)

    def damped(self) -> AbstractContextManager[Tensor]:
        """H with its damping, float32 [K, K], positive definite where GPTQ could factorise it; inside the context `gram` has it too."""
        return with_damping(self.gram.matrix, self.settings.damping)

    def split(self, value: Tensor) -> dict[str, Tensor]:
        """The rows [n, ...] of every linear."""
        return unstacked(self.linears, value)

    @property
    def energy(self) -> dict[str, float]:
        """The output of every linear, summed over its rows and the calibration tokens."""
        if self.known is None:  # not a cached property: others wait for what is said here
            energies = self.energies(self.mine.linears)
            self.known = {linear: energy or 1.0 for linear, energy in energies.items()}
        return self.known


@dataclass(frozen=True)
class Solution:
    """Codes of the stacked linears, and parameters of each; a step leaves the other fields as they are."""

    codes: Tensor  # uint8 [N, K]
    params: Mapping[str, Params]
    damping: float | None = None  # what it took to factorise H, relative to the mean of its diagonal
    steps: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # step -> linear -> relative error after it
    fallbacks: Mapping[str, str] = field(default_factory=dict)  # linear -> why it has what the first step found

    def quantized(self, problem: Problem) -> dict[str, QuantizedTensor]:
        """Every linear by itself."""
        codes = problem.split(self.codes)
        return {linear: QuantizedTensor(codes[linear], self.params[linear], problem.grid) for linear in codes}

    def facts(self, linear: str) -> dict[str, Any]:
        """What a record says of a linear."""
        steps = {step: errors[linear] for step, errors in self.steps.items()}
        errors = list(steps.values())
        fallback = self.fallbacks.get(linear)
        error = errors[0] if fallback else errors[-1]
        return {"error": error, "steps": steps, "damping": self.damping, "fallback": fallback}


def keeps_blocks(channels: Tensor) -> bool:
    """Whether the factors of sweeps over so many channels [K] take a small part of what their device has free.

    Upper factor, H_SS and its inverse, or halves of them, [K, BLOCK] each, of both ways to cut the columns.
    """
    device = channels.device
    return policy(device).apart and 2 * FACTORS * len(channels) <= KEPT * free_memory(device)


StepFunction = Callable[[Problem, Solution | None], Solution]  # the same solution where there is nothing to do


def stacked(linears: Mapping[str, Tensor]) -> Tensor:
    """The matrices as one; not a copy where there is one, or where they are rows of one in their order."""
    first, *others = matrices = list(linears.values())
    if not others:
        return first
    end = first.storage_offset()
    for matrix in matrices:
        if not (matrix.is_contiguous() and matrix.storage_offset() == end and _share(first, matrix)):
            return torch.cat(matrices)
        end += matrix.numel()
    return first.as_strided((sum(map(len, matrices)), *first.shape[1:]), first.stride())


def _share(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def with_rows(params: Params, span: slice) -> Params:
    """The parameters of some rows."""
    return params.with_stored({name: value[span] for name, value in params.stored().items()})


def unstacked(linears: Mapping[str, Tensor], value: Tensor) -> dict[str, Tensor]:
    """The rows of every linear of a stacked value."""
    return dict(zip(linears, value.split([len(matrix) for matrix in linears.values()]), strict=True))


def joined(params: Mapping[str, Params]) -> tuple[Tensor, Tensor]:
    """Steps and offsets of stacked linears."""
    pairs = [value.step_and_offset() for value in params.values()]
    return torch.cat([step for step, _ in pairs]), torch.cat([offset for _, offset in pairs])


def solve(problem: Problem, steps: Sequence[str]) -> Solution:
    """What the steps found in turn, each linear no worse than after the first."""
    first = last = _noted(problem, steps[0], None)
    for name in steps[1:]:
        try:
            last = _noted(problem, name, last)
        except NotPositiveDefiniteError as failure:
            return replace(first, fallbacks=dict.fromkeys(problem.linears, f"{steps[0]}: {failure}"))
    return _no_worse(problem, steps[0], first, last)


def _noted(problem: Problem, name: str, before: Solution | None) -> Solution:
    """The solution after step `name`, with the error that it left."""
    step: StepFunction = importlib.import_module(STEPS[name].module).step
    if STEPS[name].apart:
        mine = before and problem.of_mine(before)
        after = step(problem.mine, mine)
        if after is mine and before is not None:
            return before
        after = problem.of_all(after)
    else:
        after = step(problem, before)
    return after if after is before else replace(after, steps={**after.steps, name: _errors(problem, after)})


def _errors(problem: Problem, solution: Solution) -> dict[str, float]:
    mine = problem.mine
    quantized = problem.of_mine(solution).quantized(mine)
    differences = {linear: quantized[linear].dequantize() - matrix for linear, matrix in mine.linears.items()}
    energy = problem.energy
    return {linear: error / energy[linear] for linear, error in problem.energies(differences).items()}


def _no_worse(problem: Problem, name: str, first: Solution, last: Solution) -> Solution:
    """`last`, but for linears that `first` was better for."""
    codes, params, fallbacks = problem.split(last.codes), dict(last.params), {}
    errors = list(last.steps.values())[-1]
    for linear, error in first.steps[name].items():
        if error < errors[linear]:
            codes[linear], params[linear] = problem.split(first.codes)[linear], first.params[linear]
            fallbacks[linear] = f"{name}: solved error {errors[linear]:.3g} was not below {error:.3g}"
    return replace(last, codes=stacked(codes), params=params, fallbacks=fallbacks) if fallbacks else last
