"""What every view says first, and one page for several reports."""

import dataclasses
import json
import math

import pytest
from click.testing import CliRunner

from qquant.cli import cli
from qquant.report import ci, html, notebook, pictures
from qquant.report.facts import facts, in_short, short_names
from qquant.report.record import Verdict
from qquant.report.slices import Estimate, SliceReport
from tests.report.test_report import GATE, LAYERS, SPEED, Page, artifact, report


def told(made):
    return {fact.question: fact.answer.replace("\u00a0", " ") for fact in facts(made)}


def bare(*given, **more):
    return dataclasses.replace(artifact(*given, **more), layers=())


def thai(times, standing):
    one = Estimate(0.1, 0.09, 0.11)
    return SliceReport("Thai", "language", 4, 99, one, one, one, 10.0, 2.0, 4.0, standing, Estimate(times, 1, 9), 3.0)


def gated(outcome):
    return Verdict(outcome, ("r",) * (outcome != "pass"), (dataclasses.replace(GATE, outcome=outcome),))


@pytest.mark.parametrize(
    ("outcomes", "answer"),
    [
        (["pass"], "Yes: proven within every limit."),
        (["pass", "pass"], "Yes: all 2 are proven within their limits."),
        (["pass", "fail", "inconclusive"], "Not b (fail), c (inconclusive); the other 1 may."),
        (["fail"], "Not a (fail)."),
    ],
)
def test_may_i_publish(outcomes, answer):
    rows = [artifact(name, verdict=gated(outcome)) for name, outcome in zip("abc", outcomes)]
    assert told(report(*rows))["Publish?"] == answer
    assert facts(report(*rows))[0].outcome == report(*rows).outcome


def test_a_waiver_and_the_absence_of_limits_are_said():
    waived = artifact("w", verdict=Verdict("waived", ("r",), (GATE,), "waived by A until 2030-01-01: known"))
    assert told(report(waived, artifact("b")))["Publish?"] == "Yes, with a waiver: w."
    assert told(report(artifact()))["Publish?"] == "Nothing speaks against it, and no limit was asked for."


def test_cost_and_worst_places():
    big = bare("big", 4 * 10**6, 0.001, slices=(thai(2.0, "pass"),))
    small = artifact("small", 10**6, 0.02, slices=(thai(2.9, "pass"),), speed=SPEED)
    assert told(report(big, small)) | {"Publish?": ""} == {
        "Publish?": "",
        "Smallest": "small, 1 MB (28 % of 16 bits): KL divergence 0.02000, perplexity × 1.0100, top-1 95.00 %",
        "Closest": "big, 4 MB (28 % of 16 bits): KL divergence 0.00100, perplexity × 1.0100, top-1 95.00 %",
        "Worst slice": "Thai in small: 2.9 times the KL divergence of English (limit 3): pass",
        "Worst layer": f"{LAYERS[-4].name.removesuffix('.weight')} in small: squared error 0.003 of its output",
        "Fastest": "small decodes 2.10 times as fast as 16 bits: 210 tokens/s on cpu",
    }


def test_what_was_not_measured_is_left_out():
    assert set(told(report(bare(kl=math.nan)))) == {"Publish?"}
    assert set(told(report(bare()))) == {"Publish?", "Cost"}


def test_names_are_as_short_as_they_can_be():
    assert short_names(["a/b/c", "x/b/c", "d", "e/"]) == {"a/b/c": "a/b/c", "x/b/c": "x/b/c", "d": "d", "e/": "e"}
    assert short_names(["/r/one/AWQ", "/r/two/AWQ"]) == {"/r/one/AWQ": "one/AWQ", "/r/two/AWQ": "two/AWQ"}


def test_every_view_begins_with_them():
    made = report(artifact("out/dir/a"), artifact("b", 2 * 10**6, 0.001))
    answers = [fact.answer for fact in facts(made)]
    page = " ".join("".join(Page(html.render(made)).text).split())
    places = [page.index(" ".join(answer.split())) for answer in answers]
    assert places == sorted(places)
    assert places[-1] < page.index("size of all files")
    lines = made.to_markdown().splitlines()
    assert lines[2 : 2 + len(answers)] == in_short(made)
    shown = notebook.as_html(made)
    assert all(answer in shown for answer in answers)
    assert shown.index(answers[-1]) < shown.index("<table>")


def test_long_names_stand_in_tooltips():
    page = html.render(report(artifact("/home/someone/models/a-GPTQ-Int4")))
    assert '<td title="/home/someone/models/a-GPTQ-Int4">a-GPTQ-Int4</td>' in page


def test_details_are_folded():
    page = html.render(report(artifact(verdict=gated("pass"))))
    assert page.count('<details class="part">') == page.count("<h2>") > 3


