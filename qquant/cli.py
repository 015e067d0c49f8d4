"""The command line: the only place that prints. stdout carries the result, stderr progress and errors.

Heavy modules are imported by the commands that need them, so that `--help` and `plan` answer at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import click

from qquant import __version__
from qquant.errors import EnvironmentMissingError, GateFailedError, InconclusiveError, QQuantError, UsageError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from qquant.checkpoint import Checkpoint
    from qquant.formats.imatrix import Imatrix
    from qquant.recipe import Recipe
    from qquant.report import Report

EXITS = """\b
Exit status: 0 every gate passed, 2 usage or recipe, 3 a gate failed, 4 a gate is undecided, 5 input rejected, 6 environment (disk, memory, hub),
7 numerical, 8 not published, 9 output locked, 1 a bug.
"""
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
JUNIT = click.option(
    "--junit", type=click.Path(path_type=Path, dir_okay=False), help="Write the verdicts as JUnit XML."
)
GITHUB = click.option(
    "--github", is_flag=True, help="Print workflow annotations, and add to the step summary ($GITHUB_STEP_SUMMARY)."
)
DEVICE = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, or auto.")


@click.group(epilog=EXITS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Quantize a Qwen1.5 checkpoint once into GPTQ, AWQ and GGUF, and check every artifact against it."""


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """What to build from what: shared by `build` and `plan`."""
    for option in (
        click.argument("checkpoint", required=False),
        click.option(
            "--recipe", "recipe_name", required=True, help="A bundled recipe (`qquant recipe list`) or a YAML file."
        ),
        click.option("--only", multiple=True, metavar="ARTIFACT", help="Build these artifacts only; may be repeated."),
        click.option(
            "--adapter", type=click.Path(path_type=Path, file_okay=False), help="A PEFT LoRA folder to merge first."
        ),
        click.option("--revision", help="Branch, tag or commit of a hub checkpoint."),
        click.option("--name", help="Name of the model in folder and file names; default: the checkpoint's."),
        click.option(
            "--imatrix",
            type=click.Path(path_type=Path, dir_okay=False),
            help="An importance matrix for GGUF files (.gguf or .dat).",
        ),
    ):
        command = option(command)
    return command


def _open(
    recipe_name: str, checkpoint: str | None, revision: str | None, adapter: Path | None
) -> tuple[Recipe, Checkpoint]:
    from qquant import recipe
    from qquant.checkpoint import Checkpoint
    from qquant.padding import padded

    loaded = recipe.load(recipe_name)
    reference = checkpoint or loaded.checkpoint
    if reference is None:
        raise UsageError(
            f"recipe {loaded.name} names no checkpoint; give one: qquant build CHECKPOINT --recipe {recipe_name}"
        )
    return loaded, padded(Checkpoint.open(reference, revision or loaded.revision, adapter), loaded)


def _given(path: Path | None, checkpoint: Checkpoint) -> Imatrix | None:
    if path is None:
        return None
    from qquant.formats import imatrix
    from qquant.moments import require_fit

    found = imatrix.read(path)
    require_fit(found, checkpoint, path)
    return found


