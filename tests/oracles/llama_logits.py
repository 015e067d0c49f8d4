"""llama_logits.py GGUF TOKENS.safetensors OUT.safetensors: llama.cpp's logits for each row of `tokens`.

OUT has `logits` float32 [rows, length, vocabulary] and `continuation` int32 [rows, --continue]: the greedy continuation.
"""

import argparse
import json

import numpy as np
from llama_model import Model
from safetensors.numpy import load_file, save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--continue", dest="count", type=int, default=16)
    parser.add_argument("--cache", choices=["f16", "f32"], default="f32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    rows = load_file(args.tokens)["tokens"]
    model = Model(args.gguf, max(512, rows.shape[1] + args.count), args.cache, args.threads)
    logits = np.stack([model.logits(row) for row in rows])
    continuation = np.stack([model.continue_greedily(row, args.count) for row in rows])
    save_file({"logits": logits, "continuation": continuation}, args.out)
    print(json.dumps({"rows": len(rows), "vocabulary": model.vocab_size}))


if __name__ == "__main__":
    main()
