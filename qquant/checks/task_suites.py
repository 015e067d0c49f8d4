"""The benchmarks of a model's announcement by one name: which tasks of lm-eval they are, how many examples each shows, and where its data lie.

`SUITES["qwen1.5"]` are those of https://qwenlm.github.io/blog/qwen1.5: names as in lm-eval 0.4.13, shots as announced (GSM8K 8, MATH 4), data
sets of the hub as the tasks name them. The multilingual ones ask what there is for each of the twelve languages. Every benchmark is one row: the
questions of all its subtasks together, one metric.

    DIR/OWNER/NAME    a local copy of the data set OWNER/NAME of the hub, as `hf download OWNER/NAME --repo-type dataset --local-dir` makes it

HumanEval and MBPP run programs that a model wrote; they are left out unless that is allowed by name. A model's scores by question are kept in a
folder as soon as a benchmark is done, under a digest of everything they depend on, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qquant.disk.writes import make_folder, write_synced
from qquant.errors import EnvironmentMissingError, InputError
from qquant.source.untrusted import read_json

SCHEMA = "qquant-task-scores-1"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, and how lm-eval is asked for it."""

    name: str
    tasks: tuple[str, ...]
    metric: str  # metric,filter
    data: str  # data set of the hub
    shots: int
    runs_code: bool = False


BELEBELE = "arb_Arab deu_Latn fra_Latn ind_Latn ita_Latn jpn_Jpan kor_Hang por_Latn rus_Cyrl spa_Latn tha_Thai vie_Latn"
MMLU_IN = "ar de es fr id it pt ru vi"
MGSM_IN = "de es fr ja ru th"
SUITES: Mapping[str, tuple[Benchmark, ...]] = {
    "qwen1.5": (
        Benchmark("MMLU", ("mmlu",), "acc,none", "cais/mmlu", 5),
        Benchmark("C-Eval", ("ceval-valid",), "acc,none", "ceval/ceval-exam", 5),
        Benchmark("GSM8K", ("gsm8k",), "exact_match,strict-match", "openai/gsm8k", 8),
        Benchmark("MATH", ("hendrycks_math",), "exact_match,none", "EleutherAI/hendrycks_math", 4),
        Benchmark("HumanEval", ("humaneval",), "pass@1,create_test", "openai/openai_humaneval", 0, runs_code=True),
        Benchmark("MBPP", ("mbpp",), "pass_at_1,none", "google-research-datasets/mbpp", 3, runs_code=True),
        Benchmark("BBH", ("bbh_cot_fewshot",), "exact_match,get-answer", "SaylorTwift/bbh", 3),
        Benchmark("CMMLU", ("cmmlu",), "acc,none", "haonan-li/cmmlu", 5),
        *(
            Benchmark(f"MMLU, {language}", (f"m_mmlu_{language}",), "acc,none", "alexandrainst/m_mmlu", 5)
            for language in MMLU_IN.split()
        ),
        *(
            Benchmark(
                f"MGSM, {language}", (f"mgsm_direct_{language}",), "exact_match,flexible-extract", "juletxara/mgsm", 8
            )
            for language in MGSM_IN.split()
        ),
        *(
            Benchmark(f"Belebele, {language}", (f"belebele_{language}",), "acc,none", "facebook/belebele", 5)
            for language in BELEBELE.split()
        ),
    )
}


def allowed(suite: str, execute_code: bool) -> tuple[list[Benchmark], list[str]]:
    """(the benchmarks of a suite that may be asked, the names of those that would run code)."""
    every = SUITES[suite]
    return (
        [one for one in every if execute_code or not one.runs_code],
        [one.name for one in every if one.runs_code and not execute_code],
    )


def require_data(benchmarks: list[Benchmark], folder: Path) -> None:
    """Raise EnvironmentMissingError, naming every data set that has no local copy below `folder`, and how to make it."""
    names = dict.fromkeys(one.data for one in benchmarks)
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        lines = [
            f"  hf download {name} --repo-type dataset --local-dir {folder / name}  # "
            + ", ".join(one.name for one in benchmarks if one.data == name)
            for name in missing
        ]
        raise EnvironmentMissingError(
            f"{folder}: {len(missing)} of {len(names)} data sets are missing. On a machine with a network:\n"
            + "\n".join(lines)
        )


@contextlib.contextmanager
def local_copies(folder: Path | None) -> Iterator[None]:
    """Have data sets of the hub read, within it, from `folder` and nowhere else; None: as ever."""
    if folder is None:
        yield
        return
    datasets: Any = importlib.import_module("datasets")
    original = datasets.load_dataset

    def load(path: str, *arguments: object, **options: object) -> object:
        place = folder / path
        if not place.is_dir():
            raise EnvironmentMissingError(f"{place}: no local copy of the data set {path}")
        return original(str(place), *arguments, **options)

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


@dataclass(frozen=True)
class KeptScores:
    """Scores by question that earlier runs left in a folder; None: nothing is kept."""

    folder: Path | None

    def path(self, model: str, benchmark: Benchmark, limit: int | None, version: str) -> Path | None:
        """The file of a model's scores; `model` is a digest of it, `version` that of the harness."""
        if self.folder is None:
            return None
        asked = [model, benchmark.tasks, benchmark.metric, benchmark.data, benchmark.shots, limit, version]
        return self.folder / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.json"

    def read(self, path: Path | None) -> dict[str, float] | None:
        """Scores by question, if they are there. Raises InputError where the file is damaged."""
        if path is None or not path.is_file():
            return None
        content = read_json(path)
        scores = content.get("scores")
        if content.get("schema") != SCHEMA or not isinstance(scores, dict) or not scores:
            raise InputError(f"{path}: no scores of this version of qquant. Delete the file to ask again")
        if not all(type(value) in (int, float) for value in scores.values()):
            raise InputError(f"{path}: a score is no number. Delete the file to ask again")
        return {question: float(value) for question, value in scores.items()}

    def write(self, path: Path | None, benchmark: Benchmark, scores: Mapping[str, float]) -> None:
        """Keep the scores of a benchmark that is done."""
        if path is not None:
            make_folder(path.parent)
            content = {"schema": SCHEMA, "benchmark": benchmark.name, "scores": dict(scores)}
            write_synced(path, (json.dumps(content, indent=1) + "\n").encode())
