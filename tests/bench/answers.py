"""What a user sees on a GPU: `generate` of a GPTQ-Int4 artifact of a real shape, beside transformers in bf16 on the same card.

    python -m tests.bench.answers --work /dev/shm/answers [--shape 7B] [--layers 32] [--skip compiled] [--host]

Writes a random artifact, loads it in a process of its own, and prints every number as soon as it is there: seconds to load and to the
first token, tokens a second for one sequence and for eight, greedy and sampled, by our decoder, by transformers' loop over the same
modules, by transformers in bf16 and by its compiled static cache; host microseconds a linear and a launch between linears, by Triton's
launcher and by address; prefill. Random weights: no text. `--host`: only what depends on the host, both loops and first tokens of short prompts.
"""

import argparse
import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from qquant.families import family_of
from qquant.kernels import between, elementwise
from qquant.kernels.launcher import Launcher
from qquant.runtime.attention import Rotating, with_rotation
from qquant.runtime.generating import weights_of
from qquant.runtime.layers import GatedMLP, RMSNorm
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


def host_cost(name, call):
    """Microseconds that the host takes for a call; 20 at a time, so that no queue is full."""
    with torch.inference_mode():
        tell(f"host, {name}", host_us(call, calls=20, windows=25), "us a call")


class Forgetful(dict):
    """What a `Launcher` knows, if it goes through Triton's launcher each time."""

    def __setitem__(self, key, value):
        pass


@contextmanager
def by_triton():
    """A context in which nothing is launched by address but products."""
    launchers = [value for module in (between, elementwise) for value in vars(module).values() if isinstance(value, Launcher)]  # fmt: skip
    kept = [one._known for one in launchers]
    for one in launchers:
        one._known = Forgetful()
    try:
        yield
    finally:
        for one, known in zip(launchers, kept, strict=True):
            one._known = known


def host_costs(model):
    """Of the linears, and of what stands between them in one pass of one token and of 128."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

    quick = model._quick
    for name, call in (
        ("by a list", lambda: quick.decoder(model)),
        ("by names", lambda: weights_of(model, quick.family, quick.config)),
    ):
        tell(f"host, whether a model is what was loaded, {name}", min(timed(call) for _ in range(5)) * 1e3, "ms")
    linear = model.model.layers[0].self_attn.o_proj
    plain = torch.nn.Linear(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for name, module, columns in (("our int4 linear", linear, linear.in_features), ("nn.Linear", plain, 4096)):
        x = torch.randn(1, 1, columns, device="cuda", dtype=torch.bfloat16)
        host_cost(name, lambda module=module, x=x: module(x))
    config, layer = model.config, model.model.layers[0]
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    hidden, width, weight = config.hidden_size, config.hidden_size // heads, layer.input_layernorm.weight
    for rows in (1, 128):
        x, y = torch.randn(2, rows, hidden, device="cuda").bfloat16()
        qkv, both = (
            torch.randn(rows, n, device="cuda").bfloat16() for n in ((heads + 2 * kv) * width, 2 * config.intermediate_size)
        )  # fmt: skip
        keys, values = torch.zeros(2, 1, kv, 256, width, device="cuda").bfloat16()
        table, zeros = torch.rand(256, width, device="cuda"), torch.zeros(rows, dtype=torch.int32, device="cuda")
        places, pair = torch.arange(rows, dtype=torch.int32, device="cuda"), both.chunk(2, -1)
        tables = torch.rand(2, 1, rows, width, device="cuda").bfloat16()
        parts = qkv[None].split([heads * width, kv * width, kv * width], -1)[:2]
        turned = (*(part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts), *tables)
        calls = {
            "add_norm": lambda x=x, y=y: between.add_norm(x, y, weight, 1e-6),
            "rotate": lambda *a, given=(qkv, table, zeros, places, keys, values): between.rotate(*given),
            "gate": lambda both=both: between.gate(both),
            "norm module": lambda x=x: layer.input_layernorm(x),
            "gate of an MLP": lambda pair=pair: elementwise.gate(*pair),
            "rotation": lambda turned=turned: elementwise.rotated(*turned),
        }
        for name, call in calls.items():
            with by_triton():
                host_cost(f"{name} of {rows}, by Triton's launcher", call)
            host_cost(f"{name} of {rows}, by address", call)
        norm = Qwen2RMSNorm(hidden).to("cuda", torch.bfloat16)
        host_cost(f"transformers' norm of {rows}", lambda x=x, norm=norm: norm(x))
        host_cost(f"transformers' rotation of {rows}", lambda turned=turned: apply_rotary_pos_emb(*turned))
        host_cost(f"transformers' gate of {rows}", lambda pair=pair: F.silu(pair[0]) * pair[1])


@contextmanager
def their_modules(model, rotations_alone=False):
    """A context in which norms, MLPs and rotations of the model are transformers', or its rotations alone."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

    ours = () if rotations_alone else (RMSNorm, GatedMLP)
    kept = [(name, module) for name, module in model.named_modules() if isinstance(module, ours)]

    def place(name, module):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, module)

    for name, module in kept:
        with torch.device("meta"):
            is_norm = isinstance(module, RMSNorm)
            twin = Qwen2RMSNorm(model.config.hidden_size, module.variance_epsilon) if is_norm else Qwen2MLP(model.config)  # fmt: skip
        for leaf, part in (*module.named_parameters(recurse=False), *module.named_children()):
            setattr(twin, leaf, part)
        place(name, twin)
    turning = [module for module in model.modules() if isinstance(module, Rotating)]
    for module in turning:
        module.__class__ = module.theirs
    try:
        yield
    finally:
        for name, module in kept:
            place(name, module)
        for module in turning:
            with_rotation(module)


