"""A solver: Problem -> Solution, by the steps that a recipe's word stands for (`qquant.recipe.solvers`).

A problem is linears that share an input and a grid, solved as one stacked matrix; a step gets it with what the step before found, and
gives codes and parameters. After each step the error is noted, e H e' of the difference e over w H w' of the weights. A linear that ends
worse than after the first step keeps what it had then; where H cannot be factorised, all of them do.
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
from qquant.recipe.solvers import STEPS


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

    @cached_property
    def energy(self) -> dict[str, float]:
        """The output of every linear, summed over its rows and the calibration tokens."""
        return {linear: float(self.gram.energy(matrix).sum()) or 1.0 for linear, matrix in self.linears.items()}


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
    after = step(problem, before)
    return after if after is before else replace(after, steps={**after.steps, name: _errors(problem, after)})


def _errors(problem: Problem, solution: Solution) -> dict[str, float]:
    return {
        linear: float(problem.gram.energy(quantized.dequantize() - problem.linears[linear]).sum())
        / problem.energy[linear]
        for linear, quantized in solution.quantized(problem).items()
    }


def _no_worse(problem: Problem, name: str, first: Solution, last: Solution) -> Solution:
    """`last`, but for linears that `first` was better for."""
    codes, params, fallbacks = problem.split(last.codes), dict(last.params), {}
    errors = list(last.steps.values())[-1]
    for linear, error in first.steps[name].items():
        if error < errors[linear]:
            codes[linear], params[linear] = problem.split(first.codes)[linear], first.params[linear]
            fallbacks[linear] = f"{name}: solved error {errors[linear]:.3g} was not below {error:.3g}"
    return replace(last, codes=stacked(codes), params=params, fallbacks=fallbacks) if fallbacks else last
