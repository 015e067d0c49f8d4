"""Suites of benchmarks with a stand-in for lm-eval: one row each, resumable, offline, and what is missing by name."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from qquant.checks import task_suites, tasks
from qquant.checks.task_suites import SUITES, Benchmark, KeptScores, allowed
from qquant.errors import EnvironmentMissingError, InputError, StoppedError, UsageError
from qquant.progress import Quiet
from qquant.report import html
from qquant.report import tasks as report_tasks
from qquant.report.conditions import Conditions, TextFacts
from qquant.report.record import ArtifactReport, Report, Verdict
from qquant.report.tasks import TaskScore
from qquant.report.views import write
from qquant.source.checkpoint import Checkpoint
from tests.checks import test_tasks
from tests.checks.test_tasks import harness  # noqa: F401  (a fixture)
from tests.worlds.watched import Told

CPU = torch.device("cpu")
SMALL = (
    Benchmark("Sentences", ("sentences",), "acc,none", "owner/sentences", 5),
    Benchmark("Programs", ("sentences",), "acc,none", "owner/programs", 0, runs_code=True),
    Benchmark("Others", ("sentences",), "acc,none", "owner/others", 0),
)


class Asked:
    """Counts what is asked, in subtasks of a group, and reads a data set as a task does."""

    def __init__(self, stop_after=None):
        self.calls, self.read, self.stop_after = [], [], stop_after

    def __call__(self, model, tasks, task_manager, limit, log_samples, bootstrap_iters, num_fewshot, **options):
        import datasets

        self.calls.append((tuple(tasks), num_fewshot, options))
        datasets.load_dataset("owner/sentences", name="main")
        found = test_tasks.simple_evaluate(model, tasks, task_manager, limit, log_samples, bootstrap_iters)
        samples = next(iter(found["samples"].values()))
        return {
            "samples": {
                "one": samples[:2],
                "two": [{**one, "metrics": ["acc", "f1"], "f1": 0.5} for one in samples[2:]],
            }
        }


@pytest.fixture
def asked(harness, monkeypatch):  # noqa: F811
    found = Asked()
    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", found)
    monkeypatch.setitem(task_suites.SUITES, "small", SMALL)
    monkeypatch.setattr("datasets.load_dataset", lambda path, **options: found.read.append((path, options)))
    return found


def run(folder, paths, **more):
    return tasks.run_suite(Checkpoint.open(folder), paths, tasks.SuiteQuestions("small", **more), CPU, Quiet())


def test_a_benchmark_is_one_row_of_all_its_subtasks(asked, make_checkpoint, capsys):
    one, other = make_checkpoint("one"), make_checkpoint("other", seed=1)
    results = run(one, [one, other])
    assert [(row.task, row.artifact, row.questions) for row in results] == [
        (name, str(path), 6) for path in (one, other) for name in ("Sentences", "Others")
    ]
    assert results[0].metric == "acc,none"
    assert (results[0].to_wrong, results[0].to_right) == (0, 0)
    assert results[2].to_wrong + results[2].to_right > 0
    assert [call[1] for call in asked.calls] == [5, 0] * 3
    assert capsys.readouterr().out == ""


def test_programs_of_the_model_run_only_where_that_is_allowed(asked, make_checkpoint):
    folder = make_checkpoint()
    assert allowed("small", False)[1] == ["Programs"]
    run(folder, [])
    assert all("confirm_run_unsafe_code" not in options for _, _, options in asked.calls)
    asked.calls.clear()
    results = run(folder, [folder], execute_code=True)
    assert [row.task for row in results] == ["Sentences", "Programs", "Others"]
    assert [options for _, _, options in asked.calls] == [{}, {"confirm_run_unsafe_code": True}, {}] * 2


class Stops(Quiet):
    """Asks to stop after some benchmarks."""

    def __init__(self, after):
        self.left = after

    def check_stop(self):
        self.left -= 1
        if self.left == 0:
            raise StoppedError("stopped")


def test_what_is_done_is_not_asked_again(asked, make_checkpoint, tmp_path):
    one, other = make_checkpoint("one"), make_checkpoint("other", seed=1)
    whole = tasks.SuiteQuestions("small", kept=KeptScores(tmp_path / "kept"))
    with pytest.raises(StoppedError):
        tasks.run_suite(Checkpoint.open(one), [other], whole, CPU, Stops(3))
    assert len(asked.calls) == 3
    continued = tasks.run_suite(Checkpoint.open(one), [other], whole, CPU, Quiet())
    assert len(asked.calls) == 4
    assert continued == run(one, [other])
    for file in sorted((tmp_path / "kept").iterdir())[:1]:
        file.unlink()
    told = Told()
    tasks.run_suite(Checkpoint.open(one), [other], whole, CPU, told)
    assert told.steps["suite"] == [(3, 4), (4, 4)], "the time left is not that of what is only read"
    assert len(told.within["suite"]) == 1
    assert told.within["suite"][0].partition(", ")[0] in ("Sentences", "Others")
    asked.calls.clear()
    assert tasks.run_suite(Checkpoint.open(one), [other], whole, CPU, Quiet()) == continued
    assert asked.calls == []
    tasks.run_suite(Checkpoint.open(one), [other], replace(whole, limit=2), CPU, Quiet())
    assert len(asked.calls) == 4, "fewer questions are others"
    changed = other / "model.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\1")
    asked.calls.clear()
    tasks.run_suite(Checkpoint.open(one), [other], whole, CPU, Quiet())
    assert len(asked.calls) == 2, "another artifact"


@pytest.mark.parametrize(
    "content", ["{", '{"schema": "x", "scores": {"a": 1}}', '{"schema": "qquant-task-scores-1", "scores": {"a": "b"}}']
)
def test_damaged_scores_are_refused(asked, make_checkpoint, tmp_path, content):
    folder, kept = make_checkpoint(), tmp_path / "kept"
    run(folder, [], kept=KeptScores(kept))
    for file in kept.iterdir():
        file.write_text(content)
    with pytest.raises(InputError):
        run(folder, [], kept=KeptScores(kept))


def test_data_sets_are_read_from_local_copies_and_nowhere_else(asked, make_checkpoint, tmp_path):
    folder, data = make_checkpoint(), tmp_path / "data"
    (data / "owner/sentences").mkdir(parents=True)
    with pytest.raises(EnvironmentMissingError) as missing:
        run(folder, [], data=data)
    assert asked.calls == []
    lines = str(missing.value).splitlines()
    assert "1 of 2 data sets are missing" in lines[0]
    assert lines[1:] == [
        f"  hf download owner/others --repo-type dataset --local-dir {data / 'owner/others'}  # Others"
    ]
    (data / "owner/others").mkdir()
    run(folder, [], data=data)
    assert asked.read == [(str(data / "owner/sentences"), {"name": "main"})] * 2
    import datasets

    datasets.load_dataset("owner/again")
    assert asked.read[-1] == ("owner/again", {})


def test_without_a_network_the_data_set_is_named(asked, make_checkpoint, monkeypatch):
    def fails(path, **options):
        raise ConnectionError("Couldn't reach 'owner/sentences' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(EnvironmentMissingError, match=r"^Sentences: Couldn't reach.*--local-dir DIR/owner/sentences$"):
        run(make_checkpoint(), [])


def test_another_metric_is_named(asked, make_checkpoint, monkeypatch):
    monkeypatch.setitem(task_suites.SUITES, "small", (replace(SMALL[0], metric="exact_match,none"),))
    with pytest.raises(UsageError, match=r"Sentences: this lm-eval gives acc,none, f1,none, not exact_match,none"):
        run(make_checkpoint(), [])


def test_the_announced_benchmarks_are_there_and_each_is_one_row():
    suite = SUITES["qwen1.5"]
    names = [one.name for one in suite]
    assert len(set(names)) == len(names)
    assert {"MMLU", "C-Eval", "GSM8K", "MATH", "HumanEval", "MBPP", "BBH", "CMMLU"} <= set(names)
    assert {one.name for one in suite if one.runs_code} == {"HumanEval", "MBPP"}
    languages = {name.partition(", ")[2] for name in names if name.startswith("Belebele")}
    assert len(languages) == 12
    assert all(one.data.count("/") == 1 and one.metric.count(",") == 1 for one in suite)


# ---- the views


def score(task, right, now, outcome="pass"):
    return TaskScore(task, "acc,none", 100, now, right, 3, 1, 0.3, -0.05, 0.01, 0.02, outcome)


def reported(out, path):
    row = ArtifactReport("a", str(path), 10, 4.0, 9.0, 1.0, 0.02, 0.1, 0.9, Verdict("pass"))
    report = Report(
        "m", "r", 16.0, Conditions(TextFacts("wiki", 4, 512)), 9.0, (row, replace(row, name="b", path="elsewhere"))
    )
    out.mkdir()
    write(report, out)
    return report


def test_report_and_page_show_the_scores(tmp_path, make_checkpoint):
    folder, out = make_checkpoint(), tmp_path / "out"
    reported(out, folder)
    results = [tasks.TaskResult(**vars(score("MMLU", 0.6, 0.58, "fail")), artifact=str(folder))]
    assert tasks.keep_scores(tmp_path, results) == []
    assert tasks.keep_scores(out, results) == []
    report = Report.from_json(json.loads((out / "report.json").read_text()))
    assert report.artifacts[0].tasks == (score("MMLU", 0.6, 0.58, "fail"),)
    assert report.artifacts[1].tasks == ()
    assert "| MMLU | 100 | 0.6000 | 0.5800 (-3 +1) **fail** |" in report.to_markdown()
    assert "0.5800 (-3 +1)" in html.render(report)
    assert report_tasks.table(report.artifacts[1:]) == []
    other = [replace(results[0], artifact=str(tmp_path / "strange"))]
    assert tasks.keep_scores(out, other) == [str((tmp_path / "strange").resolve())]


@pytest.mark.parametrize("said", ["out/demo/model-AWQ", "/away/demo/model-AWQ", "model-AWQ"])
def test_scores_find_their_artifact_wherever_its_folder_was_built(tmp_path, said):
    """A report says paths as the build was given them: from another folder, or once it was moved, they lead nowhere."""
    out = tmp_path / "moved"
    reported(out, said)
    (out / "model-AWQ").mkdir()
    results = [tasks.TaskResult(**vars(score("MMLU", 0.6, 0.58)), artifact=str(out / "model-AWQ"))]
    assert tasks.keep_scores(out, results) == []
    report = Report.from_json(json.loads((out / "report.json").read_text()))
    assert [len(row.tasks) for row in report.artifacts] == [1, 0]


def test_command(asked, make_checkpoint, tmp_path):
    from click.testing import CliRunner

    from qquant.cli import cli

    folder, out = make_checkpoint(), tmp_path / "out"
    reported(out, folder)
    common = ["tasks", str(folder), "--against", str(folder), "--device", "cpu"]
    neither = CliRunner().invoke(cli, common)
    assert "give either --task NAME or --suite NAME" in str(neither.exception)
    task_suites.SUITES["qwen1.5"], before = SMALL, task_suites.SUITES["qwen1.5"]
    try:
        shown = CliRunner().invoke(cli, [*common, "--suite", "qwen1.5", "--out", str(out), "--margin", "0.9"])
    finally:
        task_suites.SUITES["qwen1.5"] = before
    assert (shown.exit_code, shown.exception) == (0, None)
    assert "Sentences" in shown.stdout
    assert "left out, since they run programs of the model: Programs (--execute-code)" in shown.stderr
    assert len(list((out / "tasks").iterdir())) == 2
    assert "Sentences" in (out / "report.md").read_text()
