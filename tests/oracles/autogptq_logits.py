"""autogptq_logits.py MODEL_DIR TOKENS.safetensors OUT.safetensors: logits of auto-gptq 0.7.1's own loader on a GPTQ folder.

OUT has `logits` float32 [rows, length, vocabulary], computed in float32 by its plain torch kernel. It finds the weights
by the name in quantize_config.json. Its transformers takes the rotary base from `rope_theta` only, so it is given a
config.json that states it (see quantizing.py), with links to all other files.
Prints JSON: rows, vocabulary, kernels (class name -> number of linears).
"""

import argparse
import collections
import json
import tempfile
from pathlib import Path

import torch
from auto_gptq import AutoGPTQForCausalLM
from quantizing import rope_base
from safetensors.torch import load_file, save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = load_file(args.tokens)["tokens"].long()
    with tempfile.TemporaryDirectory() as links:
        for file in args.model.iterdir():
            Path(links, file.name).symlink_to(file.resolve())
        config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
        config["rope_theta"] = rope_base(args.model)
        Path(links, "config.json").unlink()
        Path(links, "config.json").write_text(json.dumps(config))
        model = AutoGPTQForCausalLM.from_quantized(links, device="cpu", torch_dtype=torch.float32).eval()
    model.model.float()
    with torch.inference_mode():
        logits = torch.stack([model(input_ids=row[None]).logits[0] for row in rows])
    save_file({"logits": logits.contiguous()}, args.out)
    kernels = collections.Counter(
        ".".join(type(m).__module__.split(".")[-1:]) for m in model.modules() if hasattr(m, "qweight")
    )
    print(json.dumps({"rows": len(rows), "vocabulary": logits.shape[-1], "kernels": kernels}))


if __name__ == "__main__":
    main()
