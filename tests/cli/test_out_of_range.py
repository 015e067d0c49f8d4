"""Numbers that make no sense, an empty word, a place that is not there: one line that says which option, what it got and what it takes, before the work."""

import pytest
from click.testing import CliRunner

from qquant.cli import cli
from qquant.errors import QQuantError

WORK = [
    *(f"qquant.pipeline.{name}" for name in ("build", "check", "bisect", "perplexity", "choose_types")),
    *(f"qquant.checks.{name}" for name in ("speed.measure", "tasks.run", "tasks.run_suite")),
    "qquant.runtime.answering.Answerer.open",
]


@pytest.fixture
def answer(built, tmp_path, monkeypatch):
    """What is said to a command line, as one line."""
    checkpoint, out = built
    for name in WORK:
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("the work has begun"))

    def ask(typed, *more):
        places = {"checkpoint": checkpoint, "artifact": out / "model-AWQ", "new": tmp_path / "new"}
        done = CliRunner().invoke(cli, [*(word.format(**places) for word in typed.split()), *more])
        error = done.exception
        if isinstance(error, QQuantError):
            assert error.exit_code == 2, error
            return str(error)
        assert done.exit_code == 2, error
        return " ".join(done.stderr.rpartition("Error: ")[2].split())

    return ask


CHECK = "check {artifact} --against {checkpoint}"
BISECT = "bisect {artifact} --against {checkpoint} --max-kl 0.1"
PERPLEXITY = "perplexity {artifact} --against {checkpoint}"
SPEED = "speed {artifact} --against {checkpoint}"
RUN = "run {artifact} Hello"


@pytest.mark.parametrize(
    ("typed", "answered"),
    [
        (f"{CHECK} --windows 0", "--windows: out of range, got 0; allowed: whole number from 1 to 65536"),
        (f"{CHECK} --windows -1", "--windows: out of range, got -1; allowed: whole number from 1 to 65536"),
        (f"{CHECK} --length 15", "--length: out of range, got 15; allowed: whole number from 16 to 131072"),
        (f"{CHECK} --max-windows 0", "--max-windows: out of range, got 0; allowed: whole number from 1 to 65536"),
        (f"{CHECK} --max-windows 4", "--max-windows: less than windows, got 4; allowed: 40 or more"),
        (f"{CHECK} --windows 65536 --length 131072", "--windows: too many tokens, got 65536 x length 131072; allowed: "),
        (f"{CHECK} --max-kl nan", "--max-kl: out of range, got .nan; allowed: number, 0 or more"),
        (f"{CHECK} --max-perplexity-ratio 0", "--max-perplexity-ratio: out of range, got 0.0; allowed: number, 1 or more"),
        (f"{CHECK} --min-top1 2", "--min-top1: out of range, got 2.0; allowed: number from 0 to 1"),
        (f"{CHECK} --also bundled:wikitext-2-test", '--also: repeated text, got "bundled:wikitext-2-test"; allowed:'),
        (f"{BISECT} --windows 0", "--windows: out of range, got 0; allowed: whole number from 1 to 65536"),
        (f"{BISECT} --max-kl nan", "Invalid value for '--max-kl': 'nan' is no number to compare with"),
        (f"{BISECT} --max-kl -1", "Invalid value for '--max-kl': -1.0 is not in the range x>=0"),
        (f"{PERPLEXITY} --chunks 0", "Invalid value for '--chunks': 0 is not in the range 1<=x<=65536"),
        (f"{PERPLEXITY} --context 8", "Invalid value for '--context': 8 is not in the range 16<=x<=131072"),
        (f"{PERPLEXITY} --chunks 65536 --context 131072", "--chunks: too many tokens, got 65536 x length 131072;"),
        (f"{SPEED} --steps 0", "Invalid value for '--steps': 0 is not in the range"),
        (f"{SPEED} --pairs 2", "Invalid value for '--pairs': 2 is not in the range 3<=x<=10000"),
        (f"{SPEED} --margin nan", "Invalid value for '--margin': 'nan' is no number to compare with"),
        (f"{SPEED} --min-decode inf", "Invalid value for '--min-decode': 'inf' is no number to compare with"),
        (f"{RUN} --temperature nan", "Invalid value for '--temperature': 'nan' is no number to compare with"),
        (f"{RUN} --seed 99999999999999999999", "Invalid value for '--seed': 99999999999999999999 is not in the range"),
        ("build {checkpoint} --recipe demo --bits 0 --out {new}", "--bits and --group-size need --format gptq"),
        ("build {checkpoint} --recipe demo --format awq --group-size 0 --out {new}", "got 0; allowed: 32, 64, 128"),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_one_line(answer, typed, answered):
    """`--windows 0` was told in the words of a library, and NaN, which is in every range, was measured against."""
    assert answered in answer(typed)


@pytest.mark.parametrize(
    ("typed", "option"),
    [
        (CHECK, "--text"),
        (CHECK, "--revision"),
        (CHECK, "--log"),
        ("build {checkpoint} --out {new}", "--recipe"),
        ("build {checkpoint} --recipe demo --out {new}", "--size"),
        ("build {checkpoint} --recipe demo", "--out"),
        ("build {checkpoint} --recipe demo --out {new}", "--only"),
        ("report {new}", "--html"),
        ("publish {new} --to dir --out {new}", "--tag"),
    ],
)
def test_an_empty_value_is_no_default(answer, typed, option):
    """As a script gives it whose variable is not set: with `--recipe ""` the published recipe was built, with `--revision ""` another commit."""
    assert (
        answer(typed, option, "") == f"Invalid value for '{option}': it is empty; give a value, or leave the option out"
    )


def test_a_recipe_for_a_folder_that_is_not_there_is_refused_before_the_work(answer, tmp_path):
    for command in ("init", "types"):
        typed = f"recipe {command} {{checkpoint}} --recipe demo --size 1MB --out {tmp_path}/none/mine.yaml"
        assert f"there is no folder {tmp_path}/none; make it first" in answer(typed)
