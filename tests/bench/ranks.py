"""A build on 1, 2, 4, ... ranks of one host: the same bytes or not, seconds by phase, peak memory and bytes sent of each rank.

    python -m tests.bench.ranks --work FOLDER --out FOLDER [--shape demo|toy|0.5B|1.8B|7B] [--layers 32] [--samples 128] [--length 2048]
                                [--worlds 1 2 4] [--only gptq-int4 q4_k_m ...] [--windows 16] [--device auto] [--stop 20]

    python -m tests.bench.ranks --work /dev/shm/r --out OUT --shape 7B                         eleven artifacts on 1, 2 and 4 GPUs
    python -m tests.bench.ranks --work /dev/shm/r --out OUT --shape 7B --only gptq-int4        one artifact by all of them together
    python -m tests.bench.ranks --work W --out OUT --shape toy --layers 2 --samples 12 --length 256 --windows 2 --device cpu --worlds 1 2

`demo`: the bundled checkpoint by its recipe; else random bf16 weights of the shape, and a recipe of the eleven published artifacts with
random weights' verdicts asked of nobody. Every rank is a process with a GPU of its own where there are some (NVLink multicast off), with
`--device cpu` one thread; more ranks than GPUs share them. `--only` of one artifact is made by all ranks together, of several each by one. Each world
builds into the same folder, which is hashed and removed. `--stop S`: S seconds into it the first world above 1 is ended, and the next
number of ranks continues. Numbers and hashes go to FOLDER/ranks.json after every world, what ranks say to FOLDER/ranks-<world>.log; a
summary is printed, of a world that fails the last lines of that. "read back": from the last block to the last artifact with its name.
"waited": for other ranks' words and tensors, which is part of the phases. What ranks hand each other is printed by what it is for, of one
artifact beside the least that the scheme needs (`tests.bench.handed`).

On a machine that others use, processor seconds say more than the clock: those of the slowest rank in each phase, summed, are what a build
would take if every rank had a core of its own.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.bench import handed
from tests.worlds import ROOT, importing

RECIPE = """
version: 1
name: ranks
calibration:
  sources: [{{bundled: code}}, {{bundled: wikitext-2-valid}}, {{bundled: docs-zh}}, {{bundled: docs-en}}, {{bundled: books-en}}]
  samples: {samples}
  length: {length}
  default_system_share: 0
