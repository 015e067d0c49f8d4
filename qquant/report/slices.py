"""What an artifact keeps of each language, kind of text and stretch of positions: the facts, and their table as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from qquant.disk.records import Count, Number
from qquant.report.escape import in_line, markdown

if TYPE_CHECKING:
    from qquant.report.record import ArtifactReport

TITLE = "What each file keeps, by language and length"
Standing = Literal["pass", "fail", "inconclusive", "reference", "unknown", "measured"]


@dataclass(frozen=True)
class Estimate:
    """A mean over windows with its 95 % interval."""

    value: Number
    low: Number
    high: Number


@dataclass(frozen=True)
class SliceReport:
    """One slice of one artifact."""

    name: str
    group: Literal["language", "kind", "position"]
    windows: Count
    tokens: Count  # scored
    kl_divergence: Estimate  # nats per token
    perplexity_ratio: Estimate
    top1_agreement: Estimate
    perplexity_baseline: Number
    bits: Number  # a character, of the checkpoint
    frequencies: Number  # bits a character of the text's own frequencies of characters
    standing: Standing  # unknown: the checkpoint does not know the language; measured: nothing is asked of it
    relative: Estimate | None = None  # times the KL divergence of English, or of the same tokens in short windows
    limit: Number | None = None  # of `relative`
    detectable: Number | None = None  # distance from the limit that is proven in 80 % of runs with this much text


def worst(slices: Sequence[SliceReport]) -> SliceReport | None:
    """The slice that fails first: of those that are judged, the one furthest towards its limit or beyond it."""
    order = {"fail": 0, "inconclusive": 1, "pass": 2}
    judged = [one for one in slices if one.relative and one.limit and one.standing in order]
    return min(judged, key=lambda one: (order[one.standing], -_share(one)), default=None)


def _share(one: SliceReport) -> float:
    return one.relative.value / one.limit if one.relative and one.limit else 0.0


def line(artifact: ArtifactReport) -> str:
    """One line on the worst slice; empty where none was judged."""
    reading = worst(artifact.slices)
    if reading is None or reading.relative is None:
        return ""
    return in_line(
        f"{artifact.name}: worst slice {reading.name}, {comparison(reading)} (limit {reading.limit:.3g}): {reading.standing}"
    )


def comparison(one: SliceReport) -> str:
    """What stands beside the slice's KL divergence, in words."""
    times = one.relative.value if one.relative else float("nan")
    other = "the same tokens in short windows" if one.group == "position" else "English"
    return f"{times:.3g} times the KL divergence of {other}"


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=_Named)


def aligned(columns: Sequence[Sequence[Row]]) -> list[list[Row | None]]:
    """Rows of several artifacts by their names, in the order in which these first come; None where one has none of that name."""
    columns_by_name = [{row.name: row for row in column} for column in columns]
    names = dict.fromkeys(row.name for column in columns for row in column)
    return [[rows.get(name) for rows in columns_by_name] for name in names]


def by_name(artifacts: Sequence[ArtifactReport]) -> list[list[SliceReport | None]]:
    """Every slice in order, one of each artifact; None where an artifact has none of that name."""
    return aligned([artifact.slices for artifact in artifacts])


def table(artifacts: Sequence[ArtifactReport]) -> list[str]:
    """A Markdown table, slices x artifacts: KL divergence in nats, and how many times that of English. Empty: nothing was measured."""
    shown = [artifact for artifact in artifacts if artifact.slices]
    if not shown:
        return []
    lines = [f"| | {' | '.join(markdown(artifact.name) for artifact in shown)} |", "|---" + "|---:" * len(shown) + "|"]
    for row in by_name(shown):
        name = next(one.name for one in row if one)
        lines.append(f"| {markdown(name)} | {' | '.join(_cell(one) if one else '' for one in row)} |")
    return [*lines, "", LEGEND]


LEGEND = (
    "KL divergence per token in nats; after × how many times that of English, for positions that of the same tokens in windows of 512. "
    "Languages that the checkpoint does not know are not judged."
)
MARKS = {"fail": " **fail**", "inconclusive": " inconclusive", "unknown": " (not known to the checkpoint)"}


def _cell(one: SliceReport) -> str:
    times = f" ×{one.relative.value:.2f}" if one.relative else ""
    return f"{one.kl_divergence.value:.4f}{times}{MARKS.get(one.standing, '')}"
