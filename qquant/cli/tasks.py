"""`qquant tasks`: questions with right and wrong answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qquant import devices
from qquant.cli.command import command
from qquant.cli.display import Display
from qquant.cli.options import ADAPTER, AGAINST, DEVICE, EXITS, JSON, REVISION, Number, require_there
from qquant.cli.terminal import begins, counted, echo
from qquant.errors import GateFailedError, InconclusiveError, UsageError

if TYPE_CHECKING:
    from qquant.checks.tasks import TaskResult


@command(epilog=EXITS, example="tasks release/Qwen1.5-0.5B-Chat-AWQ --against Qwen/Qwen1.5-0.5B-Chat --task arc_easy")
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@AGAINST
@REVISION
@click.option("--task", "names", multiple=True, help="A task of lm-eval; may be repeated; default: those of --suite.")
@click.option("--suite", type=click.Choice(["qwen1.5"]), help="The benchmarks of an announcement; default: none.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder with local copies of the suite's data sets, DIR/OWNER/NAME; default: the hub.",
)
@click.option("--execute-code", is_flag=True, help="Also ask the benchmarks that run programs which the model wrote.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the suite's scores in DIR/tasks, go on from there, and show them in the report of DIR; default: nowhere.",
)
@click.option(
    "--include",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of your own tasks; default: none.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Questions per task; default: all.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(min=1), help="Questions at a time.")
@click.option("--margin", default=0.02, show_default=True, type=Number(0, 1), help="Loss of score that is accepted.")
@ADAPTER
@DEVICE
@JSON
def tasks(
    artifacts: tuple[Path, ...], against: str, revision: str | None, names: tuple[str, ...], suite: str | None, data: Path | None,
    execute_code: bool, out: Path | None, include: Path | None, limit: int | None, batch: int, margin: float, adapter: Path | None, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Ask artifacts and their checkpoint the questions of lm-eval tasks, or of a suite, and count the answers that changed.

    Needs the extra: pip install "qquant[tasks]". Exit status 3: a loss beyond --margin is proven, 4: it can be neither proven nor excluded.
    """
    if (suite is None) == (not names):
        raise UsageError("give either --task NAME or --suite NAME")
    if adapter is not None:  # the questions go to the folder as transformers loads it, without the adapter
        raise UsageError(
            f"--adapter {adapter}: tasks asks the checkpoint as it is on the disk; merge the adapter into it first "
            "(peft's merge_and_unload), and give that folder as --against"
        )
    for artifact in artifacts:
        require_there(artifact)
    begins(f"tasks: {', '.join(names) or suite} of {counted(len(artifacts), 'artifact')} and of {against}")
    from qquant.checks import tasks as checks
    from qquant.checks.task_suites import KeptScores
    from qquant.source.checkpoint import Checkpoint

    source = Checkpoint.open(against, revision)
    with Display() as progress:
        if suite is None:
            asked = checks.Questions(names, include, limit, batch, margin)
            results = checks.run(source, artifacts, asked, devices.named(device), progress)
        else:
            kept = KeptScores(None if out is None else out / "tasks")
            questions = checks.SuiteQuestions(suite, data, limit, batch, margin, execute_code, kept)
            results = checks.run_suite(source, artifacts, questions, devices.named(device), progress)
    if suite is not None:
        _tell(results, suite, execute_code, out)
    if as_json:
        echo(json.dumps({"schema": "qquant-tasks-1", "results": [vars(one) for one in results]}, indent=2))
    else:
        _print_scores(results)
    for outcome, error, text in (
        ("fail", GateFailedError, f"loses more than {margin:g}"),
        ("inconclusive", InconclusiveError, f"too few questions to tell a loss from {margin:g}"),
    ):
        lines = [f"{one.artifact}: {one.task}, {one.metric}: {text}" for one in results if one.outcome == outcome]
        if lines:
            raise error("\n".join(lines))


def _tell(results: Sequence[TaskResult], suite: str, execute_code: bool, out: Path | None) -> None:
    """What was left out, and where the scores are."""
    from qquant.checks import tasks as checks
    from qquant.checks.task_suites import allowed

    _, left_out = allowed(suite, execute_code)
    if left_out:
        echo(f"left out, since they run programs of the model: {', '.join(left_out)} (--execute-code)", err=True)
    if out is not None:
        for path in checks.keep_scores(out, results):
            echo(f"warning: {path} is no artifact of the report in {out}", err=True)


def _print_scores(results: Sequence[TaskResult]) -> None:
    """One row a task of an artifact; what is narrow keeps both scores and the verdict."""
    from qquant.cli.tables import Column, print_table

    columns = [Column("artifact", words=True), Column("task, metric", words=True), Column("questions", spare=3)]
    columns += [Column("checkpoint"), Column("artifact"), Column("95 % of change", words=True, spare=1)]
    columns += [Column("right → wrong", spare=2), Column("wrong → right", spare=2), Column("McNemar p", spare=4)]
    columns += [Column("verdict", words=True)]
    rows = []
    for one in results:
        scores = f"{one.score_baseline:.4f}", f"{one.score:.4f}", f"{one.low:+.4f} to {one.high:+.4f}"
        flips = str(one.to_wrong), str(one.to_right), f"{one.p_worse:.3f}"
        what = f"{one.task}, {one.metric}"
        rows.append((Path(one.artifact).name, what, str(one.questions), *scores, *flips, one.outcome))
    print_table(columns, rows)
