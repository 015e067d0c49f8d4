"""Quality of every tool's artifacts on the same calibration tokens, in the same formats, by the same check.

    make oracles
    python tests/bench/quality.py CHECKPOINT [--recipe demo] [--windows 100] [--keep FOLDER] [--only gptq-int4 ...]

Builds each format with qquant and with the tools of that format (auto-gptq with Qwen's settings, gptqmodel's defaults, autoawq,
llama-quantize with qquant's importance matrix), each in its pinned environment of `make oracles`, all from the calibration tokens of
the recipe. Every result is read back and compared with the checkpoint on held-out text in one lockstep pass. The last column is the
mean KL divergence of ours divided by theirs, with a 95 % interval from resampling windows (paired: the same windows for both).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from qquant import calibration, pipeline, recipe
from qquant.artifact import installed, open_weights
from qquant.calibration import Tokenizer
from qquant.checkpoint import Checkpoint
from qquant.checks import fidelity
from qquant.checks.review import held_out
from qquant.plan import Plan
from qquant.recipe import AwqArtifact, Checks, GgufArtifact, GptqArtifact

ROOT = Path(__file__).resolve().parents[2]
ORACLES = ROOT / ".oracles"
RUNNERS = ROOT / "tests" / "oracles"
GGUF = ("q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
OURS = {
    "gptq-int4": GptqArtifact(name="gptq-int4", format="gptq", bits=4),
    "gptq-int8": GptqArtifact(name="gptq-int8", format="gptq", bits=8),
    "awq": AwqArtifact(name="awq", format="awq"),
} | {f"gguf-{kind}": GgufArtifact(name=f"gguf-{kind}", format="gguf", type=kind, solver="gptq") for kind in GGUF}


def theirs(name, source, tokens, imatrix, work):
    """(tool, command, result) for every rival of artifact `name`."""
    if name.startswith("gptq"):
        bits = ["--bits", name[-1]]
        yield (
            "auto-gptq",
            "auto-gptq",
            ["autogptq_quantize.py", source, tokens, work / "auto-gptq", *bits],
            work / "auto-gptq",
        )
        yield (
            "gptqmodel",
            "transformers",
            ["gptqmodel_quantize.py", source, tokens, work / "gptqmodel", *bits],
            work / "gptqmodel",
        )
    elif name == "awq":
        yield "autoawq", "auto-awq", ["autoawq_quantize.py", source, tokens, work / "autoawq"], work / "autoawq"
        command = ["gptqmodel_quantize.py", source, tokens, work / "gptqmodel", "--method", "awq"]
        yield "gptqmodel", "transformers", command, work / "gptqmodel"
    else:
        kind, full = name.removeprefix("gguf-"), work.parent / "full.gguf"
        if not full.exists():
            run("llama", ["llama_convert.py", source, full])
        command = ["llama_quantize.py", full, work / "llama.gguf", kind, "--imatrix", imatrix]
        yield "llama-quantize", "llama", command, work / "llama.gguf"


def run(environment, command):
    """Run a runner with its environment's python; (seconds, peak megabytes) as it reports them."""
    began = time.monotonic()
    words = [str(ORACLES / environment / "bin" / "python"), str(RUNNERS / command[0]), *map(str, command[1:])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\nfailed ({done.returncode}): {done.stderr[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    facts = json.loads(lines[-1]) if lines else {}
    return facts.get("seconds", round(time.monotonic() - began, 1)), facts.get("peak_mb", "")


def build_ours(base, checkpoint, name, out):
    """(path, seconds, peak megabytes of this process so far) of our artifact."""
    import resource

    loaded = base.model_copy(
        update={"artifacts": (OURS[name],), "checks": Checks(text="bundled:zh-test", windows=1, length=32)}
    )
    plan = Plan.of(loaded, checkpoint)
    began = time.monotonic()
    pipeline.build(loaded, checkpoint, plan, out, torch.device("cpu"), lambda *_: None)
    return (
        installed(out, plan.artifacts[0]),
        round(time.monotonic() - began, 1),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    )


def interval(ours, other, draws=2000):
    """Ratio of mean KL divergences and its 95 % interval, windows resampled."""
    a, b = ours.kl.mean(1).numpy(), other.kl.mean(1).numpy()
    picks = np.random.default_rng(0).integers(0, len(a), (draws, len(a)))
    ratios = a[picks].mean(1) / b[picks].mean(1)
    return a.mean() / b.mean(), *np.quantile(ratios, [0.025, 0.975])


def main():
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--keep", type=Path, help="keep (and reuse) what was built here")
    parser.add_argument("--only", nargs="*", default=list(OURS), choices=list(OURS))
    options = parser.parse_args()
    work = options.keep or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, base = Checkpoint.open(options.checkpoint), recipe.load(options.recipe)
    tokenizer = Tokenizer.open(checkpoint.path)
    samples = calibration.load(base.calibration, tokenizer, template_expected=False)
    whole = [torch.as_tensor(sample) for sample in samples.tokens if len(sample) == base.calibration.length]
    if len(whole) < len(samples.tokens):
        raise SystemExit("the runners take samples of one length: use a recipe with plain texts only")
    save_file({"tokens": torch.stack(whole).int()}, work / "tokens.safetensors")
    built, facts = {}, {}
    for name in options.only:
        folder = work / name
        folder.mkdir(exist_ok=True)
        path, seconds, peak = build_ours(base, checkpoint, name, folder / "qquant")
        built[name, "qquant"], facts[name, "qquant"] = path, (seconds, peak)
        imatrix = folder / "qquant" / "calibration" / "imatrix.gguf"
        for tool, environment, command, result in theirs(
            name, checkpoint.path, work / "tokens.safetensors", imatrix, folder
        ):
            if not result.exists():
                facts[name, tool] = run(environment, command)
            built[name, tool] = result
        print(f"built {name}", file=sys.stderr)
    text = held_out(Checks(text="bundled:wikitext-2-test", windows=options.windows, length=512), tokenizer)
    sources = {f"{name} {tool}": open_weights(path) for (name, tool), path in built.items()}
    measured = fidelity.measure(checkpoint, sources, text.scored(text.windows), torch.device("cpu"), lambda *_: None)
    print(
        "| format | tool | bytes | perplexity ratio | mean KL | 99 % KL | top-1 | ours / theirs [95 %] | seconds | peak MB |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for (name, tool), path in built.items():
        found = measured[f"{name} {tool}"]
        size = (
            path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))
        )
        ratio = (
            "" if tool == "qquant" else "{:.3f} [{:.3f}, {:.3f}]".format(*interval(measured[f"{name} qquant"], found))
        )
        seconds, peak = facts.get((name, tool), ("", ""))
        high = float(found.kl.flatten().quantile(0.99))
        print(
            f"| {name} | {tool} | {size:,} | {found.perplexity_ratio:.4f} | {found.mean_kl:.6f} | {high:.5f} "
            f"| {found.top1:.4f} | {ratio} | {seconds} | {peak} |"
        )


if __name__ == "__main__":
    main()
