"""`qquant check`, `bisect`, `perplexity`: what an artifact lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qquant import devices
from qquant.cli.command import command
from qquant.cli.display import Display
from qquant.cli.options import (
    ADAPTER,
    AGAINST,
    DEVICE,
    EXITS,
    GITHUB,
    JSON,
    JUNIT,
    LOG,
    REVISION,
    TEXT,
    Number,
    OutputFile,
    OutputFolder,
    checks_and_gates,
    require_there,
)
from qquant.cli.terminal import begins, counted, echo, show, tell_watchers
from qquant.cli.together import device_of, ranks_here, working
from qquant.errors import GateFailedError, UsageError

if TYPE_CHECKING:
    from qquant.source.checkpoint import Checkpoint


@command(epilog=EXITS, example="check model-q4_k_m.gguf --against Qwen/Qwen1.5-0.5B-Chat")
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@AGAINST
@REVISION
@TEXT
@click.option(
    "--also",
    multiple=True,
    metavar="TEXT",
    help="A further text, measured and not gated; may be repeated; default: none.",
)
@click.option(
    "--profile",
    type=click.Choice(["default", "release"]),
    default="default",
    show_default=True,
    help="release: also by language, kind of text and position up to 32,768, with a gate on the worst of them.",
)
@click.option("--windows", default=40, show_default=True, help="Windows of text.")
@click.option("--max-windows", type=int, help="Read on up to so many where a gate is inconclusive; default: no more.")
@click.option("--length", default=512, show_default=True, help="Tokens per window.")
@click.option(
    "--protocol",
    type=click.Choice(["llama.cpp", "sliding"]),
    default="llama.cpp",
    show_default=True,
    help="Score the second half of each window, or all of it (GPTQ papers: --length 2048).",
)
@click.option(
    "--max-perplexity-ratio", type=float, help="Fail above this ratio to the checkpoint; default: by format and size."
)
@click.option(
    "--max-kl", type=float, help="Fail above this mean KL divergence (nats per token); default: by format and size."
)
@click.option("--min-top1", type=float, help="Fail below this top-1 agreement (0 to 1); default: by format and size.")
@click.option("--no-defaults", is_flag=True, help="Only these limits; otherwise the rest is by format and size.")
@ADAPTER
@click.option("--out", type=OutputFolder(), help="Keep report and evidence in this folder; default: only the table.")
@JUNIT
@GITHUB
@LOG
@DEVICE
@JSON
def check(
    artifacts: tuple[Path, ...], against: str, revision: str | None, text: str, also: tuple[str, ...], profile: Any, windows: int,
    max_windows: int | None, length: int, protocol: Any, max_perplexity_ratio: float | None, max_kl: float | None,
    min_top1: float | None, no_defaults: bool, adapter: Path | None, out: Path | None, junit: Path | None, github: bool, log: Path | None,
    device: str, as_json: bool,
) -> None:  # fmt: skip
    """Compare artifacts made by any tool (GPTQ or AWQ folders, GGUF files) with the checkpoint they came from."""
    for artifact in artifacts:
        require_there(artifact)
    numbers = {
        "profile": profile,
        "windows": windows,
        "max_windows": max_windows,
        "length": length,
        "protocol": protocol,
    }
    limits = {"perplexity_ratio": max_perplexity_ratio, "kl_divergence": max_kl, "top1_agreement": min_top1}
    checks, gates = checks_and_gates(numbers | {"text": text, "texts": also}, limits | {"defaults": not no_defaults})
    begins(f"check: {_named(artifacts)} against {against}, {windows} windows of {length} tokens of {text}")
    from qquant import pipeline

    source = _opened(against, revision, adapter, artifacts)
    for warning in pipeline.beyond(length, source):
        echo(f"warning: {warning}", err=True)
    ranks = ranks_here()
    with working(ranks, log) as progress:
        report = pipeline.check(artifacts, source, checks, gates, device_of(device, ranks), progress, out, ranks)
    if ranks.first:
        tell_watchers([report], junit, github)
    show(report, as_json)


@command(
    epilog=EXITS,
    surplus="--against {}",
    example="bisect release/Qwen1.5-0.5B-Chat-AWQ --against Qwen/Qwen1.5-0.5B-Chat --max-kl 0.02",
)
@click.argument("artifact", type=click.Path(path_type=Path))
@AGAINST
@REVISION
@click.option("--max-kl", required=True, type=Number(min=0), help="The mean KL divergence to reach (nats per token).")
@TEXT
@click.option("--windows", default=8, show_default=True, help="Windows of text.")
@click.option("--length", default=256, show_default=True, help="Tokens per window.")
@click.option(
    "--recipe",
    "written",
    type=OutputFile(),
    help="Write the recipe of the artifact with these in 16 bits to this file; default: only the lines are printed.",
)
@ADAPTER
@LOG
@DEVICE
@JSON
def bisect(
    artifact: Path, against: str, revision: str | None, max_kl: float, text: str, windows: int, length: int, written: Path | None,
    adapter: Path | None, log: Path | None, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Find which tensors carry the loss, and the smallest set that would reach --max-kl if it stayed in 16 bits.

    Linears that share an input are one; an AWQ artifact is searched by blocks, since its scales are folded between linears. The embedding and the
    head of a GGUF file are searched too. The answer is what a recipe says: `types` of a GGUF file, `keep` of a folder.
    """
    require_there(artifact)
    checks, _ = checks_and_gates({"text": text, "windows": windows, "length": length}, {})
    begins(f"bisect: {artifact} against {against}, {windows} windows of {length} tokens of {text}")
    from qquant import pipeline
    from qquant.artifact.again import again, in_16_bits
    from qquant.recipe import dump, lines_of

    if written is not None:
        again(artifact, {})  # there is a recipe, or this is the end

    source = _opened(against, revision, adapter, [artifact])
    with Display(log=log) as progress:
        bisection = pipeline.bisect(artifact, source, checks, max_kl, devices.named(device), progress)
    restored = [restorable.name for restorable in bisection.restored]
    weights = [name for restorable in bisection.restored for name in restorable.weights]
    fields = in_16_bits(artifact, weights, source.dtype) if restored else {}
    if as_json:
        gains = [
            {"name": restorable.name, "parameters": restorable.size, "gain": gain}
            for restorable, gain in bisection.gains
        ]
        content = {
            "schema": "qquant-bisection-1",
            "kl_divergence": bisection.kl,
            "limit": bisection.limit,
            "gains": gains,
        }
        content |= {"restored": restored, "kl_restored": bisection.kl_restored, "recipe_entry": fields}
        echo(json.dumps(content, indent=2))
    else:
        from qquant.cli.tables import Column, print_table

        columns = [
            Column("in 16 bits", words=True),
            Column("parameters", spare=1),
            Column("KL divergence less"),
            Column("of all"),
        ]
        rows = []
        for restorable, gain in bisection.gains[:12]:
            share = f"{gain / bisection.kl:.1%}" if bisection.kl else ""
            rows.append((restorable.name, f"{restorable.size:,}", f"{gain:+.6f}", share))
        print_table(columns, rows)
        if not restored:
            echo(f"mean KL divergence {bisection.kl:.6f} is within {max_kl:g} as it is")
        else:
            echo(f"mean KL divergence {bisection.kl:.6f}; {bisection.kl_restored:.6f} with these in 16 bits:")
            echo("\n".join(f"  {name}" for name in restored))
            echo("in a recipe's entry of it:")
            echo("\n".join(f"    {line}" for line in lines_of(fields)))
    if written is not None and restored:
        written.write_text(dump(again(artifact, fields), brief=True), "utf-8")
        if not as_json:
            echo(f"{written}: its recipe with these. Next: qquant build {against} --recipe {written} --out DIR")
    if bisection.kl_restored > max_kl:
        raise GateFailedError(
            f"{artifact}: {bisection.kl_restored:.6f} with all of these in 16 bits; the loss is elsewhere"
        )


