"""Compiled kernels before they are needed: `qquant doctor --warm CHECKPOINT`, once on a machine, or while its image is made.

Triton compiles a kernel for the shapes and alignments it is called with, where it is called first, and keeps it in a folder for later
processes. What a build and its answers call is found by running them: the recipe's artifacts of the checkpoint's first block alone, which has the
widths of all, from a few samples of the recipe's length; then answers of each to prompts of several lengths. It all happens in a
temporary folder. A build for a size is left out, whose types are chosen by what all blocks lose.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant import pipeline
from qquant.artifact.finishing import installed
from qquant.errors import UsageError
from qquant.families import parse_config
from qquant.kernels import jit
from qquant.plan.asked import Asked
from qquant.plan.plan import Plan
from qquant.recipe.changes import Flags, changed
from qquant.runtime.loading import load
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import padded
from qquant.source.rounding import rounded

if TYPE_CHECKING:
    import torch

    from qquant.progress import Progress
    from qquant.recipe import Recipe

CALLS = 8  # samples of the recipe's length that go through a block at once, at most: at least so many
CHANGES = ("checks.profile=default", "checks.windows=2", "checks.max_windows=null", "checks.answer_length=8")
PROMPTS = (1, 12, 48, 128, 512)  # tokens: kernels for few rows, for some and for many
ANSWER = 4  # tokens


@dataclass(frozen=True)
class Warmed:
    """What was compiled, and where it is kept."""

    kernels: int
    seconds: float
    folder: Path


def warm(asked: Asked, device: torch.device, progress: Progress) -> Warmed:
    """Run what compiles the kernels of builds of `asked` on `device`, and of answers of what they make.

    Raises:
        UsageError: nothing is compiled on this device.
        InputError, EnvironmentMissingError and others, as a build.
    """
    folder = jit.kept_in(device)
    if folder is None:
        raise UsageError(
            f"--warm: no kernels are compiled on {device}: give a CUDA device, and a torch that brings Triton"
        )
    before, began = jit.kept(folder), time.monotonic()
    build(asked.wanted(), asked.reference, device, progress)
    return Warmed(len(jit.kept(folder) - before), time.monotonic() - began, folder)


def build(recipe: Recipe, reference: str, device: torch.device, progress: Progress) -> None:
    """Build the recipe's artifacts of the first block in a temporary folder, and let each answer."""
    few = with_few_samples(recipe)
    first = padded(rounded(first_block(Checkpoint.open(reference, recipe.revision)), recipe.dtype), recipe)
    names = [artifact.name for artifact in few.artifacts if not artifact.sized]
    if not names:
        raise UsageError(f"--warm: recipe {recipe.name} has files for a size alone, whose types all blocks decide")
    plan = Plan.of(few, first, names)
    with tempfile.TemporaryDirectory(prefix="qquant-") as scratch:
        out = Path(scratch, "out")
        pipeline.build(few, first, plan, out, device, progress)
        for artifact in plan.artifacts:
            answer(installed(out, artifact), device)


def with_few_samples(recipe: Recipe) -> Recipe:
    """The recipe with as few samples as make its calls, each as long, and the shortest check."""
    samples = min(recipe.calibration.samples, max(CALLS, len(recipe.calibration.sources)))
    return changed(recipe, Flags(settings=(*CHANGES, f"calibration.samples={samples}")))


def first_block(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without its other blocks."""
    raw = dict(checkpoint.raw_config) | {"num_hidden_layers": 1}
    if isinstance(kinds := raw.get("layer_types"), list):
        raw["layer_types"] = kinds[:1]
    config = parse_config(raw, f"{checkpoint.path} of one block")
    tensors = {
        name: checkpoint.tensors[name] for name in checkpoint.family.shapes(config) if name in checkpoint.tensors
    }
    return checkpoint.become(Checkpoint, raw_config=raw, config=config, tensors=tensors)


def answer(path: Path, device: torch.device) -> None:
    """Let an artifact go on with prompts of several lengths."""
    import torch

    model: Any = load(path, device)
    for length in PROMPTS:
        tokens = torch.arange(length, device=device).unsqueeze(0)
        model.generate(tokens, max_new_tokens=ANSWER, do_sample=False)
