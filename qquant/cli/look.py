"""`qquant inspect`, `verify` and `doctor`: what a file, a folder and a machine hold."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qquant.cli.command import command
from qquant.cli.display import Display
from qquant.cli.options import DEVICE, EXITS, JSON, recipe_words, require_there
from qquant.cli.terminal import begins, counted, echo, echo_json
from qquant.cli.together import device_of, ranks_here
from qquant.errors import UsageError

if TYPE_CHECKING:
    import torch

    from qquant.doctor import Finding

WIDTH = 200  # characters of a value that are shown


@command(example="inspect model-q4_k_m.gguf")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="Also print every tensor with its type, shape and bytes.")
@JSON
def inspect(path: Path, tensors: bool, as_json: bool) -> None:
    """Show what a checkpoint, an artifact folder or a GGUF file holds; reads headers only."""
    require_there(path)
    from qquant.inspection import describe

    content = describe(path)
    if as_json:
        echo_json(json.dumps(content, indent=2, ensure_ascii=False, default=str))
        return
    for key, value in content["facts"].items():
        text = " ".join(str(value).split())
        echo(f"{key}: {text if len(text) <= WIDTH else text[:WIDTH] + ' ...'}")
    kinds = Counter(tensor["type"] for tensor in content["tensors"])
    for kind, count in kinds.most_common():
        size = sum(tensor["bytes"] for tensor in content["tensors"] if tensor["type"] == kind)
        echo(f"{size:>14,}  {kind:<6} {counted(count, 'tensor')}")
    for tensor in content["tensors"] if tensors else ():
        echo(f"{tensor['bytes']:>14,}  {tensor['type']:<6} {tensor['shape']!s:<18} {tensor['name']}")


@command(epilog=EXITS, example="verify release/Qwen1.5-0.5B-Chat-AWQ --deep")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--card", "with_card", is_flag=True, help="Also compare README.md with report.json and the manifest.")
@click.option(
    "--deep",
    is_flag=True,
    help="Scan every tensor for NaN, and compare every digest; without it, some of each artifact.",
)
@click.option("--bytes", "only_bytes", is_flag=True, help="Only compare sizes and hashes; needs no torch.")
@JSON
def verify(folders: tuple[Path, ...], with_card: bool, deep: bool, only_bytes: bool, as_json: bool) -> None:
    """Verify artifact or release FOLDERS (or that of a GGUF file): every file's hash, the structure, and values dequantized again."""
    from qquant.errors import InputError

    problems, rows = [], []
    for path in folders:
        folder = path if path.is_dir() else path.parent  # of a GGUF file, where its manifest is
        if not only_bytes:
            begins(f"verify: {folder}")
        row, text, unlisted = _verified(folder, deep, only_bytes)
        rows.append(row)
        if not as_json:
            echo(f"{folder}: {text}")
        for name in unlisted:
            echo(f"{folder}: {name} is not in the manifest", err=True)
        if with_card:
            from qquant.release import card

            problems += card.problems(folder)
    if as_json:
        echo(json.dumps({"schema": "qquant-verified-1", "folders": rows, "problems": problems}, indent=2))
    if problems:
        raise InputError("\n".join(problems))
    if with_card and not as_json:
        echo(
            f"{counted(len(folders), 'card')} {'agrees with its report' if len(folders) == 1 else 'agree with their reports'}"
        )


def _verified(folder: Path, deep: bool, only_bytes: bool) -> tuple[dict[str, object], str, tuple[str, ...]]:
    """(for --json, for people, files that no manifest lists) of one folder."""
    from qquant.artifact import verification

    if only_bytes:
        size = verification.hashes(folder)
        return {"folder": str(folder), "bytes": size}, f"{size:,} bytes as the manifest says", ()
    verified = verification.verify(folder, deep)
    row = {"folder": str(folder), "bytes": verified.size, "tensors": verified.tensors, "digests": verified.digests}
    values = f"{verified.tensors} tensors are finite, {verified.digests} dequantize as recorded"
    return row, f"{verified.size:,} bytes as the manifest says; {values}", tuple(verified.unlisted)


@command(epilog=EXITS, example="doctor --out release")
@click.option("--out", type=click.Path(path_type=Path), default=Path(), help="The folder that builds will write to.")
@click.option(
    "--calibrate",
    is_flag=True,
    help="Also build something small, in a minute, and keep what it took: `plan` and `build` then foresee better.",
)
@click.option(
    "--warm",
    metavar="CHECKPOINT",
    help="Also compile the kernels that builds of this checkpoint on a GPU call, and answers of what they make: on one block of it. Triton keeps them.",
)
@click.option(
    "--recipe",
    help="What the builds make that --warm compiles for: a bundled recipe or a YAML file; default: the published one that fits.",
    shell_complete=recipe_words,
)
@DEVICE
@JSON
def doctor(out: Path, calibrate: bool, warm: str | None, recipe: str | None, device: str, as_json: bool) -> None:
    """Find out whether this machine can build: versions, memory, the file system of --out, kernels, hub login.

    Under `torchrun -m` also whether ranks can work together: collectives, and one folder for all of them.
    """
    if recipe and not warm:
        raise UsageError("--recipe goes with --warm CHECKPOINT")
    begins(f"doctor: trying this machine, and {out}")
    from qquant import doctor as examination
    from qquant.errors import EnvironmentMissingError

    ranks = ranks_here()
    here = device_of(device, ranks)
    findings = list(examination.examine(out, here))
    if ranks.world > 1:
        findings += examination.group(out, here, ranks, findings)
    if calibrate and ranks.first:
        findings.append(_calibrated(here))
    if warm and ranks.first:
        findings.append(_warmed(warm, recipe, here))
    if as_json:
        content = {"schema": "qquant-doctor-1", "findings": [vars(finding) for finding in findings]}
        echo(json.dumps(content, indent=2))
    else:
        for finding in findings:
            echo(f"{finding.state:<8} {finding.name}: {finding.text}")
    failed = [finding for finding in findings if finding.state == examination.FAILURE]
    if failed and ranks.first:
        raise EnvironmentMissingError("; ".join(f"{finding.name}: {finding.text}" for finding in failed))


def _calibrated(device: torch.device) -> Finding:
    """What a small build took over what was counted, kept for `plan`."""
    from qquant import reference
    from qquant.doctor import OK, Finding
    from qquant.plan import machine

    with Display() as progress:
        measured = reference.measure(device, progress)
    path = machine.keep(measured, device)
    factors = ", ".join(f"{phase} {factor:.2f}" for phase, factor in measured.factors.items())
    return Finding("calibrated", OK, f"times what is counted: {factors}; kept in {path}")


def _warmed(checkpoint: str, recipe: str | None, device: torch.device) -> Finding:
    """How many kernels were compiled, and where they are kept."""
    from qquant import warming
    from qquant.doctor import OK, Finding
    from qquant.plan.asked import Asked

    with Display() as progress:
        warmed = warming.warm(Asked(checkpoint, recipe), device, progress)
    return Finding(
        "warmed", OK, f"{counted(warmed.kernels, 'kernel')} compiled in {warmed.seconds:.0f} s; kept in {warmed.folder}"
    )
