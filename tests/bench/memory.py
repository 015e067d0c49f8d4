"""Peak memory of a build on random weights of a real shape, on the device and on the host, beside what the plan says.

    python -m tests.bench.memory [--shape 1.8B] [--layers 24] [--samples 8] [--length 512]             with twice as many layers, too
    python -m tests.bench.memory --shape 110B --layers 1 --length 2048 --device cuda --limit-gb 80     within so much memory of a card
    python -m tests.bench.memory --shape 110B --scale 16 --layers 1 --once                             a sixteenth of every width
    python -m tests.bench.memory --table --samples 128 --length 2048               what plans say of every published shape, built by nobody

Writes a random checkpoint of the shape to a temporary folder (`--work`), builds `--artifacts` from it with the quality that recipes have
by default (objective kl, streams of their own, sweeps) in a process of its own, and prints its peaks. `--limit-gb`: torch may take so
much of the card, less CONTEXT for what CUDA takes by itself; a build that needs more fails. Host memory is the peak of resident pages,
files that are mapped included.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from qquant import recipe as recipes
from qquant.families import FAMILIES, parse_config
from qquant.plan.plan import Plan
from qquant.resources import data_dir
from qquant.source.checkpoint import Checkpoint
from qquant.source.safetensors_file import header_bytes

SHAPES = {
    "0.5B": (1024, 2816, 24, 16, 16),
    "1.8B": (2048, 5504, 24, 16, 16),
    "4B": (2560, 6912, 40, 20, 20),
    "7B": (4096, 11008, 32, 32, 32),
    "14B": (5120, 13696, 40, 40, 40),
    "32B": (5120, 27392, 64, 40, 8),
    "72B": (8192, 24576, 80, 64, 64),
    "110B": (8192, 49152, 80, 64, 8),
}  # hidden, intermediate, layers, heads, heads of keys and values
SMALL = {
    "toy": (256, 768, 4, 4, 2),
    "0.5B-8k": (1024, 2816, 24, 16, 16),
}  # of nobody: where a published size takes too long
WORDS = {"toy": 8192, "0.5B-8k": 8192, "14B": 152064, "32B": 152064, "72B": 152064, "110B": 152064}
COMMON = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
PEAKS = ("host", "device", "reserved", "planned", "planned at least", "planned for the host")
CONTEXT = 0.6  # GB of a card: CUDA's context, and the workspaces of its libraries
RECIPE = """
version: 1
name: memory
calibration:
  sources: [{{bundled: books-en}}, {{bundled: code}}, {{bundled: wikitext-2-valid}}, {{bundled: docs-zh}}, {{bundled: docs-en}}]
  samples: {samples}
  length: {length}
  default_system_share: 0
checks: {{text: "bundled:wikitext-2-test", windows: 2, length: 128, answer_length: 0}}
artifacts:  # what random weights predict is not judged
"""
ENTRIES = {
    "gptq-int4": "{name: gptq-int4, format: gptq, bits: 4, gates: {defaults: false}}",
    "gptq-int8": "{name: gptq-int8, format: gptq, bits: 8, gates: {defaults: false}}",
    "awq": "{name: awq, format: awq, gates: {defaults: false}}",
    "gguf-q8_0": "{name: gguf-q8_0, format: gguf, type: q8_0, gates: {defaults: false}}",
    "gguf-q4_k_m": "{name: gguf-q4_k_m, format: gguf, type: q4_k_m, gates: {defaults: false}}",
}

# VmHWM belongs to the new program's memory; ru_maxrss would start from the memory of the process that started it.
CHILD = """
import json, pathlib, re, sys
target, limit, *command = sys.argv[1:]
import torch
if float(limit):
    torch.cuda.set_per_process_memory_fraction(float(limit) * 1e9 / torch.cuda.mem_get_info()[1])
from qquant.cli import main
try:
    main(command)
finally:
    status = pathlib.Path("/proc/self/status").read_text()
    found = {"host": 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])}
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    pathlib.Path(target).write_text(json.dumps(found))
"""


def config_of(shape, layers=None, scale=1):
    """The config of a published size, or of one `scale` times as narrow."""
    hidden, intermediate, all_layers, heads, kv_heads = (SHAPES | SMALL)[shape]
    return COMMON | {
        "vocab_size": WORDS.get(shape, 151936),
        "hidden_size": hidden // scale,
        "intermediate_size": intermediate // scale,
        "num_hidden_layers": layers or all_layers,
        "num_attention_heads": max(1, heads // scale),
        "num_key_value_heads": max(1, kv_heads // scale),
        "tie_word_embeddings": shape == "0.5B",
    }


def described(folder, config):
    """The shapes of a checkpoint's tensors by name; into the new `folder` go its config and the demo's tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    demo = data_dir("recipes") / "demo" / "tiny-qwen1.5"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((demo / name).read_bytes())
    return FAMILIES["qwen2"].shapes(parse_config(config, "bench"))


