"""How many times one loss is of another, with what is proven: the means of two samples of windows, compared in logarithms.

    theta = ln mean(o) - ln max(mean(e), floor)          o: window means of a slice, e: of what it stands beside
    s^2   = var(o) / (n mean(o)^2) + var(e) / (m mean(e)^2)                    different windows
    s     = sd(o / mean(o) - e / mean(e)) / sqrt(n)                            the same tokens read twice: paired

to first order (the delta method). T = (theta - ln limit) / s is held against a studentized bootstrap over the windows of both samples, where
there are `RESAMPLED`, and against Student's distribution with n - 1, or Welch's, degrees of freedom; the larger p-value counts. Where e is
below `floor`, it is the floor, known exactly: what is harmless everywhere is not far from itself anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qquant.checks.statistics import RESAMPLED, SEED, Vector, student, student_quantile

RESAMPLES = 10000  # so that a hundredth of the level of one slice in twenty is told apart


@dataclass(frozen=True)
class Ratio:
    """How many times; the natural logarithm of it, its standard error, and Student's degrees of freedom."""

    log: float
    error: float
    degrees: int
    resampled: Vector | None  # (theta* - theta) / s*, float64 [RESAMPLES]

    @property
    def times(self) -> float:
        """The ratio of the means."""
        return math.exp(self.log) if self.log < 700 else math.inf

    def p_within(self, limit: float) -> float:
        """The p-value of "the ratio is above `limit`": small where it is proven to be at most that."""
        return self._tail(limit, -1)

    def p_beyond(self, limit: float) -> float:
        """The p-value of "the ratio is at most `limit`": small where it is proven to be above that."""
        return self._tail(limit, 1)

    def _tail(self, limit: float, side: int) -> float:
        """P(T at least as far to one side as seen) if the ratio were the limit."""
        away = side * (self.log - math.log(limit))
        if self.error == 0 or not math.isfinite(away):
            return float(not (away > 0 or (away == 0 and side < 0)))  # what is the limit itself is within it
        t = away / self.error
        p = 1 - student(t, self.degrees)
        if self.resampled is not None:
            drawn = side * self.resampled
            p = max(p, float((1 + np.count_nonzero(drawn >= t)) / (1 + len(drawn))))
        return p

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided confidence interval of the ratio, by Student's distribution or the bootstrap, whichever is wider on a side."""
        if self.error == 0 or not math.isfinite(self.log):
            return self.times, self.times
        reach = student_quantile((1 + level) / 2, self.degrees)
        low = high = reach
        if self.resampled is not None:
            left, right = np.quantile(self.resampled, [(1 - level) / 2, (1 + level) / 2], method="nearest")
            low, high = max(reach, float(right)), max(reach, -float(left))
        ends = (self.log - low * self.error, self.log + high * self.error)
        return math.exp(ends[0]), math.exp(ends[1]) if ends[1] < 700 else math.inf


def ratio(ours: Vector, beside: Vector, *, paired: bool = False, floor: float = 0.0) -> Ratio:
    """How many times the mean of `ours` float64 [n] is that of `beside` float64 [m], n, m >= 2; `paired`: window by window of the same tokens.

    What is not finite, or nothing beside nothing, has no error: a loss that is not finite is beyond every limit, and no loss within.
    """
    mean, other = float(ours.mean()), float(beside.mean())
    if not other > floor:
        beside, other, paired = np.full(2, max(floor, 0.0)), max(floor, 0.0), False
    if not (math.isfinite(mean) and math.isfinite(other) and mean > 0 and other > 0):
        return Ratio(-math.inf if mean == 0 else math.inf, 0.0, 1, None)
    error, degrees = _spread(ours, beside, paired)
    if error == 0:
        return Ratio(math.log(mean / other), 0.0, 1, None)
    enough = len(ours) >= RESAMPLED and (len(beside) >= RESAMPLED or not beside.std())
    drawn = _studentized(ours, beside, paired) if enough else None
    return Ratio(math.log(mean / other), error, degrees, drawn)


def _spread(ours: Vector, beside: Vector, paired: bool) -> tuple[float, int]:
    """(standard error of the log ratio, degrees of freedom)."""
    count = len(ours)
    if paired:
        return float((ours / ours.mean() - beside / beside.mean()).std(ddof=1)) / math.sqrt(count), count - 1
    parts = [float((x.std(ddof=1) / x.mean()) ** 2 / len(x)) for x in (ours, beside)]
    variance = sum(parts)
    shares = sum(part**2 / (len(x) - 1) for part, x in zip(parts, (ours, beside), strict=True))
    return math.sqrt(variance), max(1, int(variance**2 / shares)) if shares else count - 1


def _studentized(ours: Vector, beside: Vector, paired: bool) -> Vector:
    """The distribution of (theta* - theta) / s*; resamples without spread count as infinitely far."""
    rng = np.random.default_rng(SEED)
    mine, own = _resampled(rng, ours)
    constant = not beside.std()
    theirs, other = (np.full((RESAMPLES, 1), beside[0]), None) if constant else _resampled(rng, beside)
    if paired and other is not None:
        theirs = beside[own]
    means, others = mine.mean(1), theirs.mean(1)
    shift = np.log(means / others) - math.log(float(ours.mean()) / float(beside.mean()))
    if paired:
        variance = (mine / means[:, None] - theirs / others[:, None]).var(1, ddof=1) / len(ours)
    else:
        variance = (mine.std(1, ddof=1) / means) ** 2 / len(ours)
        variance += 0.0 if constant else (theirs.std(1, ddof=1) / others) ** 2 / len(beside)
    shrink = len(ours) / (len(ours) - 1)  # resamples vary by (n - 1) / n less than samples do
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(math.sqrt(shrink) * shift / np.sqrt(variance), nan=0.0, posinf=np.inf, neginf=-np.inf)


def _resampled(
    rng: np.random.Generator, values: Vector
) -> tuple[Vector, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
    picks = rng.integers(0, len(values), (RESAMPLES, len(values)))
    return values[picks], picks