@cli.command(epilog=EXITS)
@source_options
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Output folder; new, empty, or of an earlier run."
)
@JUNIT
@GITHUB
@DEVICE
@JSON
def build(
    checkpoint: str | None, recipe_name: str, only: tuple[str, ...], adapter: Path | None, revision: str | None,
    name: str | None, imatrix: Path | None, out: Path, junit: Path | None, github: bool, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Build every artifact of a recipe from CHECKPOINT (a folder, or a hub id), and check each one.

    The same command continues an interrupted build.
    """
    from qquant.plan import Plan

    loaded, source = _open(recipe_name, checkpoint, revision, adapter)
    plan = Plan.of(loaded, source, only, name, _given(imatrix, source))
    plan.require_room(out)
    from qquant import pipeline

    began = time.monotonic()
    with Progress() as progress:
        report = pipeline.build(loaded, source, plan, out, _device(device), progress)
    _note_source(source, checkpoint or loaded.checkpoint or "", out)
    if not as_json:
        click.echo(f"{len(plan.artifacts)} artifacts in {time.monotonic() - began:.0f} s: {out}", err=True)
    _watched(report, junit, github)
    _show(report, as_json)


@cli.command()
@source_options
@click.option("--tensors", is_flag=True, help="Also print what every tensor is stored as.")
@JSON
def plan(
    checkpoint: str | None, recipe_name: str, only: tuple[str, ...], adapter: Path | None, revision: str | None,
    name: str | None, imatrix: Path | None, tensors: bool, as_json: bool,
) -> None:  # fmt: skip
    """Print every output file with its exact size, the memory and disk a build needs, and every tensor's type."""
    from qquant.plan import Plan

    loaded, source = _open(recipe_name, checkpoint, revision, adapter)
    planned = Plan.of(loaded, source, only, name, _given(imatrix, source))
    if as_json:
        click.echo(json.dumps(planned.to_dict(), indent=2))
        return
    for artifact in planned.artifacts:
        click.echo(f"{artifact.name}: {artifact.size:,} bytes, {artifact.bits_per_weight:.2f} bits per weight")
        for file in artifact.files:
            click.echo(f"  {file.size:>16,}  {artifact.folder}/{file.name}")
        if artifact.fallbacks:
            click.echo(
                f"  {len(artifact.fallbacks)} tensors cannot have the type of the mix, e.g. {artifact.fallbacks[0]}"
            )
        types: dict[str, list[str]] = {}
        for tensor, kind in artifact.grids.items():
            types.setdefault(kind, []).append(tensor)
        for kind, members in types.items():
            click.echo(f"  {kind}: {len(members)} tensors")
            for tensor in members if tensors else ():
                click.echo(f"    {tensor}")
    click.echo(f"memory: about {planned.memory / 1e9:.1f} GB; disk: {planned.disk:,} bytes")


@cli.command(epilog=EXITS)
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--against", required=True, help="The 16-bit checkpoint it was made from: a folder, or a hub id.")
@click.option(
    "--text", default="bundled:wikitext-2-test", show_default=True, help="Held-out text: bundled:NAME or a file."
)
@click.option("--also", multiple=True, metavar="TEXT", help="A further text, measured and not gated; may be repeated.")
@click.option("--windows", default=40, show_default=True, help="Windows of text.")
@click.option("--max-windows", type=int, help="Read on up to so many where a gate is inconclusive.")
@click.option("--length", default=512, show_default=True, help="Tokens per window.")
@click.option(
    "--protocol",
    type=click.Choice(["llama.cpp", "sliding"]),
    default="llama.cpp",
    show_default=True,
    help="Score the second half of each window, or all of it (GPTQ papers: --length 2048).",
)
@click.option("--max-perplexity-ratio", default=1.1, show_default=True, help="Fail above this ratio to the checkpoint.")
@click.option("--max-kl", type=float, help="Fail above this mean KL divergence (nats per token).")
@click.option("--min-top1", type=float, help="Fail below this top-1 agreement (0 to 1).")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Keep report and evidence in this folder."
)
@JUNIT
@GITHUB
@DEVICE
@JSON
def check(
    artifacts: tuple[Path, ...], against: str, text: str, also: tuple[str, ...], windows: int, max_windows: int | None,
    length: int, protocol: Any, max_perplexity_ratio: float, max_kl: float | None, min_top1: float | None,
    out: Path | None, junit: Path | None, github: bool, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Compare artifacts made by any tool (GPTQ or AWQ folders, GGUF files) with the checkpoint they came from."""
    from pydantic import ValidationError

    from qquant import pipeline
    from qquant.checkpoint import Checkpoint
    from qquant.recipe import Checks, Gates

    try:
        checks = Checks(
            text=text, texts=also, windows=windows, max_windows=max_windows, length=length, protocol=protocol
        )
        gates = Gates(perplexity_ratio=max_perplexity_ratio, kl_divergence=max_kl, top1_agreement=min_top1)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--{'-'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}") from None
    source = Checkpoint.open(against)
    with Progress() as progress:
        report = pipeline.check(artifacts, source, checks, gates, _device(device), progress, out)
    _watched(report, junit, github)
    _show(report, as_json)


@cli.command(epilog=EXITS)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--against", required=True, help="The 16-bit checkpoint it was made from: a folder, or a hub id.")
@click.option("--max-kl", required=True, type=float, help="The mean KL divergence to reach (nats per token).")
@click.option(
    "--text", default="bundled:wikitext-2-test", show_default=True, help="Held-out text: bundled:NAME or a file."
)
@click.option("--windows", default=8, show_default=True, help="Windows of text.")
@click.option("--length", default=256, show_default=True, help="Tokens per window.")
@DEVICE
@JSON
def bisect(
    artifact: Path, against: str, max_kl: float, text: str, windows: int, length: int, device: str, as_json: bool
) -> None:
    """Find which linears carry the loss, and the smallest set that would reach --max-kl if it stayed in 16 bits.

    Linears that share an input are one; an AWQ artifact is searched by blocks, since its scales are folded between linears.
    """
    from qquant import pipeline
    from qquant.checkpoint import Checkpoint
    from qquant.recipe import Checks

    source = Checkpoint.open(against)
    checks = Checks(text=text, windows=windows, length=length)
    with Progress() as progress:
        found = pipeline.bisect(artifact, source, checks, max_kl, _device(device), progress)
    chosen = [part.name for part in found.chosen]
    if as_json:
        gains = [{"name": part.name, "parameters": part.size, "gain": gain} for part, gain in found.gains]
        content = {"schema": "qquant-bisection-1", "kl_divergence": found.kl, "limit": found.limit, "gains": gains}
        click.echo(json.dumps(content | {"restored": chosen, "kl_restored": found.kl_chosen}, indent=2))
    else:
        from rich.table import Table

        table = Table("in 16 bits", "parameters", "KL divergence less", "of all")
        for part, gain in found.gains[:12]:
            table.add_row(part.name, f"{part.size:,}", f"{gain:+.6f}", f"{gain / found.kl:.1%}" if found.kl else "")
        _console().print(table)
        if not chosen:
            click.echo(f"mean KL divergence {found.kl:.6f} is within {max_kl:g} as it is")
        else:
            click.echo(f"mean KL divergence {found.kl:.6f}; {found.kl_chosen:.6f} with these in 16 bits:")
            click.echo("\n".join(f"  {name}" for name in chosen))
    if found.kl_chosen > max_kl:
        raise GateFailedError(f"{artifact}: {found.kl_chosen:.6f} with every linear in 16 bits; the loss is elsewhere")


@cli.command("report", epilog=EXITS)
@click.argument("place", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the page to this file.")
@JUNIT
@GITHUB
@JSON
def show_report(place: Path, html: Path | None, junit: Path | None, github: bool, as_json: bool) -> None:
    """Show the report of an earlier build or check again: an output folder, or its report.json."""
    from qquant import report_html
    from qquant.checkpoint import read_json
    from qquant.report import Report

    report = Report.from_json(read_json(place / "report.json" if place.is_dir() else place))
    if html is not None:
        html.write_text(report_html.render(report), "utf-8")
    _watched(report, junit, github)
    _show(report, as_json)


@cli.command(epilog=EXITS)
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("now", type=click.Path(path_type=Path))
@JSON
def compare(before: Path, now: Path, as_json: bool) -> None:
    """What changed from one report to another, token by token on the same text; neither model is needed.

    BEFORE and NOW are output folders, or their report.json with the folder evidence/ beside it. Exit status 3: something is
    proven worse.
    """
    from qquant.checks import regression

    changes = regression.compare(before, now)
    if as_json:
        content = {"schema": "qquant-comparison-1", "changes": [vars(change) for change in changes]}
        click.echo(json.dumps(content, indent=2))
    else:
        from rich.table import Table

        table = Table("artifact", "loss", "before", "now", "change", "95 % interval", "windows", "")
        for change in changes:
            numbers = f"{change.before:.6f}", f"{change.now:.6f}", f"{change.now - change.before:+.6f}"
            between = f"{change.low:+.6f} to {change.high:+.6f}"
            table.add_row(change.artifact, change.loss, *numbers, between, str(change.windows), change.outcome)
        _console().print(table)
    worse = [change for change in changes if change.outcome == "worse"]
    if worse:
        raise GateFailedError("\n".join(f"{change.artifact}: {change.loss} is worse" for change in worse))


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@JSON
def inspect(path: Path, as_json: bool) -> None:
    """Show what a checkpoint, an artifact folder or a GGUF file holds; reads headers only."""
    from qquant.inspection import describe

    content = describe(path)
    if as_json:
        click.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))
        return
    for key, value in content["facts"].items():
        click.echo(f"{key}: {value}")
    for tensor in content["tensors"]:
        click.echo(f"{tensor['bytes']:>14,}  {tensor['type']:<6} {tensor['shape']!s:<18} {tensor['name']}")


def _note_source(source: Checkpoint, reference: str, out: Path) -> None:
    """Keep what `publish` needs to know of the checkpoint."""
    from qquant import provenance
    from qquant.output import write_synced

    write_synced(out / provenance.SOURCE, provenance.as_json(provenance.source_facts(source, reference)))


@cli.command(epilog=EXITS)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["hf", "modelscope", "dir"]), default="hf", show_default=True)
@click.option("--namespace", default="", help="User or organisation that will own the repositories.")
@click.option("--out", type=click.Path(path_type=Path), help="With --to dir: where the release folders go.")
@click.option("--only", multiple=True, metavar="ARTIFACT", help="Publish these artifacts only; may be repeated.")
@click.option("--tag", default="v1", show_default=True, help="Tag of the release; never moved once it is set.")
@click.option("--base-model", help="Hub id of the checkpoint, where the build had a local folder.")
@click.option("--collection", help="Title of a collection that gets every repository.")
@click.option("--private", is_flag=True, help="Create repositories that only the namespace can read.")
@click.option("--pr", is_flag=True, help="Stage on a pull request, and merge it once it is verified.")
@click.option("--no-merge", is_flag=True, help="With --pr: leave the verified pull request open.")
@click.option("--endpoint", help="Another hub than huggingface.co.")
@click.option("--dry-run", is_flag=True, help="Look and say what would be uploaded; change nothing.")
@JSON
def publish(
    folder: Path, to: str, namespace: str, out: Path | None, only: tuple[str, ...], tag: str, base_model: str | None,
    collection: str | None, private: bool, pr: bool, no_merge: bool, endpoint: str | None, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Publish what passed: FOLDER is the output of `qquant build`; one repository per artifact folder.

    A repository changes in one step from what it was to the whole release, after every byte was staged, downloaded again and
    compared. The same command continues an interrupted one.
    """
    from qquant import card, hub, provenance

    if to == "dir" and out is None:
        raise UsageError("--to dir needs --out FOLDER")
    if to != "dir" and not namespace:
        raise UsageError(f"--to {to} needs --namespace USER_OR_ORGANISATION")
    release = provenance.read_release(folder, only)
    for name, reason in release.refused.items():
        click.echo(f"not published: {name}: {reason}", err=True)
    facts = {"tag": tag, "namespace": namespace or None, "base_model": base_model}
    repositories = [
        provenance.with_statements(card.with_card(provenance.complete(repository, facts)))
        for repository in release.repositories
    ]
    request = hub.Request(namespace, tag, private, pr, not no_merge, collection, dry_run)
    done = hub.destination(to, out, endpoint, lambda text: click.echo(text, err=True)).publish(repositories, request)
    if as_json:
        click.echo(
            json.dumps({"schema": "qquant-published-1", "repositories": [vars(result) for result in done]}, indent=2)
        )
        return
    for result in done:
        click.echo(f"{result.state}: {result.repository} {result.revision or ''} ({len(result.uploaded)} files)")


@cli.command(epilog=EXITS)
@click.argument("setting")
@click.option("--repos", multiple=True, required=True, metavar="OWNER/PATTERN", help="Repositories, with * and ?.")
@click.option("--endpoint", help="Another hub than huggingface.co.")
@click.option("--dry-run", is_flag=True, help="Show the changes and make none.")
@click.option("--yes", is_flag=True, help="Make them without a question.")
def patch(setting: str, repos: tuple[str, ...], endpoint: str | None, dry_run: bool, yes: bool) -> None:
    """Change one setting (FILE.json:KEY=VALUE) in all repositories of a family, one commit each.

    Every change is shown as a diff first; without --yes it is asked for.
    """
    from qquant import hub

    if not (dry_run or yes or sys.stdin.isatty()):
        raise UsageError("patch asks before it changes anything, and there is nobody to ask; give --yes or --dry-run")

    def show(change: hub.Change) -> bool:
        click.echo(change.diff or f"{change.repository}: has it already")
        return not dry_run and bool(change.diff) and (yes or click.confirm(f"Change {change.repository}?", err=True))

    client = hub.HuggingFace.connect(endpoint, lambda text: click.echo(text, err=True))
    changes = hub.patch(client, hub.Setting.parse(setting), repos, show)
    made = [change for change in changes if change.commit]
    click.echo(f"{len(made)} of {len(changes)} repositories changed", err=True)


@cli.command(epilog=EXITS)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Private key (PEM, elliptic curve); default: Sigstore.",
)
def sign(folders: tuple[Path, ...], key: Path | None) -> None:
    """Sign release FOLDERS (of `publish --to dir`): model.sig, which `model_signing verify` checks."""
    from qquant import provenance

    for folder in folders:
        click.echo(provenance.sign(folder, key))


