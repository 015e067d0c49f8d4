"""Everything that is measured on a set of artifacts, and the verdict on each: what `build` ends with and `check` is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qquant import calibration
from qquant.artifact import open_weights
from qquant.calibration import CalibrationSet, Tokenizer
from qquant.checkpoint import Checkpoint, WeightSource
from qquant.checks import fidelity
from qquant.checks.gate import judge
from qquant.errors import InputError
from qquant.recipe import Checks, Gates
from qquant.report import ArtifactReport, warnings_of

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Candidate:
    """An artifact to be judged."""

    name: str
    path: Path
    size: int  # bytes of all files
    bits_per_weight: float
    gates: Gates
    fallbacks: tuple[str, ...] = ()
    layers: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class HeldOut:
    """The text that judges: windows int64 [W, L], and where it comes from."""

    windows: torch.Tensor
    vocabulary: int  # token ids from here on are padding
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Review:
    """What was found."""

    baseline_perplexity: float
    artifacts: tuple[ArtifactReport, ...]
    warnings: tuple[str, ...]


def held_out(checks: Checks, tokenizer: Tokenizer, used: CalibrationSet | None = None) -> HeldOut:
    """The first windows of the held-out text.

    Raises:
        InputError: it is shorter than a window, or shares text with the calibration tokens `used`.
    """
    ids, facts = calibration.heldout(checks.text, tokenizer)
    count = min(checks.windows, len(ids) // checks.length)
    if count == 0:
        raise InputError(
            f"{checks.text}: {len(ids)} tokens are less than one window of {checks.length}. Lower checks.length"
        )
    ids = ids[: count * checks.length]
    if used is not None:
        calibration.require_apart(used, ids, tokenizer)
    windows = torch.as_tensor(ids, dtype=torch.int64).view(count, checks.length)
    text = {"name": checks.text, "windows": count, "length": checks.length, "sha256": facts["sha256"]}
    return HeldOut(windows, tokenizer.size, text)


def review(
    checkpoint: Checkpoint, candidates: Sequence[Candidate], text: HeldOut, device: torch.device, progress: Progress
) -> Review:
    """Measure every candidate against the checkpoint in one pass, and judge it by its gates.

    Raises:
        InputError: a candidate was not made from a model of this shape.
    """
    sources = {}
    for candidate in candidates:
        source = open_weights(candidate.path)
        if _difference(source, checkpoint):
            raise InputError(
                f"{candidate.path}: is not a quantization of {checkpoint.path}: {_difference(source, checkpoint)}"
            )
        sources[candidate.name] = source
    measured = fidelity.measure(checkpoint, sources, text.windows, text.vocabulary, device, progress)
    warnings = tuple(
        f"{candidate.name}: {warning}" for candidate in candidates for warning in warnings_of(candidate.layers)
    )
    rows = tuple(_row(candidate, measured[candidate.name]) for candidate in candidates)
    return Review(measured[candidates[0].name].perplexity_baseline, rows, warnings)


def _difference(source: WeightSource, checkpoint: Checkpoint) -> str:
    """The numbers of the config that differ; a head may be stored twice, and contexts may be shortened."""
    theirs, ours = vars(source.config), vars(checkpoint.config)
    differing = [
        key
        for key in ours
        if key not in ("tied", "positions") and not math.isclose(theirs[key], ours[key], rel_tol=1e-6)
    ]
    return ", ".join(f"{key} is {theirs[key]}, not {ours[key]}" for key in differing)


def _row(candidate: Candidate, measured: fidelity.Fidelity) -> ArtifactReport:
    return ArtifactReport(
        name=candidate.name,
        path=str(candidate.path),
        size=candidate.size,
        bits_per_weight=candidate.bits_per_weight,
        perplexity=measured.perplexity,
        perplexity_ratio=measured.perplexity_ratio,
        kl_divergence=measured.mean_kl,
        kl_99=float(measured.kl.flatten().quantile(0.99)),
        top1_agreement=measured.top1,
        verdict=judge(candidate.gates, measured),
        fallbacks=candidate.fallbacks,
        layers=candidate.layers,
    )