def write_random(folder, shape, layers, device="cpu", shards=1, scale=1):
    """A checkpoint of `shape` with random bf16 weights made on `device`, written tensor by tensor into `shards` files; the same ones at every call."""
    torch.manual_seed(0)
    shapes = described(folder, config_of(shape, layers, scale))
    names = list(shapes)
    step = -(-len(names) // shards)
    parts = [names[start : start + step] for start in range(0, len(names), step)]
    files = [f"model-{n + 1:05d}-of-{len(parts):05d}.safetensors" for n in range(len(parts))]
    if shards == 1:
        files = ["model.safetensors"]
    else:
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for file_name, part in zip(files, parts, strict=True):
        head, _ = header_bytes([(name, "BF16", shapes[name]) for name in part], {"format": "pt"})
        with (folder / file_name).open("wb") as file:
            file.write(head)
            for name in part:
                size = shapes[name]
                value = torch.ones(size) if "norm" in name else torch.randn(size, device=device) * size[-1] ** -0.5
                file.write(value.bfloat16().cpu().view(torch.uint8).numpy().data)
    if device != "cpu":
        torch.cuda.empty_cache()
    return folder


def build(folder, out, options):
    """Peak bytes of `qquant build` in a process of its own, and what its plan said."""
    recipe = out.parent / "memory.yaml"
    entries = "".join(f"  - {ENTRIES[name]}\n" for name in options.artifacts)
    recipe.write_text(RECIPE.format(samples=options.samples, length=options.length) + entries)
    need = Plan.of(recipes.load(str(recipe)), Checkpoint.open(folder)).needs[options.device.split(":")[0]]
    peak = out.parent / "peak"
    limit = options.limit_gb - CONTEXT if options.limit_gb else 0
    command = [sys.executable, "-c", CHILD, str(peak), str(limit), "build", str(folder), "--recipe", str(recipe)]
    began = time.monotonic()
    run = subprocess.run(
        [*command, "--out", str(out), "--device", options.device], check=False, stdout=subprocess.DEVNULL
    )
    found = json.loads(peak.read_text())
    planned = {"planned": need.device, "planned at least": need.least, "planned for the host": need.host}
    return found | planned | {"seconds": round(time.monotonic() - began, 1), "exit": run.returncode}


def measured(options, layers):
    """The peaks of one build, printed."""
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        folder = write_random(Path(temporary) / "model", options.shape, layers, options.device, scale=options.scale)
        found = build(folder, Path(temporary) / "out", options)
    sizes = ", ".join(f"{name} {found[name] / 1e9:.3f} GB" for name in PEAKS if found.get(name))
    narrow = f" / {options.scale}" if options.scale > 1 else ""
    print(
        f"{options.shape}{narrow}, layers {layers}, {options.samples} x {options.length}, {' '.join(options.artifacts)}: ",
        end="",
    )
    print(f"{sizes}; {found['seconds']} s, exit {found['exit']}", flush=True)
    return found


def write_hollow(folder, shape, layers=None):
    """A checkpoint of all layers of a published shape, or of some, without a byte of weights: the headers are all that a plan reads."""
    shapes = described(folder, config_of(shape, layers))
    head, _ = header_bytes([(name, "BF16", size) for name, size in shapes.items()], {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(2 * math.prod(size) for size in shapes.values()))
    return folder


def table(options):
    """A row for every published shape, in GB."""
    print(
        "| model | GPU, with room | GPU, at least | host beside it | CPU | CPU, at least |\n|---|---:|---:|---:|---:|---:|"
    )
    text = RECIPE.format(samples=options.samples, length=options.length)
    recipe = recipes.parse(text + "".join(f"  - {ENTRIES[name]}\n" for name in options.artifacts))
    for shape in SHAPES:
        with tempfile.TemporaryDirectory(dir=options.work) as temporary:
            needs = Plan.of(recipe, Checkpoint.open(write_hollow(Path(temporary) / "model", shape))).needs
        card, cpu = needs["cuda"], needs["cpu"]
        sizes = (card.device, card.least, card.host, cpu.device, cpu.least)
        print(f"| {shape} | {' | '.join(f'{size / 1e9:.1f}' for size in sizes)} |", flush=True)


def main():
    """Build the shape, with twice as many layers too unless one build was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.8B")
    parser.add_argument("--scale", type=int, default=1, help="divide every width by it")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--artifacts", nargs="+", choices=ENTRIES, default=["gptq-int4"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit-gb", type=float, help="memory of the card that may be taken")
    parser.add_argument("--once", action="store_true", help="do not build with twice as many layers")
    parser.add_argument("--work", type=Path, help="a folder with room for the checkpoint and the artifacts")
    parser.add_argument("--table", action="store_true", help="print what plans say of every shape, and build nothing")
    options = parser.parse_args()
    if options.table:
        table(options)
        return
    once = options.once or options.limit_gb or options.device != "cpu"
    peaks = [measured(options, layers)["host"] for layers in (options.layers, 2 * options.layers)[: 1 if once else 2]]
    if not once:
        print(f"ratio {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
