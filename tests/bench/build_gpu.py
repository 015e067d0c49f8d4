"""A build on random weights of a real shape on a GPU: seconds by phase, and peak GPU memory.

    python -m tests.bench.build_gpu --work /dev/shm/build --out FOLDER [--shape 7B] [--sets gptq-int4 all ...] [--samples 128]

Random bf16 weights of the exact shape, calibration tokens of the bundled corpora (128 x 2048 by default). The check runs on a few
windows; its seconds are listed apart. Results go to FOLDER/build.json after every step. `--resume` goes on with what an interrupted run left.
"""

import argparse
import json
import shutil
import time
from collections import defaultdict
from pathlib import Path

import torch

from qquant import pipeline, recipe
from qquant.algorithms import coupled, descent, gptq
from qquant.algorithms.grid import UniformGrid
from qquant.artifact import draft
from qquant.checks import loading, review
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.solve import curvature, outside, propagate, solver, walk
from qquant.source.checkpoint import Checkpoint
from tests.bench.memory import write_random

RECIPE = """
version: 1
name: build-gpu
calibration:
  sources: [{{bundled: code}}, {{bundled: wikitext-2-valid}}, {{bundled: docs-zh}}, {{bundled: docs-en}}, {{bundled: books-en}}]
  samples: {samples}
  length: 2048
  default_system_share: 0
  objective: {objective}
checks: {{text: "bundled:zh-test", windows: 4, length: 512}}
artifacts:
  - {{name: gptq-int4, format: gptq, bits: 4{ways}}}
  - {{name: gptq-int8, format: gptq, bits: 8{ways}}}
  - {{name: awq, format: awq{ways}}}
"""
GGUF = ("q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_0", "q5_k_m", "q6_k", "q8_0")


class Clock:
    """Seconds spent in functions, by name; nested ones count in both."""

    def __init__(self):
        self.seconds = defaultdict(float)

    def watch(self, owner, name, label):
        """Replace owner.name by a timed version, if there is one."""
        inner = getattr(owner, name, None)
        if inner is None:
            print(f"{label}: not timed, {owner.__name__} has no {name}")
            return

        def timed(*args, **kwargs):
            torch.cuda.synchronize()
            began = time.monotonic()
            try:
                return inner(*args, **kwargs)
            finally:
                torch.cuda.synchronize()
                self.seconds[label] += time.monotonic() - began

        setattr(owner, name, timed)


class Progress(Quiet):
    """Writes down after every step how far a build is, so that one that is cut off has been measured too."""

    def __init__(self, name, clock, path, results):
        self.name, self.clock, self.path, self.results = name, clock, path, results
        self.began = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def note(self, what, done, of):
        """Seconds since the build began."""
        seconds = time.monotonic() - self.began
        peak = torch.cuda.max_memory_allocated() / 1e9
        self.results[self.name] = {
            "total": seconds,
            "at": f"{what} {done} of {of}",
            "peak_gpu_gb": peak,
            **self.clock.seconds,
        }
        self.path.write_text(json.dumps(self.results, indent=1))
        return seconds

    def advance(self, what, done, of):
        """As a build reports it."""
        print(f"{self.name}: {what} {done} of {of}: {self.note(what, done, of):.1f} s", flush=True)


def spoken(child):
    """`loading._child` that shows what a clean process said, and when."""

    def timed(*given):
        began = time.monotonic()
        lines, problem = child(*given)
        print(f"clean process, {time.monotonic() - began:.1f} s: {[line.decode()[-200:] for line in lines]} {problem}")
        return lines, problem

    return timed


def main():
    """Build each requested set and print its phases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="7B")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sets", nargs="*", default=["gptq-int4"], help="comma-separated artifacts, or all")
    parser.add_argument("--plain", action="store_true", help="objective: output, propagate: false, sweeps: 0")
    parser.add_argument(
        "--whole", action="store_true", help="time phases alone: a clock in every step waits for the GPU"
    )
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run has finished")
    options = parser.parse_args()
    began = time.monotonic()
    folder = options.work / "model"
    if not folder.exists():
        write_random(folder, options.shape, options.layers, "cuda", shards=4)
    print(f"random checkpoint: {time.monotonic() - began:.1f} s", flush=True)
    path = options.work / "recipe.yaml"
    path.write_text(
        RECIPE.format(
            samples=options.samples,
            objective="output" if options.plain else "kl",
            ways=", propagate: false, sweeps: 0" if options.plain else "",
        )
        + "".join(f"  - {{name: gguf-{t}, format: gguf, type: {t}}}\n" for t in GGUF)
    )
    loaded, results = recipe.load(str(path)), {}
    clock = Clock()
    for owner, name, label in (
        (pipeline.calibration, "load", "calibration"),
        (Checkpoint, "content_hash", "hash of the checkpoint"),
        (Checkpoint, "block", "read blocks"),
        (walk, "measure", "curvature"),
        (walk.Stream, "advance", "forward and Gram"),
        (walk, "transform", "AWQ search"),
        (gptq, "factorize", "factorise"),
        (solver.Solver, "_round", "solve"),
        (propagate, "drift", "own stream: forward, Gram and drift"),
        (propagate, "_targets", "own stream: correction"),
        (descent, "sweep", "sweeps"),
        (descent, "refit", "scales refitted"),
        (coupled, "sweep", "coupled sweeps"),
        (UniformGrid, "fit", "scale search"),
        (curvature, "backward", "curvature: blocks"),
        (solver.Solver, "_store", "GGUF blocks"),
        (draft.Draft, "write", "write"),
        (draft.Draft, "finish", "read back and rename"),
        (outside, "_write_group", "other tensors"),
        (outside._Table, "solve", "embedding and head"),
        (review, "_read", "check: windows"),
        (review.loading, "examine", "check: clean processes, beside the windows"),
        (review.sanity, "answer", "check: answers"),
        (pipeline, "review", "check"),
        (pipeline.owning, "finish", "end: read back and named"),
        (pipeline, "write_imatrix", "end: importance matrix"),
        (pipeline, "_judge", "end: judged, with the check"),
    ):
        if not options.whole or label.startswith(("calibration", "hash", "check", "end")):
            clock.watch(owner, name, label)
    loading._child = spoken(loading._child)
    for chosen in options.sets:
        only = () if chosen == "all" else chosen.split(",")
        checkpoint = Checkpoint.open(folder)
        out = options.work / "out"
        if not options.resume:
            shutil.rmtree(out, ignore_errors=True)
        clock.seconds.clear()
        torch.cuda.reset_peak_memory_stats()
        progress = Progress(chosen, clock, options.out / ("plain.json" if options.plain else "build.json"), results)
        report = pipeline.build(
            loaded, checkpoint, Plan.of(loaded, checkpoint, only), out, torch.device("cuda"), progress
        )
        total = progress.note("whole", 1, 1)
        verdicts = ", ".join(f"{row.name} {row.verdict.outcome}" for row in report.artifacts)
        print(f"{chosen}: {verdicts}; peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
        print(f"{chosen}: {total:.1f} s in all, {total - clock.seconds['check']:.1f} s without the check")
        for label, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
            print(f"  {seconds:7.1f} s  {label}", flush=True)


if __name__ == "__main__":
    main()
