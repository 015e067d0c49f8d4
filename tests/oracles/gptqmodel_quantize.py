"""gptqmodel_quantize.py SOURCE TOKENS.safetensors TARGET: gptqmodel 7.7.0 with its defaults, GPTQ or AWQ."""

import argparse
import os

# gptqmodel asks for two CPU workers and takes no more than the process may use.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import GPTQModel
from gptqmodel.quantization import METHOD, QuantizeConfig
from quantizing import Stopwatch, copy_tokenizer, read_samples


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("tokens")
    parser.add_argument("target")
    parser.add_argument("--method", choices=["gptq", "awq"], default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    watch = Stopwatch()
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in read_samples(args.tokens)]
    settings = QuantizeConfig(bits=args.bits, group_size=args.group_size)
    if args.method == "awq":
        settings = QuantizeConfig(bits=args.bits, group_size=args.group_size, quant_method=METHOD.AWQ, format="gemm")
    model = GPTQModel.load(args.source, settings)
    model.quantize(samples, batch_size=1)
    model.save(args.target)
    copy_tokenizer(args.source, args.target)
    watch.report(samples=len(samples))


if __name__ == "__main__":
    main()
