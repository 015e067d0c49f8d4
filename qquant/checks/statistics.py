"""What a sample of windows says about a loss: proven within a limit, proven beyond it, or neither.

A loss is a number per token, artifact against checkpoint on the same token: NLL difference, KL divergence, disagreement. Tokens of
a window hang together, so windows are the sample (n of them, each the mean of its tokens), and

    t = (mean - limit) / s,  s = standard error of the window means
    p_within = P(T <= t) under mean = limit     small: the loss is proven below the limit
    p_beyond = P(T >= t)                        small: it is proven above

T is taken from a studentized bootstrap over windows (window means are skewed; the normal interval is too short on their long
side) and from Student's distribution, and the larger p-value counts; below `RESAMPLED` windows Student's alone. A loss that is the
same in every window is known exactly. tests/bench/gate_simulation.py measures how often this errs on real windows; what skewness is left
at 40 windows is why p-values are held to `gates.ASKED`, a fifth below the promised level.

An artifact passes if every loss is proven within its limit: an intersection, which needs no correction. It fails if any one is
proven beyond: a union, which does, by Holm. Looking again with more text divides the level by the number of looks. References:
Miller, Adding Error Bars to Evals (2024); Hall, The Bootstrap and Edgeworth Expansion (1992);
Hesterberg, What Teachers Should Know About the Bootstrap (2015); Holm (1979); Berger (1982).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from qquant.recipe.limits import ASKED, POWER, normal_quantile
from qquant.report.record import Proof

Vector = NDArray[np.float64]

RESAMPLED = 12  # windows from which on resampling knows the tails better than Student's distribution
RESAMPLES = 4000
SEED = 20240204


@dataclass(frozen=True)
class Loss:
    """One gated loss: its mean, what is allowed, and how sure it is."""

    mean: float
    limit: float
    error: float  # standard error of the mean, from windows
    p_within: float  # small: proven at or below the limit
    p_beyond: float  # small: proven above
    windows: int

    @property
    def detectable(self) -> float:
        """Distance from the limit that would be proven in `POWER` of all runs."""
        return (normal_quantile(1 - ASKED) + normal_quantile(POWER)) * self.error


def measure_loss(windows: Vector, limit: float) -> Loss:
    """Test the window means float64 [n], n >= 1, of a loss against `limit`; a value that is not finite is beyond every limit."""
    count = len(windows)
    mean = float(windows.mean())
    if not math.isfinite(mean):
        return Loss(mean, limit, math.inf, 1.0, 0.0, count)
    if bool((windows == windows[0]).all()) and (count > 1 or mean == 0):
        exact = float(windows[0])
        return Loss(exact, limit, 0.0, float(exact > limit), float(exact <= limit), count)
    if count == 1:
        return Loss(mean, limit, math.inf, 0.5, 0.5, count)
    error = float(windows.std(ddof=1)) / math.sqrt(count)
    t = (mean - limit) / error
    below = student(t, count - 1)
    within, beyond = below, 1 - below
    if count >= RESAMPLED:
        drawn = _studentized(windows)
        within = max(within, float((1 + np.count_nonzero(drawn <= t)) / (1 + len(drawn))))
        beyond = max(beyond, float((1 + np.count_nonzero(drawn >= t)) / (1 + len(drawn))))
    return Loss(mean, limit, error, within, beyond, count)


def _studentized(windows: Vector) -> Vector:
    """The distribution of (mean* - mean) / s* over resamples of the windows; resamples without spread count as infinite."""
    count = len(windows)
    picks = np.random.default_rng(SEED).integers(0, count, (RESAMPLES, count))
    drawn = windows[picks]
    shift = drawn.mean(1) - windows.mean()
    spread = drawn.std(1, ddof=1) / math.sqrt(count)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Resamples vary by (n - 1) / n less than samples do.
        return np.nan_to_num(math.sqrt(count / (count - 1)) * shift / spread, nan=0.0, posinf=np.inf, neginf=-np.inf)


def interval(windows: Vector, level: float = 0.95) -> tuple[float, float]:
    """Two-sided bootstrap-t confidence interval of the mean of window means float64 [n]; (mean, mean) if they are all equal."""
    count, mean = len(windows), float(windows.mean())
    if count == 1 or not math.isfinite(mean):
        return -math.inf, math.inf
    error = float(windows.std(ddof=1)) / math.sqrt(count)
    if error == 0:
        return mean, mean
    if count < RESAMPLED:
        reach = student_quantile((1 + level) / 2, count - 1) * error
        return mean - reach, mean + reach
    low, high = np.quantile(
        _studentized(windows), [(1 - level) / 2, (1 + level) / 2], method="nearest"
    )  # may be infinite
    return mean - float(high) * error, mean - float(low) * error


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for having tested all of them: reject those at or below the level, the chance of any false one is the level."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def mcnemar(worse: int, better: int) -> float:
    """P(at least `worse` of the pairs that differ got worse) if getting better were as likely; exact, 1 if none differs."""
    count = worse + better
    return sum(math.comb(count, k) for k in range(worse, count + 1)) / 2**count


def flips(to_wrong: int, to_right: int, count: int, limit: float) -> tuple[Loss, tuple[float, float]]:
    """(the loss of score tested against `limit`, 95 % interval of the change) for paired answers, right or wrong, of `count` questions.

    By Agresti and Min (2005): half an answer is added to each of the four cells, so that few flips are no certainty.
    """
    more, wrong, right = count + 2, to_wrong + 0.5, to_right + 0.5
    loss = (wrong - right) / more
    error = math.sqrt((wrong + right) / more - loss**2) / math.sqrt(more)
    within = NormalDist().cdf((loss - limit) / error)
    reach = normal_quantile(0.975) * error
    return Loss((to_wrong - to_right) / count, limit, error, within, 1 - within, count), (
        max(-1.0, -loss - reach),
        min(1.0, -loss + reach),
    )


def decide(losses: Mapping[str, Loss], looks: int = 1) -> tuple[Proof, dict[str, Proof]]:
    """(outcome, outcome of each loss), each "pass", "fail" or "inconclusive", at `gates.LEVEL` over all losses and `looks`."""
    level = ASKED / looks
    beyond = dict(zip(losses, holm([loss.p_beyond for loss in losses.values()]), strict=True))
    each: dict[str, Proof] = {
        name: "fail" if beyond[name] <= level else "pass" if loss.p_within <= level else "inconclusive"
        for name, loss in losses.items()
    }
    return worst(each.values()), each


def worst(outcomes: Collection[str]) -> Proof:
    """Fail before inconclusive before pass."""
    return "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"


def student(t: float, degrees: int) -> float:
    """P(T <= t) of Student's distribution with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for step in range(degrees // 2):
        total += term
        term *= square * (2 * step + 1 + odd) / (2 * step + 2 + odd)
    between = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + between) / 2


def student_quantile(p: float, degrees: int) -> float:
    """The t below which Student's distribution has the share p, 0 < p < 1."""
    low, high = -1e6, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, degrees) < p else (low, middle)
    return (low + high) / 2
