"""report.html: one file, no network, no scripts; the answer first, then the numbers, then pictures, drawn as SVG by hand.

    render   one report: verdict, cost and worst places on the first screen, details folded
    family   several releases, or sizes of a family: one row and one line of points for each

Colours come from CSS variables that follow the reader's light or dark mode and print as black on white. Every picture has a text
for those who do not see it, and every number in it also stands in a table or a tooltip (<title>).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from qquant.report import peers, pictures
from qquant.report.escape import visible
from qquant.report.facts import facts, short_names, size
from qquant.report.peers import Peer
from qquant.report.record import COLUMNS, TITLES, WORST_FIRST, ArtifactReport, Report

COLOURS = 6  # of lines in a picture of several reports


def render(report: Report) -> str:
    """The page of one report."""
    names = short_names([artifact.name for artifact in report.artifacts])
    return _page(
        "page",
        report=report,
        title=TITLES[report.outcome],
        facts=facts(report),
        names=names,
        columns=COLUMNS,
        rows=report.rows(),
        charts=_charts([report.artifacts], names, peers=peers.known(report)),
        slices=pictures.kept(report.artifacts),
        behaviour=pictures.asked(report.artifacts),
        benchmarks=pictures.benchmarks(report.artifacts),
        heat=[pictures.heat(artifact) for artifact in report.artifacts if len(artifact.layers) > 1],
        headroom=pictures.headroom(report.artifacts),
        histograms=[
            (artifact, pictures.histogram(artifact))
            for artifact in report.artifacts
            if pictures.usable(artifact) and pictures.has_histogram(artifact)
        ],
        anchors={artifact.name: f"a{index}" for index, artifact in enumerate(report.artifacts)},
    )


def family(reports: Mapping[str, Report]) -> str:
    """One page of several reports, by the names they go by: releases of a model, or sizes of a family."""
    named = {label: short_names([a.name for a in report.artifacts]) for label, report in reports.items()}
    names = {name: short for each in named.values() for name, short in each.items()}
    outcomes = {report.outcome for report in reports.values()}
    rows = [report.artifacts for report in reports.values()]
    texts = [report.conditions.text for report in reports.values()]
    same = len({(text.name, text.sha256, text.length, text.protocol, text.windows) for text in texts}) == 1
    return _page(
        "family",
        reports=reports,
        outcome=next((worst for worst in WORST_FIRST if worst in outcomes), "pass"),
        facts={label: facts(report) for label, report in reports.items()},
        titles=TITLES,
        columns=COLUMNS,
        names=named,
        colours=COLOURS,
        charts=_charts(rows, names),
        same=same,
        between=_charts(rows, names, pictures.perplexity) if same else [],
    )


def _charts(
    reports: Sequence[Sequence[ArtifactReport]],
    names: Mapping[str, str],
    loss: pictures.Loss = pictures.divergence,
    peers: Sequence[Peer] = (),
) -> list[pictures.Chart]:
    """The same picture for wide and for narrow pages; none where there is nothing to compare."""
    drawn = [pictures.pareto(reports, names, loss, width, peers) for width in (pictures.WIDTH, pictures.NARROW)]
    return [chart for chart in drawn if chart is not None]


def _page(name: str, **content: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"size": size, "visible": _visible, "probability": _probability, "digits": pictures.digits}
    return environment.get_template(f"{name}.html.jinja").render(content)


def _probability(nll: float) -> float:
    """The probability of a token with this NLL in nats."""
    return math.exp(-nll) if nll > -700 else math.inf


def _visible(text: str) -> str:
    """Blanks and line ends as signs that can be seen."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    return re.sub(r"^ | $", "␣", shown) if shown.strip() else "␣" * len(shown)
