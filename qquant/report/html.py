"""report.html: one file, no network, no scripts; verdict first, then the numbers, then pictures, drawn as SVG by hand.

Colours come from CSS variables that follow the reader's light or dark mode and print as black on white. Every picture has a text
for those who do not see it, and every number in it also stands in a table or a tooltip (<title>).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from qquant.recipe.limits import WORST_SLICE
from qquant.recipe.solvers import title
from qquant.report import behaviour, slices
from qquant.report.escape import visible
from qquant.report.record import COLUMNS, KL_BINS, TITLES, ArtifactReport, Report
from qquant.report.slices import SliceReport
from qquant.report.solved import linears

WIDTH, HEIGHT = 720, 320  # of a picture, in its own units
LEFT, RIGHT, TOP, BOTTOM = 84, 16, 14, 46  # margins
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SHADES = 8  # steps of the heat map


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` to `high`, drawn from pixel `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    @classmethod
    def of(cls, values: Sequence[float], start: float, stop: float, margin: float = 1.25) -> Axis:
        """An axis that shows all `values` > 0."""
        return cls(min(values) / margin, max(values) * margin, start, stop)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self, most: int = 7) -> list[float]:
        """Round values inside, 1-2-5 where there is room, else powers of ten; finer ones where an axis is short."""
        for steps in ((1, 2, 5), (1, 3), (1,)):
            ticks = self._inside(steps)
            if len(ticks) <= most:
                break
        ticks = ticks or self._inside((1.5, 3, 4, 6, 7, 8, 9))
        stride = -(-len(ticks) // most)
        return ticks[::stride]

    def _inside(self, steps: Sequence[float]) -> list[float]:
        """Multiples of powers of ten that the axis shows."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        ticks = [step * 10.0**power for power in powers for step in steps]
        return [value for value in ticks if self.low <= value <= self.high]


def render(report: Report) -> str:
    """The page."""
    template = _environment().from_string((Path(__file__).with_name("page.html.jinja")).read_text("utf-8"))
    artifacts = [artifact for artifact in report.artifacts if _usable(artifact)]
    return template.render(
        report=report,
        title=TITLES[report.outcome],
        columns=COLUMNS,
        rows=list(zip(report.rows(), (None, *report.artifacts), strict=True)),
        pareto=_pareto(artifacts),
        slices=_slices(report.artifacts),
        behaviour=_behaviour(report.artifacts),
        heat=[_heat(artifact) for artifact in report.artifacts if len(artifact.layers) > 1],
        headroom=_headroom(report.artifacts),
        histograms=[(artifact, _histogram(artifact)) for artifact in artifacts if _has_histogram(artifact)],
        anchors={artifact.name: f"a{index}" for index, artifact in enumerate(report.artifacts)},
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, finalize=_shown, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"size": _size, "visible": _visible, "probability": _probability, "digits": _digits}
    return environment


def _shown(value: Any) -> Any:
    return visible(value) if type(value) is str else value


def _usable(artifact: ArtifactReport) -> bool:
    return abs(artifact.kl_divergence) < 1e100 and artifact.size > 0


def _has_histogram(artifact: ArtifactReport) -> bool:
    told = {"50", "90", "99", "99.9"} <= artifact.kl_percentiles.keys() and {"mean", "rms"} <= artifact.delta_p.keys()
    return told and len(artifact.kl_histogram) == len(KL_BINS) + 1


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _digits(value: float, count: int = 4) -> str:
    """A number with `count` digits that count, never in a form that only programmers read."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        digits, _, power = f"{value:.{max(0, count - 2)}e}".partition("e")
        return f"{digits}·10{str(int(power)).translate(SUPERSCRIPT)}"
    return f"{value:.{max(0, count - 1 - math.floor(math.log10(abs(value))))}f}"


def _probability(nll: float) -> float:
    """Of a token with this NLL in nats."""
    return math.exp(-nll) if nll > -700 else math.inf


def _visible(text: str) -> str:
    """Blanks and line ends as signs that can be seen."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    return re.sub(r"^ | $", "␣", shown) if shown.strip() else "␣" * len(shown)