@cli.command(epilog=EXITS)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--card", "with_card", is_flag=True, help="Also compare README.md with report.json and the manifest.")
def verify(folders: tuple[Path, ...], with_card: bool) -> None:
    """Compare the files of artifact or release FOLDERS with their manifest, byte by byte."""
    from qquant import card, provenance
    from qquant.errors import InputError

    found = []
    for folder in folders:
        click.echo(f"{folder}: {provenance.verify(folder):,} bytes as the manifest says")
        found += card.problems(folder) if with_card else []
    if found:
        raise InputError("\n".join(found))
    if with_card:
        click.echo(f"{len(folders)} cards agree with their reports")


@cli.command()
@click.argument("matrix", type=click.Path(path_type=Path))
@click.option("--shard", metavar="I/N", help="Only part I of N of the cells.")
@click.option("--github-matrix", is_flag=True, help="Print the jobs as `strategy.matrix` of GitHub Actions takes them.")
@JSON
def matrix(matrix: Path, shard: str | None, github_matrix: bool, as_json: bool) -> None:
    """Plan a release: the checkpoints of a MATRIX file times the artifacts of their recipes.

    Sizes, repositories, licences, fallbacks and tensor-parallel sizes before and after padding, from headers alone.
    """
    from qquant import release

    jobs = release.plan(release.shard(release.load(matrix), shard))
    broken = [f"{job.model}: {job.problem}" for job in jobs if job.plan is None]
    if github_matrix:
        click.echo(json.dumps(release.github_matrix(jobs)))
    elif as_json:
        click.echo(json.dumps(release.to_dict(jobs), indent=2))
    else:
        for job in jobs:
            click.echo("\n".join(release.lines(job)))
        total = sum(job.plan.disk for job in jobs if job.plan)
        click.echo(f"{len(jobs)} jobs, {total:,} bytes of disk in all")
    if broken:
        raise UsageError("\n".join(broken))


