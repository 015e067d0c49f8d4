"""What report.html draws: points and lines of the pictures, shades of the heat maps, bars of the histograms; plain data for the templates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qquant.recipe.limits import WORST_SLICE
from qquant.recipe.solvers import title
from qquant.report import behaviour, slices, tasks
from qquant.report.facts import size
from qquant.report.peers import Peer
from qquant.report.record import KL_BINS, ArtifactReport, Pace
from qquant.report.slices import SliceReport
from qquant.report.solved import linears

WIDTH, HEIGHT = 720, 320  # of a picture, in its own units
NARROW = 350  # on a phone
SMALLEST, LARGEST = 1e-100, 1e100  # that are drawn
LEFT, RIGHT, TOP, BOTTOM = 84, 16, 14, 46  # margins
CROSS = 4  # half the width of another tool's mark
NEAR = 1.25  # how far beyond the sizes of a report other tools' artifacts are drawn
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
    def of(cls, values: Sequence[float], start: float, stop: float) -> Axis:
        """An axis that shows all `values` > 0, with an eighth of its length free at either end."""
        low, high = max(min(values), SMALLEST), min(max(values), LARGEST)
        span = math.log(high) - math.log(low)
        margin = math.exp(min(0.17 * span, 5)) if span > 1e-4 else 1.25
        return cls(low / margin, high * margin, start, stop)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self, most: int = 7) -> list[float]:
        """Round values inside, 1-2-5 where there is room, else powers of ten; equal steps where an axis is short."""
        for steps in ((1, 2, 5), (1, 3), (1,)):
            ticks = self._inside(steps)
            if len(ticks) <= most:
                break
        if len(ticks) < 3:
            ticks = self._even()
        stride = -(-len(ticks) // most)
        return ticks[::stride]

    def _even(self) -> list[float]:
        """Three to seven multiples of 1, 2 or 5 times a power of ten."""
        power = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
        step = next(power * times for times in (5, 2, 1) if (self.high - self.low) / (power * times) >= 3)
        first = math.ceil(self.low / step)
        return [round(count * step, 15) for count in range(first, math.floor(self.high / step) + 1)]

    def _inside(self, steps: Sequence[float]) -> list[float]:
        """Multiples of powers of ten that the axis shows."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        ticks = [step * 10.0**power for power in powers for step in steps]
        return [value for value in ticks if self.low <= value <= self.high]


def usable(artifact: ArtifactReport) -> bool:
    return abs(artifact.kl_divergence) < LARGEST and 0 < artifact.size < LARGEST


def has_histogram(artifact: ArtifactReport) -> bool:
    told = {"50", "90", "99", "99.9"} <= artifact.kl_percentiles.keys() and {"mean", "rms"} <= artifact.delta_p.keys()
    return told and len(artifact.kl_histogram) == len(KL_BINS) + 1


def digits(value: float, count: int = 4) -> str:
    """A number with `count` digits that count, never in a form that only programmers read."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e9:
        digits, _, power = f"{value:.{max(0, count - 2)}e}".partition("e")
        return f"{digits}·10{str(int(power)).translate(SUPERSCRIPT)}"
    return f"{value:,.{max(0, count - 1 - math.floor(math.log10(abs(value))))}f}"


@dataclass(frozen=True)
class Point:
    """An artifact in a chart; pixels."""

    artifact: ArtifactReport
    name: str  # as it stands in the picture
    series: int  # the report it is from
    x: float
    y: float
    radius: float
    best: bool  # nothing else is as good in everything that is drawn
    label: tuple[float, float]
    leader: tuple[float, float] | None  # end of the line to a name that stands further away
    value: float  # of the vertical axis
    pace: Pace | None


@dataclass(frozen=True)
class Cross:
    """Another tool's artifact in a chart; pixels."""

    peer: Peer
    x: float
    y: float
    label: tuple[float, float] | None  # none where there is no room


