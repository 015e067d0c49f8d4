"""llmcompressor_quantize.py SOURCE TOKENS.safetensors TARGET: llm-compressor 0.14, GPTQ to W4A16 in compressed-tensors.

Its defaults: groups of 128, symmetric, static activation order, damping 0.01, one decoder layer after the other. The model is loaded in
the checkpoint's dtype (`--dtype auto`, as in its examples), in which group scales are stored too. With `--dequantized FOLDER` its own
compressed-tensors unpacks the result once more into a plain checkpoint for tools that do not read that format; in float32, so that
codes times scales are exact.
"""

import argparse
import json
from pathlib import Path

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from quantizing import Stopwatch, copy_tokenizer, read_samples
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def quantize(args):
    """Quantize into `args.target`; how many samples were used."""
    samples = torch.tensor(read_samples(args.tokens))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in samples]
    model = AutoModelForCausalLM.from_pretrained(args.source, dtype=args.dtype)
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=args.group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    group = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(
        model=model,
        dataset=DataLoader(rows, batch_size=None),
        recipe=group,
        num_calibration_samples=len(rows),
        max_seq_length=samples.shape[1],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(args.target, save_compressed=True)
    copy_tokenizer(args.source, args.target)
    return len(rows)


def dequantize(folder, target):
    """Write the artifact in `folder` as a plain float32 checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scheme = QuantizationConfig.model_validate(config.pop("quantization_config")).config_groups["group_0"]
    stored, plain = load_file(folder / "model.safetensors"), {}
    packed = [name for name in stored if name.endswith(".weight_packed")]
    for name in packed:
        prefix = name.removesuffix("weight_packed")
        part = {word: stored.pop(prefix + word) for word in ("weight_packed", "weight_scale", "weight_shape")}
        part["weight_scale"] = part["weight_scale"].float()
        plain[prefix + "weight"] = PackedQuantizationCompressor.decompress(part, scheme)["weight"].float()
    plain |= {name: value.float() for name, value in stored.items()}
    target.mkdir(parents=True)
    save_file(plain, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    copy_tokenizer(folder, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("tokens")
    parser.add_argument("target", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--dequantized", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    watch = Stopwatch()
    watch.report(samples=quantize(args))
    if args.dequantized:
        dequantize(args.target, args.dequantized)


if __name__ == "__main__":
    main()
