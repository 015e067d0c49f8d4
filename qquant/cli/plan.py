"""`qquant plan`: what a build will write, take and tell, on one screen; files, tensors and gates where they are asked for."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qquant.cli.command import command
from qquant.cli.options import DEVICE, EXITS, JSON, PLANNING, asking, given_imatrix, settle
from qquant.cli.terminal import begins, counted, echo

if TYPE_CHECKING:
    import torch

    from qquant.formats.planned import PlannedArtifact
    from qquant.plan.asked import Asked
    from qquant.plan.beside import Cost
    from qquant.plan.machine import Machine
    from qquant.plan.plan import Plan
    from qquant.plan.seconds import Rates
    from qquant.recipe import Recipe
    from qquant.source.checkpoint import Checkpoint

SIGNS = {"top-1 agreement": "at least"}
LONG = 8 * 3600  # seconds that nobody waits for beside their work
LESS = "for a part of that: --recipe laptop (one GGUF file), or --effort fast --set checks.profile=default"


@command(epilog=EXITS, surplus="--recipe {}", example="plan Qwen/Qwen1.5-0.5B-Chat --recipe qwen1.5-chat")
@asking(*PLANNING)
@click.option("--files", is_flag=True, help="Also print every file with its size in bytes.")
@click.option("--tensors", is_flag=True, help="Also print what every tensor is stored as.")
@click.option("--gates", is_flag=True, help="Also print every limit, and what distance from it the text can prove.")
@click.option(
    "--time/--no-time",
    "timed",
    default=None,
    help="Say how long the phases take here, from a probe of a second (imports torch); default: on a terminal.",
)
@click.option(
    "--world",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Ranks that build together (torchrun --nproc-per-node); with more than 1 their shares are printed.",
)
@DEVICE
@JSON
def plan(
    asked: Asked, only: tuple[str, ...], name: str | None, imatrix: Path | None, files: bool, tensors: bool, gates: bool,
    timed: bool | None, world: int, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Print what a build will write to the byte, the memory, disk and time it takes, and what does not fit.

    Needs no torch and no GPU but for --time and --device; what does not fit on the device that is named exits with 6.
    """
    from qquant.plan.beside import beside
    from qquant.plan.plan import Plan

    loaded, source = settle(asked, question=False).open()
    planned = Plan.of(loaded, source, only, name, given_imatrix(imatrix, source))
    phases: dict[str, float] = {}
    clock = None
    if sys.stdout.isatty() if timed is None else timed:
        begins("plan: trying how fast this machine is, about a second (--no-time leaves it out)")
        clock = _clock(source, device, world)
        phases = clock(loaded, planned)
    costs = beside(loaded, source, planned, None if clock is None else lambda *asked: sum(clock(*asked).values()))
    if as_json:
        content = planned.to_dict() | ({"seconds": phases} if phases else {}) | {"efforts": list(map(vars, costs))}
        echo(json.dumps(content, indent=2))
        return
    _print_artifacts(planned)
    if files:
        _print_files(planned)
    if tensors:
        _print_tensors(planned)
    if planned.writing:
        echo(f"calibration: {planned.writing}")
    if planned.background:
        own = planned.tokens - planned.background
        echo(
            f"calibration: at most {own:,} tokens of the sources and {planned.background:,} beside them of other bundled texts (calibration.background)"
        )
    _print_checks(planned, source, gates)
    if timed is None and not phases:
        echo("time:   --time says how long, after a probe of a second; shown unasked on a terminal")
    _print_needs(planned, source, phases, calibrated=clock is not None and clock.calibrated)
    if world > 1:
        _print_ranks(loaded, planned, source, device, world)
    _print_efforts(costs)
    for warning in planned.warnings:
        echo(f"warning: {warning}")
    _judge(loaded, source, planned, device)


def _judge(recipe: Recipe, source: Checkpoint, planned: Plan, device: str) -> None:
    """Raise EnvironmentMissingError where the device that was named here has too little memory."""
    if device == "auto":
        return
    from qquant import devices
    from qquant.plan.capacity import Free, require_memory

    require_memory(recipe, source, planned, Free.of(devices.named(device)))


