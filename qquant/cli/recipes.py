"""`qquant recipe`: init, types, list, show, validate, schema."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qquant.cli.command import Group
from qquant.cli.options import (
    DEVICE,
    EXITS,
    JSON,
    LOG,
    PLANNING,
    OutputFile,
    asking,
    given_imatrix,
    recipe_words,
    settle,
    somebody_is_there,
)
from qquant.cli.terminal import begins, counted, echo, echo_json
from qquant.errors import UsageError

if TYPE_CHECKING:
    from qquant.plan.asked import Asked
    from qquant.recipe import Recipe

ALL, CHANGED = "all", "-changed"


@click.group("recipe", cls=Group, example="recipe show qwen1.5-chat")
def recipes() -> None:
    """Write, list, show and validate recipes."""


@recipes.command(
    "init",
    surplus="--recipe {}",
    example="recipe init path/to/my-model --format gguf --type q4_k_m --calibration support.jsonl",
)
@asking()
@click.option("--out", type=OutputFile(), default="recipe.yaml", help="The new file; - prints it.")
def init_recipe(asked: Asked, out: Path) -> None:
    """Write a recipe of your own: that of --recipe, or the published one that fits CHECKPOINT, with what the other options say.

    On a terminal, where no option says what to build or on what to calibrate, it asks.
    """
    from qquant import recipe
    from qquant.plan.asked import GENERATED

    for path in asked.calibration:
        if str(path) != GENERATED:
            _require_there(path)
    asked = settle(asked, question=False)
    silent = asked.flags == type(asked.flags)() and not asked.calibration
    written = _answered(asked) if silent and somebody_is_there() else asked.wanted()
    text = recipe.dump(written, brief=True)
    if str(out) == "-":
        echo(text, nl=False)
        return
    _write(out, f"# every field: recipes/README.md, or `qquant recipe show {out}`\n{text}")
    echo(
        f"{out}: {counted(len(written.artifacts), 'artifact')}. Next: qquant plan {asked.checkpoint or 'CHECKPOINT'} --recipe {out}"
    )


def _answered(asked: Asked) -> Recipe:
    """The recipe with what somebody answers instead of giving options; an empty answer leaves it as it is."""
    names = [artifact.name for artifact in asked.wanted().artifacts]

    def chosen(text: str) -> list[str]:
        words = names if text == ALL else [word.strip() for word in text.split(",")]
        unknown = [word for word in words if word not in names]
        if unknown:
            raise click.UsageError(f"{unknown[0]}: no artifact of the recipe; it has {', '.join(names)}")
        return words

    wanted = click.prompt(f"artifacts of {', '.join(names)}", default=ALL, value_proc=chosen, err=True)
    what = "a file of your texts or chats to calibrate on; empty: the recipe's"
    file = click.prompt(what, default="", show_default=False, value_proc=_file_or_nothing, err=True)
    recipe = replace(asked, calibration=(Path(file),) if file else ()).wanted()
    if wanted == names:
        return recipe
    kept = tuple(artifact for artifact in recipe.artifacts if artifact.name in wanted)
    return recipe.model_copy(update={"artifacts": kept, "name": f"{recipe.name[:90].removesuffix(CHANGED)}{CHANGED}"})


def _file_or_nothing(text: str) -> str:
    if text:
        _require_there(Path(text))
    return text


def _require_there(path: Path) -> None:
    if not path.is_file():
        raise click.UsageError(f"{path}: there is no such file")


def _write(out: Path, text: str) -> None:
    """A new file."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}; give another name") from None


