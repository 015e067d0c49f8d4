"""The record and its views: valid JSON whatever the numbers, and a page that needs nothing and shows everything."""

import dataclasses
import json
import math
from html.parser import HTMLParser

import pytest

from qquant.errors import InputError
from qquant.release.card import shown
from qquant.report import ci, html, pictures
from qquant.report.conditions import Conditions, TextFacts
from qquant.report.record import (
    AnswerCounts,
    AnswerRun,
    Answers,
    ArtifactReport,
    GateReport,
    Pace,
    Report,
    SpeedReport,
    TextReport,
    Verdict,
    WorstToken,
)
from qquant.report.schema import schema
from qquant.report.solved import BlockRecord, LinearRecord, ScaleChoice

GATE = GateReport("mean KL divergence", "fail", 0.06, 0.05, 0.055, 0.066, 1.0, 0.0002, 0.004, 40)
LAYERS = tuple(
    LinearRecord(
        f"model.layers.{block}.{linear}.weight",
        0.001 * (block + 1),
        steps={"rtn": 0.004 * (block + 1), "gptq": 0.002 * (block + 1), "sweeps": 0.001 * (block + 1)},
        largest=10.0 * 100**block,
    )
    for block in range(3)
    for linear in ("self_attn.q_proj", "mlp.down_proj")
) + (BlockRecord("model.layers.0", 2), BlockRecord("model.layers.0.q_k_v", awq=ScaleChoice("q_k_v", None, 0.1, 0.2)))


PACES = (
    Pace("prefill", 1, 0, 900.0, 1000.0, 0.9, 0.85, 0.95, 0.01, 1.0),
    Pace("decode", 1, 512, 210.0, 100.0, 2.1, 2.0, 2.2, 0.01, 3.4),
)
SPEED = SpeedReport("pass", "cpu", "int4, bf16", "new tokens", PACES, 10**6, 3 * 10**6, 10**5, 2 * 10**6, 4 * 10**6)
COUNTS = AnswerCounts(33, 0.5, 0, 1, 0, 0, 0)
ANSWERS = Answers((AnswerRun(33, 0.4, 1, 1, 0, 0, 0, "bf16", ("stopped",), COUNTS),))


def artifact(name="a", size=10**6, kl=0.01, outcome="pass", **more):
    verdict = more.pop("verdict", Verdict(outcome))
    numbers = {
        "perplexity": 10.1,
        "perplexity_ratio": 1.01,
        "kl_divergence": kl,
        "kl_99": 9 * kl,
        "top1_agreement": 0.95,
    }
    parts = {"50": kl, "90": 2 * kl, "99": 3 * kl, "99.9": 4 * kl}
    return ArtifactReport(
        name, f"out/{name}", size, 4.5, **numbers, verdict=verdict, kl_percentiles=parts, kl_histogram=tuple(range(38)),
        delta_p={"mean": -0.001, "rms": 0.02}, layers=LAYERS, headroom=(0.001, 0.02, 1.53), **more,
    )  # fmt: skip


def report(*artifacts, **more):
    conditions = Conditions(TextFacts("t", 4, 64, "llama.cpp"), {"a": {"mean KL divergence": 0.004}}, {"torch": "2"})
    return Report("m", "r", 16.0, conditions, 10.0, artifacts or (artifact(),), **more)


class Page(HTMLParser):
    """Tags that are opened and closed in order, and everything that could leave the page."""

    VOID = ("meta", "br", "img", "link", "line", "circle", "rect", "polyline")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        self.links += [name for name, _ in attributes if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_whole_and_alone():
    text = html.render(report(artifact(), artifact("b", 2 * 10**6, 0.001)))
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert page.tags.count("svg") == 4  # size against divergence, wide and narrow, and one histogram each


@pytest.mark.parametrize(
    ("outcome", "title"),
    [("pass", "passed"), ("fail", "FAILED"), ("inconclusive", "INCONCLUSIVE"), ("waived", "passed with a waiver")],
)
def test_verdict_comes_first_everywhere(outcome, title):
    waiver = "waived by A. Person until 2030-01-01: known" if outcome == "waived" else ""
    made = report(artifact(verdict=Verdict(outcome, ("too far off",) * (outcome != "pass"), (GATE,), waiver)))
    shown = " ".join("".join(Page(html.render(made)).text).split())
    assert shown.index(title) < shown.index("recipe r")
    assert made.to_markdown().startswith(f"# m: {title}\n")
    assert json.loads(made.to_json())["verdict"] == outcome
    assert waiver in shown
    assert waiver in made.to_markdown()
    assert ("too far off" in shown) == ("too far off" in made.to_markdown()) == (outcome != "pass")


def test_worst_verdict_is_that_of_the_report():
    assert report(artifact(), artifact("b", outcome="inconclusive")).outcome == "inconclusive"
    assert report(artifact("b", outcome="inconclusive"), artifact("c", outcome="fail")).outcome == "fail"
    assert report(artifact(), artifact("b", outcome="waived")).passed


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0])
def test_numbers_that_cannot_be_drawn(value):
    made = report(artifact(kl=value), artifact("b"), artifact("c", 3 * 10**6))
    Page(html.render(made))
    stored = json.loads(made.to_json(), parse_constant=lambda text: pytest.fail(text))
    assert stored["artifacts"][0]["kl_divergence"] == (0.0 if value == 0 else str(value))