@dataclass(frozen=True)
class _Clock:
    """Seconds of builds of one checkpoint on one device."""

    source: Checkpoint
    device: torch.device
    rates: Rates
    machine: Machine | None  # what `qquant doctor --calibrate` found
    world: int

    @property
    def calibrated(self) -> bool:
        """Whether the machine was measured."""
        return self.machine is not None

    def __call__(self, recipe: Recipe, planned: Plan) -> dict[str, float]:
        """Phase -> the seconds it is expected to take."""
        from qquant.plan import seconds

        counted = seconds.seconds(recipe, self.source, planned, self.rates, self.device, self.world)
        return self.machine.foreseen(counted) if self.machine else counted


def _clock(source: Checkpoint, device: str, world: int) -> _Clock:
    """What tells the seconds of a plan, by rates that were measured, or that a probe of a second finds."""
    from qquant import devices
    from qquant.plan import machine, seconds

    where = devices.named(device)
    measured = machine.measured(where)
    rates = measured.rates_for(source) if measured else seconds.probe(source, where)
    return _Clock(source, where, rates, measured, world)


def _print_efforts(costs: list[Cost]) -> None:
    """One line for each effort, the chosen one marked."""
    from qquant.cli.display import span

    for cost in costs:
        took = "" if cost.seconds is None else f"about {span(cost.seconds)}, "
        echo(f"effort: {cost.effort:<8} {took}{cost.memory / 1e9:.1f} GB{'  (chosen)' if cost.asked else ''}")


def _print_artifacts(planned: Plan) -> None:
    """One row an artifact."""
    from qquant.cli.tables import Column, print_table

    columns = [Column("artifact", words=True), Column("bytes"), Column("bits per weight")]
    columns += [Column("fallbacks", spare=2), Column("tensor parallel", words=True, spare=1)]
    rows = []
    for artifact in planned.artifacts:
        sizes = planned.parallel.get(artifact.name)
        ranks = ",".join(map(str, sizes["vllm"])) or "none" if sizes else ""
        if sizes and sizes["without_padding"] != sizes["vllm"]:
            ranks += f" (unpadded {','.join(map(str, sizes['without_padding'])) or 'none'})"
        fallbacks = str(len(artifact.fallbacks) or "")
        numbers = f"{artifact.size:,}", f"{artifact.bits_per_weight:.2f}"
        rows.append((artifact.name, *numbers, fallbacks, ranks))
    print_table(columns, rows, planned.model)
    for name in planned.unsettled:
        echo(
            f"{name}: which tensor has which type is chosen by the build, in this size, by what each loses; `qquant recipe types` chooses now, and writes it down"
        )
    for artifact in planned.artifacts:
        if artifact.fallbacks:
            which = counted(len(artifact.fallbacks), "tensor")
            echo(f"{artifact.name}: {which} cannot have the type of the mix, e.g. {artifact.fallbacks[0]}")


def _print_files(planned: Plan) -> None:
    for artifact in planned.artifacts:
        for file in artifact.files:
            echo(f"{file.size:>16,}  {artifact.folder}/{file.name}")


def _print_tensors(planned: Plan) -> None:
    for artifact in planned.artifacts:
        for label, members in _by_type(artifact).items():
            echo(f"{artifact.name}: {label}: {counted(len(members), 'tensor')}")
            for tensor in members:
                echo(f"    {tensor}")


def _by_type(artifact: PlannedArtifact) -> dict[str, list[str]]:
    """Tensors of the checkpoint by what they are stored as."""
    types: dict[str, list[str]] = {}
    for tensor, stored in artifact.stored.items():
        types.setdefault(stored.label, []).append(tensor)
    return types


def _print_checks(planned: Plan, source: Checkpoint, gates: bool) -> None:
    """What will be read, and with `gates` what is asked of each artifact and what the text can tell."""
    checks = planned.checks
    more = f", up to {planned.looks[-1]} where a gate is inconclusive" if len(planned.looks) > 1 else ""
    windows = planned.looks[0]
    read = f"{windows} windows of {checks.length} tokens ({windows * checks.scored:,} scored){more}"
    echo(f"check:  {checks.text}, {read}")
    if checks.profile == "release":
        from qquant.calibration import behaviour
        from qquant.calibration.slices import most_tokens

        short, long = most_tokens(source.config.positions)
        echo(
            f"slices: languages, kinds of text, positions: at most {short + long:,} tokens, {long:,} of them in long documents"
        )
        hidden, answers = behaviour.most_tokens(source.config.positions)
        echo(
            f"behaviour: facts in documents, {hidden:,} tokens in all; {behaviour.ANSWERS} answers, {answers:,} tokens at most"
        )
    if not gates:
        return
    for artifact in planned.artifacts:
        limits = [
            f"{gate.gate} {SIGNS.get(gate.gate, 'at most')} {gate.limit:g} (detectable {gate.detectable:.2g})"
            for gate in planned.reach(artifact.name)
        ]
        echo(f"  {artifact.name}: {', '.join(limits) or 'measured, not gated'}")
    echo("  detectable: the distance from a limit that this text proves in 80 % of runs")
    if checks.profile == "release":
        _print_slices(planned, source)