@command(epilog=EXITS, example="perplexity model-q4_k_m.gguf --against Qwen/Qwen1.5-0.5B-Chat")
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--against", help="The 16-bit checkpoint: a folder, or a hub id. Not needed with --logits; default: none."
)
@REVISION
@click.option(
    "--logits",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Base logits to read (--kl-divergence-base); default: measured.",
)
@click.option("--save-logits", type=OutputFile(), help="Keep the base logits in this file; default: nowhere.")
@click.option("--text", default="bundled:wikitext-2-test", show_default=True, help="bundled:NAME or a file.")
@click.option("--chunks", default=40, show_default=True, type=click.IntRange(1, 65536), help="Chunks of text.")
@click.option("--context", default=512, show_default=True, type=click.IntRange(16, 131072), help="Tokens per chunk.")
@click.option(
    "--exact-inputs", is_flag=True, help="Do not round the inputs of GGUF products to 8 bits as llama.cpp does."
)
@ADAPTER
@DEVICE
@JSON
def perplexity(
    artifacts: tuple[Path, ...], against: str | None, revision: str | None, logits: Path | None, save_logits: Path | None, text: str,
    chunks: int, context: int, exact_inputs: bool, adapter: Path | None, device: str, as_json: bool,
) -> None:  # fmt: skip
    """The numbers of `llama-perplexity --kl-divergence`, in its arithmetic, to compare with those that people publish.

    Its file of base logits is read (--logits: text and chunks come from it) and written (--save-logits).
    """
    if (against is None) == (logits is None):
        raise UsageError("give either --against CHECKPOINT or --logits FILE")
    if save_logits is not None and against is None:
        raise UsageError("--save-logits needs --against CHECKPOINT, whose logits are kept")
    if not artifacts and save_logits is None:
        raise UsageError("give an artifact, or --save-logits FILE")
    for path in (*artifacts, *([logits] if logits else ())):
        require_there(path)
    checks, _ = checks_and_gates({"text": text, "windows": chunks, "length": context}, {}, CHUNKS)
    begins(f"perplexity: {_named(artifacts)} against {against or logits}")
    from qquant import pipeline

    where = devices.named(device)
    with Display() as progress:
        if logits is not None:
            by_artifact = pipeline.perplexity_from(logits, artifacts, where, progress, not exact_inputs)
        else:
            source = _opened(str(against), revision, adapter, artifacts)
            by_artifact = pipeline.perplexity(artifacts, source, checks, save_logits, where, progress, not exact_inputs)
    if as_json:
        echo(json.dumps({"schema": "qquant-llama-perplexity-1", "artifacts": by_artifact}, indent=2))
        return
    for name, numbers in by_artifact.items():
        echo(name)
        for title, key, error, factor in SHOWN:
            more = f" ± {factor * numbers[error]:.6f}" if error else ""
            echo(f"  {title:<32}{factor * numbers[key]:>12.6f}{more}")