def test_text_of_the_model_is_text():
    worst = WorstToken("a <script>alert(1)</script>\n", " </code>", 3.0, 4.0, 1.0)
    made = report(artifact(worst=(worst,), texts=(TextReport("<b>zh", 9, 2.0, 2.0, 1.0, 0.1, 0.9),)))
    page = Page(html.render(made))
    assert "script" not in page.tags
    assert "a <script>alert(1)</script>⏎" in page.text
    assert "␣</code>" in page.text


def test_heat_map_shows_every_linear():
    page = Page(html.render(report()))
    text = " ".join("".join(page.text).split())
    assert "mlp.down_proj" in text
    assert (
        "from 0.0010 (faint) to 0.0030 (strong), logarithmic; to nearest is 1, after GPTQ 0.500, after descent and scales 0.250"
        in text
    )
    assert "mlp.down_proj of block 1: to nearest 0.00800; GPTQ 0.00400; descent and scales 0.00200" in html.render(
        report()
    )
    assert "a153 %20.10 · 2.0 · 153" in text


def test_points_that_nothing_beats_are_filled():
    made = report(artifact("a", 100, 0.1), artifact("b", 200, 0.01), artifact("c", 300, 0.05))
    assert html.render(made).count('class="dot s0 best"') == 2 * 2  # in a wide picture and in a narrow one


def test_speed_is_in_the_picture_and_in_tables():
    slow = dataclasses.replace(SPEED, paces=(dataclasses.replace(PACES[1], ratio=0.5),))
    plain = html.render(report(artifact("a", 100, 0.1), artifact("b", 90, 0.01)))
    assert "Speed and memory" not in plain
    assert plain.count('class="dot s0 best"') == 2 * 1
    timed = html.render(report(artifact("a", 100, 0.1, speed=SPEED), artifact("b", 90, 0.01, speed=slow)))
    assert timed.count('class="dot s0 best"') == 2 * 2, "the fast one is beaten in size and divergence only"
    assert "a 2.1×" in timed
    text = " ".join(" ".join(Page(timed).text).split())
    assert "decode after 512 210 100 2.10 2.00 to 2.20 3.40 62 % 1.0 %" in text
    assert "a 1 MB 3 MB 100 kB 2 MB 4 MB cpu: int4, bf16" in text


def test_line_of_the_best_goes_down_whatever_the_speed():
    """Fast ones that are filled do not bend it."""
    slow = dataclasses.replace(SPEED, paces=(dataclasses.replace(PACES[1], ratio=0.5),))
    made = report(artifact("a", 100, 0.1), artifact("b", 200, 0.01, speed=slow), artifact("c", 300, 0.05, speed=SPEED))
    (line,) = pictures.pareto([made.artifacts], {name: name for name in "abc"}).lines
    assert len(line.split()) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123456, "0.01235"),
        (9.5e-6, "9.50·10⁻⁶"),
        (-2.1e-12, "-2.10·10⁻¹²"),
        (1234.5, "1,234"),
        (0.0, "0"),
        (1.5e30, "1.50·10³⁰"),
    ],
)
def test_numbers_for_people(value, text):
    assert pictures.digits(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-5, "2·10⁻⁵"), (0.005, "0.005"), (102.5, "102.5"), (16500, "16,500"), (2.5e6, "2.5·10⁶"), (1e30, "1·10³⁰")],
)
def test_marks_of_an_axis_are_for_people(value, text):
    """The perplexity of a small model read 1.65e+04."""
    assert pictures._short(value) == text


