"""autoawq_quantize.py SOURCE TOKENS.safetensors TARGET: autoawq 0.2.9, 4 bit, asymmetric, GEMM layout, its defaults else.

Its search keeps the original weights as `state_dict()` entries `.cpu()`, which on a CPU are the live weights themselves:
every grid point then scales what the one before left, and the result is ruined (perplexity three times the baseline's).
The subclass below hands out copies while the search runs; autoawq's files stay as they are. It computes in float32
and the result is stored in fp16, as from the fp16 model that it loads by default.
"""

import argparse
import types

import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from quantizing import Stopwatch, copy_tokenizer, read_samples, rope_base


class MendedQuantizer(AwqQuantizer):
    """autoawq's quantizer, with the weights that it restores after each grid point really kept apart."""

    def _compute_best_scale(self, x, w_mean, x_mean, module2inspect, linears2scale, fp16_output, kwargs):
        def cloned_state_dict(module):
            return {name: value.clone() for name, value in type(module).state_dict(module).items()}

        module2inspect.state_dict = types.MethodType(cloned_state_dict, module2inspect)
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, linears2scale, fp16_output, kwargs)
        finally:
            del module2inspect.state_dict


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("tokens")
    parser.add_argument("target")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--parallel", type=int, default=16, help="samples in one forward pass; bounds the memory")
    parser.add_argument("--broken", action="store_true", help="leave the bug in, to see what it does")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    watch = Stopwatch()
    samples = read_samples(args.tokens)
    model = AutoAWQForCausalLM.from_pretrained(
        args.source, torch_dtype=torch.float32, device_map="cpu", rope_theta=rope_base(args.source)
    )
    settings = {"zero_point": True, "q_group_size": args.group_size, "w_bit": 4, "version": "GEMM"}
    model.quantize(
        None,
        settings,
        calib_data=samples,
        n_parallel_calib_samples=args.parallel,
        max_calib_samples=len(samples),
        max_calib_seq_len=len(samples[0]),
        quantizer_cls=AwqQuantizer if args.broken else MendedQuantizer,
    )
    model.model.half()
    model.model.config.torch_dtype = torch.float16
    model.save_quantized(args.target)
    copy_tokenizer(args.source, args.target)
    watch.report(samples=len(samples))


if __name__ == "__main__":
    main()
