"""What a user sees on a GPU: `generate` of a GPTQ-Int4 artifact of a real shape, beside transformers in bf16 on the same card.

    python -m tests.bench.answers --work /dev/shm/answers [--shape 7B] [--layers 32] [--skip compiled]

Writes a random artifact, loads it in a process of its own, and prints every number as soon as it is there: seconds to load and to the
first token, tokens a second for one sequence and for eight, greedy and sampled, by our decoder, by transformers' loop over the same
modules, by transformers in bf16 and by its compiled static cache; host microseconds a linear; prefill. Random weights: no text.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from qquant.families import family_of
from qquant.source.safetensors_file import header_bytes
from tests.bench.memory import SHAPES, SMALL, config_of
from tests.bench.tune import host_us

NEW = 128
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "repetition_penalty": 1.0}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "eos_token_id": None, "pad_token_id": 0}


def tell(what, value, unit):
    """One number, now."""
    print(f"{what}: {value:.4g} {unit}", flush=True)


def stored(name, shape, quantized):
    """(suffix, dtype, shape) of what the folder holds for a tensor."""
    if not quantized:
        return [(name, "BF16", tuple(shape))]
    rows, columns = shape
    module = name.removesuffix(".weight")
    return [
        (f"{module}.qweight", "I32", (columns // 8, rows)),
        (f"{module}.qzeros", "I32", (columns // 128, rows // 8)),
        (f"{module}.scales", "F16", (columns // 128, rows)),
        (f"{module}.g_idx", "I32", (columns,)),
    ]


def value_of(name, dtype, shape, device):
    """Random contents of a stored tensor."""
    if name.endswith("qweight"):
        return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64, device=device).to(torch.int32)
    if name.endswith("qzeros"):
        return torch.full(shape, 0x77777777, dtype=torch.int32)
    if name.endswith("g_idx"):
        return torch.arange(shape[0], dtype=torch.int32) // 128
    if dtype == "F16":
        return (torch.rand(shape, device=device) * 0.2 + 0.9).mul_((shape[0] * 128) ** -0.5 / 4).half()
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, device=device) * (0.1 if name.endswith("bias") else shape[-1] ** -0.5)).bfloat16()


def write_artifact(folder, shape, layers, device):
    """A GPTQ-Int4 folder of random words."""
    config = config_of(shape, layers)
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "checkpoint_format": "gptq",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    family = family_of(config, "bench")
    parsed = family.parse(config, "bench")
    entries = []
    for name, size in family.shapes(parsed).items():
        entries += stored(name, size, "_proj.weight" in name)
    head, _ = header_bytes(entries, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        for name, dtype, size in entries:
            file.write(value_of(name, dtype, size, device).cpu().view(torch.uint8).numpy().data)


def timed(work, repeats=1):
    """Seconds of a call that ends on the device."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


class First:
    """A streamer that notes when tokens came."""

    def __init__(self):
        self.times = []

    def put(self, value):
        """The prompt, then tokens."""
        self.times.append(time.perf_counter())

    def end(self):
        """Nothing waits."""


def rates(name, generate, batch, settings, new=NEW, runs=3):
    """Best tokens a second of `runs` answers, and what the first of them took."""
    found = []
    for run in range(runs):
        ids = torch.randint(1, 30000, (batch, 64 + 3 * run), device="cuda")
        streamer = First() if batch == 1 else None
        seconds = timed(lambda ids=ids, s=streamer: generate(ids, max_new_tokens=new, streamer=s, **settings))
        found.append(batch * new / seconds)
        first = f", first token after {1e3 * (streamer.times[1] - streamer.times[0]):.0f} ms" if streamer else ""
        print(f"{name}, batch {batch}, answer {run + 1}: {found[-1]:.1f} tokens/s{first}", flush=True)
    return max(found)


