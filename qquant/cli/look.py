"""`qquant inspect`, `verify` and `doctor`: what a file, a folder and a machine hold."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qquant import devices
from qquant.cli.command import command
from qquant.cli.options import DEVICE, EXITS, JSON


@command(example="inspect model-q4_k_m.gguf")
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


@command(epilog=EXITS, example="verify release/Qwen1.5-0.5B-Chat-AWQ --deep")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--card", "with_card", is_flag=True, help="Also compare README.md with report.json and the manifest.")
@click.option(
    "--deep",
    is_flag=True,
    help="Scan every tensor for NaN, and compare every digest; without it, some of each artifact.",
)
@click.option("--bytes", "only_bytes", is_flag=True, help="Only compare sizes and hashes; needs no torch.")
def verify(folders: tuple[Path, ...], with_card: bool, deep: bool, only_bytes: bool) -> None:
    """Verify artifact or release FOLDERS: every file's hash, the structure, and values dequantized again."""
    from qquant.artifact import verification
    from qquant.artifact.manifest import verify_files
    from qquant.errors import InputError
    from qquant.release import card

    problems = []
    for folder in folders:
        if only_bytes:
            click.echo(f"{folder}: {verify_files(folder):,} bytes as the manifest says")
        else:
            found = verification.verify(folder, deep)
            values = f"{found.tensors} tensors are finite, {found.digests} dequantize as recorded"
            click.echo(f"{folder}: {found.size:,} bytes as the manifest says; {values}")
            for name in found.unlisted:
                click.echo(f"{folder}: {name} is not in the manifest", err=True)
        problems += card.problems(folder) if with_card else []
    if problems:
        raise InputError("\n".join(problems))
    if with_card:
        click.echo(f"{len(folders)} cards agree with their reports")


@command(epilog=EXITS, example="doctor --out release")
@click.option("--out", type=click.Path(path_type=Path), default=Path(), help="The folder that builds will write to.")
@DEVICE
@JSON
def doctor(out: Path, device: str, as_json: bool) -> None:
    """Find out whether this machine can build: versions, memory, the file system of --out, kernels, hub login."""
    from qquant import doctor as examination
    from qquant.errors import EnvironmentMissingError

    findings = list(examination.examine(out, devices.named(device)))
    if as_json:
        content = {"schema": "qquant-doctor-1", "findings": [vars(finding) for finding in findings]}
        click.echo(json.dumps(content, indent=2))
    else:
        for finding in findings:
            click.echo(f"{finding.state:<8} {finding.name}: {finding.text}")
    failed = [finding for finding in findings if finding.state == examination.FAILURE]
    if failed:
        raise EnvironmentMissingError("; ".join(f"{finding.name}: {finding.text}" for finding in failed))
