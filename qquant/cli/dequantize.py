"""`qquant dequantize`: an artifact back to a 16-bit checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qquant import devices
from qquant.cli.command import command
from qquant.cli.display import Display
from qquant.cli.options import DEVICE, EXITS, JSON, require_there
from qquant.cli.terminal import begins, echo


@command(epilog=EXITS, surplus="--out {}", example="dequantize model-q4_k_m.gguf --out model-bf16")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new checkpoint folder.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of the weights; default: that of the artifact's config, bfloat16 for GGUF.",
)
@DEVICE
@JSON
def dequantize(artifact: Path, out: Path, dtype: str | None, device: str, as_json: bool) -> None:
    """Write a GPTQ, AWQ or GGUF artifact of any tool as a 16-bit checkpoint that transformers loads, to fine-tune it or to build it again.

    The weights are what the artifact's codes stand for: what quantizing lost is not brought back.
    """
    require_there(artifact)
    begins(f"dequantize: {artifact} to {out}")
    from qquant.cli.terminal import Stop
    from qquant.dequantization import dequantize as write

    with Stop() as stop, Display(stop) as progress:
        made = write(artifact, out, dtype, devices.named(device), progress)
    if as_json:
        content = {"schema": "qquant-dequantized-1", "folder": str(made.folder), "bytes": made.size}
        echo(json.dumps(content | {"tensors": made.tensors}, indent=2))
        return
    echo(f"{made.folder}: {made.tensors} tensors, {made.size:,} bytes; it loads in transformers as any checkpoint does")
