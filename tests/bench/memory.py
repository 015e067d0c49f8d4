"""Peak memory of a build on random weights of a real shape, and whether it depends on the number of layers.

    python tests/bench/memory.py [--layers 24] [--samples 8] [--length 512]

Writes a random checkpoint of Qwen1.5-1.8B's shape (3.7 GB in bf16) with `--layers` and with twice as many layers to a temporary
folder, builds GPTQ-Int4 and q8_0 from each in a process of its own, and prints the peak resident memory of both and their ratio.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from qquant.families import FAMILIES, parse_config
from qquant.resources import data_dir
from qquant.source.safetensors_file import header_bytes

SHAPES = {
    "0.5B": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "1.8B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
COMMON = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
RECIPE = """
version: 1
name: memory
calibration: {{sources: [{{bundled: books-en}}], samples: {samples}, length: {length}, default_system_share: 0}}
checks: {{text: "bundled:wikitext-2-test", windows: 2, length: 128}}
artifacts:  # what random weights predict is not judged
  - {{name: gptq-int4, format: gptq, bits: 4, gates: {{defaults: false}}}}
  - {{name: gguf-q8_0, format: gguf, type: q8_0, gates: {{defaults: false}}}}
"""


# VmHWM belongs to the new program's memory; ru_maxrss would start from the memory of the process that started it.
CHILD = """
import pathlib, re, sys
from qquant.cli import main
try:
    main(sys.argv[2:])
finally:
    status = pathlib.Path("/proc/self/status").read_text()
    pathlib.Path(sys.argv[1]).write_text(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
"""


def write_random(folder, shape, layers, device="cpu", shards=1):
    """A checkpoint of `shape` with random bf16 weights made on `device`, written tensor by tensor into `shards` files."""
    config = COMMON | SHAPES[shape] | {"num_hidden_layers": layers}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    demo = data_dir("recipes") / "demo" / "tiny-qwen1.5"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((demo / name).read_bytes())
    shapes = FAMILIES["qwen2"].shapes(parse_config(config, "bench"))
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
    return folder


def build(folder, out, options):
    """Peak resident bytes of `qquant build` in a process of its own."""
    recipe = out.parent / "memory.yaml"
    recipe.write_text(RECIPE.format(samples=options.samples, length=options.length))
    peak = out.parent / "peak"
    command = [sys.executable, "-c", CHILD, str(peak), "build", str(folder), "--recipe", str(recipe), "--out", str(out)]
    subprocess.run([*command, "--device", "cpu"], check=True, stdout=subprocess.DEVNULL)
    return 1024 * int(peak.read_text())


def main():
    """Build the shape with `layers` and twice as many layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.8B")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    peaks = []
    for layers in (options.layers, 2 * options.layers):
        with tempfile.TemporaryDirectory() as temporary:
            folder = write_random(Path(temporary) / "model", options.shape, layers)
            peaks.append(build(folder, Path(temporary) / "out", options))
        print(f"{options.shape}, {layers} layers: peak resident memory {peaks[-1] / 1e9:.3f} GB", flush=True)
    print(f"ratio {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
