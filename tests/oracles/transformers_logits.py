"""transformers_logits.py MODEL_DIR TOKENS.safetensors OUT.safetensors: logits of AutoModelForCausalLM.from_pretrained.

Reads plain checkpoints, GPTQ and AWQ directories (the last two through optimum and gptqmodel). OUT has `logits` float32
[rows, length, vocabulary]. `--kernel default` multiplies as a user's program would, in bf16 or fp16; `--kernel reference`
takes gptqmodel's plain torch kernel and turns scales, biases and activations to float32, so that the logits are
those of the dequantized weights up to rounding (its AWQ kernel still multiplies in fp16).
transformers fills weights it does not find with random numbers and only warns: any missing tensor is an error here, and
so is any left-over one, except the all-zero biases that auto-gptq gives to linears that have none.
Prints JSON: rows, vocabulary, kernels (class name -> number of linears), seconds.
"""

import argparse
import collections
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

# gptqmodel asks for two CPU workers and takes no more than the process may use.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

REFERENCE = {
    "gptq": lambda bits: GPTQConfig(bits=bits, backend="torch"),
    "awq": lambda bits: AwqConfig(bits=bits, backend="torch_awq"),
}


@contextlib.contextmanager
def loadable(folder):
    """`folder`, or links to its files under the name that transformers looks for (auto-gptq writes another)."""
    weights = list(folder.glob("*.safetensors"))
    if any(folder.glob("model*.safetensors*")) or len(weights) != 1:
        yield folder
        return
    with tempfile.TemporaryDirectory() as links:
        for file in folder.iterdir():
            Path(links, "model.safetensors" if file == weights[0] else file.name).symlink_to(file.resolve())
        yield Path(links)


def stored_as_zeros(folder, name):
    """Whether a safetensors file of `folder` holds `name`, with zeros only."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if name in set(file.keys()):
                return not file.get_tensor(name).any()
    return False


def load(folder, reference):
    """The model, with an error if any of its tensors did not come from the files or any of theirs was not used."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config")
    extra = {}
    if reference and quantization:
        extra["quantization_config"] = REFERENCE[quantization["quant_method"]](quantization["bits"])
    dtype = torch.float32 if reference else "auto"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=dtype, **extra)
    left_over = info.pop("unexpected_keys")
    info["unexpected_keys"] = [n for n in left_over if not (n.endswith(".bias") and stored_as_zeros(folder, n))]
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if wrong:
        raise SystemExit(f"{folder}: transformers did not load every tensor as stored: {json.dumps(wrong)[:4000]}")
    return torch.nn.Module.float(model) if reference else model  # transformers forbids .float() on quantized models


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--kernel", choices=["default", "reference"], default="default")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._dynamo.config.disable = True  # gptqmodel compiles its torch kernels: tens of seconds of C++ for nothing here
    begin = time.perf_counter()
    rows = load_file(args.tokens)["tokens"].long()
    with loadable(args.model) as folder:
        model = load(folder, args.kernel == "reference").eval()
    with torch.inference_mode():
        logits = torch.stack([model(row[None]).logits[0].float() for row in rows])
    save_file({"logits": logits.contiguous()}, args.out)
    kernels = collections.Counter(type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__)
    seconds = round(time.perf_counter() - begin, 1)
    print(json.dumps({"rows": len(rows), "vocabulary": logits.shape[-1], "kernels": kernels, "seconds": seconds}))


if __name__ == "__main__":
    main()
