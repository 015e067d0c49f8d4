"""Qwen2ForCausalLM (Qwen1.5, Qwen2, Qwen2.5 dense): config, names and shapes as data, and the forward pass of a block.

    x -> input_layernorm -> q,k,v (biased) -> rotary, causal attention -> o -> + x
      -> post_attention_layernorm -> gate, up -> silu(gate) * up -> down -> + x

A stage is the set of linears that share an input. A scale pair says which operator can absorb the inverse of a scaling of
a stage's input channels, so that AWQ changes the weights and not the function of the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qquant.errors import InputError
from qquant.families.config import ModelConfig, number, require_bounds, require_full_attention, rope_theta
from qquant.families.family import Family, GgufNames, Linear, ScalePair, Stage, Transformers
from qquant.families.forward import Operators, Passage, StageInput, Stream


def parse(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """Read a `config.json` mapping of transformers 4 or 5.

    Raises:
        InputError: a number is missing, of the wrong type, or inconsistent, or the model uses what Qwen1.5 does not.
    """
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act must be 'silu', got {raw['hidden_act']!r}")
    if raw.get("use_sliding_window"):
        raise InputError(f"{where}: use_sliding_window is true; sliding-window attention is not supported")
    heads = number(raw, "num_attention_heads", int, where)
    hidden = number(raw, "hidden_size", int, where)
    config = ModelConfig(
        hidden=hidden,
        intermediate=number(raw, "intermediate_size", int, where),
        layers=number(raw, "num_hidden_layers", int, where),
        heads=heads,
        kv_heads=number({"num_key_value_heads": heads, **raw}, "num_key_value_heads", int, where),
        head_dim=number({"head_dim": max(1, hidden // heads), **raw}, "head_dim", int, where),
        vocab=number(raw, "vocab_size", int, where),
        tied=raw.get("tie_word_embeddings", False) is True,
        epsilon=number(raw, "rms_norm_eps", float, where),
        rope_theta=rope_theta(raw, where),
        positions=number(raw, "max_position_embeddings", int, where),
    )
    if config.heads % config.kv_heads:
        raise InputError(
            f"{where}: {config.heads} attention heads do not divide into {config.kv_heads} key-value heads"
        )
    if hidden % heads and "head_dim" not in raw:
        raise InputError(f"{where}: hidden_size {hidden} does not divide into {heads} attention heads")
    require_bounds(config, where)
    require_full_attention(raw, config.layers, where)
    return config


def forward(ops: Operators[Stream], x: Stream) -> Passage[Stream]:
    """The head of this file, stage by stage; what is done with is let go of, since many samples may wait here at once."""
    h = ops.normed("qkv", x)
    yield StageInput("qkv", h)
    a = ops.attend(ops.apply("qkv", h))
    del h
    yield StageInput("o", a, x)
    (y,) = ops.apply("o", a)
    del a
    x = ops.add(x, y)
    del y
    h = ops.normed("gate_up", x)
    yield StageInput("gate_up", h)
    m = ops.gated(ops.apply("gate_up", h))
    del h
    yield StageInput("down", m, x)
    (y,) = ops.apply("down", m)
    return ops.add(x, y)


def settings(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `Qwen2Config` that the config implies."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,  # read by the model and not declared by its config
        "max_position_embeddings": config.positions,
        "rms_norm_eps": config.epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "use_sliding_window": False,
    }


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    parse=parse,
    forward=forward,
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    block="model.layers.{}.",
    stages=(
        Stage(
            "qkv",
            (
                Linear("self_attn.q_proj", out="heads", inn="hidden", bias=True),
                Linear("self_attn.k_proj", out="kv", inn="hidden", bias=True),
                Linear("self_attn.v_proj", out="kv", inn="hidden", bias=True),
            ),
            norm="input_layernorm.weight",
            fused="self_attn.qkv_proj",
        ),
        Stage("o", (Linear("self_attn.o_proj", out="hidden", inn="heads"),), into_residual=True),
        Stage(
            "gate_up",
            (
                Linear("mlp.gate_proj", out="intermediate", inn="hidden"),
                Linear("mlp.up_proj", out="intermediate", inn="hidden"),
            ),
            norm="post_attention_layernorm.weight",
            fused="mlp.gate_up_proj",
        ),
        Stage("down", (Linear("mlp.down_proj", out="hidden", inn="intermediate"),), into_residual=True),
    ),
    scale_pairs=(
        ScalePair("input_layernorm", "qkv"),
        ScalePair("self_attn.v_proj", "o", tied_over_query_heads=True),
        ScalePair("post_attention_layernorm", "gate_up"),
        ScalePair("mlp.up_proj", "down"),
    ),
    ignored=("rotary_emb.inv_freq",),
    padded_by="intermediate_size",
    transformers=Transformers(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        settings,
        computed=("model.rotary_emb",),
        attention="self_attn",
        gated="mlp",
    ),
    gguf=GgufNames(
        architecture="qwen2",
        pre="qwen2",
        names={
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
    ),
)