@cli.group("recipe")
def recipes() -> None:
    """List, show and validate recipes."""


@recipes.command("list")
def list_recipes() -> None:
    """Names and descriptions of the bundled recipes."""
    from qquant import recipe

    for name in recipe.names():
        click.echo(f"{name:<20} {recipe.load(name).description}")


@recipes.command("show")
@click.argument("name")
def show_recipe(name: str) -> None:
    """A recipe with every default written out, as YAML."""
    from qquant import recipe

    click.echo(recipe.dump(recipe.load(name)), nl=False)


@recipes.command("validate")
@click.argument("files", nargs=-1, required=True)
def validate_recipes(files: tuple[str, ...]) -> None:
    """Check recipes; every problem of every file is reported at once."""
    from qquant import recipe

    problems = []
    for file in files:
        try:
            recipe.load(file)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    click.echo(f"{len(files)} valid")


@recipes.command("schema")
def recipe_schema() -> None:
    """The JSON schema of recipes, for editors."""
    from qquant import recipe

    click.echo(json.dumps(recipe.schema(), indent=2))


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: not a device; give cpu, cuda, cuda:1, or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentMissingError(
            f"--device {name}: this torch ({torch.__version__}) sees no CUDA device. Use --device cpu"
        )
    return device


def _watched(report: Report, junit: Path | None, github: bool) -> None:
    """Tell those who watch the build, before the verdict ends it."""
    from qquant.checks import ci

    if junit is not None:
        junit.write_text(ci.junit(report), "utf-8")
    if github:
        click.echo(ci.commands(report), nl=False, err=True)
        summary = os.environ.get("GITHUB_STEP_SUMMARY")
        if summary:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(ci.github(report))


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def _show(report: Report, as_json: bool) -> None:
    """Print the result, and raise GateFailedError if something failed."""
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        from rich.table import Table

        from qquant.report import COLUMNS

        table = Table(title=f"{report.model} · {report.recipe}")
        for column in COLUMNS:
            table.add_column(
                column, justify="left" if column in ("artifact", "verdict") else "right", no_wrap=column == "artifact"
            )
        colours = {"pass": "green", "waived": "yellow", "inconclusive": "bold yellow", "fail": "bold red"}
        for row in report.rows():
            verdict = row[-1]
            table.add_row(*row[:-1], f"[{colours[verdict]}]{verdict}" if verdict else "")
        _console().print(table)
        for warning in report.warnings:
            click.echo(f"warning: {warning}", err=True)
        for artifact in report.artifacts:
            if artifact.verdict.waiver:
                click.echo(f"warning: {artifact.name}: {artifact.verdict.waiver}", err=True)
    errors = {"fail": GateFailedError, "inconclusive": InconclusiveError}
    if report.outcome in errors:
        lines = [
            f"{artifact.name}: {reason}"
            for artifact in report.artifacts
            if artifact.verdict.outcome in errors
            for reason in artifact.verdict.reasons
        ]
        raise errors[report.outcome]("\n".join(lines))


