"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qquant.errors import UsageError

if TYPE_CHECKING:
    from qquant.formats.gguf.imatrix import Imatrix
    from qquant.recipe import Recipe
    from qquant.source.checkpoint import Checkpoint


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


def open_source(
    recipe_name: str,
    checkpoint: str | None,
    revision: str | None,
    adapter: Path | None,
    pickles_beside: Path | None = None,
) -> tuple[Recipe, Checkpoint]:
    """The recipe, and its checkpoint or the one given; pickles of a local folder are converted beside `pickles_beside`, if given."""
    from qquant import recipe
    from qquant.source.checkpoint import Checkpoint
    from qquant.source.padding import padded

    loaded = recipe.load(recipe_name)
    reference = checkpoint or loaded.checkpoint
    if reference is None:
        raise UsageError(
            f"recipe {loaded.name} names no checkpoint; give one: qquant build CHECKPOINT --recipe {recipe_name}"
        )
    if pickles_beside is not None:
        from qquant.source.pickles import converted

        reference = str(converted(Path(reference), pickles_beside)) if Path(reference).is_dir() else reference
    return loaded, padded(Checkpoint.open(reference, revision or loaded.revision, adapter), loaded)


def given_imatrix(path: Path | None, checkpoint: Checkpoint) -> Imatrix | None:
    if path is None:
        return None
    from qquant.formats.gguf import imatrix
    from qquant.solve.moments import require_fit

    found = imatrix.read(path)
    require_fit(found, checkpoint, path)
    return found
