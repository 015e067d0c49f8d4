"""What a person sees: tables and verdicts on stdout, warnings on stderr; and the signals by which a person ends the work."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from qquant.errors import GateFailedError, InconclusiveError, StoppedError
from qquant.report.escape import in_json, in_line, in_lines, visible

if TYPE_CHECKING:
    from rich.console import Console

    from qquant.report.record import Report


@contextmanager
def unheard() -> Iterator[None]:
    """Meanwhile a reader that goes (`head`, `less`) ends nothing: what it would have read goes nowhere, and the command to its own end."""
    try:
        yield
    except BrokenPipeError:
        to_nobody()


def to_nobody() -> None:
    """Let streams whose reader has gone lead nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def echo(text: str = "", nl: bool = True, err: bool = False) -> None:
    """Print a text without what steers a terminal; as whole lines (`nl`) also without what a workflow's log takes for a command."""
    with unheard():
        click.echo((in_lines if nl else visible)(text), nl=nl, err=err)


def begins(text: str) -> None:
    """Say on stderr what begins. Before torch is imported: on a busy machine that takes minutes, and an empty screen is that of a program which hangs."""
    echo(text, err=True)


def echo_json(content: str) -> None:
    """Print JSON, which stays that; strange characters in its texts as JSON spells them."""
    with unheard():
        click.echo(in_json(content), nl=not content.endswith("\n"))


def tell_watchers(reports: Sequence[Report], junit: Path | None, github: bool) -> None:
    """Tell those who watch the build, before the verdict ends it."""
    from qquant.report import ci

    if junit is not None:
        junit.write_text(ci.junit(*reports), "utf-8")
    for report in reports if github else ():
        echo(ci.commands(report), nl=False, err=True)
        summary = os.environ.get("GITHUB_STEP_SUMMARY")
        if summary:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(ci.github(report))


def counted(number: int, what: str) -> str:
    """1 artifact, 2 artifacts."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def console() -> Console:
    """Stdout as wide as the terminal, or as $COLUMNS says; 140 where nobody says."""
    from rich.console import Console

    class Patient(Console):
        def on_broken_pipe(self) -> None:
            to_nobody()

    return Patient(width=shutil.get_terminal_size((140, 24)).columns)


def show(report: Report, as_json: bool, *, quiet: bool = False) -> None:
    """Print the result unless `quiet`, and raise GateFailedError if something failed."""
    if quiet:
        pass
    elif as_json:
        echo_json(report.to_json())
    else:
        from qquant.cli.tables import table_of
        from qquant.report import behaviour, slices

        screen = console()
        screen.print(table_of(report, screen.width))
        for view in (slices, behaviour):
            for line in filter(None, map(view.line, report.artifacts)):
                echo(line)
        for warning in report.warnings:
            echo(f"warning: {in_line(warning)}", err=True)
        for artifact in report.artifacts:
            if artifact.verdict.waiver:
                echo(f"warning: {in_line(artifact.name)}: {in_line(artifact.verdict.waiver)}", err=True)
    errors = {"fail": GateFailedError, "inconclusive": InconclusiveError}
    if report.outcome in errors:
        lines = [
            f"{in_line(artifact.name)}: {in_line(reason)}"
            for artifact in report.artifacts
            if artifact.verdict.outcome in errors
            for reason in artifact.verdict.reasons
        ]
        raise errors[report.outcome]("\n".join(lines))


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """The first SIGINT, SIGTERM or SIGHUP lets the block at hand be finished, the second ends the build where it is.

    Either way what is journalled is kept, and the exit status is 75.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.speaks = speaks
        self.asked = ""  # the name of the signal
        self.ended = False  # the error is on its way
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` asks
                self.before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: object) -> None:
        name = signal.Signals(number).name
        if self.ended:
            return
        if self.asked:
            self.ended = True
            raise StoppedError(f"stopped at once by {name}")
        self.asked = name
        clear = "\r\x1b[2K" if os.isatty(2) else ""  # the live line, which is drawn again below
        if self.speaks:
            os.write(2, f"{clear}{name}: stopping after this block; once more to stop at once\n".encode())

    def check(self) -> None:
        """Raise StoppedError if a signal came."""
        if self.asked:
            self.ended = True
            raise StoppedError(f"stopped by {self.asked}")
