"""`qquant report`, `compare`: what earlier builds and checks found, alone, side by side, and one against the other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qquant.cli.command import command
from qquant.cli.options import EXITS, GITHUB, JSON, JUNIT, OutputFile
from qquant.cli.terminal import begins, console, echo, echo_json, show, tell_watchers
from qquant.errors import GateFailedError, InconclusiveError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from qquant.checks.regression import LossChange
    from qquant.report.record import Report


@command("report", epilog=EXITS, example="report release --html report.html")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--html", type=OutputFile(), help="Write the page to this file; default: no page.")
@JUNIT
@GITHUB
@JSON
def show_report(paths: tuple[Path, ...], html: Path | None, junit: Path | None, github: bool, as_json: bool) -> None:
    """Show the report of an earlier build or check again; several releases, or sizes of a family, side by side.

    A PATH is an output folder, or its report.json. With several, --html writes one page for all of them.
    """
    from qquant.report.html import family, render

    reports = _read(paths)
    if html is not None:
        first = next(iter(reports.values()))
        html.write_text(render(first) if len(reports) == 1 else family(reports), "utf-8")
    tell_watchers(list(reports.values()), junit, github)
    if len(reports) == 1:
        show(next(iter(reports.values())), as_json)
    else:
        _show_all(reports, as_json)


def _read(paths: Sequence[Path]) -> dict[str, Report]:
    """Reports by what they go by: their models, or where these are the same, their folders."""
    from qquant.artifact.manifest import REPORT, read_report
    from qquant.report.facts import short_names

    files = {str(path): path / REPORT if path.is_dir() else path for path in paths}
    if len(files) < len(paths):
        raise UsageError("the same path was given twice; give each once")
    by_path = {path: read_report(file) for path, file in files.items()}
    models = [report.model for report in by_path.values()]
    if len(set(models)) == len(models):
        return dict(zip(models, by_path.values(), strict=True))
    short = short_names(list(by_path))
    return {short[path]: report for path, report in by_path.items()}


def _show_all(reports: Mapping[str, Report], as_json: bool) -> None:
    """Print all of them, and raise what the worst one does."""
    if as_json:
        content = {name: json.loads(report.to_json()) for name, report in reports.items()}
        echo_json(json.dumps({"schema": "qquant-reports-1", "reports": content}, indent=2, ensure_ascii=False))
    problems: dict[type[Exception], list[str]] = {}
    for name, report in reports.items():
        try:
            show(report, as_json, quiet=as_json)
        except (GateFailedError, InconclusiveError) as error:
            problems.setdefault(type(error), []).extend(f"{name}: {line}" for line in str(error).splitlines())
    for kind in (GateFailedError, InconclusiveError):
        if kind in problems:
            raise kind("\n".join(problems[kind]))


@command(epilog=EXITS, surplus="qquant report, which shows several", example="compare release-1 release-2")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("now", type=click.Path(path_type=Path))
@JSON
def compare(before: Path, now: Path, as_json: bool) -> None:
    """What changed from one report to another, token by token on the same text; neither model is needed.

    BEFORE and NOW are output folders, or their report.json with the folder evidence/ beside it. Exit status 3: something is
    proven worse.
    """
    begins(f"compare: {now} with {before}")
    from qquant.checks import regression

    changes = regression.compare(before, now)
    if as_json:
        content = {"schema": "qquant-comparison-1", "changes": [vars(change) for change in changes]}
        echo(json.dumps(content, indent=2))
    else:
        screen = console()
        screen.print(changes_table(changes, screen.width))
    worse = [change for change in changes if change.outcome == "worse"]
    if worse:
        raise GateFailedError("\n".join(f"{change.artifact}: {change.loss} is worse" for change in worse))


def changes_table(changes: Sequence[LossChange], width: int) -> Table:
    """One row a loss of an artifact; a narrow one keeps the change and its interval."""
    from qquant.cli.tables import Column, fitted

    columns = [Column("artifact", words=True), Column("loss", words=True), Column("before", spare=3)]
    columns += [Column("now", spare=2), Column("change"), Column("95 % interval", words=True, spare=1)]
    columns += [Column("windows", spare=4), Column("", words=True)]
    rows = [
        (
            change.artifact,
            change.loss,
            f"{change.before:.6f}",
            f"{change.now:.6f}",
            f"{change.now - change.before:+.6f}",
            f"{change.low:+.6f} to {change.high:+.6f}",
            str(change.windows),
            change.outcome,
        )
        for change in changes
    ]
    return fitted(columns, rows, width)
