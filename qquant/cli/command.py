"""How commands present themselves: in the order of a release's journey, by whole sentences, each with an example that runs.

qquant --help            every command under its stage (make, judge, use, publish, look), and one example a stage
qquant COMMAND --help    the example of the command, before the exit codes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

COMPLETION = """\b
Shell completion, to put into your shell's startup file:
  bash   eval "$(_QQUANT_COMPLETE=bash_source qquant)"
  zsh    eval "$(_QQUANT_COMPLETE=zsh_source qquant)"
  fish   _QQUANT_COMPLETE=fish_source qquant | source
"""


class Command(click.Command):
    """A command with an example; its arguments are what a user would type after `qquant`."""

    def __init__(self, *arguments: Any, example: str = "", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.example = example

    @property
    def sentence(self) -> str:
        """The first sentence of its help, whole."""
        paragraph = " ".join((self.help or "").split("\n\n")[0].split())
        return paragraph.partition(". ")[0].rstrip(".") + "."

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example, then what every command ends with."""
        if self.example:
            with formatter.section("Example"):
                formatter.write_text(f"\b\nqquant {self.example}")
        super().format_epilog(ctx, formatter)


class Group(Command, click.Group):
    """Commands under one name, such as `qquant recipe`; each is a `Command`."""

    command_class = Command


class Journey(Group):
    """All commands, by the stage at which one needs them."""

    stages: Mapping[str, Sequence[Command]]

    def journey(self, stages: Mapping[str, Sequence[Command]]) -> None:
        """Add the commands of `stages`: title -> commands in the order of their use."""
        self.stages = stages
        for commands in stages.values():
            for command in commands:
                self.add_command(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A section per stage."""
        width = max(len(command.name or "") for commands in self.stages.values() for command in commands)
        for title, commands in self.stages.items():
            with formatter.section(title):
                formatter.write_dl([((command.name or "").ljust(width), command.sentence) for command in commands])
                formatter.write_text(f"\b\n$ qquant {commands[0].example}")


def command(name: str | None = None, *, example: str, epilog: str = "") -> Callable[[Callable[..., Any]], Command]:
    """Decorator: the function as a `Command` with an example."""
    return click.command(name, cls=Command, example=example, epilog=epilog or None)
