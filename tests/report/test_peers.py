"""Other tools' artifacts in the chart: only of the same checkpoint, calibration and text, and as the bench printed them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from qquant.report import html, peers, pictures
from qquant.resources import data_dir
from tests.report.test_report import artifact, report

STORED = json.loads((data_dir("recipes") / "demo" / "peers.json").read_text())


def alike(**changes):
    """A report of the demo checkpoint, calibrated and measured as the peers were but for `changes`."""
    rows = artifact("int4", 11_690_392, 0.0015), artifact("q4_0", 6_085_416, 0.0015)
    made = report(*rows)
    asked = {key: STORED[key] for key in ("checkpoint", "calibration", "tokens", "length")} | changes
    text = dataclasses.replace(made.conditions.text, tokens_sha256=asked.pop("tokens"), length=asked.pop("length"))
    return dataclasses.replace(made, conditions=dataclasses.replace(made.conditions, text=text, inputs=asked))


def test_peers_of_the_demo_are_drawn_once_in_each_picture():
    page = html.render(alike())
    near = [point for point in STORED["points"] if 6_085_416 / 1.25 <= point["bytes"] <= 11_690_392 * 1.25]
    assert 10 < len(near) < len(STORED["points"]), "those of other sizes are not"
    assert page.count('class="cross"') == 2 * len(near)
    for point in near:
        assert page.count(f"<title>{point['made'].replace(chr(39), '&#39;')}: ") == 2
    assert "(60 windows)" in page


@pytest.mark.parametrize("key", ["checkpoint", "calibration", "tokens", "length"])
def test_of_another_checkpoint_calibration_or_text_nothing_is_known(key):
    other = alike(**{key: 9 if key == "length" else "another"})
    assert peers.known(other) == []
    assert 'class="cross"' not in html.render(other)
    assert "Crosses" not in html.render(other)


def test_the_demo_recipe_is_measured_on_what_the_peers_were(demo):
    """Its calibration has the digest that the file names, so that the picture of `make demo` has them."""
    from qquant import calibration, recipe
    from qquant.calibration import Tokenizer

    samples = calibration.load(recipe.load("demo").calibration, Tokenizer.open(demo), template_expected=False)
    assert samples.sha256 == STORED["calibration"]


def test_points_are_what_the_bench_printed():
    page = (Path(__file__).parents[1] / "bench" / "README.md").read_text()
    for point in STORED["points"]:
        made = point["made"].rsplit(", ", 1)[0]
        beside = 553_952 if point["kind"] in ("int4", "int8", "AWQ") else 424  # tokenizer and configs; Modelfile
        row = rf"\| {re.escape(made)} \| {point['bytes'] - beside:,} \| [\d.]+ \| (0\.0*{point['kl_divergence'] * 1e7:.0f}) \|"
        assert re.search(row, page), point


def test_names_of_crosses_leave_points_theirs():
    made = alike()
    names = {one.name: one.name for one in made.artifacts}
    bare = pictures.pareto([made.artifacts], names)
    crossed = pictures.pareto([made.artifacts], names, peers=peers.known(made))
    assert all(point.name for point in bare.points)
    assert all(point.name for point in crossed.points)
    boxes = [(*p.label, len(p.name)) for p in crossed.points]
    boxes += [(*cross.label, len(cross.peer.name)) for cross in crossed.peers if cross.label]
    for at, (x, y, letters) in enumerate(boxes):
        for x2, y2, letters2 in boxes[:at]:
            assert abs(y - y2) >= 15 or x + 7.2 * letters <= x2 or x2 + 7.2 * letters2 <= x
