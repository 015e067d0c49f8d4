"""How much calibration a solver needs: GPTQ-Int4 of the demo checkpoint at 4 to 128 tokens a column, gradients on all or on a quarter.

    python -m tests.bench.tokens [--jobs 2] [--seeds 5] [--samples 16 32 64 128] [--windows 40] [--save tokens.json]

Every build runs in a process of its own on one thread; seeds choose the samples of 256 tokens. Prints mean KL divergence on windows of
WikiText-2 test (second half scored), processor seconds and peak memory of the build, and what a quarter of the gradients costs with
its 95 % interval (windows resampled, the same ones for both). Tokens a column are those of q, k, v, o, gate and up (256 columns; down has 768).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from qquant import pipeline, recipe
from qquant.artifact.finishing import installed
from qquant.artifact.opening import open_weights
from qquant.calibration import Tokenizer
from qquant.checks import fidelity
from qquant.checks.review import held_out
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.recipe import Checks, GptqArtifact
from qquant.resources import data_dir
from qquant.source.checkpoint import Checkpoint

COLUMNS, LENGTH = 256, 256
FEW = 4  # gradients on one sample of so many
SPEC = GptqArtifact(name="gptq-int4", format="gptq", bits=4)


def build(samples, share, seed, windows):
    """What one build took, and its divergence window by window."""
    checkpoint, base = Checkpoint.open(str(data_dir("recipes") / "demo" / "tiny-qwen1.5")), recipe.load("demo")
    tokens = samples * LENGTH
    asked = {"samples": samples, "length": LENGTH, "seed": seed, "curvature_tokens": max(tokens // share, LENGTH)}
    update = {"calibration": base.calibration.model_copy(update=asked), "artifacts": (SPEC,)}
    loaded = base.model_copy(update=update | {"checks": Checks(text="bundled:zh-test", windows=1, length=32)})
    plan = Plan.of(loaded, checkpoint)
    with tempfile.TemporaryDirectory() as out:
        began = time.process_time()
        pipeline.build(loaded, checkpoint, plan, Path(out), torch.device("cpu"), Quiet())
        seconds = time.process_time() - began
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
        text = held_out(
            Checks(text="bundled:wikitext-2-test", windows=windows, length=512), Tokenizer.open(checkpoint.path)
        )
        sources = {"built": open_weights(installed(Path(out), plan.artifacts[0]))}
        found = fidelity.measure(checkpoint, sources, text.scored(text.windows), torch.device("cpu"), Quiet())["built"]
    return {"seconds": seconds, "megabytes": peak, "kl": found.kl.mean(1).tolist()}


def in_a_process(windows, case):
    """The same in a process of its own, on one thread."""
    words = [sys.executable, "-m", "tests.bench.tokens", "--one", *map(str, case), "--windows", str(windows)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=settings)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\nfailed ({done.returncode}): {done.stderr[-2000:]}")
    print(f"built {case}", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def ratio(ours, others, draws=2000):
    """Mean of `ours` [seeds, windows] over that of `others`, with its 95 % interval."""
    picks = np.random.default_rng(0).integers(0, ours.shape[1], (draws, ours.shape[1]))
    low, high = np.quantile(ours.mean(0)[picks].mean(1) / others.mean(0)[picks].mean(1), [0.025, 0.975])
    return f"{ours.mean() / others.mean():.3f} [{low:.3f}, {high:.3f}]"


def show(found, counts):
    """Print the table. `found`: by (samples, share), a row for each seed."""
    print("| tokens a column | gradients on | mean KL | of seeds | KL / gradients on all | seconds | peak MB |")
    print("|---:|---|---:|---|---|---:|---:|")
    for samples in counts:
        for share in (1, FEW):
            rows = found[samples, share]
            kl = np.array([row["kl"] for row in rows])
            whole = np.array([row["kl"] for row in found[samples, 1]])
            seeds = f"{kl.mean(1).min():.6f} to {kl.mean(1).max():.6f}"
            seconds, peak = (np.mean([row[key] for row in rows]) for key in ("seconds", "megabytes"))
            against = "" if share == 1 else ratio(kl, whole)
            where = "all" if share == 1 else f"1/{share}"
            print(
                f"| {samples * LENGTH // COLUMNS} | {where} | {kl.mean():.6f} | {seeds} | {against} | {seconds:.1f} | {peak:.0f} |"
            )


def main():
    """One build, or all of them and their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, nargs="*", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--one", type=int, nargs=3, metavar=("SAMPLES", "SHARE", "SEED"))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(build(*options.one, options.windows)))
        return
    cases = [
        (samples, share, seed) for samples in options.samples for share in (1, FEW) for seed in range(options.seeds)
    ]
    cases.sort(reverse=True)  # the longest first
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = dict(zip(cases, pool.map(partial(in_a_process, options.windows), cases), strict=True))
    found = {
        (samples, share): [rows[samples, share, seed] for seed in range(options.seeds)]
        for samples in options.samples
        for share in (1, FEW)
    }
    if options.save:
        options.save.write_text(json.dumps([[*case, row] for case, row in rows.items()]))
    show(found, options.samples)


if __name__ == "__main__":
    main()
