"""Solvers by the word that recipes use, each a sequence of steps; what a step is called in reports, and where its code is.

    solver: gptq   ->   rtn  ->  gptq  ->  sweeps  ->  coupled        a step takes what the one before it found, and gives something better

The module of a step has a function `step(problem, earlier) -> Solution` (`qquant.algorithms.problem` calls it); it is imported when it is
first needed, so that this table costs a plan nothing. A linear that ends worse than after the first step keeps what that found. A solver of
one step is taken to make up for no errors (`feedback` of an entry): its artifacts have no stream of their own, no curvature is measured for
them, and what lies outside the blocks is not solved. A solver without steps leaves the weight to the format's own quantizer.

To add a step: a module in `qquant/algorithms`, a line in STEPS, and its name in the sequence of a solver, of those here or a new one. One that
changes scales too makes them anew by `linear_form` and `with_coefficients` of `algorithms/grid.py`, in the type in which they are stored, as the
refits of `algorithms/descent.py` do. To see a step beside another solver of the same format, build each `--only`, into a folder of its own. A
setting of its own is a property of `SolverSettings` (`qquant.algorithms.problem`) and a field of every entry in `recipe/artifacts.py`:
mypy and tests/solve/test_solvers.py find those that lack it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What reports call a step, and the module that takes it."""

    title: str
    module: str
    apart: bool = True  # rows do not depend on each other: ranks may share them out; else the step does that itself


@dataclass(frozen=True)
class Solver:
    """The steps of a solver in order, and what it does, in words for the tables of recipes/README.md."""

    steps: tuple[str, ...]
    meaning: str


STEPS: dict[str, Step] = {
    "rtn": Step("to nearest", "qquant.algorithms.rtn"),
    "gptq": Step("GPTQ", "qquant.algorithms.gptq"),
    "sweeps": Step("descent and scales", "qquant.algorithms.descent"),
    "coupled": Step("coupled rows", "qquant.algorithms.coupled", apart=False),
}
SOLVERS: dict[str, Solver] = {
    "rtn": Solver(("rtn",), "to nearest"),
    "gptq": Solver(
        ("rtn", "gptq", "sweeps", "coupled"),
        "each column makes up for the errors before it, polished by `sweeps`, also in embedding and head where they are codes",
    ),
    "ggml": Solver((), "byte-identical to llama-quantize, for GGUF alone"),
}


def title(step: str) -> str:
    """What a report calls a step; its name, where it was taken by something that is not known here."""
    return STEPS[step].title if step in STEPS else step