def test_large_numbers_are_grouped_in_every_view():
    """A broken artifact's perplexity has eight digits before the point, which nobody counts: 12345678.900."""
    broken = dataclasses.replace(artifact("broken"), perplexity=12345678.9, perplexity_ratio=120718.55171)
    told = dataclasses.replace(report(broken), baseline_perplexity=1234567.8)
    texts = (TextReport("zh", 123456, 12345678.9, 2.0, 1.0, 0.1, 0.9),)
    page = html.render(dataclasses.replace(told, artifacts=(dataclasses.replace(broken, texts=texts),)))
    for view in (told.to_markdown(), page):
        assert "1,234,567.800" in view
        assert "12,345,678.900" in view
        assert "120,718.5517" in view
    assert "<td>123,456</td><td>12,345,679</td>" in page
    assert (shown("perplexity", 12345678.9), shown("perplexity_ratio", 120718.55171)) == (
        "12,345,678.900",
        "120,718.5517",
    )


def test_axis_ticks_are_round_and_inside():
    axis = pictures.Axis.of([4.2e6, 1.9e7], 0, 100)
    assert axis.ticks() == [5e6, 1e7, 2e7]
    assert axis.at(axis.low) == 0
    assert axis.at(axis.high) == 100
    wide = pictures.Axis.of([1e-9, 10], 0, 100)
    assert len(wide.ticks()) <= 7


@pytest.mark.parametrize("values", [[4.6e6, 1.43e7], [6e9, 1.1e10], [102.2, 102.9], [0.0014, 0.0019], [3.0, 3.0]])
def test_a_short_axis_has_three_ticks_or_more(values):
    assert 3 <= len(pictures.Axis.of(values, 0, 100).ticks()) <= 7


def test_an_axis_of_nearly_equal_values_has_a_tick():
    """Two artifacts of one size: no 1-2-5 number may lie between 1.25 times less and 1.25 times more."""
    for tenths in range(10, 100):
        axis = pictures.Axis.of([tenths * 1e5], 0, 100)
        assert axis.ticks(), tenths
        assert all(axis.low <= value <= axis.high for value in axis.ticks())


# --- the record read again, and what machines read -------------------------------------------------------------------------


def everything():
    waived = Verdict("waived", ("mean KL divergence 0.06 is above",), (GATE,), "waived by A until 2030-01-01: known")
    return report(
        artifact("good", verdict=Verdict("pass", (), (dataclasses.replace(GATE, outcome="pass"),))),
        artifact("bad", kl=math.inf, verdict=Verdict("fail", ("tokenizer: is not the checkpoint's", "mean KL divergence 0.06 is above the limit: 5 %\n2"), (GATE,), faults=("tokenizer: is not the checkpoint's",))),
        artifact("open", verdict=Verdict("inconclusive", ("mean KL divergence",), (dataclasses.replace(GATE, outcome="inconclusive", high=math.inf),))),
        artifact("late", verdict=waived, texts=(TextReport("zh", 9, 2.0, 2.0, 1.0, 0.1, 0.9),), worst=(WorstToken("a", "b", 1.0, 2.0, math.nan),)),
        artifact("fast", speed=SPEED, answers=ANSWERS),
        warnings=("w",), calibration={"samples": 2, "tokens": 9, "sha256": "ab", "seed": 3, "sources": [{"name": "s", "licence": "MIT", "kept": 2}]},
    )  # fmt: skip


def test_record_fits_its_published_schema():
    import jsonschema

    published = json.loads(json.dumps(schema()))
    jsonschema.Draft202012Validator.check_schema(published)
    validator = jsonschema.Draft202012Validator(published)
    content = json.loads(everything().to_json())
    assert list(validator.iter_errors(content)) == []
    for damage in (
        {"verdict": "good"},
        {"schema": "qquant-report-0"},
        {"artifacts": [content["artifacts"][0] | {"size": "many"}]},
        {"artifacts": [content["artifacts"][0] | {"extra": 1}]},
        {"baseline": {"perplexity": 3.0}},
    ):
        assert not validator.is_valid(content | damage), damage


def test_record_is_read_back_whole():
    made = everything()
    back = Report.from_json(json.loads(made.to_json()))
    assert json.loads(back.to_json()) == json.loads(made.to_json())
    assert Report.from_json(json.loads(back.to_json())).to_json() == back.to_json()
    assert html.render(back) == html.render(made)
    assert math.isinf(back.artifacts[1].kl_divergence)


def test_record_of_an_earlier_version_is_read():
    content = json.loads(everything().to_json())
    for row in content["artifacts"]:
        for name in ("warnings", "sha256", "question"):
            del row[name]
        del row["verdict"]["faults"]
        row["answers"] = {}
        row["layers"] = [{key: value for key, value in layer.items() if value is not None} for layer in row["layers"]]
    del content["conditions"]["text"]["further"]
    back = Report.from_json(content)
    assert [row.verdict.reasons for row in back.artifacts] == [row.verdict.reasons for row in everything().artifacts]
    assert back.artifacts[0].layers == everything().artifacts[0].layers
    cases = ci.junit(back)
    assert cases.count("<failure") == ci.junit(everything()).count("<failure") - 1  # whose fault was not told apart


