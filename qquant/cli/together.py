"""A command on several ranks (`torchrun -m qquant build ...`): one voice, a device for each, one end.

Tables, progress and errors are the first rank's. Another one speaks only where it alone knows what went wrong, and then says who it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from qquant import devices
from qquant.cli.display import Display
from qquant.cli.terminal import Stop
from qquant.errors import GateFailedError, InconclusiveError, QQuantError, ShortMemoryError, StoppedError, UsageError
from qquant.progress import Progress
from qquant.ranks import ALONE, Membership, Ranks, join, watched
from qquant.report.escape import in_lines

if TYPE_CHECKING:
    import torch

COMMANDS = ("build", "check", "doctor")
AGAIN = "What is finished is kept; the same command continues, on as many ranks as you like"


@contextmanager
def joined(environment: Mapping[str, str], arguments: Sequence[str]) -> Iterator[Ranks]:
    """This process among the ranks that a launcher says it is one of; one alone without a launcher.

    Raises:
        UsageError: the command is not one for several.
    """
    member = Membership.of(environment)
    if member is None:
        yield ALONE
        return
    if not set(arguments[:1]) <= {*COMMANDS, "-h", "--help"}:
        if member.rank:
            sys.exit(UsageError.exit_code)
        raise UsageError(
            f"{arguments[0]}: is not for several ranks; run it without a launcher. {', '.join(COMMANDS)} are"
        )
    ranks = join(member)
    devices.share_host(member.beside)
    with ExitStack() as quiet, watched(ranks, lost):
        if not ranks.first:
            nowhere = quiet.enter_context(Path(os.devnull).open("w"))
            quiet.enter_context(redirect_stdout(nowhere))
            quiet.enter_context(redirect_stderr(nowhere))
        yield ranks


def lost(message: str, status: int) -> NoReturn:
    """End this process at once, whatever it does: what it journalled is kept."""
    if message:
        os.write(2, f"error: {in_lines(message)}. {AGAIN}\n".encode())
    os._exit(status)


def told(error: BaseException, message: str, ranks: Ranks) -> int | None:
    """The exit status of all ranks, one of which has told `error`; None where there is one rank, which has to."""
    if ranks.world == 1:
        return None
    status = error.exit_code if isinstance(error, QQuantError) else StoppedError.exit_code
    if isinstance(error, GateFailedError | InconclusiveError):  # which all have heard of
        return None if ranks.first else status
    if isinstance(error, MemoryError | RuntimeError | ShortMemoryError):
        status, message = StoppedError.exit_code, f"{message}. {AGAIN}"
    if isinstance(error, StoppedError | KeyboardInterrupt):
        message = f"{ranks.lost() or message}. {AGAIN}"
    if ranks.ends(message, status):
        named = ranks.first or message.startswith("rank ")
        who = "" if named else f"rank {ranks.rank} ({ranks.where(ranks.rank)}): "
        os.write(2, f"error: {who}{in_lines(message)}\n".encode())
    return status


def ranks_here() -> Ranks:
    """The ranks of the command that runs; one alone where none does."""
    context = click.get_current_context(silent=True)
    ranks = context.find_object(Ranks) if context else None
    return ranks or ALONE


def device_of(name: str, ranks: Ranks) -> torch.device:
    """The device that a user named; of several ranks each has a GPU of its own while there are any left."""
    import torch

    if ranks.world == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return devices.named(name)
    device = devices.named(f"cuda:{ranks.member.local % torch.cuda.device_count()}")
    torch.cuda.set_device(device)
    torch.set_num_threads(
        max(torch.get_num_threads(), devices.cores())
    )  # launchers ask for one; bytes depend on no host's
    return device


@dataclass
class Signing:
    """Progress that tells other ranks that work goes on; shown by the first one alone."""

    shown: Progress
    ranks: Ranks

    def advance(self, phase: str, done: int, of: int) -> None:
        """Show how far the work is; raise where another rank ended."""
        self.ranks.alive()
        self.shown.advance(phase, done, of)

    def at(self, what: str) -> None:
        """Tell other ranks that work goes on, and show what."""
        self.ranks.alive()
        self.shown.at(what)

    def check_stop(self) -> None:
        """Raise StoppedError if a signal came."""
        self.ranks.alive()
        self.shown.check_stop()


@contextmanager
def working(ranks: Ranks, log: Path | None, stop: Stop | None = None) -> Iterator[Progress]:
    """Progress that people see, of the first rank."""
    with Display(stop, log if ranks.first else None) as display:
        yield display if ranks.world == 1 else Signing(display, ranks)
