"""`qquant recipe`: list, show, validate, schema."""

from __future__ import annotations

import json

import click

from qquant.errors import UsageError


@click.group("recipe")
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
@click.option("--report", "of_report", is_flag=True, help="That of report.json, for programs that read it.")
def recipe_schema(of_report: bool) -> None:
    """The JSON schema of recipes, for editors."""
    from qquant import recipe
    from qquant.report import record

    click.echo(json.dumps(record.schema() if of_report else recipe.schema(), indent=2))