def their_loop(model):
    """transformers' loop over our modules, over our linears alone, and over ours without launches by address."""
    ids = torch.randint(1, 30000, (1, 40), device="cuda")
    made = model.generate(ids, max_new_tokens=64, **GREEDY)
    quick, model._quick = model._quick, None
    other = model.generate(ids, max_new_tokens=64, **GREEDY)
    tell("tokens of 64 before both loops part", int((made == other)[0, 40:].long().cumprod(0).sum()), "")
    rates("transformers' loop over our linears", model.generate, 1, GREEDY, runs=3)
    with their_modules(model):
        rates(
            "transformers' loop over our linears, with its own norms, MLPs and rotations",
            model.generate,
            1,
            GREEDY,
            runs=2,
        )
    with their_modules(model, rotations_alone=True):
        rates("transformers' loop over our linears, with its own rotations", model.generate, 1, GREEDY, runs=2)
    with by_triton():
        rates("transformers' loop over our linears, by Triton's launcher", model.generate, 1, GREEDY, runs=2)
    rates("transformers' loop over our linears, again", model.generate, 1, GREEDY, runs=2)
    model._quick = quick


def first_tokens(model, lengths, name):
    """Milliseconds to the first token of prompts."""
    for rows in lengths:
        ids = torch.randint(1, 30000, (1, rows), device="cuda")
        run = lambda ids=ids: model.generate(ids, max_new_tokens=1, **GREEDY)
        run()
        tell(f"first token of {rows}, {name}", min(timed(run) for _ in range(6)) * 1e3, "ms")


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
    if options.host:
        host_costs(model)
        first_tokens(model, (16, 128, 512), "our generate")
        with by_triton():
            first_tokens(model, (16, 128, 512), "our generate by Triton's launcher")
        their_loop(model)
        return
    rates("ours", model.generate, 1, GREEDY)
    rates("ours, sampled", model.generate, 1, SAMPLED)
    rates("ours", model.generate, 8, GREEDY)
    host_costs(model)
    their_loop(model)
    for rows in (512, 2048, 4096):
        tell(f"prefill of {rows}, transformers' forward over our linears", prefill(model, rows), "ms")
    first_tokens(model, (128, 512, 1024, 2048, 4096), "our generate")
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
    if not options.host:
        rates("bf16 eager", model.generate, 1, GREEDY, runs=2)
    torch.backends.cuda.enable_cudnn_sdp(False)
    rates("bf16 eager without cuDNN attention", model.generate, 1, GREEDY, runs=3)
    if options.host:
        first_tokens(model, (16, 128, 512), "bf16")
        return
    rates("bf16 eager without cuDNN attention", model.generate, 8, GREEDY, runs=2)
    for rows in (128, 512, 1024, 2048, 4096):
        tell(f"prefill of {rows}, bf16", prefill(model, rows), "ms")
        first_tokens(model, [rows], "bf16")
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
    parser.add_argument("--host", action="store_true")
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
    sides = [["--side", "ours"], ["--side", "ours", "--only-first"], ["--side", "bf16"]]
    for more in sides[::2] if options.host else sides:
        print("--", *more, flush=True)
        began = time.perf_counter()
        status = subprocess.run([*same, *more], check=False).returncode
        print(f"-- exit {status}, {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