@recipes.command(
    "types",
    epilog=EXITS,
    surplus="--recipe {}",
    example="recipe types path/to/my-model --recipe mine.yaml --out chosen.yaml",
)
@asking(*PLANNING)
@click.option(
    "--out",
    type=OutputFile(),
    default="chosen.yaml",
    show_default=True,
    help="The new file; - prints it.",
)
@LOG
@DEVICE
def choose_types(
    asked: Asked, only: tuple[str, ...], name: str | None, imatrix: Path | None, out: Path, log: Path | None, device: str
) -> None:  # fmt: skip
    """Choose the types of GGUF files that ask for a size, as a build would, and write a recipe that names them.

    Measures what every tensor loses as every type (one backward and one forward pass). Built from the new recipe, the files are the same.
    """
    from tempfile import TemporaryDirectory

    from qquant import devices, recipe
    from qquant.cli.display import Display
    from qquant.plan.plan import Plan

    if str(out) != "-" and out.exists():
        raise UsageError(f"--out {out}: File exists; give another name")
    loaded, source = settle(asked, question=False).open()
    plan = Plan.of(loaded, source, only, name, given_imatrix(imatrix, source))
    if not plan.unsettled:
        raise UsageError(f"recipe {loaded.name}: no artifact asks for a size: {', '.join(_NEEDS)}")
    begins(f"{plan.model}: measuring what each tensor loses as each type")
    from qquant import pipeline

    with TemporaryDirectory(dir=out.absolute().parent, prefix=".qquant-") as scratch, Display(log=log) as progress:
        place = devices.named(device)
        plan = pipeline.choose_types(loaded, source, plan, Path(scratch), place, progress)
    specs = {artifact.name: artifact.spec for artifact in plan.artifacts}
    settled = loaded.model_copy(
        update={"artifacts": tuple(specs.get(spec.name, spec) for spec in loaded.artifacts if spec.name in specs)}
    )
    lines = [
        f"{artifact.name}: {sum(file.size for file in artifact.files if file.tensors):,} bytes, {artifact.bits_per_weight:.3f} bits per weight, "
        f"expected KL divergence {plan.expected[artifact.name]:.6f}"
        for artifact in plan.artifacts
        if artifact.name in plan.expected
    ]
    text = "".join(f"# {line}\n" for line in lines) + recipe.dump(settled, brief=True)
    if str(out) == "-":
        echo(text, nl=False)
        return
    _write(out, text)
    echo("\n".join(lines))
    echo(f"{out}: names the types. Next: qquant build {asked.checkpoint or 'CHECKPOINT'} --recipe {out} --out DIR")


_NEEDS = ("size: 4.4GB", "bits_per_weight: 4.85")


@recipes.command("list", example="recipe list")
@JSON
def list_recipes(as_json: bool) -> None:
    """Names and descriptions of the bundled recipes."""
    from qquant import recipe

    described = {name: recipe.load(name).description for name in recipe.names()}
    if as_json:
        rows = [{"name": name, "description": text} for name, text in described.items()]
        echo_json(json.dumps({"schema": "qquant-recipes-1", "recipes": rows}, indent=2, ensure_ascii=False))
        return
    for name, text in described.items():
        echo(f"{name:<20} {text}")


@recipes.command("show", example="recipe show qwen1.5-chat")
@click.argument("name", shell_complete=recipe_words)
@JSON
def show_recipe(name: str, as_json: bool) -> None:
    """A recipe with every default written out, as YAML."""
    from qquant import recipe

    if as_json:
        echo_json(json.dumps(recipe.load(name).model_dump(mode="json"), indent=2, ensure_ascii=False))
    else:
        echo(recipe.dump(recipe.load(name)), nl=False)


@recipes.command("validate", example="recipe validate mine.yaml")
@click.argument("files", nargs=-1, required=True, shell_complete=recipe_words)
@JSON
def validate_recipes(files: tuple[str, ...], as_json: bool) -> None:
    """Check recipes; every problem of every file is reported at once."""
    from qquant import recipe

    problems = []
    for file in files:
        try:
            problems += [f"{file}: {clash}; keep one, or build them with --only" for clash in recipe.load(file).clashes]
        except UsageError as error:
            problems.append(str(error))
    if as_json:
        lines = [line for problem in problems for line in problem.splitlines()]
        echo(json.dumps({"schema": "qquant-validated-1", "files": len(files), "problems": lines}, indent=2))
    if problems:
        raise UsageError("\n".join(problems))
    if not as_json:
        echo(f"{len(files)} valid")


@recipes.command("schema", example="recipe schema")
@click.option("--report", "of_report", is_flag=True, help="That of report.json, for programs that read it.")
def recipe_schema(of_report: bool) -> None:
    """The JSON schema of recipes, for editors."""
    from qquant import recipe
    from qquant.report import schema

    echo(json.dumps(schema.schema() if of_report else recipe.schema(), indent=2))