def host_cost(name, linear, columns):
    """Microseconds that the host takes for a call."""
    x = torch.randn(1, 1, columns, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        tell(f"host, {name}", host_us(partial(linear, x)), "us a call")


def prefill(model, rows):
    """Milliseconds of one forward of so many tokens."""
    ids = torch.randint(1, 30000, (1, rows), device="cuda")
    with torch.inference_mode():
        call = lambda: model(ids, logits_to_keep=1, use_cache=True)
        call()
        call()
        return min(timed(call, 3) for _ in range(3)) * 1e3


def ours(options):
    """Our side, in a process of its own."""
    began = time.perf_counter()
    import transformers  # noqa: F401
    from transformers import Qwen2ForCausalLM  # noqa: F401

    tell("import of torch and transformers by this process, from here", time.perf_counter() - began, "s")
    import qquant

    seconds = timed(lambda: None)
    began = time.perf_counter()
    model = qquant.load(options.work / "artifact", "cuda")
    torch.cuda.synchronize()
    tell("load", time.perf_counter() - began + seconds, "s")
    tell("memory after loading", torch.cuda.memory_allocated() / 1e9, "GB")
    if options.only_first:
        rates("ours, process with compiled kernels", model.generate, 1, GREEDY, runs=2)
        return
    model.keeps_history = False
    rates("ours", model.generate, 1, GREEDY)
    rates("ours, sampled", model.generate, 1, SAMPLED)
    rates("ours", model.generate, 8, GREEDY)
    linear = model.model.layers[0].self_attn.o_proj
    host_cost("our int4 linear", linear, linear.in_features)
    host_cost("nn.Linear", torch.nn.Linear(4096, 4096, device="cuda", dtype=torch.bfloat16), 4096)
    ids = torch.randint(1, 30000, (1, 40), device="cuda")
    made = model.generate(ids, max_new_tokens=64, **GREEDY)
    quick, model._quick = model._quick, None
    other = model.generate(ids, max_new_tokens=64, **GREEDY)
    tell("tokens of 64 before both loops part", int((made == other)[0, 40:].long().cumprod(0).sum()), "")
    rates("transformers' loop over our linears", model.generate, 1, GREEDY, runs=2)
    for rows in (512, 2048, 4096):
        tell(f"prefill of {rows}, transformers' forward over our linears", prefill(model, rows), "ms")
    model._quick = quick
    for rows in (128, 512, 1024, 2048, 4096):
        ids = torch.randint(1, 30000, (1, rows), device="cuda")
        run = lambda ids=ids: model.generate(ids, max_new_tokens=1, **GREEDY)
        run()
        tell(f"first token of {rows}, our generate", min(timed(run) for _ in range(4)) * 1e3, "ms")
    long = torch.randint(1, 30000, (1, 8000), device="cuda")
    for run in range(2):
        tell(
            f"1,000 tokens after 8,000, answer {run + 1}",
            1000 / timed(lambda: model.generate(long, max_new_tokens=1000, **GREEDY)),
            "tokens/s",
        )
    rates("ours", model.generate, 16, GREEDY, runs=2)


def bf16(options):
    """transformers in bf16."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    raw = config_of(options.shape, options.layers)
    raw.pop("architectures", None)
    raw.pop("torch_dtype", None)
    began = time.perf_counter()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(Qwen2Config(**raw)).eval()
    torch.set_default_dtype(torch.float32)
    torch.cuda.synchronize()
    tell("bf16 made", time.perf_counter() - began, "s")
    rates("bf16 eager", model.generate, 1, GREEDY, runs=2)
    torch.backends.cuda.enable_cudnn_sdp(False)
    rates("bf16 eager without cuDNN attention", model.generate, 1, GREEDY, runs=3)
    rates("bf16 eager without cuDNN attention", model.generate, 8, GREEDY, runs=2)
    for rows in (128, 512, 1024, 2048, 4096):
        tell(f"prefill of {rows}, bf16", prefill(model, rows), "ms")
        ids = torch.randint(1, 30000, (1, rows), device="cuda")
        run = lambda ids=ids: model.generate(ids, max_new_tokens=1, **GREEDY)
        run()
        tell(f"first token of {rows}, bf16", min(timed(run) for _ in range(4)) * 1e3, "ms")
    if "compiled" not in options.skip:
        static = GREEDY | {"cache_implementation": "static"}

        def generate(ids, streamer=None, **settings):
            return model.generate(ids[:, :64], **settings)

        model.generation_config.max_length = None
        for run in range(3):
            ids = torch.randint(1, 30000, (1, 64), device="cuda")
            seconds = timed(lambda ids=ids: generate(ids, max_new_tokens=NEW, **static))
            tell(f"bf16 compiled static cache, answer {run + 1}", NEW / seconds, "tokens/s")


def main():
    """Both sides, ours first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", default="7B", choices=[*SHAPES, *SMALL])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--side", choices=("ours", "bf16"))
    parser.add_argument("--only-first", action="store_true")
    options = parser.parse_args()
    if options.side:
        {"ours": ours, "bf16": bf16}[options.side](options)
        return
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    began = time.perf_counter()
    write_artifact(options.work / "artifact", options.shape, options.layers, "cuda")
    torch.cuda.empty_cache()
    tell("artifact written", time.perf_counter() - began, "s")
    same = [sys.executable, "-m", "tests.bench.answers", *sys.argv[1:]]
    for more in (["--side", "ours"], ["--side", "ours", "--only-first"], ["--side", "bf16"]):
        print("--", *more, flush=True)
        began = time.perf_counter()
        status = subprocess.run([*same, *more], check=False).returncode
        print(f"-- exit {status}, {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
