"""Quality of every tool's artifacts on the same calibration tokens, in the same formats, by the same check.

    make oracles
    python tests/bench/quality.py CHECKPOINT [--recipe demo] [--windows 100] [--text bundled:code-test] [--keep FOLDER]
        [--only gptq-int4 ...] [--tools auto-round-200 llm-compressor ...] [--group-size 64]
    python tests/bench/quality.py CHECKPOINT --peers-only --keep FOLDER --save peers.json
    python tests/bench/quality.py CHECKPOINT --ours OUT --against peers.json

Builds each format with qquant and with the tools of that format (auto-gptq with Qwen's settings, gptqmodel's defaults, auto-round with
50 and 200 steps a block, llm-compressor's GPTQ, autoawq, llama-quantize with qquant's importance matrix), each in its pinned
environment of `make oracles`, all from the calibration tokens of the recipe. Every result is read back and compared with the checkpoint on held-out text in one lockstep pass. The last column but two
is the mean KL divergence of ours divided by theirs, with a 95 % interval from resampling windows (paired: the same windows for both).
Seconds are of the processor and peaks of the process, from its start: every artifact, ours too, is built in a process of its own.

What stands under --keep is not built again, and what it took is kept beside it. --ours takes artifacts that `qquant build` made elsewhere, from every output folder below
it. --save keeps what was measured, window by window, beside what the file has already; --against compares with the numbers of such a
file instead of building and measuring the peers again.
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from qquant import calibration, pipeline, recipe
from qquant.artifact.finishing import installed
from qquant.artifact.opening import open_weights
from qquant.calibration import Tokenizer
from qquant.checks import fidelity
from qquant.checks.review import held_out
from qquant.disk.output import MANIFEST
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.recipe import AwqArtifact, Checks, Gates, GgufArtifact, GptqArtifact
from qquant.source.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
ORACLES = ROOT / ".oracles"
FACTS = "facts.json"  # what every build under --keep took
IMATRIX = "imatrix"  # an artifact that is built for its importance matrix only
RUNNERS = ROOT / "tests" / "oracles"
DEQUANTIZED = (
    "dequantized"  # folder in an artifact of a format that qquant does not read: the same weights as a checkpoint
)
ROUNDED = {
    "gptq-int4": (50, 200),
    "gguf-q4_k_m": (0, 200),
}  # steps a block of auto-round; 0: its search of scales alone
GGUF = ("q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
PROPAGATED = ("q4_k_m", "q4_0", "q3_k_m", "q2_k")  # as in the published recipes
OURS = {
    "gptq-int4": GptqArtifact(name="gptq-int4", format="gptq", bits=4),
    "gptq-int8": GptqArtifact(name="gptq-int8", format="gptq", bits=8, propagate=False),
    "awq": AwqArtifact(name="awq", format="awq"),
} | {
    f"gguf-{kind}": GgufArtifact(
        name=f"gguf-{kind}", format="gguf", type=kind, solver="gptq", propagate=kind in PROPAGATED
    )
    for kind in GGUF
}


def theirs(name, source, work, group_size):
    """(tool, environment, command, result) for every rival of artifact `name`."""
    tokens = work.parent / "tokens.safetensors"
    size = ["--group-size", group_size]
    rounded = "auto_gptq" if name == "gptq-int4" else name.replace("gguf-", "gguf:")
    if name in ROUNDED:
        for steps in ROUNDED[name]:
            tool = f"auto-round-{steps}"
            result = work / (f"{tool}.gguf" if ":" in rounded else tool)
            command = ["autoround_quantize.py", source, tokens, result, "--format", rounded, "--iters", steps, *size]
            yield tool, "autoround", command, result
    if name == "gptq-int4":
        result = work / "llm-compressor"
        command = ["llmcompressor_quantize.py", source, tokens, result, *size, "--dequantized", result / DEQUANTIZED]
        yield "llm-compressor", "llmcompressor", command, result
    if name.startswith("gptq"):
        for tool, environment in (("auto-gptq", "auto-gptq"), ("gptqmodel", "transformers")):
            runner = f"{tool.replace('-', '')}_quantize.py"
            command = [runner, source, tokens, work / tool, "--bits", name[-1], *size]
            yield tool, environment, command, work / tool
    elif name == "awq":
        yield "autoawq", "auto-awq", ["autoawq_quantize.py", source, tokens, work / "autoawq", *size], work / "autoawq"
        command = ["gptqmodel_quantize.py", source, tokens, work / "gptqmodel", "--method", "awq", *size]
        yield "gptqmodel", "transformers", command, work / "gptqmodel"
    else:
        kind, full, result = name.removeprefix("gguf-"), work.parent / "full.gguf", work / "llama.gguf"
        command = ["llama_quantize.py", full, result, kind, "--imatrix", imatrix_of(work.parent)]
        yield "llama-quantize", "llama", command, result


def run(environment, command):
    """Run a runner with its environment's python; (processor seconds, peak megabytes) as it reports them."""
    words = [str(ORACLES / environment / "bin" / "python"), str(RUNNERS / command[0]), *map(str, command[1:])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\nfailed ({done.returncode}): {done.stderr[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    facts = json.loads(lines[-1]) if lines else {}
    return facts.get("processor_seconds", ""), facts.get("peak_mb", "")


def imatrix_of(keep):
    """The importance matrix that `ready` left for llama-quantize."""
    return keep / IMATRIX / "calibration" / "imatrix.gguf"


def ready(base, checkpoint, keep):
    """What llama-quantize starts from, in `keep`: the checkpoint as f32 GGUF, and our importance matrix (one forward pass); `build_ours`'s facts of that."""
    if not (keep / "full.gguf").exists():
        run("llama", ["llama_convert.py", checkpoint.path, keep / "full.gguf"])
    spec = GgufArtifact(name=IMATRIX, format="gguf", type="q8_0", gates=Gates(defaults=False))
    return build_ours(base, checkpoint, spec, keep / IMATRIX)[1:]


def spec_of(base, name, group_size):
    """What the recipe builds in this format, else its defaults; in groups of `group_size`, if the format has a choice."""
    found = next((spec for spec in base.artifacts if kind_of(spec.model_dump()) == name), OURS[name])
    return found.model_copy(update={"group_size": group_size}) if hasattr(found, "group_size") else found


def kind_of(spec):
    """The key of `OURS` for an artifact of a recipe."""
    match spec["format"]:
        case "gptq":
            return f"gptq-int{spec['bits']}"
        case "gguf":
            return f"gguf-{spec['type']}"
    return spec["format"]


def build_ours(base, checkpoint, spec, out):
    """(path, processor seconds, peak megabytes) of our artifact, from a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(build_here, (base, checkpoint.path, spec, out))


def build_here(base, path, spec, out):
    """The same, of this process since it began."""
    checkpoint = Checkpoint.open(str(path))
    checks = Checks(text="bundled:zh-test", windows=1, length=32)
    loaded = base.model_copy(update={"artifacts": (spec,), "checks": checks})
    plan = Plan.of(loaded, checkpoint)
    pipeline.build(loaded, checkpoint, plan, out, torch.device("cpu"), Quiet())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return installed(out, plan.artifacts[0]), round(sum(os.times()[:4]), 1), peak


def made(folder):
    """Format -> path of every artifact of ours in the output folders below `folder`."""
    found = {}
    for path in sorted(folder.rglob(MANIFEST)):
        for name, entry in json.loads(path.read_text())["artifacts"].items():
            spec = next(spec for spec in entry["recipe"]["artifacts"] if spec["name"] == name)
            files = [path.parent / file for file in entry["files"] if file.endswith(".gguf")]
            place = files[0] if files else path.parent
            if name == IMATRIX:
                continue
            if kind_of(spec) in found:
                raise SystemExit(
                    f"{place} and {found[kind_of(spec)]}: both are {kind_of(spec)}. Give --ours one of them"
                )
            found[kind_of(spec)] = place
    return found


def taken(keep):
    """What the builds under `keep` took, by "format tool"."""
    path = keep / FACTS
    return json.loads(path.read_text()) if path.exists() else {}


def build(base, checkpoint, options):
    """Paths and (processor seconds, megabytes) by (format, tool): ours and theirs, built where they are not there yet."""
    built, facts = {}, taken(options.keep)
    ours = made(options.ours) if options.ours else {}

    def note(name, tool, took):
        facts.update(taken(options.keep))  # another may have written meanwhile
        facts[f"{name} {tool}"] = took
        (options.keep / FACTS).write_text(json.dumps(facts, indent=1))

    for name in options.only:
        folder = options.keep / name
        folder.mkdir(exist_ok=True)
        if options.ours and name in ours:
            built[name, "qquant"] = ours[name]
        elif not options.ours and not options.peers_only:
            if f"{name} qquant" not in facts:
                spec = spec_of(base, name, options.group_size)
                note(name, "qquant", build_ours(base, checkpoint, spec, folder / "qquant")[1:])
            built[name, "qquant"] = made(folder / "qquant")[name]
        if not options.against:
            for tool, environment, command, result in theirs(name, checkpoint.path, folder, options.group_size):
                if options.tools is not None and tool not in options.tools:
                    continue
                if tool == "llama-quantize" and not imatrix_of(options.keep).exists():
                    note(IMATRIX, "qquant", ready(base, checkpoint, options.keep))
                if not result.exists():
                    note(name, tool, run(environment, command))
                built[name, tool] = result
        print(f"built {name}", file=sys.stderr)
    return built, facts


def readable(path):
    """Where the weights of an artifact are in a format that qquant reads."""
    return path / DEQUANTIZED if (path / DEQUANTIZED).is_dir() else path


def measure(checkpoint, built, text):
    """What the table says of every artifact, by "format tool"; `kl`: the mean of every window."""
    sources = {f"{name} {tool}": open_weights(readable(path)) for (name, tool), path in built.items()}
    found = fidelity.measure(checkpoint, sources, text.scored(text.windows), torch.device("cpu"), Quiet())
    rows = {}
    for (name, tool), path in built.items():
        one = found[f"{name} {tool}"]
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        rows[f"{name} {tool}"] = {
            "bytes": sum(file.stat().st_size for file in files),
            "perplexity_ratio": one.perplexity_ratio,
            "kl99": float(one.kl.flatten().quantile(0.99)),
            "top1": one.top1,
            "kl": one.kl.mean(1).tolist(),
        }
    return rows


def interval(ours, other, draws=2000):
    """Ratio of mean KL divergences and its 95 % interval, windows resampled."""
    a, b = np.array(ours["kl"]), np.array(other["kl"])
    picks = np.random.default_rng(0).integers(0, len(a), (draws, len(a)))
    ratios = a[picks].mean(1) / b[picks].mean(1)
    return a.mean() / b.mean(), *np.quantile(ratios, [0.025, 0.975])


def show(rows, facts):
    """Print the table."""
    columns = "format | tool | bytes | perplexity ratio | mean KL | 99 % KL | top-1 | ours / theirs [95 %] | processor seconds | peak MB"
    print(f"| {columns} |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for key, row in sorted(rows.items(), key=lambda item: list(OURS).index(item[0].split()[0])):
        name, tool = key.split()
        ours = rows.get(f"{name} qquant")
        ratio = "" if tool == "qquant" or not ours else "{:.3f} [{:.3f}, {:.3f}]".format(*interval(ours, row))
        seconds, peak = facts.get(key, ("", ""))
        print(
            f"| {name} | {tool} | {row['bytes']:,} | {row['perplexity_ratio']:.4f} | {np.mean(row['kl']):.7f} "
            f"| {row['kl99']:.5f} | {row['top1']:.4f} | {ratio} | {seconds} | {peak} |"
        )


def stored(path, conditions):
    """The rows of a file that --save wrote."""
    content = json.loads(path.read_text())
    if content["conditions"] != conditions:
        raise SystemExit(f"{path}: was measured on {content['conditions']}, not on {conditions}")
    return content["rows"]


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--group-size", type=int, default=128, help="of GPTQ and AWQ, for every tool")
    parser.add_argument("--windows", type=int, default=100, help="of 512 tokens, the second half scored")
    parser.add_argument("--text", default="bundled:wikitext-2-test", help="held out, as in a recipe's checks")
    parser.add_argument("--keep", type=Path, help="keep (and reuse) what was built here")
    parser.add_argument("--only", nargs="*", default=list(OURS), choices=list(OURS))
    parser.add_argument("--tools", nargs="*", help="of the others, these alone, or none; default: all")
    parser.add_argument("--ours", type=Path, help="artifacts of ours that were built elsewhere; none is built")
    parser.add_argument("--peers-only", action="store_true", help="build and measure the other tools' artifacts only")
    parser.add_argument("--save", type=Path, help="keep what was measured, as JSON")
    parser.add_argument(
        "--against", type=Path, help="the other tools' numbers from this file instead of building theirs"
    )
    options = parser.parse_args()
    if options.peers_only and (options.ours or options.against):
        parser.error("--peers-only leaves nothing to do for --ours and --against")
    options.keep = options.keep or Path(tempfile.mkdtemp())
    options.keep.mkdir(parents=True, exist_ok=True)
    return options


def main():
    """Build, measure, print."""
    options = arguments()
    checkpoint, base = Checkpoint.open(options.checkpoint), recipe.load(options.recipe)
    tokenizer = Tokenizer.open(checkpoint.path)
    samples = calibration.load(base.calibration, tokenizer, template_expected=False)
    whole = [torch.as_tensor(sample) for sample in samples.tokens if len(sample) == base.calibration.length]
    if len(whole) < len(samples.tokens):
        raise SystemExit("the runners take samples of one length: use a recipe with plain texts only")
    save_file({"tokens": torch.stack(whole).int()}, options.keep / "tokens.safetensors")
    text = held_out(Checks(text=options.text, windows=options.windows, length=512), tokenizer)
    conditions = {
        "checkpoint": checkpoint.content_hash(),
        "calibration": samples.sha256,
        "group_size": options.group_size,
    }
    conditions |= {"windows": options.windows, "tokens_sha256": text.facts.tokens_sha256}
    peers = stored(options.against, conditions) if options.against else {}
    built, facts = build(base, checkpoint, options)
    if not built:
        raise SystemExit(f"{options.ours}: no artifact of the formats asked for stands below it")
    formats = {name for name, _ in built}
    rows = measure(checkpoint, built, text) | {
        key: row for key, row in peers.items() if key.split()[0] in formats and not key.endswith(" qquant")
    }
    if options.save:
        before = stored(options.save, conditions) if options.save.exists() else {}
        options.save.write_text(json.dumps({"conditions": conditions, "rows": before | rows}))
    show(rows, facts)
    if f"{IMATRIX} qquant" in facts:
        print("The importance matrix took {} processor seconds and {} MB.".format(*facts[f"{IMATRIX} qquant"]))


if __name__ == "__main__":
    main()
