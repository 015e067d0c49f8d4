"""What an artifact says and a runtime answers by: another value is a fault, not a warning, whatever tables say of its key."""

import json

import pytest

from tests.formats.test_claims import changed, noticed, rewrite

ANSWERS = {  # by key: a value with which a runtime answers otherwise, or not at all
    "general.architecture": "qwen3",
    "general.quantization_version": 1,
    "qwen2.context_length": 256,
    "qwen2.rope.freq_base": 10000.0,
    "qwen2.attention.layer_norm_rms_epsilon": 1e-3,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.eos_token_id": 5,
    "tokenizer.chat_template": "{{ messages }}",
}


@pytest.mark.parametrize("key", ANSWERS)
def test_a_value_that_changes_answers_fails(gguf, key):
    checkpoint, path, fields = gguf
    assert any(field.key == key for field in fields)
    rewrite(path, changed(fields, key, ANSWERS[key]))
    faults, _ = noticed(path, checkpoint)
    assert faults


ANSWERS_OF_A_FOLDER = {  # as ANSWERS, by file and key
    ("config.json", "architectures"): ["LlamaForCausalLM"],
    ("config.json", "hidden_act"): "gelu",
    ("config.json", "rms_norm_eps"): 1e-3,
    ("config.json", "rope_theta"): 500.0,
    ("config.json", "rope_scaling"): {"rope_type": "yarn", "factor": 4.0},
    ("config.json", "max_position_embeddings"): 8,
    ("config.json", "use_sliding_window"): True,
    ("config.json", "is_causal"): False,
    ("config.json", "partial_rotary_factor"): 0.5,
    ("config.json", "eos_token_id"): 5,
    ("generation_config.json", "eos_token_id"): 5,
    ("generation_config.json", "temperature"): 3.0,
    ("generation_config.json", "top_p"): 0.1,
    ("generation_config.json", "top_k"): 1,
    ("generation_config.json", "repetition_penalty"): 2.0,
    ("generation_config.json", "suppress_tokens"): [5],
    ("tokenizer_config.json", "eos_token"): "x",
    ("tokenizer_config.json", "add_bos_token"): True,
    ("tokenizer_config.json", "add_prefix_space"): True,
    ("tokenizer_config.json", "split_special_tokens"): True,
}


@pytest.mark.parametrize(("file", "key"), ANSWERS_OF_A_FOLDER)
def test_a_value_of_a_folder_that_changes_answers_fails(edited, file, key):
    checkpoint, found, open_file = edited
    path, content = open_file("gptq", file)
    path.write_text(json.dumps(content | {key: ANSWERS_OF_A_FOLDER[file, key]}))
    faults, _ = noticed(found["gptq"], checkpoint)
    assert faults


@pytest.mark.parametrize("damping", [1.5, 0, None, "x"])
def test_a_damping_that_transformers_refuses_fails(edited, damping):
    checkpoint, found, open_file = edited
    path, content = open_file("gptq", "config.json")
    wrong = content["quantization_config"] | {"damp_percent": damping}
    path.write_text(json.dumps(content | {"quantization_config": wrong}))
    assert any("damp_percent" in fault for fault in noticed(found["gptq"], checkpoint)[0])
