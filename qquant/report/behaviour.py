"""What an artifact still does that its checkpoint does, question by question: the facts, and their table as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qquant.disk.records import Count, Number
from qquant.report.escape import in_line, markdown
from qquant.report.slices import Estimate, aligned

if TYPE_CHECKING:
    from qquant.report.record import ArtifactReport

TITLE = "What each file still does"
LEAST = 1e-9  # a limit of nothing, to divide by
Standing = Literal["pass", "fail", "inconclusive", "unable", "measured"]


@dataclass(frozen=True)
class BehaviourReport:
    """One kind of question, asked of an artifact and of its checkpoint."""

    name: str
    questions: Count
    right: Count
    right_baseline: Count
    to_wrong: Count  # right answers of the checkpoint that the artifact does not give
    to_right: Count
    p_worse: Number  # McNemar, exact, one-sided
    lost: Estimate  # share of the questions, to wrong minus to right
    standing: Standing  # unable: the checkpoint itself cannot do it; measured: nothing is asked of it
    limit: Number | None = None  # of `lost`
    kl_divergence: Estimate | None = None  # nats per token of the right answers, or of the structure of right calls
    top1_agreement: Estimate | None = None  # on the same tokens


def worst(rows: Sequence[BehaviourReport]) -> BehaviourReport | None:
    """The kind of question that fails first: of those that are judged, the one furthest towards its limit or beyond it."""
    order = {"fail": 0, "inconclusive": 1, "pass": 2}
    judged = [row for row in rows if row.standing in order and row.limit is not None]
    return min(
        judged, key=lambda row: (order[row.standing], -row.lost.value / max(row.limit or 0.0, LEAST)), default=None
    )


def said(row: BehaviourReport) -> str:
    """How many answers are right, in words."""
    if row.standing == "unable":
        return f"the checkpoint itself cannot do this: {row.right_baseline} of {row.questions}"
    return f"{row.right} of {row.questions} right, the checkpoint {row.right_baseline}"


def line(artifact: ArtifactReport) -> str:
    """One line on the worst kind of question, or that nothing could be asked; empty where nothing was."""
    if not artifact.behaviour:
        return ""
    shown = worst(artifact.behaviour)
    if shown is None:
        unable = [row for row in artifact.behaviour if row.standing == "unable"]
        told = f"of {len(artifact.behaviour)} kinds of questions the checkpoint itself can do {len(artifact.behaviour) - len(unable)}"
        return in_line(f"{artifact.name}: behaviour: {told}")
    limit = f"lost {shown.lost.value:.1%} of them, limit {shown.limit:.1%}"
    return in_line(f"{artifact.name}: behaviour: {shown.name}: {said(shown)} ({limit}): {shown.standing}")


def by_name(artifacts: Sequence[ArtifactReport]) -> list[list[BehaviourReport | None]]:
    """Every kind of question in order, one of each artifact; None where an artifact was not asked."""
    return aligned([artifact.behaviour for artifact in artifacts])


def table(artifacts: Sequence[ArtifactReport]) -> list[str]:
    """A Markdown table, kinds of questions x artifacts: right answers beside the checkpoint's. Empty: nothing was asked."""
    shown = [artifact for artifact in artifacts if artifact.behaviour]
    if not shown:
        return []
    names = " | ".join(markdown(artifact.name) for artifact in shown)
    lines = [f"| | checkpoint | {names} |", "|---|---:" + "|---:" * len(shown) + "|"]
    for rows in by_name(shown):
        first = next(row for row in rows if row)
        theirs = f"{first.right_baseline} of {first.questions}"
        note = " (the checkpoint itself cannot do this)" if first.standing == "unable" else ""
        cells = " | ".join(_cell(row) if row else "" for row in rows)
        lines.append(f"| {markdown(first.name)}{note} | {theirs} | {cells} |")
    return [*lines, "", LEGEND]


LEGEND = (
    "Right answers; after - and + how many of the checkpoint's went wrong, and how many came right. Retrieval: a model that is given the right "
    "answers so far would have said the next. All others: greedy answers. Where the checkpoint is right in less than a quarter, nothing is judged."
)
MARKS = {"fail": " **fail**", "inconclusive": " inconclusive"}


def _cell(row: BehaviourReport) -> str:
    return f"{row.right} (-{row.to_wrong} +{row.to_right}){MARKS.get(row.standing, '')}"
