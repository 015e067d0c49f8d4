"""Solvers by the word that recipes use, each a sequence of steps; what a step is called in reports, and where its code is.

    solver: gptq   ->   rtn  ->  gptq  ->  sweeps  ->  coupled        a step takes what the one before it found, and gives something better

The module of a step has a function `step(problem, earlier) -> Solution` (`qquant.algorithms.problem` calls it); it is imported when it is
first needed, so that this table costs a plan nothing. To add a step: a module in `qquant/algorithms`, a line in STEPS, and its name in a
solver's sequence. A solver without steps leaves the weight to the format's own quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What reports call a step, and the module that takes it."""

    title: str
    module: str


STEPS: dict[str, Step] = {
    "rtn": Step("to nearest", "qquant.algorithms.rtn"),
    "gptq": Step("GPTQ", "qquant.algorithms.gptq"),
    "sweeps": Step("descent and scales", "qquant.algorithms.descent"),
    "coupled": Step("coupled rows", "qquant.algorithms.coupled"),
}
SOLVERS: dict[str, tuple[str, ...]] = {
    "rtn": ("rtn",),
    "gptq": ("rtn", "gptq", "sweeps", "coupled"),
    "ggml": (),
}


def title(step: str) -> str:
    """What a report calls a step; its name, where it was taken by something that is not known here."""
    return STEPS[step].title if step in STEPS else step
