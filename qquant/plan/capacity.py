"""Whether a build fits into the memory that a machine has, before its first hour; and what would make it fit.

A prediction is off by up to SURE: what is refused would not have fitted. What else is short is found out on the way, and costs no finished block.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qquant.devices import free_memory, host_memory
from qquant.errors import EnvironmentMissingError
from qquant.plan.memory import Memory, build_memory
from qquant.plan.plan import Plan
from qquant.recipe import Recipe
from qquant.recipe.changes import Flags, changed
from qquant.source.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

SURE = 0.85  # of what is predicted is taken in any case


@dataclass(frozen=True)
class Free:
    """Bytes that a machine has free."""

    kind: str  # of the device that computes
    device: int
    host: int  # the same where that is the host

    @classmethod
    def of(cls, device: torch.device) -> Free:
        """What is free now."""
        return cls(device.type, free_memory(device), host_memory())


def lacking(recipe: Recipe, checkpoint: Checkpoint, plan: Plan, free: Free) -> str | None:
    """What needs how much, what is there and what to change, in a line; None where the build fits."""
    need = plan.needs[free.kind]
    for what, bytes_, there in _short(need, free):
        fits = _remedies(recipe, checkpoint, plan, free)
        helps = f" Fits: {', '.join(fits)}" if fits else " Nothing less of it fits: take a machine with more"
        return (
            f"{plan.model}: the build takes {bytes_ / 1e9:.1f} GB of {what} at the least ({need.step}), "
            f"{there / 1e9:.1f} GB are free.{helps}"
        )
    return None


def require_memory(recipe: Recipe, checkpoint: Checkpoint, plan: Plan, free: Free) -> None:
    """Raise EnvironmentMissingError where a build cannot fit."""
    problem = lacking(recipe, checkpoint, plan, free)
    if problem:
        raise EnvironmentMissingError(problem)


def require_fit(recipe: Recipe, checkpoint: Checkpoint, plan: Plan, out: Path, device: torch.device) -> None:
    """Raise EnvironmentMissingError where a build has no room on the disk of `out`, or in memory."""
    plan.require_room(out)
    require_memory(recipe, checkpoint, plan, Free.of(device))


def _short(need: Memory, free: Free) -> list[tuple[str, int, int]]:
    """(what, bytes that are needed, bytes that are free) of every memory that is too small."""
    places = [("memory" if free.kind == "cpu" else "the GPU", need.least, free.device)]
    if free.kind != "cpu":
        places.append(("the host's memory", need.host, free.host))
    return [place for place in places if SURE * place[1] > place[2]]


def _remedies(recipe: Recipe, checkpoint: Checkpoint, plan: Plan, free: Free) -> list[str]:
    """What the user can change, so that it fits."""
    names = {artifact.name for artifact in plan.artifacts}

    def fits(recipe: Recipe, there: Free) -> bool:
        specs = [spec for spec in recipe.artifacts if spec.name in names]
        return not _short(build_memory(plan.texts.of(recipe), checkpoint, there.kind, specs), there)

    tried = {"--effort fast": (changed(recipe, Flags(effort="fast")), free)}
    if free.kind != "cpu":
        tried["--device cpu"] = recipe, Free("cpu", free.host, free.host)
    fewer = max(len(recipe.calibration.sources), recipe.calibration.samples // 4)
    setting = f"calibration.samples={fewer}"
    tried[f"--set {setting}"] = changed(recipe, Flags(settings=(setting,))), free
    fitting = [name for name, trial in tried.items() if fits(*trial)]
    alone = [
        name
        for name in sorted(names)
        if len(names) > 1 and not _short(_alone(plan.texts.of(recipe), checkpoint, name, free), free)
    ]
    return fitting + ([f"--only {alone[0]}"] if alone else [])


def _alone(recipe: Recipe, checkpoint: Checkpoint, name: str, free: Free) -> Memory:
    specs = [spec for spec in recipe.artifacts if spec.name == name]
    return build_memory(recipe, checkpoint, free.kind, specs)
