"""Round to nearest: every weight by itself, on parameters searched with the mean square of each input. What a solver must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qquant.algorithms.grid import nearest
from qquant.algorithms.problem import Solution, joined

if TYPE_CHECKING:
    from qquant.algorithms.problem import Problem


def step(problem: Problem, earlier: Solution | None) -> Solution:
    """The nearest values of the grid; what was found before does not matter."""
    del earlier
    importance = problem.gram.importance
    params = {linear: problem.grid.fit(matrix, importance) for linear, matrix in problem.linears.items()}
    return Solution(nearest(problem.weight, *joined(params), problem.grid), params)
