"""One release against another, from the evidence that each kept: neither model is needed.

For every artifact that both have, paired on the windows both read: how the KL divergence, the disagreement and the NLL changed, with a
bootstrap interval over windows. "worse" and "better" are proven (`gates.ASKED`, Holm over the three losses of one artifact).
Of releases that were checked with `profile: release` also the slice whose KL divergence grew most, and every one that is proven to have
grown or shrunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qquant.checks import evidence, slice_changes, statistics
from qquant.checks.evidence import Evidence
from qquant.errors import InputError
from qquant.recipe.limits import ASKED

Move = Literal["worse", "better", "equal", "inconclusive"]  # equal: to the bit
LOSSES = {"kl": "mean KL divergence", "top1": "top-1 disagreement", "nll": "mean NLL difference"}


@dataclass(frozen=True)
class LossChange:
    """One loss of one artifact, then and now."""

    artifact: str
    loss: str
    before: float
    now: float
    low: float  # 95 % interval of now - before
    high: float
    outcome: Move
    windows: int


def compare(before: Path, now: Path) -> list[LossChange]:
    """Changes from one report (or its folder) to another, by artifact.

    Raises:
        UsageError: a report or its evidence is missing.
        InputError: they share no artifact, or read other tokens.
    """
    then, fresh = evidence.of_report(before), evidence.of_report(now)
    shared = _pairs(then, fresh, evidence.paths_of(before), evidence.paths_of(now))
    if not shared:
        raise InputError(f"{before} has {', '.join(then)}, {now} has {', '.join(fresh)}: no artifact of one name")
    changes = []
    for old, new in shared.items():
        evidence.require_comparable(fresh[new].facts, then[old].facts, str(before))
        changes += _changes(new, then[old], fresh[new])
    return changes


def _pairs(
    then: Mapping[str, Evidence],
    fresh: Mapping[str, Evidence],
    paths: Mapping[str, str],
    fresh_paths: Mapping[str, str],
) -> dict[str, str]:
    """Artifacts of one name, or else of one file or folder name, since a check calls them by their paths; two alone are about the same one."""
    if len(then) == len(fresh) == 1:
        return dict(zip(then, fresh, strict=True))
    by_file = {path.rpartition("/")[2]: name for name, path in paths.items()}
    pairs = {name: name for name in fresh if name in then}
    for name in fresh.keys() - pairs.keys():
        old = by_file.get(fresh_paths[name].rpartition("/")[2])
        if old is not None and old not in pairs:
            pairs[old] = name
    return {old: pairs[old] for old in then if old in pairs}


def _changes(name: str, then: Evidence, fresh: Evidence) -> list[LossChange]:
    count = min(then.windows, fresh.windows)
    moves = {loss: fresh.means[loss][:count] - then.means[loss][:count] for loss in LOSSES}
    losses = {loss: statistics.measure_loss(move, 0.0) for loss, move in moves.items()}
    worse = statistics.holm([loss.p_beyond for loss in losses.values()])
    better = statistics.holm([loss.p_within for loss in losses.values()])
    changes = []
    for (loss, move), above, below in zip(moves.items(), worse, better, strict=True):
        if not move.any():
            outcome: Move = "equal"
        else:
            outcome = "worse" if above <= ASKED else "better" if below <= ASKED else "inconclusive"
        low, high = statistics.interval(move)
        changes.append(
            LossChange(
                artifact=name,
                loss=LOSSES[loss],
                before=float(then.means[loss][:count].mean()),
                now=float(fresh.means[loss][:count].mean()),
                low=low,
                high=high,
                outcome=outcome,
                windows=count,
            )
        )
    return [*changes, *_slices(name, then, fresh)]


def _slices(name: str, then: Evidence, fresh: Evidence) -> list[LossChange]:
    """Slices that are proven to have changed, and the one that grew most; none where all are as they were."""
    moved = [change for change in slice_changes.changes(then.slices, fresh.slices) if change.then != change.now]
    worse = statistics.holm([change.times.p_beyond(1.0) for change in moved])
    better = statistics.holm([change.times.p_within(1.0) for change in moved])
    most = max((change.times.log for change in moved), default=0.0)
    shown = []
    for change, above, below in zip(moved, worse, better, strict=True):
        outcome: Move = "worse" if above <= ASKED else "better" if below <= ASKED else "inconclusive"
        if outcome != "inconclusive" or change.times.log == most:
            low, high = statistics.interval(fresh.slices[change.name].kl - then.slices[change.name].kl)
            shown.append(
                LossChange(
                    artifact=name,
                    loss=f"KL divergence, {change.name}",
                    before=change.then,
                    now=change.now,
                    low=low,
                    high=high,
                    outcome=outcome,
                    windows=change.windows,
                )
            )
    return shown
