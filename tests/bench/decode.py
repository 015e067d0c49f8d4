"""Decoding on the CPU: whole models of a real shape on random weights, int4 and int8 against bf16, and against llama.cpp.

    python -m tests.bench.decode [--models 0.5B 1.8B] [--kinds int4 int8] [--threads 1] [--pairs 7]
    python -m tests.bench.decode --rows 8 48 128 512            the products of one matrix of 2816 x 1024 instead, by rows of x

The speed check's own protocol (`qquant.checks.speed`): A B B A in one process, medians and 95 % intervals over pairs, the baseline
against itself first. Where llama-cpp-python is importable, a q4_k_m file of the same shape (made here, of repeated random blocks)
takes turns with int4.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional

from qquant import recipe
from qquant.checks import speed
from qquant.families.linear import linear
from qquant.formats.gguf.layout import Gguf
from qquant.formats.gguf.quantize import quantize
from qquant.formats.gguf.source import GgufSource
from qquant.formats.gguf.types import TYPES
from qquant.kernels import cpu_int4
from qquant.source.checkpoint import Checkpoint
from tests.bench.gpu import random_weights, shape_of
from tests.bench.memory import write_random

RECIPE = """
version: 1
name: decode
calibration: {sources: [{bundled: books-en}], samples: 1, length: 64}
artifacts:
  - {name: gguf, format: gguf, type: q4_k_m, solver: ggml, imatrix: false}
"""


def write_gguf(folder, model):
    """A q4_k_m file of the shape: every tensor repeats 64 quantized random rows."""
    layers = shape_of(model).layers
    checkpoint_folder = folder / "source"
    write_random(checkpoint_folder, model, layers, "cpu")
    (folder / "recipe.yaml").write_text(RECIPE)
    loaded, checkpoint = recipe.load(str(folder / "recipe.yaml")), Checkpoint.open(checkpoint_folder)
    planned = Gguf().plan(checkpoint, loaded.artifacts[0], loaded, model)
    file = planned.files[0]
    path = folder / file.name
    cache = {}
    with path.open("wb") as out:
        out.truncate(file.size)
        out.write(file.head)
        for tensor in file.tensors:
            columns = tensor.shape[-1]
            row = TYPES[tensor.dtype].row_bytes(columns) if tensor.dtype in TYPES else 4 * columns
            key = tensor.dtype, columns
            if key not in cache:
                cache[key] = quantize(torch.randn(64, columns) * columns**-0.5, tensor.dtype).numpy().tobytes()
            out.seek(tensor.offset)
            count = tensor.nbytes // row
            out.write((cache[key] * (count // 64 + 1))[: tensor.nbytes])
    for item in checkpoint_folder.glob("*.safetensors"):
        item.unlink()
    return path


def products(rows):
    """Milliseconds of one matrix by every way to multiply, each the least of some calls."""
    outputs, columns = 2816, 1024
    weight = (torch.randn(outputs, columns) * columns**-0.5).bfloat16()
    print(
        "| bits | rows | torch's int4 product | unpack and multiply | shifts and masks instead | bf16 as qquant multiplies it | F.linear |\n|---:|"
        + "---:|" * 6
    )
    unpacks = cpu_int4.unpacks
    for bits in (4, 8):
        codes = torch.randint(0, 1 << bits, (outputs, columns), dtype=torch.uint8)
        packed = cpu_int4.pack_cpu(codes, torch.rand(outputs, columns // 128).half(), None, bits)
        for count in rows:
            x = torch.randn(count, columns).bfloat16()
            took = [least(cpu_int4.few_rows, x, packed), least(cpu_int4.many_rows, x, packed)]
            cpu_int4.unpacks = lambda: False
            took.append(least(cpu_int4.many_rows, x, packed))
            cpu_int4.unpacks = unpacks
            took += [least(linear, x, weight), least(functional.linear, x, weight)]
            print(f"| {bits} | {count} | " + " | ".join(f"{1e3 * one:.2f}" for one in took) + " |", flush=True)


def least(call, *arguments, calls=5):
    """Seconds of the processor that the quickest of some calls took."""
    found = []
    for _ in range(calls + 1):
        began = time.process_time()
        call(*arguments)
        found.append(time.process_time() - began)
    return min(found[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["0.5B", "1.8B"])
    parser.add_argument("--kinds", nargs="*", default=["int4", "int8"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.rows:
        products(options.rows)
        return
    settings = speed.SpeedSettings(prompt=options.prompt, steps=options.steps, pairs=options.pairs)
    cpu, results = torch.device("cpu"), {}
    for model in options.models:
        config = shape_of(model)

        def stepped(kind, config=config):
            return speed.Stepped(config, random_weights(config, kind, "cpu"), settings, cpu, torch.bfloat16)

        def tell(name, found, model=model):
            results[f"{model} {name}"] = [vars(pace) for pace in found.paces]
            for pace in found.paces:
                print(
                    f"{model} {name} {pace.phase}: {pace.rate:.2f} and {pace.rate_baseline:.2f} tokens/s, {pace.ratio:.3f}x "
                    f"[{pace.low:.3f}, {pace.high:.3f}], noise {pace.noise:.1%}, at best {pace.ceiling:.2f}",
                    flush=True,
                )
            print(f"   weights {found.weights / 1e6:.0f} and {found.weights_baseline / 1e6:.0f} MB", flush=True)

        with torch.inference_mode():
            int4 = None
            if options.kinds:
                baseline = stepped("bf16")
                for kind in options.kinds:
                    other = stepped(kind)
                    tell(f"{kind} against bf16", speed.compare(baseline, other, settings, cpu))
                    int4 = other if kind == "int4" else int4
                    del other
                del baseline
            if importlib.util.find_spec("llama_cpp"):
                with tempfile.TemporaryDirectory() as folder:
                    path = write_gguf(Path(folder), model)
                    theirs = speed.LlamaCpp(path, GgufSource.open(path), settings)
                    found = speed.compare(int4 or stepped("int4"), theirs, settings, cpu)
                    tell("llama.cpp q4_k_m against int4", found)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