checks: {{text: "bundled:zh-test", windows: {windows}, length: 512}}
artifacts:
"""
TAIL = 40  # lines that are shown of ranks that failed
LAUNCHER = "torch/distributed/elastic"  # in the first line that torchrun writes of ranks that failed
FOLDERS = {"gptq-int4": "format: gptq, bits: 4", "gptq-int8": "format: gptq, bits: 8", "awq": "format: awq"}
GGUF = ("q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_0", "q5_k_m", "q6_k", "q8_0")


def prepare(options):
    """Write a recipe, and a checkpoint where none is there."""
    from qquant.resources import data_dir

    if options.shape == "demo":
        text = (data_dir("recipes") / "demo.yaml").read_text()
        text = text.replace("samples: 96", f"samples: {options.samples or 96}")
        (options.work / "ranks.yaml").write_text(text.replace("windows: 40", f"windows: {options.windows or 40}"))
        return
    import torch

    from tests.bench.memory import write_random

    if not (options.work / "model").exists():
        place = "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
        write_random(options.work / "model", options.shape, options.layers, place, shards=4)
    entries = FOLDERS | {name: f"format: gguf, type: {name}" for name in GGUF}
    lines = [f"  - {{name: {name}, {entry}, gates: {{defaults: false}}}}\n" for name, entry in entries.items()]
    text = RECIPE.format(samples=options.samples or 128, length=options.length, windows=options.windows or 16)
    (options.work / "ranks.yaml").write_text(text + "".join(lines))


class Clock:
    """Progress of a rank: seconds up to every step, by its phase, of the clock and of the processor."""

    def __init__(self):
        self.began = time.monotonic()
        self.last = self.began, time.process_time()
        self.phases = {}
        self.inside = Counter()

    def advance(self, phase, done, of):
        """As a build reports it."""
        now = time.monotonic(), time.process_time()
        known = self.phases.get(phase, (0.0, 0.0))
        self.phases[phase] = tuple(known[i] + now[i] - self.last[i] for i in range(2))
        self.last = now

    def at(self, what):
        """Not of interest."""

    def check_stop(self):
        """Never."""

    def watch(self, owner, name, label):
        """Count the seconds that owner.name takes among those of `label`."""
        inner = getattr(owner, name)

        def timed(*given, **named):
            began = time.monotonic()
            try:
                return inner(*given, **named)
            finally:
                self.inside[label] += time.monotonic() - began

        setattr(owner, name, timed)


def rank_main(options):
    """Build as one rank, and leave what it took."""
    import torch

    from qquant import exchange, pipeline, recipe
    from qquant.artifact import owning
    from qquant.cli import together
    from qquant.plan.plan import Plan
    from qquant.resources import data_dir
    from qquant.source.checkpoint import Checkpoint

    if options.device == "cpu":
        torch.set_num_threads(int(options.threads))
    demo = options.shape == "demo"
    folder = data_dir("recipes") / "demo" / "tiny-qwen1.5" if demo else options.work / "model"
    with together.joined(os.environ, ["build"]) as ranks:
        device = together.device_of(options.device, ranks)
        loaded, source, clock = recipe.load(str(options.work / "ranks.yaml")), Checkpoint.open(folder), Clock()
        plan = Plan.of(loaded, source, tuple(options.only))
        clock.watch(owning, "finish", "read back")
        clock.watch(exchange.Exchange, "say", "waited")
        clock.watch(exchange.Exchange, "_moved", "waited")
        sent = handed.Handed(ranks)
        sent.watch(exchange.Exchange)
        pipeline.build(loaded, source, plan, options.work / "built", device, clock, ranks)
        whole = time.monotonic() - clock.began
        on_cuda = device.type == "cuda"
        clock.advance("end", 1, 1)
        found = {
            "seconds": whole,
            "phases": {phase: round(took, 2) for phase, (took, _) in clock.phases.items()},
            "processor": {phase: round(took, 2) for phase, (_, took) in clock.phases.items()},
            "inside": {label: round(took, 2) for label, took in clock.inside.items()},
            "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if on_cuda else None,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if on_cuda else None,
            "sent_gb": ranks.sent / 1e9,
            "handed": sent.bytes,
            "times": sent.times,
            "least": handed.least(loaded, source, plan, ranks.world) if len(plan.artifacts) == 1 else {},
            "layers": source.config.layers,
            "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        }
        (options.work / f"rank-{ranks.rank}.json").write_text(json.dumps(found))


def start(world, options):
    """The process of a group of `world` ranks."""
    settings = {"NCCL_NVLS_ENABLE": "0", "TOKENIZERS_PARALLELISM": "false"}
    if options.device == "cpu":
        settings["OMP_NUM_THREADS"] = options.threads
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    command = [sys.executable, *launcher, "-m", "tests.bench.ranks", *sys.argv[1:], "--rank"]
    with log_of(world, options).open("wb") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=importing(**settings), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def last_words(world, options):
    """The last lines of what ranks said before their launcher did."""
    lines = log_of(world, options).read_text(errors="replace").splitlines()
    launcher = next((number for number, line in enumerate(lines) if LAUNCHER in line), 0)
    return lines[: launcher or None][-TAIL:]


def log_of(world, options):
    """The file of what ranks say."""
    return options.out / f"ranks-{world}.log"


def hashes(folder):
    """sha256 by file, without the one that tells the time."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timings.json"
    }


