"""autoround_quantize.py SOURCE TOKENS.safetensors TARGET: auto-round 0.16.1, 4 bit symmetric as `auto_gptq`, or a GGUF file.

Its defaults but for the calibration: signed gradient descent on rounding and ranges of a block at a time, 8 samples a step, all
samples given. TARGET is a folder in GPTQ's format, or for `--format gguf:q4_k_m` (and its sisters) the file itself, written by the
converter of llama.cpp that auto-round is pointed to (`--llama-cpp`): its own copy asks for a `gguf` that PyPI does not have.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from converting import TOOLS, take_unknown_for_qwen2


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("tokens")
    parser.add_argument("target", type=Path)
    parser.add_argument("--format", default="auto_gptq")
    parser.add_argument("--iters", type=int, default=200, help="steps a block; 0 rounds to nearest, scales searched")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="samples a step")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--llama-cpp", type=Path, default=TOOLS, help="where conversion/ and gguf-py/ stand, for GGUF")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main():
    args = arguments()
    gguf = args.format.startswith("gguf")
    if gguf:
        os.environ["LLAMA_CPP_ROOT"] = str(args.llama_cpp)  # read when auto-round is imported
        sys.path.insert(
            0, str(args.llama_cpp / "gguf-py")
        )  # newer than the newest on PyPI, and what conversion/ goes with

    import torch
    from auto_round import AutoRound
    from auto_round.export.export_to_gguf.llama_cpp_conversion import get_conversion
    from quantizing import Stopwatch, copy_tokenizer, read_samples
    from transformers import AutoTokenizer

    if gguf:
        get_conversion(args.source)  # loads the package `conversion` by its rules, and keeps it
        take_unknown_for_qwen2(sys.modules["conversion.base"].TextModel)
    torch.set_num_threads(args.threads)
    watch = Stopwatch()
    samples = torch.tensor(read_samples(args.tokens))
    grid = {"scheme": args.format} if gguf else {"bits": 4, "sym": True, "group_size": args.group_size}
    rounding = AutoRound(
        args.source,
        AutoTokenizer.from_pretrained(args.source),
        dataset=list(samples.split(args.batch)),
        nsamples=len(samples),
        seqlen=samples.shape[1],
        batch_size=args.batch,
        iters=args.iters,
        seed=args.seed,
        device_map="cpu",
        **grid,
    )
    with tempfile.TemporaryDirectory(dir=args.target.parent) as work:
        rounding.quantize_and_save(work, format=args.format)
        if gguf:
            (written,) = Path(work).rglob("*.gguf")
            shutil.move(written, args.target)
        else:
            (config,) = Path(work).rglob("config.json")
            shutil.move(config.parent, args.target)
            copy_tokenizer(args.source, args.target)
    watch.report(samples=len(samples))


if __name__ == "__main__":
    main()
