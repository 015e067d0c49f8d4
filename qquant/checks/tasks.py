"""Tasks of the lm-eval harness on artifacts and their checkpoint: what a score hides is how many answers changed.

Every model runs as `qquant.load` gives it, one after the other, on the same questions. With right = 1 and wrong = 0 per question, paired:

    flips    right -> wrong and wrong -> right; equal scores can hide many (Dutta et al., Accuracy is Not All You Need, 2024)
    McNemar  P(as many went wrong) if the flips were a coin's; exact
    verdict  mean loss within `margin`, proven (pass), beyond it (fail), or neither; 0 and 1 by Agresti and Min's paired interval, other
             scores as the other gates are tested, a question a window

Flips of a metric that is not 0 or 1 are counted as down and up. Needs `pip install "qquant[tasks]"`.
Left out: tasks that make no difference between questions (perplexity; `qquant check` does that), several samples per question.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qquant.artifact.manifest import REPORT, read_report
from qquant.checks import statistics
from qquant.checks.task_suites import Benchmark, KeptScores, allowed, local_copies, require_data
from qquant.errors import EnvironmentMissingError, InputError, UsageError
from qquant.formats import weight_files
from qquant.progress import Progress
from qquant.report import views
from qquant.report.tasks import TaskScore
from qquant.runtime import loading
from qquant.source.checkpoint import Checkpoint

Scores = Mapping[tuple[str, str], Mapping[str, float]]  # (task, metric) -> question -> score


@dataclass(frozen=True)
class Questions:
    """Tasks that are asked, how many of their questions, and the margin."""

    tasks: tuple[str, ...]
    include: Path | None = None  # a folder of further task definitions
    limit: int | None = None  # questions per task
    batch: int = 8
    margin: float = 0.02  # loss of score that is accepted


@dataclass(frozen=True)
class SuiteQuestions:
    """The benchmarks of a suite (`task_suites`), and how they are asked."""

    suite: str
    data: Path | None = None  # local copies of the data sets; None: the hub
    limit: int | None = None  # questions per task
    batch: int = 8
    margin: float = 0.02
    execute_code: bool = False  # benchmarks that run programs of the model are asked, too
    kept: KeptScores = field(default_factory=lambda: KeptScores(None))


@dataclass(frozen=True)
class TaskResult(TaskScore):
    """One metric of one task, of an artifact."""

    artifact: str


def run(
    checkpoint: Checkpoint, paths: Sequence[Path], questions: Questions, device: torch.device, progress: Progress
) -> list[TaskResult]:
    """Ask the checkpoint and every artifact.

    Raises:
        EnvironmentMissingError: lm-eval is not installed.
        UsageError: it does not know a task, or a task has no score per question.
    """
    import transformers

    harness = _harness()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
    scores: list[Scores] = []
    progress.advance("ask", 0, 1 + len(paths))
    for index, path in enumerate([checkpoint.path, *paths]):
        model = loading.load(path, device)
        scores.append(_scores(harness, model, tokenizer, questions))
        del model
        progress.advance("ask", index + 1, 1 + len(paths))
        progress.check_stop()
    results = []
    for path, mine in zip(paths, scores[1:], strict=True):
        results += [compared(str(path), key, scores[0][key], mine[key], questions.margin) for key in scores[0]]
    return results


def run_suite(
    checkpoint: Checkpoint, paths: Sequence[Path], questions: SuiteQuestions, device: torch.device, progress: Progress
) -> list[TaskResult]:
    """Ask the checkpoint and every artifact the benchmarks of a suite: one result for each artifact and benchmark.

    Raises:
        EnvironmentMissingError: lm-eval or a data set is missing.
        UsageError: this lm-eval does not know a task, or gives another metric.
        InputError: kept scores are damaged.
        StoppedError: with `questions.kept`, what is done is there when it is asked again.
    """
    harness = _harness()
    benchmarks, _ = allowed(questions.suite, questions.execute_code)
    if questions.data is not None:
        require_data(benchmarks, questions.data)
    models = [_ModelAsked(checkpoint, path, device) for path in (checkpoint.path, *paths)]
    rows = [(model, benchmark) for model in models for benchmark in benchmarks]
    kept = [_kept(harness, model, benchmark, questions) for model, benchmark in rows]
    done = sum(scores is not None for scores in kept)
    progress.advance("suite", done, len(rows))
    scores: list[list[Mapping[str, float]]] = [[] for _ in models]
    for index, ((model, benchmark), known) in enumerate(zip(rows, kept, strict=True)):
        if known is None:
            progress.at(f"{benchmark.name}, {model.path.name}")
            known = _benchmark(harness, model, benchmark, questions)
            done += 1
            progress.advance("suite", done, len(rows))
        scores[index // len(benchmarks)].append(known)
        progress.check_stop()
        if benchmark is benchmarks[-1]:
            model.release()
    results = []
    for path, mine in zip(paths, scores[1:], strict=True):
        for benchmark, theirs, ours in zip(benchmarks, scores[0], mine, strict=True):
            results.append(compared(str(path), (benchmark.name, benchmark.metric), theirs, ours, questions.margin))
    return results


class _ModelAsked:
    """A model that is loaded when something must be asked, and its digest."""

    def __init__(self, checkpoint: Checkpoint, path: Path, device: torch.device) -> None:
        self.checkpoint, self.path, self.device = checkpoint, path, device
        self.loaded: tuple[Any, Any] | None = None

    @cached_property
    def digest(self) -> str:
        """sha256 of the files of its weights and config, and of its checkpoint."""
        files = sorted({*weight_files(self.path), *self.path.glob("*.json")}) if self.path.is_dir() else [self.path]
        digest = hashlib.sha256(self.checkpoint.fingerprint.encode())
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def get(self) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        if self.loaded is None:
            import transformers

            tokenizer = transformers.AutoTokenizer.from_pretrained(self.checkpoint.path, local_files_only=True)
            self.loaded = loading.load(self.path, self.device), tokenizer
        return self.loaded

    def release(self) -> None:
        """Free its memory."""
        self.loaded = None


def _kept(
    harness: Any, model: _ModelAsked, benchmark: Benchmark, questions: SuiteQuestions
) -> Mapping[str, float] | None:
    """Scores by question that an earlier run left."""
    return questions.kept.read(_place(harness, model, benchmark, questions))


def _place(harness: Any, model: _ModelAsked, benchmark: Benchmark, questions: SuiteQuestions) -> Path | None:
    version = str(getattr(harness, "__version__", "unknown"))
    return questions.kept.path(model.digest, benchmark, questions.limit, version) if questions.kept.folder else None


def _benchmark(
    harness: Any, model: _ModelAsked, benchmark: Benchmark, questions: SuiteQuestions
) -> Mapping[str, float]:
    """Scores by question of all subtasks, asked now and kept."""
    with local_copies(questions.data), _data_missing(benchmark):
        every = _scores(
            harness,
            *model.get(),
            Questions(benchmark.tasks, limit=questions.limit, batch=questions.batch),
            num_fewshot=benchmark.shots,
            **({"confirm_run_unsafe_code": True} if benchmark.runs_code else {}),
        )
    scores = {
        f"{task} {question}": value
        for (task, metric), answers in every.items()
        if metric == benchmark.metric
        for question, value in answers.items()
    }
    if not scores:
        have = ", ".join(dict.fromkeys(metric for _, metric in every))
        raise UsageError(f"{benchmark.name}: this lm-eval gives {have}, not {benchmark.metric}; take lm-eval 0.4.13")
    questions.kept.write(_place(harness, model, benchmark, questions), benchmark, scores)
    return scores


@contextlib.contextmanager
def _data_missing(benchmark: Benchmark) -> Iterator[None]:
    """Say which data set could not be had, and how to have it."""
    try:
        yield
    except (OSError, ImportError) as error:
        raise EnvironmentMissingError(
            f"{benchmark.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}. It needs the data set {benchmark.data}: go online, or copy it and "
            f"give --data DIR: hf download {benchmark.data} --repo-type dataset --local-dir DIR/{benchmark.data}"
        ) from error


def compared(
    artifact: str, key: tuple[str, str], baseline: Mapping[str, float], mine: Mapping[str, float], margin: float
) -> TaskResult:
    """Scores by question of an artifact against the checkpoint's.

    Raises:
        InputError: they answered other questions.
    """
    if baseline.keys() != mine.keys():
        raise InputError(f"{artifact}: {key[0]}: answered {len(mine)} questions, the checkpoint {len(baseline)} others")
    change = np.array([mine[question] - baseline[question] for question in baseline], np.float64)
    to_wrong, to_right = int((change < 0).sum()), int((change > 0).sum())
    if set(np.abs(change).tolist()) <= {0.0, 1.0}:
        loss, (low, high) = statistics.flips(to_wrong, to_right, len(change), margin)
    else:
        loss, (low, high) = statistics.measure_loss(-change, margin), statistics.interval(change)
    return TaskResult(
        artifact=artifact,
        task=key[0],
        metric=key[1],
        questions=len(change),
        score=float(np.mean(list(mine.values()))),
        score_baseline=float(np.mean(list(baseline.values()))),
        to_wrong=to_wrong,
        to_right=to_right,
        p_worse=statistics.mcnemar(to_wrong, to_right),
        low=low,
        high=high,
        margin=margin,
        outcome=statistics.decide({"": loss})[0],
    )


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise EnvironmentMissingError(f'{error}: tasks need lm-eval; pip install "qquant[tasks]"') from None
    return lm_eval


def _scores(harness: Any, model: Any, tokenizer: Any, questions: Questions, **options: Any) -> Scores:
    """Score by question of every task and metric that lm-eval gives per question."""
    manager = harness.tasks.TaskManager(include_path=None if questions.include is None else str(questions.include))
    unknown = [task for task in questions.tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(f"--task {unknown[0]}: lm-eval knows no such task; --include DIR adds definitions")
    with _quiet():
        answerer = harness.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=questions.batch)
        result = harness.simple_evaluate(
            model=answerer,
            tasks=list(questions.tasks),
            task_manager=manager,
            limit=questions.limit,
            log_samples=True,
            bootstrap_iters=0,
            **options,
        )
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for task, samples in result["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                value, name = sample[metric], f"{metric},{sample['filter']}"
                if isinstance(value, bool | int | float):
                    scores.setdefault((task, name), {})[str(sample["doc_id"])] = float(value)
    if not scores:
        raise UsageError(f"{', '.join(questions.tasks)}: no metric with a score per question")
    return scores


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What lm-eval prints goes where progress goes, since stdout carries the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def keep_scores(out: Path, results: Sequence[TaskResult]) -> list[str]:
    """Put scores of benchmarks into the report of an output folder, if it has one; the artifacts that it does not know."""
    path = out / REPORT
    if not path.is_file():
        return []
    report = read_report(path)
    by_place: dict[Path, list[TaskScore]] = {}
    for one in results:
        score = TaskScore(**{key: value for key, value in vars(one).items() if key != "artifact"})
        by_place.setdefault(Path(one.artifact).resolve(), []).append(score)
    rows = []
    for row in report.artifacts:
        place = next((place for place in _places(out, Path(row.path)) if place in by_place), None)
        rows.append(replace(row, tasks=tuple(by_place.pop(place))) if place else row)
    views.write(replace(report, artifacts=tuple(rows)), out)
    return [str(place) for place in by_place]


def _places(out: Path, path: Path) -> Iterator[Path]:
    """Where an artifact of a report in `out` may be: where the build said it was, from here, or that below `out`, which may have been moved since."""
    yield path.resolve()
    yield from ((out / Path(*path.parts[first:])).resolve() for first in range(len(path.parts)))