def _pareto(artifacts: Sequence[ArtifactReport]) -> dict[str, Any] | None:
    """Points of size against KL divergence, their area decode speed, and the line of those that nothing beats in all of them."""
    if len(artifacts) < 2:
        return None
    floor = min((a.kl_divergence for a in artifacts if a.kl_divergence > 0), default=1e-6)
    x = Axis.of([a.size for a in artifacts], LEFT, WIDTH - RIGHT)
    y = Axis.of([max(a.kl_divergence, floor) for a in artifacts], HEIGHT - BOTTOM, TOP, 1.6)
    points: list[dict[str, Any]] = []
    for artifact in artifacts:
        beaten = any(_beats(other, artifact) for other in artifacts)
        place = x.at(artifact.size), y.at(max(artifact.kl_divergence, floor))
        pace = artifact.speed.pace("decode") if artifact.speed else None
        ratio = pace.ratio if pace and math.isfinite(pace.ratio) else 1.0
        point = {"a": artifact, "x": place[0], "y": place[1], "best": not beaten, "pace": pace}
        points.append(point | {"r": round(5 * math.sqrt(min(max(ratio, 0.25), 9)), 1), "name": _named(artifact)})
    points.sort(key=lambda point: point["x"])
    _place_labels(points)
    line = " ".join(
        f"{point['x']},{point['y']}" for point in points if not any(_smaller(a, point["a"]) for a in artifacts)
    )
    return {"points": points, "line": line, "x": _marks(x), "y": _marks(y), "timed": any(p["pace"] for p in points)}


def _named(artifact: ArtifactReport) -> str:
    """The name in the picture, with the decode speed against 16 bits."""
    pace = artifact.speed.pace("decode") if artifact.speed else None
    short = artifact.name.rstrip("/").rpartition("/")[2]
    return f"{short} {pace.ratio:.2g}×" if pace else short


def _smaller(one: ArtifactReport, other: ArtifactReport) -> bool:
    """Whether `one` is closer to the checkpoint in as few bytes."""
    return one.size <= other.size and one.kl_divergence < other.kl_divergence


def _beats(one: ArtifactReport, other: ArtifactReport) -> bool:
    """Whether `one` is as good in size and speed, and closer to the checkpoint."""
    mine, theirs = (entry.speed.pace("decode") if entry.speed else None for entry in (one, other))
    slower = mine is not None and theirs is not None and mine.ratio < theirs.ratio
    return _smaller(one, other) and not slower


def _place_labels(points: list[dict[str, Any]]) -> None:
    """Give each point a place for its name that no name before it takes: beside, above, below, further away."""
    taken = [(p["x"] - p["r"], p["y"] - p["r"], p["x"] + p["r"], p["y"] + p["r"]) for p in points]
    for point in points:
        width = 7.2 * len(point["name"])
        gap = point["r"] + 5
        for dx, dy in ((gap, 4), (gap, -12), (gap, 20), (-gap - width, 4), (-gap - width, -12), (gap, 36), (gap, -28)):
            left, top = point["x"] + dx, point["y"] + dy - 12
            box = (left, top, left + width, top + 15)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        point["label_x"], point["label_y"] = round(left, 1), round(top + 12, 1)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _marks(axis: Axis) -> list[tuple[float, float]]:
    return [(axis.at(value), value) for value in axis.ticks()]


def _place(name: str) -> tuple[int, str] | None:
    """(block, linear) of a weight's name, such as (3, "mlp.up_proj")."""
    match = re.search(r"(?:^|\.)(\d{1,4})\.(.{1,80})\.weight$", name)
    return (int(match[1]), match[2]) if match else None


def _heat(artifact: ArtifactReport) -> dict[str, Any]:
    """Relative squared error of each linear by block: the stronger the more, on a logarithmic scale of this artifact."""
    cells: dict[tuple[int, str], float] = {}
    notes: dict[tuple[int, str], str] = {}
    for linear in linears(artifact.layers):
        place = _place(linear.name)
        if place and math.isfinite(linear.error):
            cells[place] = linear.error
            steps = ((title(step), error) for step, error in linear.steps.items())
            notes[place] = "; ".join(f"{step} {_digits(error, 3)}" for step, error in steps) or _digits(cells[place], 3)
    blocks = sorted({block for block, _ in cells})
    rows_of = list(dict.fromkeys(row for _, row in cells))
    positive = [value for value in cells.values() if value > 0]
    low, high = (math.log(min(positive)), math.log(max(positive))) if positive else (0.0, 0.0)

    def shade(value: float) -> int:
        share = (math.log(value) - low) / (high - low) if value > 0 and high > low else 0.0
        return min(SHADES - 1, int(share * SHADES))

    rows = [
        (row, [(block, notes.get((block, row)), shade(cells.get((block, row)) or 0.0)) for block in blocks])
        for row in rows_of
    ]
    ends = {"low": math.exp(low), "high": math.exp(high)}
    return {"artifact": artifact, "rows": rows, "blocks": blocks, "steps": _steps(artifact)} | ends


