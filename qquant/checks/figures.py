"""Figures of a report from what was measured on every token: percentiles, the histogram, texts and stretches of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from qquant.checks.fidelity import Fidelity
from qquant.report.record import KL_BINS, TextReport

BUCKETS = (0, 2048, 8192, 32768)  # positions that are told apart in long windows


def percentiles(values: torch.Tensor, at: Sequence[float]) -> dict[str, float]:
    """The percentiles of values, by linear interpolation at f (n - 1), as llama-perplexity does."""
    return dict(zip([f"{f:g}" for f in at], np.percentile(values.numpy(), at).tolist(), strict=True))


def delta_p(measured: Fidelity) -> dict[str, float]:
    values = measured.delta_p
    moments = {"mean": float(values.mean()), "rms": float(values.square().mean().sqrt())}
    return moments | percentiles(values, (0.1, 1, 10, 50, 90, 99, 99.9))


def histogram(kl: torch.Tensor) -> tuple[int, ...]:
    values = np.nan_to_num(kl.numpy().ravel(), nan=np.inf, posinf=1e9)
    edges = [-np.inf, *(10.0**power for power in KL_BINS), np.inf]
    return tuple(np.histogram(values, edges)[0].tolist())


def text(name: str, measured: Fidelity) -> TextReport:
    return TextReport(
        name,
        measured.kl.numel(),
        measured.perplexity,
        measured.perplexity_baseline,
        measured.perplexity_ratio,
        measured.mean_kl,
        measured.top1,
    )


def positions(measured: Fidelity, first: int) -> tuple[TextReport, ...]:
    """The loss by position in the window, where windows are long enough to tell."""
    length = first + measured.kl.shape[1]
    stretches = []
    for start, stop in zip(BUCKETS, (*BUCKETS[1:], math.inf), strict=True):
        low, high = max(start - first, 0), int(min(stop, length)) - first
        if low < high:
            columns = {name: column[:, low:high] for name, column in vars(measured).items()}
            stretches.append(text(f"{low + first} to {high + first}", Fidelity(**columns)))
    return tuple(stretches) if len(stretches) > 1 else ()