class Progress:
    """A bar with an estimate on a terminal, one line per block otherwise; on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bars

        self.bars = Bars(console=Console(stderr=True)) if sys.stderr.isatty() else None
        self.tasks: dict[str, Any] = {}
        self.began: dict[str, float] = {}
        self.last = time.monotonic()

    def __call__(self, what: str, done: int, of: int) -> None:
        """Block `done` of `of` of phase `what` is done."""
        now = time.monotonic()
        began = self.began.setdefault(what, self.last)
        self.last = now
        if self.bars is None:
            left = (now - began) / done * (of - done)
            click.echo(f"{what}: block {done} of {of}, {now - began:.0f} s, about {left:.0f} s left", err=True)
            return
        if what not in self.tasks:
            self.bars.start()
            self.tasks[what] = self.bars.add_task(what, total=of)
        self.bars.update(self.tasks[what], completed=done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()


def _bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    click.echo(f"error: this is a bug in qquant {__version__}; please report the lines above", err=True)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; every error that a user can cause becomes one message and an exit status."""
    sys.excepthook = _bug
    try:
        result: Any = cli.main(args=arguments, prog_name="qquant", standalone_mode=False)
        status = result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped; the same command continues", err=True)
        status = 75
    except QQuantError as error:
        click.echo(f"error: {error}", err=True)
        status = error.exit_code
    except BrokenPipeError:
        status = 0
    except MemoryError:
        click.echo("error: out of memory; see `qquant plan` for what a build needs", err=True)
        status = 6
    sys.exit(status)


if __name__ == "__main__":
    main()
