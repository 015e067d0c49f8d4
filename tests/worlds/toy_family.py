"""A family that is like no other in qquant: its own config keys and names, norms on each head of q and k, no biases, a head that is
wider than hidden / heads, an MLP of another width in every block. Neither transformers nor llama.cpp knows it.
"""

from dataclasses import dataclass

from qquant.families import Family, Linear, ModelConfig, ScalePair, Stage, Vector, require_bounds
from qquant.families.config import number
from qquant.families.forward import StageInput

CONFIG = {
    "model_type": "toy",
    "architectures": ["ToyForCausalLM"],
    "width": 64,
    "mlp_widths": [128, 192],
    "heads": {"query": 4, "key": 2, "size": 32},
    "vocabulary": 8192,
    "norm_epsilon": 1e-6,
    "rope_base": 10000.0,
    "context": 512,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    """With the width of every block's MLP."""

    widths: tuple[int, ...] = ()

    def sizes(self, layer):
        return {**super().sizes(layer), "intermediate": self.widths[layer]}


def parse(raw, where):
    widths, heads = raw["mlp_widths"], raw["heads"]
    config = ToyConfig(
        hidden=number(raw, "width", int, where),
        intermediate=max(widths),
        layers=len(widths),
        heads=number(heads, "query", int, where),
        kv_heads=number(heads, "key", int, where),
        head_dim=number(heads, "size", int, where),
        vocab=number(raw, "vocabulary", int, where),
        tied=raw.get("tied", False),
        epsilon=number(raw, "norm_epsilon", float, where),
        rope_theta=number(raw, "rope_base", float, where),
        positions=number(raw, "context", int, where),
        widths=tuple(widths),
    )
    return require_bounds(config, where)


def forward(ops, x):
    h = ops.normed("read", x)
    yield StageInput("read", h)
    query, key, value = ops.apply("read", h)
    a = ops.attend((ops.head_norm("mix.query_norm.weight", query), ops.head_norm("mix.key_norm.weight", key), value))
    yield StageInput("write", a, x)
    x = ops.add(x, *ops.apply("write", a))
    h = ops.normed("wide", x)
    yield StageInput("wide", h)
    m = ops.gated(ops.apply("wide", h))
    yield StageInput("narrow", m, x)
    return ops.add(x, *ops.apply("narrow", m))


TOY = Family(
    model_type="toy",
    architecture="ToyForCausalLM",
    parse=parse,
    forward=forward,
    embedding="words.weight",
    final_norm="last_norm.weight",
    head="unembed.weight",
    block="h.{}.",
    stages=(
        Stage(
            "read",
            (
                Linear("mix.query", out="heads", inn="hidden"),
                Linear("mix.key", out="kv", inn="hidden"),
                Linear("mix.value", out="kv", inn="hidden"),
            ),
            norm="ln_1.weight",
            vectors=(Vector("mix.query_norm.weight", "head"), Vector("mix.key_norm.weight", "head")),
        ),
        Stage("write", (Linear("mix.out", out="hidden", inn="heads"),), into_residual=True),
        Stage(
            "wide",
            (
                Linear("ffn.gate", out="intermediate", inn="hidden"),
                Linear("ffn.value", out="intermediate", inn="hidden"),
            ),
            norm="ln_2.weight",
        ),
        Stage("narrow", (Linear("ffn.out", out="hidden", inn="intermediate"),), into_residual=True),
    ),
    scale_pairs=(
        ScalePair("ln_1", "read"),
        ScalePair("mix.value", "write", tied_over_query_heads=True),
        ScalePair("ln_2", "wide"),
        ScalePair("ffn.value", "narrow"),
    ),
)
