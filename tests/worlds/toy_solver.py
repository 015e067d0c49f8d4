"""A solver of its own, as somebody would add one: GPTQ with its polish, then the best single changes of codes, `flips` of them a row."""

from qquant.algorithms.grid import value_of
from qquant.algorithms.problem import Problem, Solution, joined
from qquant.recipe import GptqArtifact
from qquant.recipe.solvers import SOLVERS, STEPS, Solver, Step


class FlippedArtifact(GptqArtifact):
    """An entry with the step's own setting."""

    flips: int = 4


def step(problem: Problem, earlier: Solution | None) -> Solution:
    """Move one code of every row by one, where that lowers w H w' of its error most; as often as the recipe asks."""
    codes, spacing = earlier.codes.clone(), joined(earlier.params)
    size = spacing[0].repeat_interleave(problem.grid.width, dim=1)
    with problem.damped() as damped:
        curve = damped.diagonal() * size.square()
        for _ in range(problem.settings.flips):
            slope = (value_of(codes, *spacing, problem.grid) - problem.weight) @ damped * size
            up, down = curve + 2 * slope, curve - 2 * slope
            up[codes == problem.grid.levels - 1] = down[codes == 0] = 0
            gain, column = up.minimum(down).min(1, keepdim=True)
            move = (up.gather(1, column) < down.gather(1, column)).int() * 2 - 1
            moved = codes.gather(1, column).int() + move * (gain < 0)
            codes.scatter_(1, column, moved.to(codes.dtype))
    return Solution(codes, earlier.params, earlier.damping, earlier.steps)


def register(monkeypatch):
    """What the two lines in `qquant.recipe.solvers` would do."""
    monkeypatch.setitem(STEPS, "flips", Step("best single flips", __name__))
    monkeypatch.setitem(
        SOLVERS, "flipped", Solver((*SOLVERS["gptq"].steps, "flips"), "the best single changes of codes after gptq")
    )
