"""`qquant build`: artifacts, their verdicts, and what to do next."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qquant.cli.command import command
from qquant.cli.display import peak_memory, span
from qquant.cli.options import DEVICE, EXITS, GITHUB, JSON, JUNIT, LOG, PLANNING, asking, given_imatrix, settle
from qquant.cli.terminal import Stop, begins, counted, echo, show, tell_watchers
from qquant.cli.together import device_of, ranks_here, working
from qquant.progress import Timed

if TYPE_CHECKING:
    import torch

    from qquant.plan.asked import Asked
    from qquant.plan.plan import Plan
    from qquant.ranks import Ranks
    from qquant.recipe import Recipe
    from qquant.report.record import Report
    from qquant.source.checkpoint import Checkpoint


@command(
    epilog=EXITS, surplus="--recipe {}", example="build Qwen/Qwen1.5-0.5B-Chat --recipe qwen1.5-chat --out release"
)
@asking(*PLANNING)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Output folder; new, empty, or of an earlier run."
)
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Convert the .bin files of a local CHECKPOINT once, in a process without a network.",
)
@JUNIT
@GITHUB
@LOG
@DEVICE
@JSON
def build(
    asked: Asked, only: tuple[str, ...], name: str | None, imatrix: Path | None, out: Path, allow_pickle: bool,
    junit: Path | None, github: bool, log: Path | None, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Build every artifact of a recipe from CHECKPOINT (a folder, or a hub id), and check each one.

    The same command continues an interrupted build, and under `torchrun -m` several processes share out the artifacts. Without a recipe, --format, --bits and --type say what to build, in the same
    words; --calibration and --set change any recipe.
    """
    from qquant.plan.plan import Plan

    reference = asked.reference
    checkpoint = _converted(reference, out) if allow_pickle else reference
    asked = settle(dataclasses.replace(asked, checkpoint=checkpoint), question=True)
    loaded, source = asked.open()
    plan = Plan.of(loaded, source, only, name, given_imatrix(imatrix, source))
    plan.require_room(out)
    plan.texts.require()
    for warning in plan.warnings:
        echo(f"warning: {warning}", err=True)
    begins(f"{plan.model}: {counted(len(plan.artifacts), 'artifact')}, recipe {loaded.name}: {out}")
    from qquant import pipeline
    from qquant.artifact import timings

    began, ranks = time.monotonic(), ranks_here()
    where = device_of(device, ranks)
    foreseen = _foreseen(loaded, source, plan, where, ranks)
    with Stop(ranks.first) as stop, working(ranks, log, stop) as progress:
        clock = Timed(progress)
        report = pipeline.build(loaded, source, plan, out, where, clock, ranks)
    if ranks.first and "quantize" in clock.took:
        whole = {
            "seconds": timings.Foretold(time.monotonic() - began, sum(foreseen.values()) if foreseen else None),
            "peak_bytes": timings.Foretold(peak_memory(), plan.needs[where.type].device),
        }
        timings.foresee(out, clock.took, foreseen, whole)
    if not as_json:
        told = f", {span(sum(foreseen.values()))} foreseen" if foreseen else ""
        echo(f"{counted(len(plan.artifacts), 'artifact')} in {span(time.monotonic() - began)}{told}: {out}", err=True)
        echo(
            "\n".join(_next(report, plan, out, dataclasses.replace(asked, revision=asked.revision or loaded.revision))),
            err=True,
        )
    if ranks.first:
        tell_watchers([report], junit, github)
    show(report, as_json)


def _foreseen(recipe: Recipe, source: Checkpoint, plan: Plan, device: torch.device, ranks: Ranks) -> dict[str, float]:
    """Seconds by phase, where `qquant doctor --calibrate` has measured this machine; otherwise nothing, and no time is spent on it."""
    from qquant.plan import machine, seconds

    measured = machine.measured(device) if ranks.first else None
    if measured is None:
        return {}
    return measured.foreseen(seconds.seconds(recipe, source, plan, measured.rates_for(source), device, ranks.world))


def _next(report: Report, plan: Plan, out: Path, asked: Asked) -> Iterator[str]:
    """What one does with a build: look at it, ask it something, publish it, or find what carries the loss of the first that failed."""
    from qquant.artifact.finishing import installed

    paths = {artifact.name: installed(out, artifact) for artifact in plan.artifacts}
    yield f"look:    {out / 'report.html'}"
    yield f"ask:     {shlex.join(['qquant', 'run', str(next(iter(paths.values()))), 'Who are you?'])}"
    if report.passed:
        yield f"publish: {shlex.join(['qquant', 'publish', str(out)])} --namespace YOUR_NAME"
    for failed in [artifact for artifact in report.artifacts if artifact.verdict.outcome == "fail"][:1]:
        limits = (f"{gate.limit:g}" for gate in failed.verdict.gates if gate.name == "mean KL divergence")
        words = ["qquant", "bisect", str(paths[failed.name]), "--against", asked.reference]
        words += ["--revision", asked.revision] if asked.revision else []
        words += ["--adapter", str(asked.adapter)] if asked.adapter else []
        yield f"find:    {shlex.join(words)} --max-kl {next(limits, 'LIMIT')}"
    yield f"compare: qquant compare EARLIER {shlex.quote(str(out))}"


def _converted(reference: str, out: Path) -> str:
    """The folder of safetensors made from a local folder of pickles; others as they are."""
    from qquant.source.pickles import converted

    return str(converted(Path(reference), out)) if Path(reference).is_dir() else reference
