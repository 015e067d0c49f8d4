"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from qquant.cli.terminal import echo
from qquant.errors import InputError, UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from qquant.formats.gguf.imatrix import Imatrix
    from qquant.plan.asked import Asked
    from qquant.recipe import Checks, Gates
    from qquant.recipe.efforts import EffortName
    from qquant.source.checkpoint import Checkpoint


EXITS = """\b
Exit status:
  0 every gate passed   2 usage or recipe      3 a gate failed
  4 gate inconclusive   5 input rejected       6 environment (disk, memory, hub)
  7 numerical           8 not published        9 output locked
  10 published in part  75 stopped safely      1 a bug
"""


class OutputFile(click.Path):
    """A file that is written after the work: whether it can be is seen before."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        folder = path.absolute().parent
        if not folder.is_dir():
            self.fail(f"{path}: there is no folder {folder}; make it first", param, ctx)
        if not os.access(path if path.exists() else folder, os.W_OK):
            self.fail(f"{path}: cannot be written; name another file", param, ctx)
        return path


class OutputFolder(click.Path):
    """A folder that is made after the work, with those above it: whether it can be is seen before."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        nearest = path.absolute()
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            self.fail(f"{path}: {nearest} is no folder that can be written to; name another", param, ctx)
        return path


class Number(click.FloatRange):
    """A number that others can be compared with: no NaN, which is in every range, and no infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is no number to compare with", param, ctx)
        return number


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
JUNIT = click.option(
    "--junit", type=OutputFile(), help="Write the verdicts as JUnit XML to this file; default: nowhere."
)
GITHUB = click.option(
    "--github", is_flag=True, help="Print workflow annotations, and add to the step summary ($GITHUB_STEP_SUMMARY)."
)
LOG = click.option(
    "--log", type=OutputFile(), help="Add every step of the work to this file as JSON lines; default: nowhere."
)
AGAINST = click.option(
    "--against", required=True, help="The 16-bit checkpoint it was made from: a folder, or a hub id."
)
REVISION = click.option("--revision", help="Branch, tag or commit of a hub checkpoint; default: main.")
TEXT = click.option(
    "--text", default="bundled:wikitext-2-test", show_default=True, help="Held-out text: bundled:NAME or a file."
)
ADAPTER = click.option(
    "--adapter",
    type=click.Path(path_type=Path, file_okay=False),
    help="The PEFT LoRA folder that was merged when it was built; default: none.",
)
DEVICE = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, or auto.")


class FormatParam(click.ParamType[str]):
    """A format by the word of recipes, which are imported when one is given or the words are shown."""

    name = "format"

    def _words(self) -> click.Choice[str]:
        from qquant.recipe.artifacts import FormatName

        return click.Choice(get_args(FormatName))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word itself."""
        return self._words().convert(value, param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        """Every word."""
        return self._words().get_metavar(param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Words that begin so."""
        return self._words().shell_complete(ctx, param, incomplete)


def recipe_words(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Published recipes that begin as what was typed, and where none does, files, for shell completion: bash forgets what precedes a file."""
    from click.shell_completion import CompletionItem

    from qquant import recipe

    names = [CompletionItem(name) for name in recipe.names() if name.startswith(incomplete)]
    return [CompletionItem(incomplete, type="file"), *names]


def _type_words(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """GGUF types that begin as what was typed, for shell completion."""
    from qquant.recipe.artifacts import GgufType

    return [name for name in get_args(GgufType) if name.startswith(incomplete.lower())]


SOURCE = (
    click.argument("checkpoint", required=False),
    click.option(
        "--recipe",
        help="A bundled recipe (`qquant recipe list`) or a YAML file; default: the published one that fits CHECKPOINT.",
        shell_complete=recipe_words,
    ),
    click.option("--revision", help="Branch, tag or commit of a hub checkpoint; default: the recipe's, else main."),
    click.option(
        "--adapter",
        type=click.Path(path_type=Path, file_okay=False),
        help="A PEFT LoRA folder to merge; default: none.",
    ),
)
CHANGES = (
    click.option(
        "--effort",
        type=click.Choice(["fast", "default", "best"]),
        help="How long the solvers may take, where the recipe does not say it; default: the recipe's.",
    ),
    click.option("--format", type=FormatParam(), help="Build this instead; default: the recipe's artifacts."),
    click.option("--bits", type=int, help="With --format gptq: 4 or 8; default with awq: 4."),
    click.option("--group-size", type=int, help="Weights that share a scale; default: the recipe's, else 128."),
    click.option(
        "--type",
        "types",
        multiple=True,
        metavar="TYPE",
        shell_complete=_type_words,
        help="GGUF files of these types, e.g. q4_k_m; default: the recipe's.",
    ),
    click.option(
        "--size",
        metavar="SIZE",
        help="A GGUF file of at most this size, e.g. 4.4GB, its types chosen by what each tensor loses; default: the recipe's.",
    ),
    click.option(
        "--calibration",
        multiple=True,
        type=click.Path(path_type=Path),
        help="Your texts or chats (.jsonl, .txt, .parquet), or `generated`: the checkpoint writes them; beside files, 5 % from bundled texts of other kinds; default: the recipe's sources.",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change the recipe, e.g. calibration.samples=64; default: as it is.",
    ),
)
PLANNING = (
    click.option("--only", multiple=True, metavar="ARTIFACT", help="Build these artifacts only; default: all."),
    click.option("--name", help="Name of the model in folder and file names; default: the checkpoint's."),
    click.option(
        "--imatrix",
        type=click.Path(path_type=Path, dir_okay=False),
        help="An importance matrix for GGUF files (.gguf or .dat); default: measured on the calibration.",
    ),
)


def asking(*planning: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: what to build from what, as `asked`; shared by `build`, `plan` and `recipe init`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def gathered(
            *, checkpoint: str | None, recipe: str | None, revision: str | None, adapter: Path | None, format: str | None,
            effort: EffortName | None, bits: int | None, group_size: int | None, types: tuple[str, ...], size: str | None,
            calibration: tuple[Path, ...],
            settings: tuple[str, ...], **others: Any,
        ) -> Any:  # fmt: skip
            from qquant.plan.asked import Asked
            from qquant.recipe.changes import Flags

            flags = Flags(format, bits, group_size, types, (), settings, effort, size)
            return command(asked=Asked(checkpoint, recipe, revision, adapter, flags, calibration), **others)

        for option in reversed((*SOURCE, *CHANGES, *planning)):
            gathered = option(gathered)
        return gathered

    return decorate


def somebody_is_there() -> bool:
    """Whether a question would be answered."""
    return sys.stdin.isatty()


def settle(asked: Asked, *, question: bool) -> Asked:
    """`asked` with a recipe: where none was named, the one that fits, said on stderr; where somebody is there, it is a `question` first.

    Raises:
        UsageError: the answer is no.
    """
    proposal = asked.proposal()
    if proposal is None:
        return asked
    what = f"recipe {proposal.name}: {proposal.reason}"
    if question and not asked.flags.chooses and somebody_is_there():
        if not click.confirm(f"{what}. Build it?", default=True, err=True):
            raise UsageError("nothing was built; `qquant recipe list` names recipes, and --format builds one artifact")
    else:
        echo(what, err=True)
    return dataclasses.replace(asked, recipe=proposal.name)


def require_there(artifact: Path) -> None:
    """Raise InputError where there is nothing at `artifact`: before torch is imported, which takes seconds."""
    if not artifact.exists():
        at_hub = len(artifact.parts) == 2 and not artifact.parent.exists() and artifact.suffix != ".gguf"
        fetch = f". If it is on the hub: hf download {artifact} --local-dir {artifact.name}" if at_hub else ""
        raise InputError(f"{artifact}: not found{fetch}")


def checks_and_gates(
    checks: Mapping[str, object], gates: Mapping[str, object], names: Mapping[str, str] | None = None
) -> tuple[Checks, Gates]:
    """What `check` measures and holds an artifact to; `names` of options that are called otherwise than with `check`.

    Raises UsageError, which names the options.
    """
    from qquant.recipe import Checks, Gates, fit

    return fit.part(Checks, checks, names or OPTIONS), fit.part(Gates, gates, names or OPTIONS)


OPTIONS = {
    "texts": "also",
    "kl_divergence": "max-kl",
    "top1_agreement": "min-top1",
    "perplexity_ratio": "max-perplexity-ratio",
}


def given_imatrix(path: Path | None, checkpoint: Checkpoint) -> Imatrix | None:
    if path is None:
        return None
    from qquant.formats.gguf import imatrix
    from qquant.solve.moments import require_fit

    importance = imatrix.read(path)
    require_fit(importance, checkpoint, path)
    return importance
