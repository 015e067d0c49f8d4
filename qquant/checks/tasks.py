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
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qquant.checks import statistics
from qquant.errors import EnvironmentMissingError, InputError, UsageError
from qquant.progress import Progress
from qquant.report.record import Proof
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
class TaskResult:
    """One metric of one task."""

    artifact: str
    task: str
    metric: str
    questions: int
    score: float
    score_baseline: float
    to_wrong: int  # flips
    to_right: int
    p_worse: float  # McNemar, one-sided
    low: float  # 95 % interval of the score minus the checkpoint's
    high: float
    margin: float
    outcome: Proof


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


def _scores(harness: Any, model: Any, tokenizer: Any, questions: Questions) -> Scores:
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