def test_names_in_the_narrow_picture_stay_inside():
    rows = [artifact(f"gguf-q{bits}_k_m", bits * 10**6, 10.0**-bits) for bits in range(2, 9)]
    chart = pictures.pareto([rows], {row.name: row.name for row in rows}, width=pictures.NARROW)
    assert chart.width == pictures.NARROW
    assert len(chart.x) <= 4
    for point in chart.points:
        assert point.label[0] + 7.2 * len(point.name) <= chart.width
        assert point.label[0] >= chart.left


def crowd(count):
    rows = [artifact(f"gguf-q5_k_m-{at}", 10**6 + 9000 * at, 0.01 - 0.0002 * at) for at in range(count)]
    return [*rows, artifact("far", 4 * 10**6, 0.001)]


@pytest.mark.parametrize("width", [pictures.WIDTH, pictures.NARROW])
@pytest.mark.parametrize("count", [2, 6, 25])
def test_names_in_a_picture_never_cover_each_other_and_stand_at_their_point_or_on_a_line_to_it(width, count):
    rows = crowd(count)
    chart = pictures.pareto([rows], {row.name: row.name for row in rows}, width=width)
    named = [point for point in chart.points if point.name]
    boxes = [(p.label[0], p.label[1] - 12, p.label[0] + 7.2 * len(p.name), p.label[1] + 3) for p in named]
    for at, one in enumerate(boxes):
        assert one[0] >= chart.left
        assert one[2] <= width
        assert not any(
            one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3] for two in boxes[:at]
        )
    for point, box in zip(named, boxes):
        away = max(box[0] - point.x, point.x - box[2], box[1] - point.y, point.y - box[3])
        assert away < 20 or point.leader, point
    assert named, "the best are named while there is room"


# --- several reports -------------------------------------------------------------------------------------------------------


def family():
    small = dataclasses.replace(report(artifact("int4", 10**6), artifact("awq", 2 * 10**6)), model="model-1b")
    rows = (
        dataclasses.replace(artifact("int4", 4 * 10**6), perplexity=6.0),
        artifact("bad", 3 * 10**6, kl=math.inf, verdict=gated("fail")),
    )
    return {"model-1b": small, "model-7b": dataclasses.replace(report(*rows), model="model-7b", warnings=("w",))}


def test_family_page_has_a_line_and_a_table_for_each():
    text = html.family(family())
    page = Page(text)
    assert page.open == []
    assert page.links == []
    shown = " ".join("".join(page.text).split())
    assert shown.index("Not bad (fail); the other 1 may.") < shown.index("size of all files")
    assert page.tags.count("table") == 2
    assert page.tags.count("svg") == 4, "divergence and perplexity, wide and narrow"
    assert text.count('class="dot s0 best"') + text.count('class="dot s0"') == 2 * 2 * 2
    assert text.count('class="dot s1 best"') == 2 * 2, "the larger one has the least perplexity"
    assert 'class="verdict fail"' in text


@pytest.mark.parametrize("change", [{"sha256": "x"}, {"windows": 9}, {"length": 9}])
def test_perplexities_of_other_texts_are_not_compared(change):
    reports = family()
    other = reports["model-7b"]
    conditions = dataclasses.replace(other.conditions, text=dataclasses.replace(other.conditions.text, **change))
    reports["model-7b"] = dataclasses.replace(other, conditions=conditions)
    page = html.family(reports)
    assert Page(page).tags.count("svg") == 2
    assert "different text" in page
    assert "different text" not in html.family(family())


@pytest.fixture
def places(tmp_path):
    found = []
    for name, made in family().items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(made.to_json())
        found.append(str(tmp_path / name))
    return found


def test_report_command_takes_several(places, tmp_path):
    page, junit = tmp_path / "all.html", tmp_path / "j.xml"
    result = CliRunner().invoke(cli, ["report", *places, "--html", str(page), "--junit", str(junit)])
    assert type(result.exception).__name__ == "GateFailedError"
    assert str(result.exception) == "model-7b: bad: r"
    assert result.output.index("model-1b") < result.output.index("model-7b")
    assert page.read_text() == html.family(family())
    assert junit.read_text() == ci.junit(*family().values())
    assert "model-1b.int4" in junit.read_text()
    assert "model-7b.int4" in junit.read_text()


def test_report_command_json_of_several(places):
    result = CliRunner().invoke(cli, ["report", *places, "--json"])
    content = json.loads(result.stdout)
    assert content["schema"] == "qquant-reports-1"
    assert list(content["reports"]) == ["model-1b", "model-7b"]
    assert content["reports"]["model-7b"]["verdict"] == "fail"


def test_releases_of_one_model_go_by_their_folders(tmp_path):
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(report().to_json())
    result = CliRunner().invoke(cli, ["report", str(tmp_path / "v1"), str(tmp_path / "v2"), "--json"])
    assert list(json.loads(result.stdout)["reports"]) == ["v1", "v2"]
    again = CliRunner().invoke(cli, ["report", str(tmp_path / "v1"), str(tmp_path / "v1")])
    assert "given twice" in str(again.exception)
