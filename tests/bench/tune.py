"""Fills the launch table of `wq_mm` by measuring on the GPU at hand.

    python -m tests.bench.tune --models 7B 0.5B --out table.json [--seconds 300]

For every layer of a model (q, k, v and gate, up fused), 4 and 8 bit, and 1, 4, 16 and 64 rows: first the height, warps and splits
at four pipeline stages, then the stages of the best two. A candidate is timed in a captured graph over enough copies of the
weights that the L2 cache does not answer. Copy the result to qquant/kernels/table.json.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from qquant.kernels import jit, wq_mm
from qquant.kernels.dequant import dequant
from qquant.kernels.jit import blocks, starts_early
from qquant.kernels.unpack import WORDS, tile

MODELS = {  # hidden, intermediate, key-value width
    "0.5B": (1024, 2816, 1024),
    "1.8B": (2048, 5504, 2048),
    "4B": (2560, 6912, 2560),
    "7B": (4096, 11008, 4096),
    "14B": (5120, 13696, 5120),
    "32B": (5120, 27392, 1024),
    "72B": (8192, 24576, 8192),
}
GROUP = 128
SHAPES = ((64, 4), (128, 4), (128, 8), (256, 8))  # outputs of a program, warps
DEPTHS = ((3, 0, 1), (3, 0, 2), (4, 0, 1), (6, 0, 1), (3, 1, 1), (4, 0, 2))  # stages, ahead, unroll
NARROW = ((16, 1), (32, 1), (64, 1), (32, 2), (64, 2))  # the same for up to 16 rows of x: every warp by itself
STAGES = {4: (3, 4, 6), 8: (4, 6, 8)}
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
COLD = 150e6  # bytes of weights behind one another: 2.5 times the L2 cache of an H200
COPIES = 200
VARIANTS = (
    (4, 128, True),
    (4, 128, False),
    (8, 128, True),
    (8, 64, False),
    (4, 32, False),
    (4, 64, True),
)  # bits, group, symmetric


def layers(model):
    """name -> (columns, outputs) of the matrices that run, fused where they share an input."""
    hidden, middle, key = MODELS[model]
    return {
        "qkv": (hidden, hidden + 2 * key),
        "o": (hidden, hidden),
        "gate_up": (hidden, 2 * middle),
        "down": (middle, hidden),
    }


def random_layer(columns, outputs, bits, copies, device="cuda"):
    """`copies` of random (qweight, params): every bit pattern is a weight."""
    words = blocks(columns, tile(bits)) * WORDS
    made = []
    for _ in range(copies):
        qweight = torch.randint(-(2**31), 2**31, (outputs, words), dtype=torch.int32, device=device)
        scales = (torch.rand(outputs, columns // GROUP, device=device) * 0.01 + 0.001).half()
        made.append((qweight, scales))
    return made


def copies_for(nbytes):
    return int(min(COPIES, max(2, -(-COLD // nbytes))))


def timed_graph(calls, windows=5, least=1e-3):
    """(median, spread) in microseconds of one call; `calls` run one after another in a captured graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def window(replays):
        first.record()
        for _ in range(replays):
            graph.replay()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e3 / replays / len(calls)

    replays = max(1, int(least * 1e6 / (window(1) * len(calls))))
    found = sorted(window(replays) for _ in range(windows))
    return statistics.median(found), (found[-1] - found[0]) / found[len(found) // 2]


def host_us(call, calls=100, windows=5):
    """Microseconds of the host for one call, not waiting for what it starts: the best of some windows."""
    for _ in range(30):
        call()
    best = float("inf")
    for _ in range(windows):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - began) / calls * 1e6)
    torch.cuda.synchronize()
    return best


def shapes_for(rows):
    """(outputs of a program, warps) that may be best for so many rows of x."""
    return (*NARROW, *SHAPES) if rows <= 16 else SHAPES[:3]


