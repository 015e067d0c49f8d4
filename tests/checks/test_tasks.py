"""Tasks with a stand-in for lm-eval: it asks the real models real questions, in the harness's own words and shapes."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from qquant.checks import tasks
from qquant.errors import EnvironmentMissingError, InputError, UsageError
from qquant.progress import Quiet
from qquant.source.checkpoint import Checkpoint

quiet = Quiet()

CPU = torch.device("cpu")
QUESTIONS = [(f"The {word} of the", (" house", " river")) for word in ("door", "end", "name", "king", "bank", "sea")]
RIGHT = (0, 1, 0, 0, 1, 1)


class Model:
    """lm_eval.models.huggingface.HFLM: a ready model and its tokenizer."""

    def __init__(self, pretrained, tokenizer, batch_size):
        self.model, self.tokenizer = pretrained, tokenizer

    def likelier(self, question, choices):
        with torch.no_grad():
            logits = self.model(self.tokenizer(question, return_tensors="pt").input_ids).logits[0, -1]
        return max(range(len(choices)), key=lambda index: float(logits[self.tokenizer(choices[index]).input_ids[0]]))


class Manager:
    def __init__(self, include_path=None):
        self.known = {"sentences"} | ({"own"} if include_path else set())

    def match_tasks(self, names):
        return [name for name in names if name in self.known]


def simple_evaluate(model, tasks, task_manager, limit, log_samples, bootstrap_iters):
    print("chatter")
    samples = [
        {"doc_id": index, "filter": "none", "metrics": ["acc"], "acc": float(model.likelier(*question) == right)}
        for index, (question, right) in enumerate(zip(QUESTIONS[:limit], RIGHT[:limit], strict=True))
    ]
    return {"samples": dict.fromkeys(tasks, samples)}


@pytest.fixture
def harness(monkeypatch):
    package, models, found = ModuleType("lm_eval"), ModuleType("lm_eval.models"), ModuleType("lm_eval.tasks")
    package.models, package.tasks, package.simple_evaluate = models, found, simple_evaluate
    models.huggingface = ModuleType("lm_eval.models.huggingface")
    models.huggingface.HFLM, found.TaskManager = Model, Manager
    parts = {"": package, ".models": models, ".models.huggingface": models.huggingface, ".tasks": found}
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)


def test_a_model_against_itself_and_another(harness, make_checkpoint, capsys):
    one, other = make_checkpoint("one"), make_checkpoint("other", seed=1)
    asked = tasks.Questions(("sentences",))
    same, different = tasks.run(Checkpoint.open(one), [one, other], asked, CPU, quiet)
    assert (same.to_wrong, same.to_right, same.p_worse) == (0, 0, 1.0)
    assert same.outcome == "inconclusive", "six equal answers do not prove that one in fifty is not lost"
    assert (same.task, same.metric, same.questions) == ("sentences", "acc,none", 6)
    assert same.score == same.score_baseline == different.score_baseline
    assert different.to_wrong + different.to_right > 0
    assert different.score == pytest.approx(different.score_baseline + (different.to_right - different.to_wrong) / 6)
    assert capsys.readouterr().out == "", "stdout is for the result"
    (fewer,) = tasks.run(Checkpoint.open(one), [other], tasks.Questions(("sentences",), limit=2), CPU, quiet)
    assert fewer.questions == 2


def scores(right, wrong_now=(), right_now=()):
    before = {str(index): float(index in right) for index in range(200)}
    return before, before | dict.fromkeys(map(str, wrong_now), 0.0) | dict.fromkeys(map(str, right_now), 1.0)


@pytest.mark.parametrize(
    ("wrong_now", "right_now", "outcome"),
    [
        (range(40), (), "fail"),
        ((), (), "pass"),
        (range(6), range(196, 200), "inconclusive"),
        ((), range(180, 200), "pass"),
    ],
)
def test_verdict_on_flips(wrong_now, right_now, outcome):
    before, now = scores(range(150), wrong_now, right_now)
    found = tasks.compared("a", ("t", "acc"), before, now, 0.02)
    assert (found.to_wrong, found.to_right) == (len(wrong_now), len(right_now))
    assert found.outcome == outcome
    assert found.low <= found.score - found.score_baseline <= found.high


def test_scores_between_right_and_wrong():
    before = {str(index): index / 100 for index in range(100)}
    found = tasks.compared("a", ("t", "f1"), before, {key: 0.9 * value for key, value in before.items()}, 0.02)
    assert (found.outcome, found.to_wrong, found.to_right) == ("fail", 99, 0)
    assert found.low < -0.0495 < found.high < 0


def test_equal_scores_hide_flips():
    before, now = scores(range(100), range(30), range(150, 180))
    found = tasks.compared("a", ("t", "acc"), before, now, 0.02)
    assert found.score == found.score_baseline == 0.5
    assert (found.to_wrong, found.to_right) == (30, 30)
    assert found.p_worse > 0.5


def test_other_questions_are_refused():
    with pytest.raises(InputError, match="answered 1 questions"):
        tasks.compared("a", ("t", "acc"), {"0": 1.0, "1": 0.0}, {"0": 1.0}, 0.02)


def test_unknown_task_and_missing_harness(harness, make_checkpoint, monkeypatch, tmp_path):
    folder = make_checkpoint()
    with pytest.raises(UsageError, match="--task own"):
        tasks.run(Checkpoint.open(folder), [], tasks.Questions(("own",)), CPU, quiet)
    assert tasks.run(Checkpoint.open(folder), [], tasks.Questions(("own",), tmp_path), CPU, quiet) == []
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EnvironmentMissingError, match=r"qquant\[tasks\]"):
        tasks.run(Checkpoint.open(folder), [folder], tasks.Questions(("own",)), CPU, quiet)


def test_command(harness, make_checkpoint, monkeypatch):
    from click.testing import CliRunner

    from qquant.cli import cli

    folder = make_checkpoint()
    common = ["tasks", str(folder), "--against", str(folder), "--task", "sentences", "--device", "cpu"]
    shown = CliRunner().invoke(cli, [*common, "--json"])
    (result,) = json.loads(shown.stdout)["results"]
    assert (result["to_wrong"], result["outcome"]) == (0, "inconclusive")
    assert "too few questions to tell a loss from 0.02" in str(shown.exception)
    table = CliRunner().invoke(cli, [*common, "--margin", "0.9"])
    assert (table.exit_code, table.exception) == (0, None)
    assert "McNemar" in table.stdout
    worse = SimpleNamespace(**result | {"outcome": "fail"})
    monkeypatch.setattr(tasks, "run", lambda *_: [worse])
    failed = CliRunner().invoke(cli, common)
    assert "loses more than 0.02" in str(failed.exception)
