"""`qquant build` and `qquant plan`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qquant import devices
from qquant.cli.command import command
from qquant.cli.display import Display, span
from qquant.cli.options import (
    DEVICE,
    EXITS,
    GITHUB,
    JSON,
    JUNIT,
    LOG,
    PLANNING,
    asking,
    given_imatrix,
    settle,
)
from qquant.cli.terminal import Stop, counted, show, tell_watchers

if TYPE_CHECKING:
    from qquant.formats.planned import PlannedArtifact
    from qquant.plan.asked import Asked
    from qquant.plan.plan import Plan
    from qquant.report.record import Report


@command(epilog=EXITS, example="build Qwen/Qwen1.5-0.5B-Chat --recipe qwen1.5-chat --out release")
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

    The same command continues an interrupted build. Without a recipe, --format, --bits and --type say what to build, in the same
    words; --calibration and --set change any recipe.
    """
    from qquant.plan.plan import Plan

    reference = asked.reference
    place = _converted(reference, out) if allow_pickle else reference
    asked = settle(dataclasses.replace(asked, checkpoint=place), question=True)
    loaded, source = asked.open()
    plan = Plan.of(loaded, source, only, name, given_imatrix(imatrix, source))
    plan.require_room(out)
    for warning in plan.warnings:
        click.echo(f"warning: {warning}", err=True)
    from qquant import pipeline

    began = time.monotonic()
    with Stop() as stop, Display(stop, log) as progress:
        report = pipeline.build(loaded, source, plan, out, devices.named(device), progress)
    pipeline.note_source(source, reference, plan, out)
    if not as_json:
        click.echo(f"{counted(len(plan.artifacts), 'artifact')} in {span(time.monotonic() - began)}: {out}", err=True)
        click.echo("\n".join(_next(report, plan, out)), err=True)
    tell_watchers(report, junit, github)
    show(report, as_json)


def _next(report: Report, plan: Plan, out: Path) -> Iterator[str]:
    """What one does with a build: look at it, ask it something, publish it."""
    yield f"look:    {out / 'report.html'}"
    from qquant.artifact.finishing import installed

    first = shlex.quote(str(installed(out, plan.artifacts[0])))
    yield f"ask:     qquant run {first} 'Who are you?'"
    if report.passed:
        yield f"publish: qquant publish {shlex.quote(str(out))} --namespace YOUR_NAME"
    else:
        yield f"find:    qquant bisect {first} --against CHECKPOINT --max-kl LIMIT"
    yield f"compare: qquant compare EARLIER {shlex.quote(str(out))}"


@command(example="plan Qwen/Qwen1.5-0.5B-Chat --recipe qwen1.5-chat")
@asking(*PLANNING)
@click.option("--tensors", is_flag=True, help="Also print what every tensor is stored as.")
@JSON
def plan(
    asked: Asked, only: tuple[str, ...], name: str | None, imatrix: Path | None, tensors: bool, as_json: bool
) -> None:
    """Print every output file with its exact size, the memory and disk a build needs, and every tensor's type."""
    from qquant.plan.plan import Plan

    loaded, source = settle(asked, question=False).open()
    planned = Plan.of(loaded, source, only, name, given_imatrix(imatrix, source))
    if as_json:
        click.echo(json.dumps(planned.to_dict(), indent=2))
        return
    for artifact in planned.artifacts:
        click.echo(f"{artifact.name}: {artifact.size:,} bytes, {artifact.bits_per_weight:.2f} bits per weight")
        for file in artifact.files:
            click.echo(f"  {file.size:>16,}  {artifact.folder}/{file.name}")
        for line in _remarks(planned, artifact):
            click.echo(f"  {line}")
        types: dict[str, list[str]] = {}
        for tensor, stored in artifact.stored.items():
            types.setdefault(stored.label, []).append(tensor)
        for kind, members in types.items():
            click.echo(f"  {kind}: {len(members)} tensor{'s' if len(members) > 1 else ''}")
            for tensor in members if tensors else ():
                click.echo(f"    {tensor}")
    _print_checks(planned)
    for warning in planned.warnings:
        click.echo(f"warning: {warning}")
    click.echo(f"memory: about {planned.memory / 1e9:.1f} GB; disk: {planned.disk:,} bytes")


def _converted(reference: str, out: Path) -> str:
    """The folder of safetensors made from a local folder of pickles; others as they are."""
    from qquant.source.pickles import converted

    return str(converted(Path(reference), out)) if Path(reference).is_dir() else reference


def _remarks(planned: Plan, artifact: PlannedArtifact) -> Iterator[str]:
    if artifact.fallbacks:
        yield f"{len(artifact.fallbacks)} tensors cannot have the type of the mix, e.g. {artifact.fallbacks[0]}"
    sizes = planned.parallel.get(artifact.name)
    if sizes:
        vllm, sglang, before = (
            ",".join(map(str, sizes[key])) or "none" for key in ("vllm", "sglang", "without_padding")
        )
        yield f"tensor-parallel sizes: vLLM {vllm}; SGLang {sglang}" + (
            f"; without padding {before}" if before != vllm else ""
        )


def _print_checks(planned: Plan) -> None:
    """What will be asked of each artifact, and what the text can tell."""
    checks = planned.checks
    more = f", up to {planned.looks[-1]} where a gate is undecided" if len(planned.looks) > 1 else ""
    click.echo(
        f"check: {checks.text}, {planned.looks[0]} windows of {checks.length} tokens "
        f"({planned.looks[0] * checks.scored:,} scored){more}"
    )
    signs = {"top-1 agreement": "at least"}
    for artifact in planned.artifacts:
        gates = [
            f"{gate.gate} {signs.get(gate.gate, 'at most')} {gate.limit:g} (detectable {gate.detectable:.2g})"
            for gate in planned.reach(artifact.name)
        ]
        click.echo(f"  {artifact.name}: {', '.join(gates) or 'measured, not gated'}")
    click.echo("  detectable: the distance from a limit that this text proves in 80 % of runs")
