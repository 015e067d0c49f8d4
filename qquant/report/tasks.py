"""What benchmarks say of an artifact beside its checkpoint, on the same questions: the facts, and their table as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qquant.disk.records import Count, Number
from qquant.report.escape import markdown

if TYPE_CHECKING:
    from qquant.report.record import ArtifactReport

TITLE = "Benchmarks, on the same questions as the 16-bit checkpoint"
LEGEND = (
    "Share of right answers; after - and + how many of the checkpoint's went wrong, and how many came right. A verdict is on the loss "
    "within the margin, by paired answers."
)


@dataclass(frozen=True)
class TaskScore:
    """One metric of one benchmark."""

    task: str
    metric: str
    questions: Count
    score: Number
    score_baseline: Number
    to_wrong: Count  # flips
    to_right: Count
    p_worse: Number  # McNemar, one-sided
    low: Number  # 95 % interval of the score minus the checkpoint's
    high: Number
    margin: Number
    outcome: Literal["pass", "fail", "inconclusive"]


def table(artifacts: Sequence[ArtifactReport]) -> list[str]:
    """A Markdown table, benchmarks x artifacts. Empty: none was asked."""
    shown = [artifact for artifact in artifacts if artifact.tasks]
    if not shown:
        return []
    by_task = [{one.task: one for one in artifact.tasks} for artifact in shown]
    lines = [
        f"| | questions | checkpoint | {' | '.join(markdown(artifact.name) for artifact in shown)} |",
        "|---|---:|---:" + "|---:" * len(shown) + "|",
    ]
    for task in dict.fromkeys(one.task for artifact in shown for one in artifact.tasks):
        row = [scores.get(task) for scores in by_task]
        first = next(one for one in row if one)
        cells = " | ".join(_cell(one) if one else "" for one in row)
        lines.append(f"| {markdown(task)} | {first.questions:,} | {first.score_baseline:.4f} | {cells} |")
    return [*lines, "", LEGEND]


def _cell(one: TaskScore) -> str:
    mark = "" if one.outcome == "pass" else " **fail**" if one.outcome == "fail" else " inconclusive"
    return f"{one.score:.4f} (-{one.to_wrong} +{one.to_right}){mark}"