def _print_slices(planned: Plan, source: Checkpoint) -> None:
    """What each slice can tell; slices are the same for all artifacts, limits for nearly all."""
    from qquant.calibration import Tokenizer
    from qquant.plan.slices import slice_reaches

    tokenizer = Tokenizer.open(source.path)
    limits: dict[float, list[str]] = {}
    for name, gates in planned.gates.items():
        if gates.worst_slice is not None:
            limits.setdefault(gates.worst_slice, []).append(name)
    for limit, names in limits.items():
        echo(
            f"worst slice of {', '.join(names)}: KL divergence against that of English, or of the same tokens in short windows"
        )
        for one in slice_reaches(tokenizer, source.config.positions, limit):
            echo(
                f"  {one.name}: at most {one.limit:.3g} times (detectable {one.detectable:.2g}), {one.windows} windows, {one.tokens:,} tokens"
            )


def _print_ranks(loaded: Recipe, planned: Plan, source: Checkpoint, device: str, world: int) -> None:
    """What each rank builds, and what all of them need of one machine and hand each other."""
    from qquant import devices
    from qquant.plan import seconds
    from qquant.plan.handed import handed

    where = devices.named(device)
    hands = seconds.shares(source, planned, where, world)
    sent = handed(loaded, source, planned, where.type, world, len(hands) < world)
    if len(hands) < world:
        echo(f"ranks 0 to {world - 1}: each artifact together")
    for rank, hand in enumerate(hands if len(hands) == world else ()):
        echo(f"rank {rank}: {', '.join(artifact.name for artifact in hand) or 'no artifact; windows of the check'}")
    echo(
        f"ranks:  each reads {sum(tensor.nbytes for tensor in source.tensors.values()):,} bytes of the checkpoint, up to three times; {world * planned.memory / 1e9:.1f} GB on one machine; all hand each other {sent:,} bytes"
    )


def _tokens_checked(planned: Plan, source: Checkpoint) -> int:
    """Tokens of the longest text that a check takes through the layers."""
    from qquant.calibration.slices import most_tokens

    sliced = max(most_tokens(source.config.positions)) if planned.checks.profile == "release" else 0
    return max(planned.looks[-1] * planned.checks.length, sliced)


def _print_needs(planned: Plan, source: Checkpoint, phases: dict[str, float], calibrated: bool) -> None:
    """Time, memory and disk, each beside what is there."""
    from qquant.cli.display import span
    from qquant.devices import host_memory
    from qquant.plan.room import checked_bytes

    if phases:
        within = (
            "by what this machine took before"
            if calibrated
            else "within a factor of two or three; `qquant doctor --calibrate` tells better"
        )
        each = ", ".join(f"{phase} {span(took)}" for phase, took in phases.items())
        echo(f"time:   about {span(sum(phases.values()))} here ({each}), {within}")
        if sum(phases.values()) > LONG and planned.checks.profile == "release":
            echo(f"        {LESS}")
    models, free = 1 + len(planned.artifacts), host_memory()
    held = checked_bytes(_tokens_checked(planned, source), models, source.config.hidden, free)
    host, card = planned.needs["cpu"], planned.needs["cuda"]
    echo(
        f"memory: about {host.device / 1e9:.1f} GB at the peak on a CPU ({host.step}), and {held / 1e9:.1f} GB of windows while it is checked; {free / 1e9:.1f} GB are free on the host"
    )
    echo(
        f"        with --device cuda {card.device / 1e9:.1f} GB of the GPU, at least {card.least / 1e9:.1f} GB, and {card.host / 1e9:.1f} GB of the host"
    )
    room = shutil.disk_usage(Path.cwd()).free
    echo(f"disk:   {planned.disk:,} bytes while it is built; {room:,} are free here")
