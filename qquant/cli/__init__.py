"""The command line: the only place that prints. stdout carries the result, stderr progress and errors.

Heavy modules are imported by the commands that need them, so that `--help` and `plan` answer at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

import click

from qquant import __version__
from qquant.cli import together
from qquant.cli.build import build
from qquant.cli.check import bisect, check, perplexity
from qquant.cli.command import COMPLETION, Journey
from qquant.cli.dequantize import dequantize
from qquant.cli.look import doctor, inspect, verify
from qquant.cli.options import EXITS
from qquant.cli.plan import plan
from qquant.cli.publish import matrix, patch, publish, sign
from qquant.cli.recipes import recipes
from qquant.cli.reports import compare, show_report
from qquant.cli.run import run
from qquant.cli.speed import speed
from qquant.cli.spinning import give_way
from qquant.cli.tasks import tasks
from qquant.cli.terminal import SIGNALS, echo
from qquant.errors import EnvironmentMissingError, QQuantError, StoppedError, UsageError
from qquant.ranks import ALONE, Ranks
from qquant.report.escape import in_lines


@click.group(
    cls=Journey,
    invoke_without_command=True,
    epilog=COMPLETION + "\n" + EXITS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
)
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """Quantize a Qwen1.5 checkpoint once into GPTQ, AWQ and GGUF, and check every artifact against it."""
    if context.invoked_subcommand is None:
        echo(context.get_help())


cli.journey(
    {
        "Make": (build, plan, recipes, dequantize, doctor),
        "Judge": (check, compare, bisect, speed, perplexity, tasks),
        "Use": (run,),
        "Publish": (publish, matrix, verify, sign, patch),
        "Look": (inspect, show_report),
    }
)


def _bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    echo(f"error: this is a bug in qquant {__version__}; please report the lines above", err=True)


class SignalInterrupt(KeyboardInterrupt):
    """A signal asks for the end. Python ends with 130 whatever becomes of a plain KeyboardInterrupt in `exec` of a text (importing dataclasses)."""


def _terminated(*_: object) -> NoReturn:
    raise SignalInterrupt


def _deaf() -> None:
    """Hear no more signals: the process is about to end as the first one asked."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _require_utf8(arguments: Sequence[str]) -> None:
    for argument in arguments:
        if "\0" in argument or argument.encode("utf-8", "replace").decode() != argument:
            raise UsageError(
                f"{argument!r}: is not UTF-8, or holds a NUL. Rename the file or folder, or go by another path"
            )


def _is_out_of_memory(error: RuntimeError) -> bool:
    from qquant.solve.stream import is_out_of_memory

    return is_out_of_memory(error)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; every error that a user can cause becomes one message and an exit status."""
    sys.excepthook = _bug
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` asks
            signal.signal(number, _terminated)
    words = list(sys.argv[1:] if arguments is None else arguments)
    give_way(os.environ)
    try:
        with together.joined(os.environ, words) as ranks:
            status = _run(words, ranks)
            if ranks.world > 1:
                _deaf()  # the launcher ends all when one has ended
    except (KeyboardInterrupt, StoppedError) as error:  # a signal while the first one was being told
        _deaf()
        status = _stopped(error, words)
    except UsageError as error:
        status = _refused(error)
    sys.exit(status)


def _run(arguments: Sequence[str], ranks: Ranks = ALONE) -> int:
    try:
        _require_utf8(arguments)
        result: Any = cli.main(args=list(arguments), prog_name="qquant", standalone_mode=False, obj=ranks)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt, StoppedError) as error:
        _deaf()
        told = together.told(error, str(error) or "stopped", ranks)
        return _stopped(error, arguments) if told is None else told
    except QQuantError as error:
        told = together.told(error, str(error), ranks)
        return _refused(error) if told is None else told
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        told = together.told(error, "out of memory", ranks)
        if told is not None:
            return told
        echo("error: out of memory; see `qquant plan` for what a build needs", err=True)
        return EnvironmentMissingError.exit_code


def _refused(error: QQuantError) -> int:
    echo(f"error: {in_lines(str(error))}", err=True)
    return error.exit_code


def _stopped(error: BaseException, arguments: Sequence[str]) -> int:
    echo(f"{str(error) or 'stopped'}\ncontinue with: {shlex.join(['qquant', *arguments])}", err=True)
    return StoppedError.exit_code
