"""llama_perplexity.py GGUF TEXT: perplexity by the protocol of llama-perplexity (the wheel does not carry that program).

The text is tokenized at once and cut into windows of `--context` tokens, the rest dropped; each window starts with an
empty f16 cache, and the predictions of its second half are scored: positions context/2 to context-2.
Prints JSON: ppl, error (one standard error, as llama-perplexity), chunks, tokens (in the text), scored.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from llama_model import Model


def losses(logits, targets):
    """Negative log-likelihoods float64 of `targets` under `logits` float32 [n, vocabulary]."""
    top = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - top).sum(axis=1, dtype=np.float64)
    return np.log(total) - (logits[np.arange(len(targets)), targets] - top[:, 0])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf")
    parser.add_argument("text", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, help="the first CHUNKS windows only")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    model = Model(args.gguf, args.context, "f16", args.threads)
    tokens = model.tokenize(args.text.read_text(encoding="utf-8"))
    chunks = min(len(tokens) // args.context, args.chunks or len(tokens))
    if not chunks:
        raise SystemExit(f"{args.text} has {len(tokens)} tokens, fewer than one window of {args.context}")
    first, last = args.context // 2, args.context - 1
    found = []
    for window in tokens[: chunks * args.context].reshape(chunks, args.context):
        found.append(losses(model.logits(window)[first:last], window[first + 1 :]))
    nll = np.concatenate(found)
    ppl = math.exp(nll.mean())
    error = ppl * math.sqrt(nll.var() / (nll.size - 1))
    print(json.dumps({"ppl": ppl, "error": error, "chunks": chunks, "tokens": len(tokens), "scored": nll.size}))


if __name__ == "__main__":
    main()