@pytest.mark.parametrize("change", [{"schema": "other"}, {"artifacts": [{"name": "a"}]}, {"baseline": 3}])
def test_damaged_record_is_refused(change):
    content = json.loads(everything().to_json()) | change
    with pytest.raises(InputError, match=r"report\.json"):
        Report.from_json(content)


def test_junit():
    from xml.etree import ElementTree

    suites = ElementTree.fromstring(ci.junit(everything()))
    assert {key: suites.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "9", "failures": "2", "errors": "1", "skipped": "1",
    }  # fmt: skip
    bad = suites.find("testsuite[@name='m.bad']")
    assert bad.find("testcase[@name='structure and answers']/failure").text == "tokenizer: is not the checkpoint's"
    assert bad.find("testcase[@name='mean KL divergence']/failure").get("message").startswith("0.06, limit 0.05")
    late = suites.find("testsuite[@name='m.late']/testcase[@name='mean KL divergence']/skipped")
    assert "waived by A until 2030-01-01" in late.get("message")
    assert all(element.text for element in suites.iter("system-out"))


def test_workflow_commands():
    lines = ci.commands(everything()).splitlines()
    assert "::error title=bad::tokenizer: is not the checkpoint's" in lines
    assert "::error title=bad::mean KL divergence 0.06 is above the limit: 5 %25%0A2" in lines
    assert [line for line in lines if line.startswith("::warning title=late::waived by A")]
    assert not [line for line in lines if "title=good" in line]
    assert ci.github(everything()).startswith("❌ **m**: FAILED\n")


def test_report_command(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from qquant.cli import cli

    (tmp_path / "report.json").write_text(everything().to_json())
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    options = ["--junit", str(tmp_path / "j.xml"), "--github", "--html", str(tmp_path / "r.html")]
    result = CliRunner().invoke(cli, ["report", str(tmp_path), *options])
    assert type(result.exception).__name__ == "GateFailedError"
    assert "good" in result.output
    assert "::error title=bad" in result.stderr
    assert (tmp_path / "summary.md").read_text().startswith("❌")
    assert (tmp_path / "j.xml").is_file()
    assert (tmp_path / "r.html").read_text() == html.render(everything())


ELEVEN = {
    "gptq-int4": (11.69, 0.0015), "gptq-int8": (14.27, 1e-5), "awq": (11.63, 0.0014), "gguf-q2_k": (4.6, 0.0145),
    "gguf-q3_k_m": (5.41, 0.0028), "gguf-q4_0": (6.09, 0.0015), "gguf-q4_k_m": (6.22, 0.00108), "gguf-q5_0": (6.99, 0.00053),
    "gguf-q5_k_m": (7.06, 0.00044), "gguf-q6_k": (7.94, 0.00023), "gguf-q8_0": (10.2, 0.00002),
}  # fmt: skip


@pytest.mark.parametrize("width", [pictures.WIDTH, pictures.NARROW])
def test_each_of_the_published_artifacts_has_its_name_in_the_picture(width):
    """On a phone, GPTQ beside AWQ had none."""
    made = [artifact(name, int(size * 1e6), kl, speed=SPEED) for name, (size, kl) in ELEVEN.items()]
    chart = pictures.pareto([made], {name: name for name in ELEVEN}, width=width)
    assert [point.artifact.name for point in chart.points if not point.name] == []


def test_many_reasons_leave_the_first_screen_to_the_picture():
    """Nine paragraphs of an inconclusive release stood before it."""
    rows = [artifact(name, verdict=Verdict("inconclusive", (f"{name} is not decided",))) for name in list(ELEVEN)[:-1]]
    made = report(*rows, artifact("gguf-q8_0", verdict=Verdict("fail", ("gguf-q8_0 has failed",))))
    text = html.render(made)
    shown, folded = text[: text.index("<summary>")], text[: text.index("<svg")]
    assert "gguf-q8_0 has failed" in shown, "the worst first"
    assert sum(f"{name} is not decided" in shown for name in ELEVEN) == 2
    assert all(f"{name} is not decided" in folded for name in list(ELEVEN)[:-1])
    assert "8 more" in folded


@pytest.mark.parametrize(
    ("windows", "digits", "said"),
    [
        (40, 3, "0.055 to 0.0662, 40 windows"),
        (1, 3, "0.055 to 0.0662, 1 window"),
        (2, 5, "0.055 to 0.066161, 2 windows"),
    ],
)
def test_an_interval_says_of_how_much_text_it_is(windows, digits, said):
    assert dataclasses.replace(GATE, high=0.066161, windows=windows).between(digits) == f"95 % interval {said}"
