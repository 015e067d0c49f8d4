"""Qwen2ForCausalLM (Qwen1.5, Qwen2, Qwen2.5 dense): names and shapes as data.

    x -> input_layernorm -> q,k,v (biased) -> rotary, causal attention -> o -> + x
      -> post_attention_layernorm -> gate, up -> silu(gate) * up -> down -> + x

A stage is the set of linears that share an input. A scale pair says which operator can absorb the inverse of a scaling of
a stage's input channels, so that AWQ changes the weights and not the function of the block.
"""

from qquant.families.family import Family, ScalePair, Stage

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    block="model.layers.{}.",
    attention_norm="input_layernorm.weight",
    mlp_norm="post_attention_layernorm.weight",
    stages=(
        Stage("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Stage("o", ("self_attn.o_proj",)),
        Stage("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
        Stage("down", ("mlp.down_proj",)),
    ),
    biased=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    scale_pairs=(
        ScalePair("input_layernorm", "qkv"),
        ScalePair("self_attn.v_proj", "o"),
        ScalePair("post_attention_layernorm", "gate_up"),
        ScalePair("mlp.up_proj", "down"),
    ),
    gguf_architecture="qwen2",
    gguf_names={
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
)
