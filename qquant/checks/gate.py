"""From measurements to a verdict: each limit of the recipe against what is proven about its loss.

perplexity ratio   mean NLL difference <= ln(limit)      8-bit artifacts: not gated where KL or top-1 is, since their
                                                         perplexity differs by less than any text can resolve
KL divergence      mean KL <= limit
top-1 agreement    mean disagreement <= 1 - limit
regression         mean (KL now - (1 + tolerance) KL then) <= 0, the same for disagreement; paired with stored evidence
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from qquant.checks import statistics
from qquant.checks.statistics import Loss, Vector
from qquant.recipe import Gates
from qquant.report.record import GateReport, Proof, Verdict

MOST = 65536  # windows that a recipe may ask for

Means = Mapping[str, Vector]  # "nll", "kl", "top1": window means of the losses


@dataclass(frozen=True)
class _Gate:
    """One limit: the loss it is about, in the units of the statistics and in those of the recipe."""

    name: str
    windows: Vector
    limit: float  # of the loss
    shown: Callable[[float], float]  # from the loss to what the recipe speaks of
    word: str  # what a value on the wrong side is
    least: float = -math.inf  # loss that there can be
    most: float = math.inf


def _same(value: float) -> float:
    return value


def _agreement(value: float) -> float:
    return 1 - value


def _ratio(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _gates(gates: Gates, means: Means, earlier: Means | None, eight_bit: bool) -> list[_Gate]:
    asked = []
    resolved = not eight_bit or (gates.kl_divergence is None and gates.top1_agreement is None)
    if gates.perplexity_ratio is not None and resolved:
        limit = math.log(gates.perplexity_ratio)
        asked.append(_Gate("perplexity ratio", means["nll"], limit, _ratio, "above"))
    if gates.kl_divergence is not None:
        asked.append(_Gate("mean KL divergence", means["kl"], gates.kl_divergence, _same, "above", 0.0))
    if gates.top1_agreement is not None:
        asked.append(_Gate("top-1 agreement", means["top1"], 1 - gates.top1_agreement, _agreement, "below", 0.0, 1.0))
    if earlier is not None:
        more = 1 + gates.regression_tolerance
        names = {"kl": "KL divergence against the earlier release", "top1": "disagreement against the earlier release"}
        for key, name in names.items():
            count = min(len(means[key]), len(earlier[key]))
            excess = means[key][:count] - more * earlier[key][:count]
            asked.append(_Gate(name, excess, 0.0, _same, "above"))
    return asked


def judge(
    gates: Gates, means: Means, earlier: Means | None = None, *, eight_bit: bool = False, looks: int = 1
) -> Verdict:
    """Pass, fail or inconclusive for window means float64 [n] of an artifact; `earlier`: those of the release before.

    `eight_bit`: the artifact has 8 bits or more. `looks`: how often the question may be asked, with more text each time.
    """
    asked = _gates(gates, means, earlier, eight_bit)
    losses = {gate.name: statistics.measure_loss(gate.windows, gate.limit) for gate in asked}
    outcome, each = statistics.decide(losses, looks)
    reports = tuple(_report(gate, losses[gate.name], each[gate.name]) for gate in asked)
    reasons = tuple(_reason(gate, report) for gate, report in zip(asked, reports, strict=True))
    return Verdict(outcome, tuple(reason for reason in reasons if reason), reports)


def _report(gate: _Gate, loss: Loss, outcome: Proof) -> GateReport:
    low, high = sorted(
        gate.shown(min(max(bound, gate.least), gate.most)) for bound in statistics.interval(gate.windows)
    )
    reach = abs(gate.shown(gate.limit + loss.detectable) - gate.shown(gate.limit))
    value, limit = gate.shown(loss.mean), gate.shown(gate.limit)
    return GateReport(gate.name, outcome, value, limit, low, high, loss.p_within, loss.p_beyond, reach, loss.windows)


def _reason(gate: _Gate, report: GateReport) -> str:
    """Why a gate did not pass; empty for one that did."""
    between = report.between(digits=5)
    match report.outcome:
        case "fail":
            return f"{gate.name} {report.value:.5g} is {gate.word} the limit {report.limit:g} ({between})"
        case "inconclusive":
            return (
                f"{gate.name} {report.value:.5g}: neither within nor beyond the limit {report.limit:g} is proven ({between}; the proof "
                f"also allows for several gates and looks). {_enough(report)}"
            )
    return ""


def _enough(report: GateReport) -> str:
    """How much text would decide an inconclusive gate, and what to type: what can be detected shrinks with the root of the windows."""
    if report.windows == 1:
        return "One window has no spread to judge by: --windows 8 or more, or checks.windows in a recipe"
    distance = abs(report.value - report.limit)
    need = report.windows * (report.detectable / distance) ** 2 if distance else math.inf
    if not need <= MOST:
        return (
            f"It lies too near the limit for any text of up to {MOST:,} windows: set another limit, or build it better"
        )
    count = max(math.ceil(need), report.windows + 1)
    return f"About {count:,} windows decide: --max-windows {count}, or checks.max_windows in a recipe"


def waived(verdict: Verdict, gates: Gates, today: datetime.date) -> Verdict:
    """The verdict with the recipe's waiver applied: a fail becomes "waived" until the waiver's last day, with its reasons kept."""
    waiver = gates.waiver
    if verdict.outcome != "fail" or not waiver.reason:
        return verdict
    text = f"waived by {waiver.who} until {waiver.until}: {waiver.reason}"
    if today > datetime.date.fromisoformat(waiver.until):
        return replace(verdict, reasons=(*verdict.reasons, f"the waiver has ended ({text})"))
    return replace(verdict, outcome="waived", waiver=text)


def with_gates(verdict: Verdict, *others: Verdict | None) -> Verdict:
    """The verdict with those of further gates, where there are any: the worst outcome, all reasons."""
    for other in others:
        if other is not None:
            outcome = statistics.worst([one.outcome for one in (verdict, other) if one.outcome != "waived"])
            reasons, gates = (*verdict.reasons, *other.reasons), (*verdict.gates, *other.gates)
            verdict = replace(verdict, outcome=outcome, reasons=reasons, gates=gates)
    return verdict


def with_faults(verdict: Verdict, problems: tuple[str, ...]) -> Verdict:
    """The verdict with findings that are no matter of degree (structure, answers): any of them fails."""
    if not problems:
        return verdict
    return replace(verdict, outcome="fail", reasons=(*problems, *verdict.reasons), faults=(*problems, *verdict.faults))