@dataclass(frozen=True)
class Chart:
    """Artifacts by size and loss."""

    width: int
    left: int  # of the plot
    points: Sequence[Point]
    lines: Sequence[str]  # of each series, through what nothing smaller beats
    x: Sequence[tuple[float, str]]  # pixel, value
    y: Sequence[tuple[float, str]]
    timed: bool
    peers: Sequence[Cross] = ()


Loss = Callable[[ArtifactReport], float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


def divergence(artifact: ArtifactReport) -> float:
    """The loss that is compared within a model."""
    return artifact.kl_divergence


def perplexity(artifact: ArtifactReport) -> float:
    """The loss that is compared between sizes of a family, which share a tokenizer."""
    return artifact.perplexity


def pareto(
    reports: Sequence[Sequence[ArtifactReport]],
    names: Mapping[str, str],
    loss: Loss = divergence,
    width: int = WIDTH,
    peers: Sequence[Peer] = (),
) -> Chart | None:
    """Points of size against loss, their area decode speed, for each report the line of those that nothing beats, and `peers` of their sizes."""
    shown = [[one for one in artifacts if usable(one) and abs(loss(one)) < LARGEST] for artifacts in reports]
    every = [artifact for artifacts in shown for artifact in artifacts]
    if len(every) < 2:
        return None
    sizes = [artifact.size for artifact in every]
    peers = [peer for peer in peers if min(sizes) / NEAR <= peer.bytes <= max(sizes) * NEAR]
    floor = min((loss(artifact) for artifact in every if loss(artifact) > SMALLEST), default=1e-6)
    losses = [max(loss(artifact), floor) for artifact in every]
    left = LEFT if width == WIDTH else LEFT - 34  # without a title of the vertical axis
    x = Axis.of(sizes + [peer.bytes for peer in peers], left, width - RIGHT)
    y = Axis.of(losses + [peer.kl_divergence for peer in peers], HEIGHT - BOTTOM, TOP)
    points: list[Point] = []
    for series, artifacts in enumerate(shown):
        rivals = artifacts if loss is divergence else every
        for artifact in artifacts:
            pace = artifact.speed.pace("decode") if artifact.speed else None
            ratio = pace.ratio if pace and math.isfinite(pace.ratio) else 1.0
            radius = round(5 * math.sqrt(min(max(ratio, 0.25), 9)), 1)
            best = not any(_beats(other, artifact, loss) for other in rivals)
            name = names[artifact.name] + (f" {pace.ratio:.2g}×" if pace else "")
            name = (
                name if best or loss is divergence else ""
            )  # between sizes the best are told apart, the rest by a tooltip
            pixel = x.at(artifact.size), y.at(max(loss(artifact), floor))
            points.append(Point(artifact, name, series, *pixel, radius, best, (0.0, 0.0), None, loss(artifact), pace))
    crosses = [Cross(peer, x.at(peer.bytes), y.at(peer.kl_divergence), None) for peer in peers]
    points, crosses = _labelled(sorted(points, key=lambda point: point.x), crosses, (left, width))
    lines = []
    for series, artifacts in enumerate(shown):
        front = [p for p in points if p.series == series and not any(_smaller(a, p.artifact, loss) for a in artifacts)]
        lines.append(" ".join(f"{point.x},{point.y}" for point in front))
    across = [(x.at(value), size(value)) for value in x.ticks(7 if width == WIDTH else 4)]
    up = [(y.at(value), _short(value)) for value in y.ticks()]
    return Chart(width, left, points, lines, across, up, any(point.pace for point in points), crosses)


def _short(value: float) -> str:
    """A mark of the vertical axis."""
    if value < 1e-4:
        return digits(value, 1)
    if value < 1e6:
        return f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"
    mantissa, _, power = f"{value:.4g}".partition("e+")
    return f"{mantissa}·10{power.lstrip('0').translate(SUPERSCRIPT)}"


def _smaller(one: ArtifactReport, other: ArtifactReport, loss: Loss) -> bool:
    """Whether `one` loses less in as few bytes."""
    return one.size <= other.size and loss(one) < loss(other)


def _beats(one: ArtifactReport, other: ArtifactReport, loss: Loss) -> bool:
    """Whether `one` is as good in size and speed, and loses less."""
    mine, theirs = (entry.speed.pace("decode") if entry.speed else None for entry in (one, other))
    slower = mine is not None and theirs is not None and mine.ratio < theirs.ratio
    return _smaller(one, other, loss) and not slower


def _labelled(
    points: Sequence[Point], crosses: Sequence[Cross], between: tuple[int, int]
) -> tuple[list[Point], list[Cross]]:
    """Each point with a place for its name that nothing else takes: beside, above, below, or at the end of a line; no name where there is none.

    Crosses have names where there is room beside them afterwards.
    """
    taken = [(p.x - p.radius, p.y - p.radius, p.x + p.radius, p.y + p.radius) for p in points]
    taken += [(cross.x - CROSS, cross.y - CROSS, cross.x + CROSS, cross.y + CROSS) for cross in crosses]
    labelled = {}
    for point in sorted(points, key=lambda point: not point.best):
        box, far = _free(point.name, (point.x, point.y, point.radius), taken, between)
        if box is None:
            labelled[id(point)] = replace(point, name="")
            continue
        taken.append(box)
        end = (round(min(max(point.x, box[0]), box[2]), 1), round(box[1] if box[1] > point.y else box[3], 1))
        labelled[id(point)] = replace(point, label=_baseline(box), leader=end if far else None)
    named = []
    for cross in crosses:
        box, far = _free(cross.peer.name, (cross.x, cross.y, CROSS), taken, between)
        if box is None or far:
            named.append(cross)
            continue
        taken.append(box)
        named.append(replace(cross, label=_baseline(box)))
    return [labelled[id(point)] for point in points], named


def _baseline(box: Box) -> tuple[float, float]:
    """Where a text in `box` begins."""
    return round(box[0], 1), round(box[1] + 12, 1)


def _free(
    name: str, at: tuple[float, float, float], taken: Sequence[Box], between: tuple[int, int]
) -> tuple[Box | None, bool]:
    """The first box for `name` of the mark `at` (x, y, radius) that is inside the picture and free, and whether a line must lead there."""
    width, gap = 7.2 * len(name), at[2] + 5
    near = [(gap, 4), (gap, -12), (gap, 20), (-gap - width, 4), (-gap - width, -12), (-gap - width, 20)]
    far = [(side, step) for step in (38, -30, 54, -46, 70, -62) for side in (gap, -gap - width, -width / 2)]
    for tried, (dx, dy) in enumerate(near + far):
        left, top = at[0] + dx, at[1] + dy - 12
        box = (left, top, left + width, top + 15)
        inside = box[0] >= between[0] and box[2] <= between[1] and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            return box, tried >= len(near)
    return None, False


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _place(name: str) -> tuple[int, str] | None:
    """(block, linear) of a weight's name, such as (3, "mlp.up_proj")."""
    match = re.search(r"(?:^|\.)(\d{1,4})\.(.{1,80})\.weight$", name)
    return (int(match[1]), match[2]) if match else None


def heat(artifact: ArtifactReport) -> dict[str, Any]:
    """Relative squared error of each linear by block: the stronger the more, on a logarithmic scale of this artifact."""
    cells: dict[tuple[int, str], float] = {}
    notes: dict[tuple[int, str], str] = {}
    for linear in linears(artifact.layers):
        cell = _place(linear.name)
        if cell and math.isfinite(linear.error):
            cells[cell] = linear.error
            steps = ((title(step), error) for step, error in linear.steps.items())
            notes[cell] = "; ".join(f"{step} {digits(error, 3)}" for step, error in steps) or digits(cells[cell], 3)
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


def kept(artifacts: Sequence[ArtifactReport]) -> dict[str, Any] | None:
    """Slices x artifacts: KL divergence, shaded by its ratio to what it stands beside, the strongest at the limit and beyond."""
    shown = [artifact for artifact in artifacts if artifact.slices]
    if not shown:
        return None
    by_row = slices.by_name(shown)
    rows = [[(artifact, one, _shade(one)) for artifact, one in zip(shown, row, strict=True) if one] for row in by_row]
    return {"artifacts": shown, "rows": rows, "legend": slices.LEGEND, "title": slices.TITLE}


def asked(artifacts: Sequence[ArtifactReport]) -> dict[str, Any] | None:
    """Kinds of questions x artifacts: right answers beside the checkpoint's."""
    shown = [artifact for artifact in artifacts if artifact.behaviour]
    if not shown:
        return None
    rows = [(next(row for row in rows if row), rows) for rows in behaviour.by_name(shown)]
    return {"artifacts": shown, "rows": rows, "legend": behaviour.LEGEND, "title": behaviour.TITLE}


def benchmarks(artifacts: Sequence[ArtifactReport]) -> dict[str, Any] | None:
    """Benchmarks x artifacts: scores beside the checkpoint's."""
    shown = [artifact for artifact in artifacts if artifact.tasks]
    if not shown:
        return None
    by_task = [{one.task: one for one in artifact.tasks} for artifact in shown]
    names = dict.fromkeys(one.task for artifact in shown for one in artifact.tasks)
    rows = [[scores.get(name) for scores in by_task] for name in names]
    first = [next(one for one in row if one) for row in rows]
    return {
        "artifacts": shown,
        "rows": list(zip(first, rows, strict=True)),
        "legend": tasks.LEGEND,
        "title": tasks.TITLE,
    }


def _shade(one: SliceReport) -> int | None:
    """A shade from 0, no further from the checkpoint than what it stands beside, to `SHADES` - 1, at the limit; None where nothing is compared."""
    if one.relative is None:
        return None
    if not math.isfinite(one.relative.value):
        return SHADES - 1
    limit = one.limit if one.limit and 1 < one.limit < math.inf else WORST_SLICE
    share = math.log(max(one.relative.value, 1.0)) / math.log(limit)
    return min(SHADES - 1, int(share * (SHADES - 1)))


def headroom(artifacts: Sequence[ArtifactReport]) -> list[tuple[ArtifactReport, float, int]]:
    """Per artifact its largest share of what fp16 can hold, and the block."""
    worst = []
    for artifact in artifacts:
        if artifact.headroom:
            block = max(range(len(artifact.headroom)), key=artifact.headroom.__getitem__)
            worst.append((artifact, artifact.headroom[block], block))
    return worst


def histogram(artifact: ArtifactReport) -> dict[str, Any]:
    """Bars of the tokens per bin of KL divergence; ends gathered."""
    counts = artifact.kl_histogram
    total = sum(counts) or 1
    width = (WIDTH - LEFT - RIGHT) / len(counts)
    tallest = max(counts) or 1
    height = 150
    bars = []
    for index, count in enumerate(counts):
        low = digits(10 ** KL_BINS[index - 1], 2) if index else "0"
        high = digits(10 ** KL_BINS[index], 2) if index < len(KL_BINS) else "more"
        tall = round((height - 10) * count / tallest, 1)
        text = f"{low} to {high}: {count / total:.1%} of the tokens"
        bars.append({"x": round(LEFT + index * width, 1), "y": round(height - tall, 1), "h": tall, "text": text})
    ticks = [
        (round(LEFT + (index + 1) * width, 1), int(edge)) for index, edge in enumerate(KL_BINS) if edge == int(edge)
    ]
    return {"bars": bars, "ticks": ticks[::2], "width": round(width - 1, 1), "height": height}
