"""What a build would take with less effort and with more, beside what it takes as asked: seconds and memory, from shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from qquant.plan.memory import build_memory
from qquant.plan.plan import Plan
from qquant.recipe import Recipe
from qquant.recipe.changes import Flags, changed
from qquant.recipe.efforts import EFFORTS
from qquant.source.checkpoint import Checkpoint

Clock = Callable[[Recipe, Plan], float]  # seconds of a build


@dataclass(frozen=True)
class Cost:
    """The cost of one effort; `seconds` is None where no clock was asked."""

    effort: str
    asked: bool  # the recipe says it
    memory: int  # bytes at the peak
    seconds: float | None


def beside(recipe: Recipe, checkpoint: Checkpoint, plan: Plan, clock: Clock | None) -> list[Cost]:
    """Each effort, from the least to the most; before them the recipe as it is, where it names none."""
    costs = []
    if recipe.effort is None:
        costs.append(_cost("as it is", recipe, checkpoint, plan, clock))
    for effort in EFFORTS:
        other = changed(recipe, Flags(effort=effort))
        cost = _cost(effort, other, checkpoint, plan, clock)
        costs.append(dataclasses.replace(cost, asked=effort == recipe.effort))
    return costs


def _cost(effort: str, recipe: Recipe, checkpoint: Checkpoint, plan: Plan, clock: Clock | None) -> Cost:
    specs = {spec.name: spec for spec in recipe.artifacts}
    artifacts = tuple(dataclasses.replace(one, spec=specs[one.spec.name]) for one in plan.artifacts)
    held = plan.texts.of(recipe)
    other = dataclasses.replace(plan, artifacts=artifacts, tokens=held.calibration.tokens)
    memory = build_memory(held, checkpoint, specs=[one.spec for one in artifacts]).device
    return Cost(effort, True, memory, clock(recipe, other) if clock else None)
