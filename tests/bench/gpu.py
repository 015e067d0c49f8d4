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

from qquant.kernels import jit, wq_mm
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


# -- decoding


def shape_of(model):
    """The numbers of a Qwen1.5 model, key-value heads as many as heads."""
    from qquant.families import ModelConfig

    hidden, middle, key = tune.MODELS[model]
    width = 64 if model == "0.5B" else 128
    count = {"0.5B": 24, "1.8B": 24, "4B": 40, "7B": 32, "14B": 40}[model]
    return ModelConfig(
        hidden, middle, count, hidden // width, key // width, width, 151936, model == "0.5B", 1e-6, 1e6, 32768
    )


def random_linear(kind, rows, columns, device, dtype, biased=False):
    """A linear on random weights; kind: bf16, int4, int8 or awq (int4 with zero points)."""
    from qquant.algorithms.grid import Integers
    from qquant.kernels import cpu_int4
    from qquant.runtime import linears

    bias = torch.randn(rows, device=device).to(dtype) * 0.1 if biased else None
    if kind == "bf16":
        weight = torch.empty(rows, columns, device=device, dtype=dtype).normal_(0, columns**-0.5)
        return linears.DenseLinear(weight, bias, "bf16")
    bits = 8 if kind == "int8" else 4
    lowest = (
        0 if kind == "awq" else 1
    )  # symmetric about the zero point: a common part in all weights makes attention jump
    codes = torch.randint(lowest, 1 << bits, (rows, columns), dtype=torch.uint8, device=device)
    spread = columns**-0.5 / (1 << (bits - 2))
    scales = (torch.rand(rows, columns // GROUP, device=device) * 0.2 * spread + 0.9 * spread).half()
    zeros = torch.randint(6, 10, scales.shape, device=device).float() if kind == "awq" else None
    weight = Integers(codes, scales, zeros, bits)
    on_cpu = torch.device(device).type == "cpu" and cpu_int4.available(rows, columns, GROUP)
    return (linears.CpuQuantLinear if on_cpu else linears.QuantLinear)(weight, bias, kind)


def random_weights(config, kind, device=DEVICE, dtype=torch.bfloat16):
    """Weights of a whole model."""
    from torch import nn

    from qquant.families import FAMILIES
    from qquant.runtime import linears
    from qquant.runtime.stepping import Layer, ModelWeights

    family = FAMILIES["qwen2"]
    sizes = config.sizes(0)
    wide = (config.heads + 2 * config.kv_heads) * config.head_dim
    shapes = {
        "qkv": (wide, config.hidden),
        "o": (config.hidden, config.hidden),
        "gate_up": (2 * config.intermediate, config.hidden),
        "down": (config.hidden, config.intermediate),
    }
    norm = torch.ones(config.hidden, device=device, dtype=dtype)
    layers = tuple(
        Layer(
            norms={stage.name: norm for stage in family.stages if stage.norm},
            linears={name: random_linear(kind, *shape, device, dtype, name == "qkv") for name, shape in shapes.items()},
            widths={stage.name: [sizes[row.out] for row in stage.rows] for stage in family.stages},
            vectors={},
        )
        for _ in range(config.layers)
    )
    embedding = nn.Embedding(config.vocab, config.hidden, device=device, dtype=dtype)
    table = embedding.weight.data
    head = table if config.tied else torch.randn_like(table) * config.hidden**-0.5
    return ModelWeights(family, layers, embedding, norm, linears.DenseLinear(head, None, "bf16"))


def moved(weights, device, dtype):
    """A copy of weights on another device, with floats of another type (the scales of integers keep theirs)."""
    import copy
    from dataclasses import replace

    def module(original):
        twin = copy.deepcopy(original).to(device)
        for tensor in (*twin.parameters(), *twin.buffers()):
            if tensor.dtype == torch.bfloat16:
                tensor.data = tensor.data.to(dtype)
        return twin

    layers = tuple(
        replace(
            layer,
            norms={name: norm.to(device, dtype) for name, norm in layer.norms.items()},
            linears={name: module(linear) for name, linear in layer.linears.items()},
        )
        for layer in weights.layers
    )
    ends = module(weights.embedding), weights.final_norm.to(device, dtype), module(weights.head)
    return replace(weights, layers=layers, embedding=ends[0], final_norm=ends[1], head=ends[2])


def steps_agree(record, options):
    """A small model's logits by the kernels, eager and captured, against plain torch on the CPU."""
    from qquant.families import ModelConfig
    from qquant.kernels.replay import recorded
    from qquant.runtime.stepping import Stepper

    def error(a, b):
        return float((a.cpu().double() - b.double()).norm() / b.double().norm())

    lines = []
    for kind, heads, kv, width in (("bf16", 8, 8, 64), ("int4", 4, 2, 128), ("int8", 8, 8, 64), ("awq", 4, 4, 128)):
        config = ModelConfig(512, 1408, 3, heads, kv, width, 1000, False, 1e-6, 1e6, 4096)
        weights, errors = random_weights(config, kind), []
        for dtype in (torch.bfloat16, torch.float16):
            ids = torch.randint(0, 1000, (77,))
            with torch.inference_mode():
                here = Stepper(config, moved(weights, "cuda", dtype), 200, torch.device("cuda"), dtype)
                there = Stepper(config, moved(weights, "cpu", torch.float32), 200, torch.device("cpu"), torch.float32)
                errors.append(error(here.prefill(ids.to("cuda")), there.prefill(ids)))
                logits = []
                here.step()
                replay = recorded(lambda here=here, logits=logits: logits.append(here.step()))
                here.rewind(77, 5)
                there.rewind(77, 5)
                for _ in range(60):
                    replay()
                    errors.append(error(logits[-1], there.step()))
                    here.token.copy_(there.token)
        record[kind] = errors
        lines.append(f"{kind}: prefill {errors[0]:.1e}, largest of 60 captured steps {max(errors):.1e} (bf16 and fp16)")
    return lines


def decode(record, options):
    """Whole models on random weights: decode and prefill of int4, int8 and awq against bf16, in captured graphs."""
    from qquant.checks import speed

    lines, device = [], torch.device(DEVICE)
    wq_mm.counters_of.cache_clear()
    deadline = time.monotonic() + options.share
    for early in (False, True):
        jit.early = early
        lines += alone("7B", 512, record, f"int4, kernels start early: {early}")
    jobs = (
        ("7B", 512, ("int4", "int8", "awq")),
        ("7B", 2048, ("int4",)),
        ("0.5B", 512, ("int4",)),
        ("14B", 512, ("int4",)),
    )
    for model, prompt, kinds in jobs:
        if time.monotonic() > deadline:
            lines.append(f"{model} {prompt}: left out, no time")
            continue
        config = shape_of(model)
        settings = speed.SpeedSettings(prompt=prompt, steps=32, pairs=7)
        with torch.inference_mode():
            baseline = speed.Stepped(config, random_weights(config, "bf16"), settings, device, torch.bfloat16)
            for kind in kinds:
                other = speed.Stepped(config, random_weights(config, kind), settings, device, torch.bfloat16)
                found = speed.compare(baseline, other, settings, device)
                record[f"{model} {prompt} {kind}"] = {
                    "paces": [vars(pace) for pace in found.paces],
                    "memory": [found.weights, found.weights_baseline, found.cache, found.peak, found.peak_baseline],
                }
                lines += [told(model, kind, prompt, pace) for pace in found.paces]
                lines.append(
                    f"   weights {found.weights / 1e9:.2f} GB, peak {found.peak / 1e9:.2f} GB; bf16 {found.peak_baseline / 1e9:.2f} GB"
                )
                print("\n".join(lines[-3:]), flush=True)
                if (model, prompt, kind) == ("7B", 512, "int4"):
                    lines += profile(other, record)
                    lines += profile(baseline, record)
                del other
            del baseline
        torch.cuda.empty_cache()
    return lines


def alone(model, prompt, record, label):
    """Tokens per second of int4 by itself, and where a step's time goes."""
    from qquant.checks import speed

    config, settings = shape_of(model), speed.SpeedSettings(prompt=prompt, steps=32, pairs=3)
    with torch.inference_mode():
        contender = speed.Stepped(
            config, random_weights(config, "int4"), settings, torch.device(DEVICE), torch.bfloat16
        )
        contender.decode()
        seconds = sorted(speed._seconds(contender.decode, 5) for _ in range(3))[1]
        record[label] = settings.steps / seconds
        return [f"{model} {label}: {settings.steps / seconds:.1f} tokens/s", *profile(contender, record)]


def tuner(record, options):
    """Fill the launch table, and use it for the rest of this run."""
    began = time.monotonic()
    codes = tune.compile_all(options.workers)
    lines = [f"compiled in {time.monotonic() - began:.0f} s, exit codes {sorted(set(codes))}"]
    table, times = tune.fill(
        options.models, options.share - (time.monotonic() - began), report=partial(print, flush=True)
    )
    tune.write(table, options.out / "table.json")
    jit.TABLE = options.out / "table.json"
    wq_mm._table.cache_clear()
    wq_mm.config_for.cache_clear()
    record.update(times={key: list(value) for key, value in times.items()})
    gain = sorted(rule / best for best, rule in times.values())
    lines.append(
        f"{len(times)} shapes, gain over the rule of thumb: median {gain[len(gain) // 2]:.2f}x, largest {gain[-1]:.2f}x"
    )
    return lines + [f"{key}: {best:.2f} us" for key, (best, _) in times.items() if key.split("/")[2] == "1"]


def told(model, kind, prompt, pace):
    """A line about a pace."""
    return (
        f"{model} {kind} {pace.phase} at {prompt}: {pace.rate:.1f} tokens/s, bf16 {pace.rate_baseline:.1f}; "
        f"{pace.ratio:.3f}x [{pace.low:.3f}, {pace.high:.3f}], noise {pace.noise:.2%}, {pace.ratio / pace.ceiling:.0%} of {pace.ceiling:.2f}"
    )


def profile(contender, record):
    """Where the time of a step goes, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    with watch(activities=[ProfilerActivity.CUDA]) as seen:
        contender.decode()
    rows = sorted(seen.key_averages(), key=lambda row: -row.device_time_total)[:10]
    steps = contender.settings.steps
    record[f"profile, {contender.runtime}"] = [[row.key[:60], row.device_time_total / steps, row.count] for row in rows]
    return [
        f"   {row.device_time_total / steps:8.1f} us a step in {row.count // steps:4} of {row.key[:60]}" for row in rows
    ]


# -- the run


def in_a_process(module, *arguments):
    """Run a program beside this one, and give what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    return lines if done.returncode == 0 else [*lines, f"exit {done.returncode}", *done.stderr.splitlines()[-12:]]


def kernels(record, options):
    """The other sections of `kernels_gpu`, with the table of this run if there is one."""
    sections = ("ceilings", "correctness", "products", "dequant", "solver", "kquants")
    table = options.out / "table.json"
    arguments = ("--out", options.out, "--seconds", options.share, "--table", table, "--only", *sections)
    return in_a_process("tests.bench.kernels_gpu", *arguments)


def build(record, options):
    """GPTQ-Int4 of the 7B shape by phase, then every artifact if there is time."""
    work = Path("/dev/shm/build")
    return in_a_process("tests.bench.build_gpu", "--work", work, "--out", options.out, "--sets", *options.sets)


SECTIONS = {
    "variants": variants,
    "steps": steps_agree,
    "tune": tuner,
    "decode": decode,
    "kernels": kernels,
    "build": build,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--models", nargs="+", default=["7B", "0.5B", "14B", "1.8B", "4B"])
    parser.add_argument("--sets", nargs="+", default=["gptq-int4"], help="artifact sets of the build, see build_gpu")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--compile-variants", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    jit.early = True
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
