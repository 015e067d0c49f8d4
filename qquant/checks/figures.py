"""Figures of a report from what was measured on every token: percentiles, the histogram, texts, stretches of positions, worst tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from qquant.calibration import Tokenizer
from qquant.checks.fidelity import Fidelity
from qquant.report.record import KL_BINS, TextReport, WorstToken

WORST = 12  # tokens shown
CONTEXT = 40  # characters before a token that are shown
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


def worst_tokens(measured: Fidelity, windows: torch.Tensor, first: int, tokenizer: Tokenizer) -> tuple[WorstToken, ...]:
    """The tokens with the largest KL divergence, each with what stands before it; `first`: the position from which windows are scored."""
    scored = measured.kl.shape[1]
    order = np.argsort(-measured.kl.numpy().ravel(), kind="stable")[:WORST]
    tokens = []
    for flat in order.tolist():
        row, column = divmod(flat, scored)
        window = windows[row].tolist()
        at = first + 1 + column
        before = tokenizer.decode(window[max(0, at - 30) : at])[-CONTEXT:]
        token = tokenizer.decode(window[at : at + 1])
        numbers = (measured.kl, measured.nll, measured.nll_baseline)
        tokens.append(WorstToken(before, token, *(float(values[row, column]) for values in numbers)))
    return tuple(tokens)