CHUNKS = {"windows": "chunks", "length": "context"}  # as llama.cpp calls them


def _named(artifacts: Sequence[Path]) -> str:
    """One by its path, several by their number."""
    return str(artifacts[0]) if len(artifacts) == 1 else counted(len(artifacts), "artifact")


def _opened(against: str, revision: str | None, adapter: Path | None, artifacts: Sequence[Path]) -> Checkpoint:
    """The checkpoint, and a word where an artifact was built with another adapter."""
    from qquant.checks.comparable import merged_otherwise
    from qquant.source.checkpoint import Checkpoint

    source = Checkpoint.open(against, revision, adapter)
    for warning in merged_otherwise(artifacts, source):
        echo(f"warning: {warning}", err=True)
    return source


SHOWN = (
    ("Mean PPL(Q)", "ppl", "ppl_error", 1),
    ("Mean PPL(base)", "ppl_base", "", 1),
    ("Mean ln(PPL(Q)/PPL(base))", "ln_ppl_ratio", "ln_ppl_ratio_error", 1),
    ("Cor(ln(PPL(Q)), ln(PPL(base)))", "correlation", "", 1),
    ("Mean    KLD", "kld_mean", "kld_error", 1),
    ("Maximum KLD", "kld_max", "", 1),
    ("99.9%   KLD", "kld_99.9", "", 1),
    ("99.0%   KLD", "kld_99", "", 1),
    ("Median  KLD", "kld_50", "", 1),
    ("Mean Δp, %", "dp_mean", "", 100),
    ("RMS Δp, %", "dp_rms", "dp_rms_error", 100),
    ("Same top p, %", "same_top", "same_top_error", 100),
)
