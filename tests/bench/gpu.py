"""Everything that needs a GPU, in one program: sections that do not need each other, each with its share of the time.

    python -m tests.bench.gpu --out FOLDER [--only variants decode ...] [--seconds 540]

Results go to FOLDER/gpu.json after every section, a summary to the terminal and to FOLDER/summary.txt. A section that fails says so
and the next one runs.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch

from qquant.kernels import wq_mm
from qquant.kernels.jit import blocks, kernel, tl
from qquant.kernels.unpack import tile
from tests.bench import tune
from tests.bench.tune import GROUP, layers, random_layer, timed_graph

DEVICE = "cuda"


# -- variants of wq_mm


@kernel("size")
def _read(at, out_at, size, SPAN: tl.constexpr):
    """Reads SPAN words a program and keeps their sum."""
    i = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    words = tl.load(at + i, mask=i < size, other=0)
    tl.store(out_at + tl.program_id(0), tl.sum(words, 0))


def read_floor(nbytes):
    """Microseconds to read so many bytes that no cache holds, by a kernel that does nothing else."""
    size = nbytes // 4
    data = [torch.randint(-9, 9, (size,), dtype=torch.int32, device=DEVICE) for _ in range(tune.copies_for(nbytes))]
    found = []
    for span in (4096, 8192, 16384):
        out = torch.empty(blocks(size, span), dtype=torch.int32, device=DEVICE)
        calls = [partial(_read[(blocks(size, span),)], d, out, size, SPAN=span, num_warps=8) for d in data]
        found.append(timed_graph(calls)[0])
    return min(found)


def variant_space(rows, bits):
    shapes = (*tune.NARROW, *tune.SHAPES) if rows <= 16 else tune.SHAPES
    stages = (3, 4, 6) if bits == 4 else (4, 6)
    yield from itertools.product(shapes, stages, (0, 1, 2))


def compile_variants(index, count, rows_list=(1, 16, 64), kinds=((4, True),)):
    """Compile every `count`-th kernel of the section, for Triton's cache on disk."""
    jobs = []
    for (bits, symmetric), rows in itertools.product(kinds, rows_list):
        for ((height, warps), stages, ahead), splits in itertools.product(variant_space(rows, bits), (1, 2)):
            jobs.append((bits, symmetric, rows, wq_mm.Config(height, splits, warps, stages, ahead)))
    for bits, symmetric, rows, config in jobs[index::count]:
        tune.compile_one(bits, GROUP, symmetric, torch.bfloat16, rows, False, config)


def in_processes(workers, *arguments):
    """Run this program `workers` times with an index; exit codes."""
    started = [
        subprocess.Popen([sys.executable, "-m", "tests.bench.gpu", *arguments, str(i), str(workers)])
        for i in range(workers)
    ]
    return [process.wait() for process in started]


def variants(record, options):
    """Every way to launch `wq_mm` on some layers: which helps, the narrow tiles, the prefetch, the stages."""
    began = time.monotonic()
    codes = in_processes(options.workers, "--compile-variants")
    lines = [f"compiled in {time.monotonic() - began:.0f} s, exit codes {sorted(set(codes))}"]
    deadline = time.monotonic() + options.share
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    for (model, name), rows in itertools.product(
        (("7B", "gate_up"), ("7B", "o"), ("7B", "down"), ("7B", "qkv"), ("0.5B", "gate_up"), ("0.5B", "o")), (1, 16, 64)
    ):
        if time.monotonic() > deadline:
            lines.append(f"{model} {name} {rows}: left out, no time")
            continue
        columns, outputs = layers(model)[name]
        weights = random_layer(columns, outputs, 4, tune.copies_for(columns * outputs / 2))
        floor = read_floor(int(columns * outputs * 0.5))
        x = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
        counters = torch.zeros(blocks(outputs, 16), dtype=torch.int32, device=DEVICE)
        truth = wq_mm.wq_mm(x, *weights[0], None, 4, GROUP)
        times, wrong = {}, []
        tiles = blocks(columns, tile(4))
        for (height, warps), stages, ahead in variant_space(rows, 4):
            for splits in (1, 2, 3, 4, 6, 8, 12, 16):
                across = blocks(outputs, height) * splits
                if tiles // splits < 2 or across * warps > 40 * processors or across < processors // 4:
                    continue
                config = wq_mm.Config(height, splits, warps, stages, ahead)
                calls = [partial(wq_mm.launch, x, *w, None, 4, GROUP, config, counters) for w in weights]
                y = calls[0]()
                if not torch.allclose(y.float(), truth.float(), rtol=2e-2, atol=2e-2 * float(truth.float().std())):
                    wrong.append(str(config))
                times[config] = timed_graph(calls, windows=3, least=4e-4)[0]
        best = sorted(times, key=times.get)
        lines.append(f"{model} {name} M={rows}: reading alone {floor:.2f} us; {len(wrong)} of {len(times)} wrong")
        for label, chosen in (
            ("best", best[:4]),
            ("wide", [c for c in best if c.warps >= 4][:2]),
            ("wide, no prefetch", [c for c in best if c.warps >= 4 and not c.ahead][:1]),
            ("narrow, no prefetch", [c for c in best if c.warps < 4 and not c.ahead][:1]),
        ):
            lines += [f"   {label:20} {times[c]:7.2f} us  {c}" for c in chosen]
        record[f"{model} {name} {rows}"] = {
            "floor_us": floor,
            "wrong": wrong,
            "times": [[c.rows, c.splits, c.warps, c.stages, c.ahead, times[c]] for c in best],
        }
        print("\n".join(lines[-8:]), flush=True)
    return lines


# -- the run

SECTIONS = {"variants": variants}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--compile-variants", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile_variants:
        compile_variants(*options.compile_variants)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    torch.manual_seed(0)
    results, summary = {}, []
    for number, name in enumerate(options.only):
        left = options.seconds - (time.monotonic() - started)
        options.share = left / (len(options.only) - number)
        begun, record = time.monotonic(), {}
        try:
            lines = SECTIONS[name](record, options)
        except Exception:  # noqa: BLE001 one broken section must not cost the others their turn on the machine
            record["failed"] = traceback.format_exc()
            lines = [f"{name} FAILED", *record["failed"].splitlines()[-8:]]
        record["seconds"] = time.monotonic() - begun
        results[name] = record
        summary += [f"== {name} ({record['seconds']:.0f} s)", *lines]
        print("\n".join(summary[-len(lines) - 1 :]), flush=True)
        (options.out / "gpu.json").write_text(json.dumps(results))
        (options.out / "summary.txt").write_text("\n".join(summary) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
