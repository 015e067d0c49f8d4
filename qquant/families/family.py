"""What a model family is to the rest of the program: a table of names, and the shapes that a config implies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qquant.errors import InputError

Shape = tuple[int, ...]
NUMBER_LIMIT = 1e18
COUNT_LIMITS = {
    "hidden": 1 << 17, "intermediate": 1 << 20, "layers": 1024, "heads": 1024, "kv_heads": 1024, "head_dim": 4096, "vocab": 1 << 22,
    "positions": 1 << 31,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Linears of a block that share one input, hence one Gram matrix."""

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class ScalePair:
    """Input channels of `stage` may be multiplied by s if the outputs of `producer` are divided by s."""

    producer: str  # a norm, or a linear whose rows and bias are divided
    stage: str


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of config.json that shapes and the forward pass depend on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    epsilon: float
    rope_theta: float
    positions: int


@dataclass(frozen=True)
class Family:
    """Names of a decoder family; `{}` in `block` is the layer number."""

    model_type: str
    architecture: str
    embedding: str
    final_norm: str
    head: str
    block: str
    attention_norm: str
    mlp_norm: str
    stages: tuple[Stage, ...]
    biased: tuple[str, ...]
    scale_pairs: tuple[ScalePair, ...]
    gguf_architecture: str
    gguf_names: Mapping[str, str]

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """The linears of a block, in stage order."""
        return tuple(linear for stage in self.stages for linear in stage.linears)

    def linear_shapes(self, config: ModelConfig) -> dict[str, tuple[int, int]]:
        """Linear of a block -> (out features, in features)."""
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        hidden, inner = config.hidden, config.intermediate
        shapes = ((query, hidden), (key, hidden), (key, hidden), (hidden, query))
        return dict(zip(self.linears, (*shapes, (inner, hidden), (inner, hidden), (hidden, inner)), strict=True))

    def block_shapes(self, config: ModelConfig, layer: int) -> dict[str, Shape]:
        """Every tensor of one block, in the order of computation."""
        prefix = self.block.format(layer)
        shapes: dict[str, Shape] = {prefix + self.attention_norm: (config.hidden,)}
        for linear, shape in self.linear_shapes(config).items():
            if linear == self.stages[2].linears[0]:
                shapes[prefix + self.mlp_norm] = (config.hidden,)
            shapes[f"{prefix}{linear}.weight"] = shape
            if linear in self.biased:
                shapes[f"{prefix}{linear}.bias"] = (shape[0],)
        return shapes

    def shapes(self, config: ModelConfig) -> dict[str, Shape]:
        """Every tensor that a checkpoint of `config` must hold; a tied head is not one."""
        shapes: dict[str, Shape] = {self.embedding: (config.vocab, config.hidden)}
        for layer in range(config.layers):
            shapes |= self.block_shapes(config, layer)
        shapes[self.final_norm] = (config.hidden,)
        if not config.tied:
            shapes[self.head] = (config.vocab, config.hidden)
        return shapes

    def parameters(self, config: ModelConfig) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.shapes(config).values())

    def gguf_name(self, name: str) -> str:
        """The GGUF name of checkpoint tensor `name`, e.g. `blk.3.attn_q.weight`."""
        module, kind = name.rsplit(".", 1)
        opening, closing = self.block.split("{}")
        if module.startswith(opening):
            layer, module = module.removeprefix(opening).split(closing, 1)
            return f"blk.{layer}.{self.gguf_names[module]}.{kind}"
        return f"{self.gguf_names[module]}.{kind}"


def _number(raw: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value: Any = raw.get(key)
    good = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not good or not 0 < value < NUMBER_LIMIT:  # NaN and infinity too
        raise InputError(f"{where}: {key} must be a positive {kind.__name__}, got {repr(value)[:80]}")
    return kind(value)


def _rope_theta(raw: Mapping[str, Any], where: str) -> float:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{where}: rope_parameters must be a mapping, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(
            f"{where}: rope type {kind!r} is not supported; qquant knows 'default'. Remove the rope scaling"
        )
    source = rope if "rope_theta" in rope else raw
    return _number({"rope_theta": 10000.0, **source}, "rope_theta", float, where)


def parse_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """Read a `config.json` mapping of transformers 4 or 5.

    Raises:
        InputError: a number is missing, of the wrong type, or inconsistent, or the model uses what Qwen1.5 does not.
    """
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act must be 'silu', got {raw['hidden_act']!r}")
    if raw.get("use_sliding_window"):
        raise InputError(f"{where}: use_sliding_window is true; sliding-window attention is not supported")
    heads = _number(raw, "num_attention_heads", int, where)
    hidden = _number(raw, "hidden_size", int, where)
    config = ModelConfig(
        hidden=hidden,
        intermediate=_number(raw, "intermediate_size", int, where),
        layers=_number(raw, "num_hidden_layers", int, where),
        heads=heads,
        kv_heads=_number({"num_key_value_heads": heads, **raw}, "num_key_value_heads", int, where),
        head_dim=_number({"head_dim": max(1, hidden // heads), **raw}, "head_dim", int, where),
        vocab=_number(raw, "vocab_size", int, where),
        tied=raw.get("tie_word_embeddings", False) is True,
        epsilon=_number(raw, "rms_norm_eps", float, where),
        rope_theta=_rope_theta(raw, where),
        positions=_number(raw, "max_position_embeddings", int, where),
    )
    if config.heads % config.kv_heads:
        raise InputError(
            f"{where}: {config.heads} attention heads do not divide into {config.kv_heads} key-value heads"
        )
    if hidden % heads and "head_dim" not in raw:
        raise InputError(f"{where}: hidden_size {hidden} does not divide into {heads} attention heads")
    return require_bounds(config, where)


def require_bounds(config: ModelConfig, where: str) -> ModelConfig:
    """`config`, if its counts are whole and such as a model can have.

    Raises:
        InputError: a count is not whole, or so large that walking through it would take forever.
    """
    for name, limit in COUNT_LIMITS.items():
        value = getattr(config, name)
        if not isinstance(value, int) or value > limit:
            raise InputError(f"{where}: {name} is {value}; qquant takes whole numbers up to {limit:,}")
    return config
