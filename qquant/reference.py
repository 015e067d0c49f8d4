"""The small build by which `qquant doctor --calibrate` gets to know a machine: three artifacts of the bundled checkpoint, and their check."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from qquant import pipeline
from qquant.plan import seconds
from qquant.plan.asked import Asked
from qquant.plan.machine import SCHEMA, Machine, between, device_name
from qquant.plan.plan import Plan
from qquant.progress import Progress, Timed
from qquant.recipe.changes import Flags

ONLY = ("gptq-int4", "awq", "gguf-q4_0")
CHANGES = ("calibration.samples=16", "checks.windows=6", "checks.max_windows=null", "checks.answer_length=8")
WIDTHS = (256, 1024, 4096)  # of matrices that are multiplied: the smallest, and those of 0.5B and 7B
LEAST = 0.01  # seconds below which a phase says nothing of the machine


def measure(device: torch.device, progress: Progress, changes: tuple[str, ...] = CHANGES) -> Machine:
    """What `device` takes for a build of known arithmetic, phase by phase.

    Raises as a build.
    """
    recipe, checkpoint = Asked(None, "demo", flags=Flags(settings=changes)).open()
    plan = Plan.of(recipe, checkpoint, ONLY)
    before = _probed(device)
    clock = Timed(progress)
    with tempfile.TemporaryDirectory(prefix="qquant-") as scratch:
        pipeline.build(recipe, checkpoint, plan, Path(scratch, "out"), device, clock)
    after = _probed(device)
    rates = {width: between(before[width], after[width], 0.5) for width in before}
    machine = Machine(SCHEMA, device_name(device), torch.get_num_threads(), {}, rates)
    counted = seconds.seconds(recipe, checkpoint, plan, machine.rates_for(checkpoint), device)
    factors = {phase: clock.took[phase] / took for phase, took in counted.items() if clock.took.get(phase, 0) > LEAST}
    return replace(machine, factors=factors)


def _probed(device: torch.device) -> dict[str, seconds.Rates]:
    """Rates by the width of the matrices, measured in a few seconds."""
    return {str(width): seconds.probe_of((width, width), torch.bfloat16, device) for width in WIDTHS}
