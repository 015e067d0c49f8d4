"""`qquant.load`: a transformers model whose linears keep packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qquant import devices
from qquant.artifact.opening import open_weights
from qquant.errors import UsageError
from qquant.families import ModelConfig
from qquant.families.weights import WeightSource
from qquant.formats.gguf.source import GgufSource
from qquant.runtime.generating import Quick, answering_class
from qquant.runtime.linears import CpuQuantLinear, Linear, Part, QuantEmbedding
from qquant.runtime.parts import Loader, linears
from qquant.source.checkpoint import Checkpoint
from qquant.source.untrusted import read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, Qwen2ForCausalLM


QUICK = ("cuda", "cpu")  # devices where `generate` takes the quick way
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(owner), leaf, module)


def load(
    path: str | Path, device: str | torch.device = "auto", dtype: torch.dtype | str | None = None
) -> Qwen2ForCausalLM:
    """A causal language model that computes with the packed weights of an artifact, made by any tool.

    path: a GPTQ or AWQ folder, a GGUF file, or a 16-bit checkpoint (which also may be a hub id).
    device: cpu, cuda, cuda:1; auto is CUDA if there is one.
    dtype: of the activations: bfloat16, float16 or float32; by default the checkpoint's, bfloat16 for GGUF.

    Raises:
        InputError: it is no artifact or checkpoint, or is damaged.
        UsageError: another dtype.
        EnvironmentMissingError: the device is not there.
    """
    import transformers  # the door to transformers; costs seconds

    place = devices.named(device, "device")
    source = _open(path)
    raw = {} if isinstance(source, GgufSource) else _raw_config(source)
    number = _dtype(dtype, raw)
    config, family = source.config, source.family
    with torch.device("meta"):
        model = answering_class(transformers.Qwen2ForCausalLM)(_transformers_config(source, raw, number))
    loader = Loader(source, place, number)
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(config=model.config).to(place)
    embedding = loader.embedding()
    body.embed_tokens = embedding
    body.norm.weight = nn.Parameter(loader.vector(family.final_norm), requires_grad=False)
    model.lm_head = loader.head(embedding)
    for layer in range(config.layers):
        _fill(model, source, layer, loader)
    model.generation_config = _generation(source, raw)
    model._quick = Quick(family, config, number, QUICK)
    return model.eval()


def _fill(model: nn.Module, source: WeightSource, layer: int, loader: Loader) -> None:
    family, prefix = source.family, source.family.block.format(layer)
    shapes = family.linear_shapes(source.config, layer)
    for name in family.vectors:
        module = model.get_submodule(prefix + name.removesuffix(".weight"))
        module.weight = nn.Parameter(loader.vector(prefix + name), requires_grad=False)
    found = linears(source, layer, loader.device, loader.dtype)
    for stage in family.stages:
        modules = found[stage.name]
        if len(modules) == len(stage.linears):
            for linear, module in zip(stage.linears, modules, strict=True):
                _place(model, prefix + linear, module)
            continue
        sizes = [shapes[linear][0] for linear in stage.linears]
        parts = [Part(modules[0], sizes, index) for index in range(len(sizes))]
        for linear, part in zip(stage.linears, parts, strict=True):
            part.first = [parts[0]] if part.index else []
            _place(model, prefix + linear, part)


def _open(path: str | Path) -> WeightSource:
    place = Path(path)
    return open_weights(place) if place.exists() else Checkpoint.open(path)


def _dtype(wanted: torch.dtype | str | None, raw: dict[str, Any]) -> torch.dtype:
    if wanted is None:
        wanted = raw.get("dtype", raw.get("torch_dtype")) or "bfloat16"
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype) or found not in DTYPES:
        raise UsageError(f"dtype {wanted!r}: activations are bfloat16, float16 or float32")
    return found


def _raw_config(source: Any) -> dict[str, Any]:
    return read_json(source.path / "config.json")


def _transformers_config(source: WeightSource, raw: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import Qwen2Config

    config: ModelConfig = source.config
    stops = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw}
    return Qwen2Config(  # type: ignore[call-arg] # head_dim is read by the model and not declared by its config
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.positions,
        rms_norm_eps=config.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,  # shared or not, the head is a module of its own here
        use_sliding_window=False,
        dtype=dtype,
        **stops,
    )


def _generation(source: WeightSource, raw: dict[str, Any]) -> GenerationConfig:
    from transformers import GenerationConfig

    if isinstance(source, GgufSource):
        value = source.header.value
        names = {"eos_token_id": "eos", "bos_token_id": "bos", "pad_token_id": "padding"}
        ids = {key: value(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
        sampling = {key: value(f"general.sampling.{name}") for key, name in SAMPLING.items()}
        given = {key: value for key, value in (ids | sampling).items() if value is not None}
        return GenerationConfig(**given, do_sample=any(name in given for name in SAMPLING))
    folder = source.path  # type: ignore[attr-defined] # every source of a folder has it
    if (folder / "generation_config.json").is_file():
        return GenerationConfig(**read_json(folder / "generation_config.json"))
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{key: raw[key] for key in keys if key in raw})


SAMPLING = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k"}


def paths(model: nn.Module) -> dict[str, str]:
    """Linear (or fused linears, or embedding) -> what the file holds and what runs, in words."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            found[name.removesuffix(".whole")] = module.extra_repr()
        elif isinstance(module, QuantEmbedding):
            found[name] = f"{module.bits} bit; rows dequantized when they are asked for"
    return found


def weight_bytes(model: nn.Module) -> int:
    """Memory of all weights of a loaded model; shared ones count once."""
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen[tensor.data_ptr()] = tensor.nbytes
    packed = sum(module.packed.nbytes for module in model.modules() if isinstance(module, CpuQuantLinear))
    return sum(seen.values()) + packed
