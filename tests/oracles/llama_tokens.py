"""llama_tokens.py GGUF OUT.safetensors TEXT...: llama.cpp's token ids of each text file, int32, as `0`, `1`, ...; names of special tokens are text.

Also detokenizes them. Prints JSON: `round_trip`, per text whether that gave the text again.
"""

import argparse
import ctypes
import json
from pathlib import Path

import llama_cpp as c
import numpy as np
from llama_model import start
from safetensors.numpy import save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf")
    parser.add_argument("out")
    parser.add_argument("texts", nargs="+", type=Path)
    args = parser.parse_args()
    start()
    params = c.llama_model_default_params()
    params.vocab_only = True
    model = c.llama_model_load_from_file(args.gguf.encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {args.gguf}")
    vocab = c.llama_model_get_vocab(model)
    found, same = {}, []
    for number, path in enumerate(args.texts):
        data = path.read_bytes()
        ids = (c.llama_token * (len(data) + 8))()
        count = c.llama_tokenize(vocab, data, len(data), ids, len(ids), True, False)
        text = ctypes.create_string_buffer(2 * len(data) + 64)
        size = c.llama_detokenize(vocab, ids, count, text, len(text), False, True)
        found[str(number)] = np.frombuffer(ids, np.int32, count).copy()
        same.append(text.raw[:size] == data)
    save_file(found, args.out)
    print(json.dumps({"round_trip": same}))


if __name__ == "__main__":
    main()
