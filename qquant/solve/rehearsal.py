"""A build in miniature on a GPU, while the real one reads and hashes its checkpoint: what only the first use of a thing costs is paid then.

A process that computes on a GPU waits about ten seconds, in all, for things to be there: torch's compiler, which operators import when they
are called first, libraries of factorizations and products, kernels that are compiled or loaded, graphs. The same functions that
solve the artifacts run once, on one block of random weights, as many heads and columns as suffice to take the same kernels, and a few
tokens. What they write goes into a temporary folder; nothing of it is looked at.

Products in TF32 and repeatable attention are switched on and off for the whole process, so it must have ended before anything is computed
that counts. GGUF files are not rehearsed: their plan reads a vocabulary, which takes longer.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from qquant.artifact.draft import Draft
from qquant.background import start_early
from qquant.devices import threads_help
from qquant.errors import QQuantError, StoppedError
from qquant.families import ModelConfig
from qquant.formats import FORMATS
from qquant.formats.planned import PlannedArtifact
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.recipe import Recipe
from qquant.solve import walk
from qquant.solve.layers import Layers
from qquant.solve.moments import Moments
from qquant.source import safetensors_file
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import without_padding

HIDDEN = 2560  # more than the 2048 columns up to which some kernels take smaller tiles, and whole groups of any size
VOCAB = 4096
SAMPLES, LENGTH = 8, 1024
LOG = logging.getLogger(__name__)


@contextmanager
def beside(
    recipe: Recipe, checkpoint: Checkpoint, plan: Plan, out: Path, device: torch.device
) -> Iterator[Callable[[], None]]:
    """A function that waits until the checkpoint is hashed, and for the end of a rehearsal for those of `plan` that `out` lacks.

    Both go on beside what is read meanwhile; on a CPU there is neither. What a checkpoint writes itself, it computes: that begins
    after the rehearsal.
    """
    parts = {
        one.spec.format: one
        for one in reversed(plan.artifacts)
        if one.spec.feedback and FORMATS[one.spec.format].is_folder and not (out / one.folder).exists()
    }
    if not threads_help(device):
        yield lambda: None
        return
    work = partial(_rehearse, recipe, checkpoint, list(parts.values()), device)
    with start_early(checkpoint.hash_weights, threaded=True) as hashed, start_early(work, threaded=True) as rehearsed:

        def ready() -> None:
            hashed()
            rehearsed()

        if plan.writing:
            rehearsed()
        yield ready


def _rehearse(
    recipe: Recipe, checkpoint: Checkpoint, planned: Sequence[PlannedArtifact], device: torch.device, stop: Event
) -> None:
    """One block of `planned`; what goes wrong here goes wrong again where it counts, or does not matter."""
    if not planned:
        return
    importlib.import_module("torch._dynamo")
    card = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with card, tempfile.TemporaryDirectory(prefix="qquant-") as folder:
            _solve(recipe, miniature(checkpoint), planned, device, Path(folder), _Stopped(stop))
    except (QQuantError, RuntimeError, MemoryError, OSError) as error:
        LOG.debug("rehearsal: %s", error)


def _solve(
    recipe: Recipe,
    small: Checkpoint,
    planned: Sequence[PlannedArtifact],
    device: torch.device,
    folder: Path,
    progress: Quiet,
) -> None:
    drafts = [Draft(FORMATS[one.spec.format].plan(small, one.spec, recipe, "rehearsal"), folder, "") for one in planned]
    for draft in drafts:
        draft.open()
    ids = torch.arange(LENGTH) % small.config.vocab
    walk.quantize(
        small,
        [ids] * SAMPLES,
        drafts,
        Moments(folder / "moments"),
        Layers.of(small, device),
        progress,
        min(recipe.calibration.gradient_tokens, SAMPLES * LENGTH),
    )


@dataclass
class _Stopped(Quiet):
    """Ends where nobody waits for it."""

    stop: Event

    def check_stop(self) -> None:
        """Raise StoppedError where the build has ended."""
        if self.stop.is_set():
            raise StoppedError("the build has ended")


@dataclass(eq=False)
class Miniature(Checkpoint):
    """A checkpoint of random weights, the same whenever they are asked for, without files."""

    def tensor(self, name: str) -> Tensor:
        """Normal numbers that keep the size of what they are multiplied with."""
        info = self._info(name)
        generator = torch.Generator().manual_seed(len(name))
        value = torch.randn(info.shape, generator=generator) * info.shape[-1] ** -0.5
        return value.to(safetensors_file.torch_dtype(self.as_dtype or info.dtype))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some of the rows of `tensor`."""
        return self.tensor(name)[start:stop]


def miniature(checkpoint: Checkpoint) -> Miniature:
    """One block of the checkpoint's family with random weights, as narrow as takes the same kernels, and few words."""
    source = without_padding(checkpoint)
    config = _narrow(source.config)
    infos = {name: replace(source.tensors[name], shape=shape) for name, shape in source.family.shapes(config).items()}
    return source.become(Miniature, config=config, tensors=infos, adapter=None)


def _narrow(config: ModelConfig) -> ModelConfig:
    heads = min(config.heads, max(1, HIDDEN // config.head_dim))
    return replace(
        config,
        hidden=min(config.hidden, HIDDEN),
        intermediate=min(config.intermediate, 2 * HIDDEN),
        layers=1,
        heads=heads,
        kv_heads=heads if config.kv_heads == config.heads else 1,
        vocab=min(config.vocab, VOCAB),
    )
