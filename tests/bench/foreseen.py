"""Seconds that `qquant plan` foresees against those that a build takes, phase by phase, on the demo checkpoint and on random weights of real widths.

    python -m tests.bench.foreseen --work FOLDER [--shapes calibrate demo 0.5B 1.8B 7B] [--threads 2] [--clock processor|wall] [--out FILE]

`calibrate` is `qquant doctor --calibrate`, whose factors stay in FOLDER for the shapes after it; each shape is `plan`'s seconds and a build, in a process of its own with so many threads.
On a machine that others use the clock on the wall says nothing: `processor` counts this process's seconds and its children's in place of it, in
the probe, in the calibration and in the build alike. With one thread that is what a quiet machine would take; with more, what waits in a loop
counts as work. `--profile`: also where the build's seconds went, function by function.
"""

import argparse
import cProfile
import json
import os
import pstats
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from tests.bench.memory import ENTRIES, write_random
from tests.worlds import ROOT, importing

LAYERS = {"0.5B": 2, "1.8B": 1, "7B": 1}
SAMPLES = {"demo": 24, "0.5B": 8, "1.8B": 5, "7B": 5}  # of the calibration
LENGTH = {"0.5B": 512, "1.8B": 384, "7B": 128}
CALIBRATE = "calibrate"
EFFORT = {"0.5B": "default", "1.8B": "default", "7B": "fast"}  # minutes of one processor each
WINDOWS = {"demo": 10, "0.5B": 2, "1.8B": 2, "7B": 2}
RECIPE = """
version: 1
name: foreseen
calibration:
  sources: [{{bundled: books-en}}, {{bundled: code}}, {{bundled: wikitext-2-valid}}, {{bundled: docs-zh}}, {{bundled: docs-en}}]
  samples: {samples}
  length: {length}
  default_system_share: 0
checks: {{text: "bundled:wikitext-2-test", windows: {windows}, length: 256, answer_length: 0}}
artifacts:  # what random weights predict is not judged
"""


def processor():
    """Seconds of this process and of its children that ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


CLOCKS = {"wall": time.monotonic, "processor": processor}


def asked(shape, options):
    """Recipe and checkpoint of a shape."""
    from qquant import recipe
    from qquant.plan.asked import Asked
    from qquant.recipe.changes import Flags
    from qquant.source.checkpoint import Checkpoint

    if shape == "demo":
        settings = [
            f"calibration.samples={SAMPLES[shape]}",
            f"checks.windows={WINDOWS[shape]}",
            "checks.max_windows=null",
        ]
        return Asked(None, "demo", flags=Flags(settings=tuple(settings))).open()
    folder = options.work / shape
    if not folder.exists():
        write_random(folder, shape, LAYERS[shape])
    text = RECIPE.format(samples=SAMPLES[shape], length=LENGTH[shape], windows=WINDOWS[shape])
    return recipe.parse(f"effort: {EFFORT[shape]}\n{text}  - {ENTRIES['gptq-int4']}\n"), Checkpoint.open(folder)


def one(shape, options):
    """What was foreseen and what it took, by phase, as plain data."""
    import torch

    from qquant import pipeline, progress, reference
    from qquant.plan import machine, seconds
    from qquant.plan.plan import Plan

    clock = CLOCKS[options.clock]
    for module in (progress, seconds):
        module.time = SimpleNamespace(monotonic=clock, perf_counter=clock)
    device = torch.device("cpu")
    if shape == CALIBRATE:
        began = clock()
        found = reference.measure(device, progress.Quiet())
        machine.keep(found, device)
        return {
            "shape": shape,
            "threads": found.threads,
            "clock": options.clock,
            "factors": dict(found.factors),
            "rates": {width: vars(rates) for width, rates in found.rates.items()},
            "whole": clock() - began,
        }
    recipe, checkpoint = asked(shape, options)
    plan = Plan.of(recipe, checkpoint)
    known = machine.measured(device)
    rates = known.rates_for(checkpoint) if known else seconds.probe(checkpoint, device)
    counted = seconds.seconds(recipe, checkpoint, plan, rates, device)
    out = options.work / f"built-{shape}"
    shutil.rmtree(out, ignore_errors=True)
    profile = cProfile.Profile(time.process_time)
    timed = progress.Timed(progress.Quiet())
    began = clock()
    if options.profile:
        profile.enable()
    pipeline.build(recipe, checkpoint, plan, out, device, timed)
    profile.disable()
    timed.advance("report", 1, 1)
    whole = clock() - began
    if options.profile:
        profile.dump_stats(options.work / f"{shape}.prof")
        with (options.work / f"{shape}.prof.txt").open("w") as file:
            stats = pstats.Stats(profile, stream=file).sort_stats("tottime")
            stats.print_stats(60)
            stats.print_callers(40)
    shutil.rmtree(out)
    return {
        "shape": shape,
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "factors": dict(known.factors) if known else {},
        "rates": vars(rates),
        "probed again": vars(seconds.probe(checkpoint, device)),
        "work": {phase: vars(todo) for phase, todo in seconds.counted(recipe, checkpoint, plan, device).items()},
        "counted": counted,
        "foreseen": known.foreseen(counted) if known else counted,
        "took": timed.took,
        "whole": whole,
    }


def table(found):
    """Rows of Markdown: a phase each, and all of them."""
    both = found["took"].keys() | found["foreseen"].keys()
    order = [*found["took"], *(phase for phase in found["foreseen"] if phase not in found["took"])]
    rows = [
        (phase, found["foreseen"].get(phase, 0.0), found["took"].get(phase, 0.0)) for phase in order if phase in both
    ]
    rows.append(("all", sum(found["foreseen"].values()), found["whole"]))
    return [
        f"| {found['shape']} | {phase} | {foreseen:.1f} | {took:.1f} | {foreseen / took - 1 if took else 0:+.0%} |"
        for phase, foreseen, took in rows
    ]


def main():
    """Calibrate, foresee and build, shape by shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="a file for all numbers, as JSON lines")
    parser.add_argument("--shapes", nargs="+", choices=[CALIBRATE, *SAMPLES], default=[CALIBRATE, *SAMPLES])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="processor")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.child:
        print(json.dumps(one(options.shapes[0], options)))
        return
    print("| shape | phase | foreseen, s | took, s | error |\n|---|---|---:|---:|---:|", flush=True)
    settings = importing(
        XDG_CACHE_HOME=str(options.work / "cache"), OMP_NUM_THREADS=str(options.threads), TOKENIZERS_PARALLELISM="false"
    )
    for shape in options.shapes:
        command = [
            sys.executable,
            "-m",
            "tests.bench.foreseen",
            "--work",
            str(options.work),
            "--shapes",
            shape,
            "--child",
        ]
        command += ["--clock", options.clock, *(["--profile"] if options.profile else [])]
        run = subprocess.run(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, check=True)
        found = json.loads(run.stdout.splitlines()[-1])
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(found) + os.linesep)
        print(
            "\n".join(table(found)) if "took" in found else f"calibrated in {found['whole']:.1f} s: {found['factors']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
