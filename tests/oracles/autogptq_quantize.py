"""autogptq_quantize.py SOURCE TOKENS.safetensors TARGET: auto-gptq 0.7.1 with the settings of the official Qwen1.5 repos.

Group 128, symmetric, no activation order, damping 0.01, true-sequential. auto-gptq computes on a CUDA device only: here
its constant for that device names the CPU, which changes no arithmetic. It computes in float32 and the result is stored
in fp16, as from the fp16 model that it loads by default. The weights are renamed to model.safetensors, the only name
that transformers and vLLM look for.
"""

import argparse
from pathlib import Path

import torch
from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling import _base
from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
from quantizing import Stopwatch, copy_tokenizer, read_samples, rope_base
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("tokens")
    parser.add_argument("target", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _base.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda: None
    watch = Stopwatch()
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in read_samples(args.tokens)]
    model = AutoModelForCausalLM.from_pretrained(
        args.source, rope_theta=rope_base(args.source), torch_dtype=torch.float32
    ).eval()
    settings = BaseQuantizeConfig(
        bits=args.bits, group_size=args.group_size, damp_percent=args.damping, desc_act=False, sym=True
    )
    model.seqlen = model.config.max_position_embeddings
    wrapped = GPTQ_CAUSAL_LM_MODEL_MAP["qwen2"](model, False, settings)
    wrapped.quantize(samples)
    wrapped.model.half()
    wrapped.model.config.torch_dtype = torch.float16
    wrapped.save_quantized(str(args.target))
    (written,) = args.target.glob("gptq_model-*.safetensors")
    written.rename(args.target / "model.safetensors")
    copy_tokenizer(args.source, args.target)
    watch.report(samples=len(samples))


if __name__ == "__main__":
    main()
