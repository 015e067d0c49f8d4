"""llama_convert.py CHECKPOINT_DIR TARGET.gguf: a Qwen2ForCausalLM checkpoint as an f32 GGUF, the source of llama-quantize.

Written with the gguf package alone, so that the oracle's input owes nothing to qquant's own writer. Every tensor becomes
float32 (exact from bf16 and fp16); a head is written only if the checkpoint stores one. The tokenizer is the
byte-level BPE of tokenizer.json. Left out: the descriptive `general.*` keys, adapters, checkpoints in several files.
"""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np

TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    module, kind = name.rsplit(".", 1)
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    layer, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{int(layer)}.{BLOCK[part]}.{kind}"


def read_tensors(path):
    """Name and float32 array of each tensor of a safetensors file (numpy has no bf16, so safetensors.numpy fails)."""
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(bytes(data[8:start]))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (start + offset for offset in entry["data_offsets"])
        raw = data[begin:end]
        match entry["dtype"]:
            case "BF16":
                values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
            case "F16" | "F32":
                values = raw.view("<f2" if entry["dtype"] == "F16" else "<f4").astype(np.float32)
            case dtype:
                raise SystemExit(f"{path}: {name} is {dtype}; bf16, fp16 and fp32 can be converted")
        yield name, values.reshape(entry["shape"])


def add_architecture(writer, config):
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer, folder, config):
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["id"]: token for token in description["added_tokens"]}
    names = {index: token for token, index in description["model"]["vocab"].items()}
    names |= {index: token["content"] for index, token in added.items()}
    size = config["vocab_size"]
    kinds = [gguf.TokenType.NORMAL if i in names else gguf.TokenType.UNUSED for i in range(size)]
    for index, token in added.items():
        kinds[index] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types(kinds)
    merges = description["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = {token: index for index, token in names.items()}
    for key, add in (("eos_token", writer.add_eos_token_id), ("pad_token", writer.add_pad_token_id)):
        token = settings.get(key)
        token = token["content"] if isinstance(token, dict) else token
        if token in ids:
            add(ids[token])
    if config.get("bos_token_id") is not None:
        writer.add_bos_token_id(config["bos_token_id"])
    writer.add_add_bos_token(False)
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if text:
        writer.add_chat_template(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    config = json.loads((args.checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "qwen2":
        raise SystemExit(f"model_type is {config['model_type']}; only qwen2 can be converted")
    writer = gguf.GGUFWriter(args.target, "qwen2")
    add_architecture(writer, config)
    add_tokenizer(writer, args.checkpoint, config)
    for name, values in read_tensors(args.checkpoint / "model.safetensors"):
        writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(json.dumps({"bytes": args.target.stat().st_size}))


if __name__ == "__main__":
    main()
