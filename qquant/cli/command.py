"""How commands present themselves: in the order of a release's journey, by whole sentences, each with an example that runs.

qquant --help            every command under its stage (make, judge, use, publish, look), and one example a stage
qquant COMMAND --help    the example of the command, before the exit codes

What somebody types first, by the habit of another tool, is answered with the word that it has here: a command, an option, an option for what
was given as one more argument. What is missing is answered with what it is, and the example.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

COMPLETION = """\b
Shell completion, to put into your shell's startup file:
  bash   eval "$(_QQUANT_COMPLETE=bash_source qquant)"
  zsh    eval "$(_QQUANT_COMPLETE=zsh_source qquant)"
  fish   _QQUANT_COMPLETE=fish_source qquant | source
"""


COMMANDS = {
    "build": "quantize convert export make merge",
    "check": "eval evaluate test",
    "inspect": "info dump",
    "run": "chat generate ask serve",
    "publish": "upload push release",
    "speed": "bench benchmark",
    "perplexity": "ppl",
    "compare": "diff",
    "recipe list": "list recipes",
    "recipe init": "init new",
    "recipe validate": "validate",
}
OPTIONS = {
    "--out": "-o --output --output-dir --out-dir --save-path",
    "--against": "--base --baseline --reference --original",
    "--calibration": "--dataset --calib --calib-data",
    "--type": "--qtype --outtype --quant-type",
    "--max-new-tokens": "-n --max-tokens --n-predict",
    "--set calibration.samples=N": "--samples --nsamples --num-samples",
    "--set calibration.length=N": "--seqlen --seq-len",
}
ARGUMENTS = {
    "checkpoint": "-m --model --model-path --hf-path --checkpoint",
    "artifact": "-m --model --model-path --artifact",
    "artifacts": "-m --model --model-path --artifact",
    "prompt": "-p --prompt",
}  # given by their place


MAY_BE_EMPTY = ("system",)  # options: a system turn without a word
VERBS = ("build", "plan", "inspect", "check", "run")  # what can be done with a model


def _meant(word: str, words: Mapping[str, str]) -> str | None:
    """What `word` is called here."""
    return next((name for name, others in words.items() if word in others.split()), None)


class Command(click.Command):
    """A command with an example; its arguments are what a user would type after `qquant`.

    `surplus` is what one argument too many was probably meant for, such as "--recipe {}".
    """

    def __init__(self, *arguments: Any, example: str = "", surplus: str = "", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.example = example
        self.surplus = surplus

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """What click does; a mistake is answered with what was meant."""
        try:
            rest = super().parse_args(ctx, list(args))
            self._require_words(ctx, args)
            return rest
        except click.NoSuchOption as error:
            meant = self._option(error.option_name)
            if meant:
                raise click.UsageError(f"{error.message} {meant}", ctx) from None
            raise
        except click.MissingParameter as error:
            raise click.MissingParameter(self._missing(ctx, args, error.param), ctx, error.param) from None
        except click.UsageError as error:
            if type(error) is not click.UsageError:
                raise
            raise click.UsageError(f"{error.message}{self._surplus(ctx, args)}", ctx) from None

    def _require_words(self, ctx: click.Context, args: list[str]) -> None:
        """Refuse an option with an empty value, as a variable that is not set gives it: it was as if it had not been given, or the folder one is in."""
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        for option in self.params:
            value = given.get(option.name)
            values = value if option.multiple else [value]
            if isinstance(option, click.Option) and option.name not in MAY_BE_EMPTY and "" in (values or ()):
                raise click.BadParameter("it is empty; give a value, or leave the option out", ctx, option)

    def _option(self, typed: str) -> str:
        """What an option of another tool is here; nothing where none is like it."""
        known = {option for parameter in self.params for option in parameter.opts}
        option = _meant(typed, {name: others for name, others in OPTIONS.items() if name.split()[0] in known})
        argument = _meant(typed, {name: others for name, others in ARGUMENTS.items() if name in known})
        if option:
            return f"Did you mean {option}?"
        return f"{argument.upper()} is given without an option: qquant {self.example}" if argument else ""

    def _surplus(self, ctx: click.Context, args: list[str]) -> str:
        """What one argument too many was meant for."""
        _, rest, _ = self.make_parser(ctx).parse_args(args=list(args))
        return f". Did you mean {self.surplus.format(shlex.join(rest))}?" if rest and self.surplus else ""

    def _missing(self, ctx: click.Context, args: list[str], missing: click.Parameter | None) -> str:
        """What a missing parameter is, and where it was probably given as an argument."""
        given, rest, _ = self.make_parser(ctx).parse_args(args=list(args))
        several: list[Sequence[str]] = [given.get(one.name) or () for one in self.params if one.nargs == -1]
        if isinstance(missing, click.Option) and "--against" in missing.opts and several and len(several[0]) > 1:
            return f"Did you mean --against {shlex.quote(several[0][-1])}?"
        hint = self._surplus(ctx, args).removeprefix(". ") if rest else ""
        what = missing.help if isinstance(missing, click.Option) and missing.help else ""
        return " ".join(filter(None, (hint, what, f"For example: qquant {self.example}")))

    @property
    def sentence(self) -> str:
        """The first sentence of its help, whole."""
        paragraph = " ".join((self.help or "").split("\n\n")[0].split())
        return paragraph.partition(". ")[0].rstrip(".") + "."

    def get_short_help_str(self, limit: int = 0) -> str:
        """The first sentence of its help, which click would cut: for the list of a group, and beside what a shell completes."""
        return self.sentence

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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """What click does; a word of other tools is answered with the one that it has here, and a model with what can be done with it."""
        word = args[0]
        if word not in self.commands and not word.startswith("-"):
            meant = _meant(word, COMMANDS)
            if meant:
                ctx.fail(f"No such command {word!r}. Did you mean {meant!r}?")
            if "/" in word or Path(word).exists():
                ctx.fail(f"{word}: give a command before it, such as {', '.join(VERBS)}; `qquant --help` shows all")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A section per stage."""
        width = max(len(command.name or "") for commands in self.stages.values() for command in commands)
        for title, commands in self.stages.items():
            with formatter.section(title):
                formatter.write_dl([((command.name or "").ljust(width), command.sentence) for command in commands])
                formatter.write_text(f"\b\n$ qquant {commands[0].example}")


def command(
    name: str | None = None, *, example: str, surplus: str = "", epilog: str = ""
) -> Callable[[Callable[..., Any]], Command]:
    """Decorator: the function as a `Command` with an example."""
    return click.command(name, cls=Command, example=example, surplus=surplus, epilog=epilog or None)
