"""`qquant speed`: how fast an artifact runs against its 16-bit model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qquant import devices
from qquant.cli.command import command
from qquant.cli.options import ADAPTER, DEVICE, EXITS, JSON, REVISION, Number, require_there
from qquant.cli.terminal import begins, counted, echo
from qquant.errors import GateFailedError, InconclusiveError

if TYPE_CHECKING:
    from qquant.report.record import SpeedReport


@command(
    epilog=EXITS, surplus="--against {}", example="speed release/Qwen1.5-0.5B-Chat-AWQ --against Qwen/Qwen1.5-0.5B-Chat"
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--against", required=True, help="The 16-bit checkpoint (a folder or a hub id), or its GGUF file.")
@REVISION
@click.option(
    "--prompt",
    default=512,
    show_default=True,
    type=click.IntRange(1, 131072),
    help="Tokens of a prefill, and in the cache when decoding.",
)
@click.option(
    "--steps", default=16, show_default=True, type=click.IntRange(1, 65536), help="Tokens decoded in a window."
)
@click.option("--pairs", default=10, show_default=True, type=click.IntRange(3, 10000), help="Pairs of windows.")
@click.option(
    "--margin",
    default=0.05,
    show_default=True,
    type=Number(0, 1, min_open=True, max_open=True),
    help="Inconclusive if the baseline differs from itself by more.",
)
@click.option(
    "--min-decode",
    type=Number(min=0),
    help="Fail below this ratio to the 16-bit model's tokens per second; default: no gate.",
)
@click.option("--min-prefill", type=Number(min=0), help="The same for reading the prompt; default: no gate.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16"]), help="Of the activations of both; default: the checkpoint's."
)
@ADAPTER
@DEVICE
@JSON
def speed(
    artifact: Path, against: str, revision: str | None, prompt: int, steps: int, pairs: int, margin: float, min_decode: float | None,
    min_prefill: float | None, dtype: str | None, adapter: Path | None, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Time ARTIFACT and its 16-bit model in turns: decode and prefill, memory, and what bytes allow at best.

    A GGUF file runs in llama.cpp if llama-cpp-python is installed; give the 16-bit GGUF file as --against to compare within it.
    """
    require_there(artifact)
    begins(f"speed: {artifact} against {against}, {counted(pairs, 'pair')} of windows")
    import torch

    from qquant.checks import speed as check
    from qquant.formats.gguf.source import GgufSource
    from qquant.source.checkpoint import Checkpoint

    settings = check.SpeedSettings(
        prompt=prompt, steps=steps, pairs=pairs, margin=margin, min_decode=min_decode, min_prefill=min_prefill
    )
    path = Path(against) if against.endswith(".gguf") else None
    baseline = GgufSource.open(path) if path else Checkpoint.open(against, revision, adapter)
    number = getattr(torch, dtype) if dtype else None
    report = check.measure(artifact, baseline, settings, devices.named(device), number, path)
    if as_json:
        echo(json.dumps({"schema": "qquant-speed-1"} | dataclasses.asdict(report), indent=2))
    else:
        _show(report)
    kinds = {"fail": GateFailedError, "inconclusive": InconclusiveError}
    if report.outcome in kinds:
        raise kinds[report.outcome]("\n".join(report.reasons))


def _show(report: SpeedReport) -> None:
    from qquant.cli.tables import Column, print_table

    columns = [
        Column("", words=True),
        Column("tokens/s"),
        Column("16 bit"),
        Column("ratio"),
        Column("95 % interval", words=True),
    ]
    columns += [Column("noise", spare=3), Column("at best", spare=2), Column("of it", spare=1)]
    rows = [
        (
            f"{pace.phase}, {pace.tokens} in the cache" if pace.tokens else pace.phase,
            f"{pace.rate:,.1f}",
            f"{pace.rate_baseline:,.1f}",
            f"{pace.ratio:.3f}",
            f"{pace.low:.3f} to {pace.high:.3f}",
            f"{pace.noise:.1%}",
            f"{pace.ceiling:.2f}",
            f"{pace.share:.0%}",
        )
        for pace in report.paces
    ]
    print_table(columns, rows, f"{report.device} · {report.outcome}")
    for what, here, there in (
        ("weights", report.weights, report.weights_baseline),
        ("cache", report.cache, report.cache),
        ("peak", report.peak, report.peak_baseline),
    ):
        echo(f"{what:8} {here / 1e6:12,.1f} MB   16 bit {there / 1e6:12,.1f} MB")
    echo(f"{report.runtime}\n{report.definition}")
