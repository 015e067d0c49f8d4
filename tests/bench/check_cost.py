"""What a check of many artifacts costs against running the checkpoint alone.

    python -m tests.bench.check_cost WORK [--windows 12] [--memory MB]

--memory: what activations may take (by default a quarter of the free memory), so that windows go in groups.

Builds the eleven artifacts of the chat recipe from the demo checkpoint (rounded to nearest: their values do not matter here) into WORK, then
reads the same windows in fresh processes: the checkpoint alone, with one artifact, with all. Seconds are of the processor, one thread;
memory is the largest resident size of the process, less that of one that only imported everything.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

RECIPE = """
version: 1
name: cost
calibration: {sources: [{bundled: books-en}], samples: 1, length: 32, default_system_share: 0}
checks: {windows: 1, length: 32}
artifacts:
  - {name: gptq-int4, format: gptq, bits: 4, solver: rtn, scale_search: minmax}
  - {name: gptq-int8, format: gptq, bits: 8, solver: rtn, scale_search: minmax}
  - {name: awq, format: awq, solver: rtn, ratios: 1, scale_search: minmax}
"""
TYPES = ("q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_0", "q5_k_m", "q6_k", "q8_0")


def build(work):
    import torch

    from qquant import pipeline, recipe
    from qquant.plan.plan import Plan
    from qquant.progress import Quiet
    from qquant.source.checkpoint import Checkpoint

    lines = [f"  - {{name: {kind}, format: gguf, type: {kind}, imatrix: false}}\n" for kind in TYPES]
    work.mkdir(parents=True, exist_ok=True)
    (work / "recipe.yaml").write_text(RECIPE + "".join(lines))
    loaded, checkpoint = recipe.load(work / "recipe.yaml"), Checkpoint.open("bundled:tiny-qwen1.5")
    plan = Plan.of(loaded, checkpoint)
    pipeline.build(loaded, checkpoint, plan, work / "out", torch.device("cpu"), Quiet())


def child(paths, windows, memory):
    """Print seconds and peak bytes of reading `windows` windows of 512 tokens with the artifacts of `paths`."""
    import time

    import torch

    from qquant.artifact.opening import open_weights
    from qquant.calibration import Tokenizer
    from qquant.checks.fidelity import measure
    from qquant.checks.review import held_out
    from qquant.progress import Quiet
    from qquant.recipe import Checks
    from qquant.source.checkpoint import Checkpoint

    torch.set_num_threads(1)
    checkpoint = Checkpoint.open("bundled:tiny-qwen1.5")
    text = held_out(Checks(windows=max(windows, 1)), Tokenizer.open(checkpoint.path))
    sources = {path: open_weights(Path(path)) for path in paths}
    began = time.process_time()
    if windows:
        measure(checkpoint, sources, text.scored(text.windows), torch.device("cpu"), Quiet(), None, memory)
    seconds = time.process_time() - began
    status = Path("/proc/self/status").read_text()
    (peak,) = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")]
    print(json.dumps({"seconds": seconds, "peak": peak}))


def ask(paths, windows, memory=None):
    command = [sys.executable, "-m", "tests.bench.check_cost", "--child", json.dumps([str(path) for path in paths])]
    command += ["--windows", str(windows)]
    command += ["--memory", str(memory)] if memory else []
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--memory", type=float)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child), options.windows, options.memory and options.memory * 1e6)
        return
    if not (options.work / "out" / "report.json").is_file():
        build(options.work)
    out = options.work / "out"
    folders = [path for path in out.iterdir() if path.name.endswith(("Int4", "Int8", "AWQ"))]
    paths = sorted([*folders, *(path for path in out.rglob("*.gguf") if "calibration" not in str(path))])
    empty = ask([], 0)["peak"]
    states = options.windows * 512 * 256 * 4
    alone = ask([], options.windows, options.memory)
    print(f"{options.windows} windows of 512; hidden states of one model: {states / 1e6:.1f} MB")
    print(f"checkpoint alone   {alone['seconds']:7.1f} s                      {(alone['peak'] - empty) / 1e6:6.0f} MB")
    for count in (1, len(paths)):
        found = ask(paths[:count], options.windows, options.memory)
        more = (found["seconds"] / alone["seconds"] - 1) / count
        print(
            f"and {count:2} artifacts   {found['seconds']:7.1f} s, {found['seconds'] / alone['seconds']:5.2f} times, "
            f"{more:.2f} per artifact  {(found['peak'] - empty) / 1e6:6.0f} MB"
        )


if __name__ == "__main__":
    main()