def _steps(artifact: ArtifactReport) -> list[tuple[str, float]]:
    """The error after each step as a share of that after the first, geometric mean over the linears."""
    shares: dict[str, list[float]] = {}
    for linear in linears(artifact.layers):
        first = next(iter(linear.steps.values()), 0.0)
        for step, error in list(linear.steps.items())[1:]:
            if 0 < error < math.inf and 0 < first < math.inf:
                shares.setdefault(step, []).append(math.log(error) - math.log(first))
    return [(title(step), math.exp(sum(logs) / len(logs))) for step, logs in shares.items()]


def _slices(artifacts: Sequence[ArtifactReport]) -> dict[str, Any] | None:
    """Slices x artifacts: KL divergence, shaded by its ratio to what it stands beside, the strongest at the limit and beyond."""
    shown = [artifact for artifact in artifacts if artifact.slices]
    if not shown:
        return None
    by_row = slices.by_name(shown)
    rows = [[(artifact, one, _shade(one)) for artifact, one in zip(shown, row, strict=True) if one] for row in by_row]
    return {"artifacts": shown, "rows": rows, "legend": slices.LEGEND, "title": slices.TITLE}


def _shade(one: SliceReport) -> int | None:
    """From 0, no further from the checkpoint than what it stands beside, to `SHADES` - 1, at the limit; None where nothing is compared."""
    if one.relative is None:
        return None
    if not math.isfinite(one.relative.value):
        return SHADES - 1
    limit = one.limit if one.limit and 1 < one.limit < math.inf else WORST_SLICE
    share = math.log(max(one.relative.value, 1.0)) / math.log(limit)
    return min(SHADES - 1, int(share * (SHADES - 1)))


def _behaviour(artifacts: Sequence[ArtifactReport]) -> dict[str, Any] | None:
    """Kinds of questions x artifacts: right answers beside the checkpoint's."""
    asked = [artifact for artifact in artifacts if artifact.behaviour]
    if not asked:
        return None
    rows = [(next(row for row in rows if row), rows) for rows in behaviour.by_name(asked)]
    return {"artifacts": asked, "rows": rows, "legend": behaviour.LEGEND, "title": behaviour.TITLE}


def _headroom(artifacts: Sequence[ArtifactReport]) -> list[tuple[ArtifactReport, float, int]]:
    """Per artifact its largest share of what fp16 can hold, and the block."""
    worst = []
    for artifact in artifacts:
        if artifact.headroom:
            block = max(range(len(artifact.headroom)), key=artifact.headroom.__getitem__)
            worst.append((artifact, artifact.headroom[block], block))
    return worst


def _histogram(artifact: ArtifactReport) -> dict[str, Any]:
    """Bars of the tokens per bin of KL divergence; ends gathered."""
    counts = artifact.kl_histogram
    total = sum(counts) or 1
    width = (WIDTH - LEFT - RIGHT) / len(counts)
    tallest = max(counts) or 1
    height = 150
    bars = []
    for index, count in enumerate(counts):
        low = _digits(10 ** KL_BINS[index - 1], 2) if index else "0"
        high = _digits(10 ** KL_BINS[index], 2) if index < len(KL_BINS) else "more"
        tall = round((height - 10) * count / tallest, 1)
        text = f"{low} to {high}: {count / total:.1%} of the tokens"
        bars.append({"x": round(LEFT + index * width, 1), "y": round(height - tall, 1), "h": tall, "text": text})
    ticks = [
        (round(LEFT + (index + 1) * width, 1), int(edge)) for index, edge in enumerate(KL_BINS) if edge == int(edge)
    ]
    return {"bars": bars, "ticks": ticks[::2], "width": round(width - 1, 1), "height": height}
