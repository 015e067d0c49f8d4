"""The slices of one release against those of an earlier one: window by window of the same tokens, from what each kept as evidence.

    times = mean KL divergence now / mean KL divergence then, paired (`ratios`)

`qquant compare` shows the slice that grew most and every one that is proven to have grown (Holm over the slices, at `ASKED`). As a gate
(`gates.regression_vs` with `checks.profile: release`) no slice may have grown by more than `regression_tolerance`: fail where that is proven of
any, pass where the contrary is proven of all, as for the worst slice, with which it shares its level. There a release that lost less than
`RESOLVED` nats counts as having lost that much. Slices are compared where both read the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qquant.calibration.slices import Sliced
from qquant.checks import statistics
from qquant.checks.evidence import SliceMeans
from qquant.checks.ratios import Ratio, ratio
from qquant.checks.slices import SliceReading
from qquant.recipe.limits import ASKED, POWER, RESOLVED, SLICES, normal_quantile
from qquant.report.record import GateReport, Proof, Verdict

GATE = "worst slice against the earlier release"


@dataclass(frozen=True)
class SliceChange:
    """A slice then and now."""

    name: str
    then: float  # mean KL divergence, nats
    now: float
    times: Ratio
    windows: int


def means(readings: Sequence[SliceReading], text: Sliced) -> dict[str, SliceMeans]:
    """What is kept of every slice: its window means, and a digest of what was read."""
    digests, start = {}, 0
    for one in text.slices:
        digests[one.name] = text.short[start : start + one.windows]
        start += one.windows
    return {
        reading.name: SliceMeans(
            hashlib.sha256(digests.get(reading.name, text.long).tobytes()).hexdigest(),
            reading.fidelity.window_means()["kl"],
        )
        for reading in readings
    }


def changes(then: Mapping[str, SliceMeans], now: Mapping[str, SliceMeans], floor: float = 0.0) -> list[SliceChange]:
    """Every slice that both have read alike, in the order of `now`."""
    alike = []
    for name, mine in now.items():
        old = then.get(name)
        if old is None or old.tokens_sha256 != mine.tokens_sha256 or len(old.kl) != len(mine.kl) or len(mine.kl) < 2:
            continue
        # What did not change at all has no spread either, and is known exactly.
        same = np.array_equal(old.kl, mine.kl)
        times = Ratio(0.0, 0.0, 1, None) if same else ratio(mine.kl, old.kl, paired=True, floor=floor)
        alike.append(SliceChange(name, float(old.kl.mean()), float(mine.kl.mean()), times, len(mine.kl)))
    return alike


def judge(then: Mapping[str, SliceMeans], now: Mapping[str, SliceMeans], tolerance: float) -> Verdict | None:
    """The verdict on the slice that grew most; None where no slice can be compared."""
    compared = changes(then, now, RESOLVED)
    if not compared:
        return None
    limit = 1 + tolerance
    beyond = statistics.holm([change.times.p_beyond(limit) for change in compared])
    each: list[Proof] = [
        "fail" if p <= SLICES / 2 else "pass" if change.times.p_within(limit) <= ASKED else "inconclusive"
        for change, p in zip(compared, beyond, strict=True)
    ]
    outcome = statistics.worst(each)
    shown = max(
        (change for change, one in zip(compared, each, strict=True) if one == outcome), key=lambda one: one.times.log
    )
    low, high = shown.times.interval()
    reach = limit * np.expm1(min((normal_quantile(1 - ASKED) + normal_quantile(POWER)) * shown.times.error, 700.0))
    gate = GateReport(
        name=GATE,
        outcome=outcome,
        value=shown.times.times,
        limit=limit,
        low=low,
        high=high,
        p_within=shown.times.p_within(limit),
        p_beyond=shown.times.p_beyond(limit),
        detectable=float(reach),
        windows=shown.windows,
    )
    return Verdict(outcome, _reasons(shown, gate), (gate,))


def _reasons(shown: SliceChange, gate: GateReport) -> tuple[str, ...]:
    if gate.outcome == "pass":
        return ()
    word = "above" if gate.outcome == "fail" else "which cannot be told from"
    return (
        f"{GATE}: {shown.name} has {gate.value:.3g} times its KL divergence, {word} the limit {gate.limit:.3g} ({gate.between()})",
    )