def candidates(rows, columns, outputs, bits, processors):
    """Configurations at three stages: every shape, with as many splits as keep the device busy but not crowded."""
    tiles = blocks(columns, tile(bits))
    for height, warps in shapes_for(rows):
        for splits in SPLITS:
            programs = blocks(outputs, height) * splits
            if (splits > 1 and tiles // splits < 2) or programs * warps > 24 * processors:
                continue
            if programs < processors // 2 and tiles // splits > 4:
                continue
            yield wq_mm.Config(height, splits, warps, 3)


def tune(bits, rows, columns, outputs, dtype=torch.bfloat16):
    """(best configuration, its microseconds, those of the rule of thumb)."""
    device = torch.device("cuda")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    weights = random_layer(columns, outputs, bits, copies_for(columns * outputs * bits / 8))
    x = torch.randn(rows, columns, device=device, dtype=dtype)
    counters = torch.zeros(blocks(outputs, 16), dtype=torch.int32, device=device)

    def measure(config):
        calls = [partial(wq_mm.launch, x, *w, None, bits, GROUP, config, counters) for w in weights]
        try:
            calls[0]()
        except OutOfResources:  # more shared memory than this device has
            return float("inf")
        return timed_graph(calls, windows=3, least=3e-4)[0]

    rule = wq_mm.rule_of_thumb(bits, rows, columns, outputs, processors)
    times = {config: measure(config) for config in {rule, *candidates(rows, columns, outputs, bits, processors)}}
    for stages, ahead, unroll in DEPTHS[1:]:
        for config in sorted(times, key=times.get)[:3]:
            other = replace(config, stages=stages, ahead=ahead, unroll=unroll)
            if other not in times:
                times[other] = measure(other)
    truth = x.float() @ dequant(*weights[0], bits, GROUP, torch.float32).T
    for config in sorted(times, key=times.get):
        y = wq_mm.launch(x, *weights[0], None, bits, GROUP, config, counters)
        if float((y.float() - truth).norm() / truth.norm()) <= 4e-3:
            best = config
            break
        print(f"WRONG: {config} for {bits} bit, {rows} rows, {columns} x {outputs}", flush=True)
    return best, times[best], times[rule]


def kernels_to_compile():
    """(bits, group, symmetric, type, rows, bias, configuration) of what the tuner and the checks launch."""
    for bits, rows in itertools.product((4, 8), (1, 16, 64)):
        kinds = itertools.product(shapes_for(rows), DEPTHS, (1, 2))
        for (height, warps), (depth, ahead, unroll), splits in kinds:
            config = wq_mm.Config(height, splits, warps, depth, ahead, unroll)
            yield bits, GROUP, True, torch.bfloat16, rows, False, config
    for bits, group, symmetric in VARIANTS:
        for dtype, splits in itertools.product((torch.float16, torch.bfloat16), (1, 2)):
            for rows, height, warps in ((16, 64, 4), (16, 128, 4), (32, 128, 8), (64, 128, 8)):
                yield bits, group, symmetric, dtype, rows, True, wq_mm.Config(height, splits, warps, 4)


def compile_one(bits, group, symmetric, dtype, rows, bias, config):
    """Compile one kernel into Triton's cache on disk."""
    params = torch.float16 if symmetric else torch.int32
    sums = torch.float32 if config.splits > 1 else dtype
    pointers = (dtype, torch.int32, params, dtype, dtype, sums, torch.int32)
    sizes = (rows, 4096, 4096, 32, 32, config.splits)
    early = starts_early(torch.device("cuda"))
    fixed = wq_mm.constants(rows, 4096, bits, group, config, symmetric, bias, early)
    wq_mm._kernel.warmup(*pointers, *sizes, grid=(1,), **fixed)


def compile_share(index, count):
    """Compile every `count`-th kernel from `index` on; processes beside this one compile the others."""
    for job in list(kernels_to_compile())[index::count]:
        compile_one(*job)


def compile_all(workers):
    """Fill Triton's cache, in `workers` processes; their exit codes."""
    started = [
        subprocess.Popen([sys.executable, "-m", "tests.bench.tune", "--compile", str(i), str(workers)])
        for i in range(workers)
    ]
    return [process.wait() for process in started]


def fill(models, seconds, report=print, rows=wq_mm.BUCKETS):
    """The table's content for the layers of `models`, as far as `seconds` reach; the first model first."""
    deadline = time.monotonic() + seconds
    entries, times, skipped = {}, {}, 0
    for model in models:
        for name, (columns, outputs) in layers(model).items():
            for bits in (4, 8):
                for count in rows:
                    key = f"wq_mm/{bits}/{count}/{columns}/{outputs}"
                    if key in entries:
                        continue
                    if time.monotonic() > deadline:
                        skipped += 1
                        continue
                    best, found, rule = tune(bits, count, columns, outputs)
                    entries[key] = list(astuple(best))
                    times[key] = (found, rule)
                    report(f"{model:5} {name:8} {key:32} {found:8.2f} us (rule of thumb {rule:8.2f})  {entries[key]}")
    if skipped:
        report(f"{skipped} shapes not reached in {seconds} s")
    table = {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "early": jit.starts_early(torch.device("cuda")),
        "date": time.strftime("%Y-%m-%d"),
        "entries": dict(sorted(entries.items())),
    }
    return table, times


def write(table, path):
    """One entry a line."""
    head = {key: value for key, value in table.items() if key != "entries"}
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in table["entries"].items())
    Path(path).write_text(json.dumps(head)[:-1] + f', "entries": {{\n{lines}\n}}}}\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["7B", "14B", "0.5B", "1.8B", "4B"], choices=MODELS)
    parser.add_argument("--out", default="table.json")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--compile", nargs=2, type=int, metavar=("INDEX", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    jit.early = True
    if options.compile:
        compile_share(*options.compile)
        return
    compile_all(options.workers)
    table, _ = fill(options.models, options.seconds)
    write(table, options.out)


if __name__ == "__main__":
    main()
