"""`qquant inspect` and `verify`: what a file or folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qquant.cli.options import EXITS, JSON


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@JSON
def inspect(path: Path, as_json: bool) -> None:
    """Show what a checkpoint, an artifact folder or a GGUF file holds; reads headers only."""
    from qquant.inspection import describe

    content = describe(path)
    if as_json:
        click.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))
        return
    for key, value in content["facts"].items():
        click.echo(f"{key}: {value}")
    for tensor in content["tensors"]:
        click.echo(f"{tensor['bytes']:>14,}  {tensor['type']:<6} {tensor['shape']!s:<18} {tensor['name']}")


@click.command(epilog=EXITS)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--card", "with_card", is_flag=True, help="Also compare README.md with report.json and the manifest.")
def verify(folders: tuple[Path, ...], with_card: bool) -> None:
    """Compare the files of artifact or release FOLDERS with their manifest, byte by byte."""
    from qquant import card, provenance
    from qquant.errors import InputError

    found = []
    for folder in folders:
        click.echo(f"{folder}: {provenance.verify(folder):,} bytes as the manifest says")
        found += card.problems(folder) if with_card else []
    if found:
        raise InputError("\n".join(found))
    if with_card:
        click.echo(f"{len(folders)} cards agree with their reports")