def measured(world, options):
    """One build by `world` ranks: what it took, and what it wrote."""
    for path in options.work.glob("rank-*.json"):
        path.unlink()
    began = time.monotonic()
    status = start(world, options).wait()
    whole = time.monotonic() - began
    ranks = [json.loads(path.read_text()) for path in sorted(options.work.glob("rank-*.json"))]
    if status or len(ranks) != world:
        return {"world": world, "status": status, "seconds": whole, "said": last_words(world, options)}, {}
    out = options.work / "built"
    found = {"world": world, "seconds": whole, "bytes": sum(p.stat().st_size for p in out.rglob("*") if p.is_file())}
    files = hashes(out)
    shutil.rmtree(out)
    return found | {"ranks": ranks, "sha256": files}, files


def main():
    """Build on every number of ranks, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="7B")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, help="of the calibration; default: 128, the demo's 96")
    parser.add_argument("--length", type=int, default=2048, help="of a sample; the demo has its own")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--windows", type=int, help="of the check; default: 16, the demo's 40")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--threads", default="1", help="of a rank with --device cpu")
    parser.add_argument("--stop", type=float, help="end the first group of several after so many seconds")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.rank:
        rank_main(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    prepare(options)
    shutil.rmtree(options.work / "built", ignore_errors=True)
    results, files, wrong = [], {}, []
    for world in options.worlds:
        if options.stop and world > 1:
            group = start(world, options)
            time.sleep(options.stop)
            os.killpg(group.pid, signal.SIGKILL)
            print(
                f"{world} ranks ended after {options.stop} s with {group.wait()}; another number continues", flush=True
            )
            options.stop = None
            continue
        found, these = measured(world, options)
        results.append(found)
        files = files or these
        different = sorted(name for name in files.keys() | these.keys() if files.get(name) != these.get(name))
        found["files"], found["different"] = len(these), different
        wrong += different
        (options.out / "ranks.json").write_text(json.dumps(results, indent=1))
        print(summary(found, results[0]), flush=True)
        if files is these:
            print("".join(f"  {digest}  {name}\n" for name, digest in files.items()), end="", flush=True)
    sys.exit(bool(wrong) or any("ranks" not in found for found in results))


def longest(found):
    """Processor seconds of the slowest rank in each phase, summed."""
    ranks = [rank["processor"] for rank in found.get("ranks", [])]
    return sum(max(rank.get(phase, 0.0) for rank in ranks) for phase in {phase for rank in ranks for phase in rank})


def summary(found, first):
    """Lines for people."""
    if "ranks" not in found:
        ended = f"{found['world']} ranks: ended with {found['status']} after {found['seconds']:.1f} s; they said last:"
        return "\n  ".join([ended, *found["said"]])
    slowest = max(found["ranks"], key=lambda rank: rank["seconds"])
    before = max((rank["seconds"] for rank in first.get("ranks", [])), default=0)
    processor, processor_before = longest(found), longest(first)
    whole = f"{slowest['seconds']:.1f} s ({found['seconds']:.1f} s with the start of processes)"
    told = f"{len(found['different'])} of {found['files']} files ({found['bytes']:,} bytes) differ {found['different'][:4] or ''}"
    lines = [
        f"{found['world']} ranks on {slowest['device']}: {whole}, {before / slowest['seconds']:.2f} times as fast; {told}",
        f"  longest way by processor: {processor:.1f} s, {processor_before / processor:.2f} times as fast",
    ]
    for number, rank in enumerate(found["ranks"]):
        phases = ", ".join(f"{phase} {took:.1f}" for phase, took in (rank["phases"] | rank["inside"]).items())
        gpu = f"{rank['gpu_gb']:.1f} GB of the GPU ({rank['reserved_gb']:.1f} reserved), " if rank["gpu_gb"] else ""
        sent = f"{rank['sent_gb']:.2f} GB sent; " if rank["sent_gb"] else ""
        lines.append(f"  rank {number}: {gpu}{rank['host_gb']:.1f} GB of the host; {sent}{phases}")
    first = found["ranks"][0]
    return "\n".join([*lines, *handed.told(found["ranks"], first["least"], first["layers"])])


if __name__ == "__main__":
    main()
