"""Suites with lm-eval itself, offline: its names and metrics are those that a suite pins, and a suite is asked, stopped, and goes on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qquant.checks import task_suites, tasks
from qquant.checks.task_suites import SUITES, KeptScores
from qquant.errors import StoppedError
from qquant.progress import Quiet
from qquant.source.checkpoint import Checkpoint
from tests.checks.test_task_suites import Stops
from tests.worlds import benchmarks

lm_eval = pytest.importorskip("lm_eval", reason="the extra `tasks`")

pytestmark = pytest.mark.oracle
CPU = torch.device("cpu")
FOLDERS = (
    "mmlu/default", "ceval", "gsm8k", "hendrycks_math", "humaneval", "mbpp", "bbh/cot_fewshot", "cmmlu", "okapi/mmlu_multilingual", "mgsm/direct", "belebele",
)  # fmt: skip


@pytest.fixture(scope="module")
def definitions():
    """Every task that could be meant, by its name."""
    import lm_eval.tasks

    place = Path(lm_eval.tasks.__file__).parent
    return {task["task"]: task for folder in FOLDERS for task in benchmarks.definitions(place / folder)}


def subtasks(benchmark, definitions):
    """The tasks of a benchmark: itself, or those whose names begin with that of the group."""
    (name,) = benchmark.tasks
    return [definitions[name]] if name in definitions else [
        task for key, task in definitions.items() if key.startswith(f"{name}_") and task["dataset_path"] == benchmark.data
    ]  # fmt: skip


@pytest.mark.parametrize("benchmark", SUITES["qwen1.5"], ids=lambda one: one.name)
def test_lm_eval_knows_the_tasks_and_gives_the_metric(benchmark, definitions):
    import lm_eval.tasks

    assert lm_eval.tasks.TaskManager().match_tasks(list(benchmark.tasks)) == list(benchmark.tasks)
    found = subtasks(benchmark, definitions)
    assert found
    metric, kept = benchmark.metric.split(",")
    for task in found:
        assert task["dataset_path"] == benchmark.data
        names = {one["metric"] if isinstance(one["metric"], str) else None for one in task["metric_list"]}
        assert names & {metric, None}, "a metric that is a function has the function's name"
        assert kept in {one["name"] for one in task.get("filter_list") or [{"name": "none"}]}


def test_two_benchmarks_offline_stopped_and_gone_on_with(definitions, make_checkpoint, tmp_path, monkeypatch):
    """Answers that are written and answers that are chosen; the same questions for both models, of each task as many as were asked for."""
    wanted = [one for one in SUITES["qwen1.5"] if one.name in ("GSM8K", "MMLU, de")]
    monkeypatch.setitem(task_suites.SUITES, "two", tuple(replace(one, shots=1) for one in wanted))
    benchmarks.write(tmp_path / "data", [task for one in wanted for task in subtasks(one, definitions)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    one, other = make_checkpoint("one"), make_checkpoint("other", seed=1)
    asked = tasks.SuiteQuestions("two", tmp_path / "data", limit=3, kept=KeptScores(tmp_path / "kept"))
    with pytest.raises(StoppedError):
        tasks.run_suite(Checkpoint.open(one), [other], asked, CPU, Stops(1))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert len(kept) == 1
    rows = tasks.run_suite(Checkpoint.open(one), [other], asked, CPU, Quiet())
    assert [(row.task, row.questions) for row in rows] == [("GSM8K", 3), ("MMLU, de", 3)]
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert len(list((tmp_path / "kept").iterdir())) == 4
    assert rows[0].outcome == "inconclusive", "three questions prove nothing"
