"""What a report says first, in every view: may I publish, what does it cost, and where is it worst.

report.html, report.md, cards and notebooks begin with these lines; everything below them is detail.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qquant.report import behaviour, slices
from qquant.report.escape import markdown
from qquant.report.solved import linears

if TYPE_CHECKING:
    from qquant.report.record import ArtifactReport, Outcome, Report


@dataclass(frozen=True)
class Fact:
    """A question that a reader comes with, and its answer in a sentence."""

    question: str
    answer: str
    outcome: Outcome | None = None  # where the answer is a verdict


def facts(report: Report) -> list[Fact]:
    """The answers, most important first; what was not measured is left out."""
    names = short_names([artifact.name for artifact in report.artifacts])
    return [
        Fact("Publish?", _publish(report, names), report.outcome),
        *_cost(report, names),
        *_worst_slice(report.artifacts, names),
        *_worst_behaviour(report.artifacts, names),
        *_worst_layer(report.artifacts, names),
        *_speed(report.artifacts, names),
    ]


def in_short(report: Report, *, published: bool = False) -> list[str]:
    """The answers as a list in Markdown; where it is `published`, for those who load it: they do not ask whether they may."""
    lines = facts(report)
    if published:
        waived = ", with a waiver" if report.outcome == "waived" else ""
        gated = any(artifact.verdict.gates for artifact in report.artifacts)
        lines[0] = Fact(
            "Checked", f"proven within the limits of the recipe{waived}." if gated else "measured, without limits."
        )
    return [f"- **{fact.question}** {markdown(fact.answer)}" for fact in lines]


def short_names(names: Sequence[str]) -> dict[str, str]:
    """What to call each: the end of a path, as long as it must be to tell them apart."""
    parts = {name: [part for part in name.split("/") if part] or [name] for name in names}
    short: dict[str, str] = {}
    for name, mine in parts.items():
        for length in range(1, len(mine) + 1):
            tail = mine[-length:]
            if not any(other != name and theirs[-length:] == tail for other, theirs in parts.items()):
                break
        short[name] = "/".join(tail)
    return short


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _publish(report: Report, names: dict[str, str]) -> str:
    refused = [a for a in report.artifacts if a.verdict.outcome in ("fail", "inconclusive")]
    waived = [names[a.name] for a in report.artifacts if a.verdict.outcome == "waived"]
    count = len(report.artifacts)
    if refused:
        which = ", ".join(f"{names[a.name]} ({a.verdict.outcome})" for a in refused)
        rest = count - len(refused)
        return f"Not {which}" + (f"; the other {rest} may." if rest else ".")
    if waived:
        return f"Yes, with a waiver: {', '.join(waived)}."
    if not any(artifact.verdict.gates for artifact in report.artifacts):
        return "Nothing speaks against it, and no limit was asked for."
    return "Yes: proven within every limit." if count == 1 else f"Yes: all {count} are proven within their limits."


def _cost(report: Report, names: dict[str, str]) -> Iterator[Fact]:
    measured = [a for a in report.artifacts if math.isfinite(a.kl_divergence) and a.size > 0]
    if not measured:
        return
    smallest, closest = min(measured, key=lambda a: a.size), min(measured, key=lambda a: a.kl_divergence)
    yield Fact("Cost" if len(measured) == 1 else "Smallest", _described(smallest, report, names))
    if closest is not smallest:
        yield Fact("Closest", _described(closest, report, names))


def _described(artifact: ArtifactReport, report: Report, names: dict[str, str]) -> str:
    share = artifact.bits_per_weight / report.baseline_bits if report.baseline_bits else math.nan
    of = f" ({share:.0%} of 16 bits)" if math.isfinite(share) else ""
    return (
        f"{names[artifact.name]}, {size(artifact.size)}{of}: KL divergence {artifact.kl_divergence:.5f}, "
        f"perplexity × {artifact.perplexity_ratio:,.4f}, top-1 {artifact.top1_agreement:.2%}".replace("%", "\u00a0%")
    )


def _worst_slice(artifacts: Sequence[ArtifactReport], names: dict[str, str]) -> Iterator[Fact]:
    """The fact about the artifact whose worst slice is furthest towards its limit or beyond it."""
    owners = {id(one): artifact for artifact in artifacts for one in artifact.slices}
    furthest = slices.worst([one for artifact in artifacts for one in artifact.slices])
    if furthest is not None and furthest.limit is not None:
        text = f"{furthest.name} in {names[owners[id(furthest)].name]}: {slices.comparison(furthest)} (limit {furthest.limit:.3g}): {furthest.standing}"
        yield Fact(
            "Worst slice", text, furthest.standing if furthest.standing in ("pass", "fail", "inconclusive") else None
        )


def _worst_behaviour(artifacts: Sequence[ArtifactReport], names: dict[str, str]) -> Iterator[Fact]:
    """The fact about the artifact whose worst kind of question is furthest towards its limit or beyond it."""
    owners = {id(row): artifact for artifact in artifacts for row in artifact.behaviour}
    furthest = behaviour.worst([row for artifact in artifacts for row in artifact.behaviour])
    if furthest is not None and furthest.standing in ("pass", "fail", "inconclusive"):
        text = f"{furthest.name} in {names[owners[id(furthest)].name]}: {behaviour.said(furthest)} (at most {furthest.limit:.1%} lost): {furthest.standing}"
        yield Fact("Worst behaviour", text, furthest.standing)


def _worst_layer(artifacts: Sequence[ArtifactReport], names: dict[str, str]) -> Iterator[Fact]:
    """The linear that lost most of its output, relative to it."""
    measured = [
        (linear.error, linear.name, artifact.name)
        for artifact in artifacts
        for linear in linears(artifact.layers)
        if math.isfinite(linear.error)
    ]
    if measured:
        error, linear, artifact = max(measured, key=lambda one: one[0])
        text = f"{linear.removesuffix('.weight')} in {names[artifact]}: squared error {error:.3g} of its output"
        yield Fact("Worst layer", text)


def _speed(artifacts: Sequence[ArtifactReport], names: dict[str, str]) -> Iterator[Fact]:
    """The fastest to decode."""
    paces = [(pace, a) for a in artifacts if a.speed and (pace := a.speed.pace("decode"))]
    measured = [(pace, artifact) for pace, artifact in paces if math.isfinite(pace.ratio)]
    if measured:
        pace, artifact = max(measured, key=lambda one: one[0].ratio)
        device = artifact.speed.device if artifact.speed else ""
        text = f"{names[artifact.name]} decodes {pace.ratio:.2f} times as fast as 16 bits: {pace.rate:.3g} tokens/s on {device}"
        yield Fact("Fastest", text)
