"""What artifacts say of themselves: every key of a GGUF file of ours and of a folder's files is changed in turn, and the change is noticed."""

import json
import re
from dataclasses import replace

import pytest

from qquant import formats
from qquant.artifact.opening import open_weights
from qquant.checks.comparable import require_same_shape
from qquant.errors import InputError
from qquant.formats import FORMATS, claims_of, folder_claims, kind_of_file
from qquant.formats.gguf import claims as gguf_claims
from qquant.formats.gguf.container import Field, header_bytes, read_header


def noticed(path, checkpoint):
    """Everything that `check` says of an artifact before it measures it."""
    try:
        require_same_shape(path, open_weights(path), checkpoint)
        found = claims_of(path, checkpoint)
    except InputError as error:
        return (str(error),), ()
    return found.faults, found.warnings


def rewrite(path, fields, tensors=None):
    """A GGUF file with other fields (and types of tensors), and the same data."""
    header, data = read_header(path), path.read_bytes()
    stored = list((tensors or header.tensors).values())
    head, _, size = header_bytes(fields, [(t.name, t.shape, t.type_id, t.nbytes) for t in stored])
    content = bytearray(size)
    content[: len(head)] = head
    place = len(head)
    for tensor in stored:
        content[place : place + tensor.nbytes] = data[tensor.offset : tensor.offset + tensor.nbytes]
        place += -(-tensor.nbytes // 32) * 32
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["gptq", "awq", "gguf"])
def test_our_own_artifacts_say_what_they_are(world, name):
    checkpoint, found = world
    assert noticed(found[name], checkpoint) == ((), ())


# --- mutation: every key --------------------------------------------------------------------------------------------------


def others(field):
    """The field with other values of its kind, of another kind, and not at all (None)."""
    yield None
    if field.kind == "str":
        yield from (replace(field, value=value) for value in ("", field.value + "x"))
        yield Field(field.key, "u32", 1)
    elif field.kind == "bool":
        yield replace(field, value=not field.value)
    elif field.kind.startswith("["):
        yield from (replace(field, value=field.value[:-1]), replace(field, value=field.value[::-1]))
        yield Field(field.key, "u32", 7)
        if field.kind == "[i32]":
            yield from (replace(field, value=[kind] * len(field.value)) for kind in (1, 3, 5))
    else:
        numbers = (
            (field.value + 1, field.value * 2 + 3, 0)
            if field.kind != "f32"
            else (field.value * 1.01, float("inf"), 0.0)
        )
        yield from (replace(field, value=value) for value in numbers)
        yield replace(field, kind="f64" if field.kind == "f32" else "i64")
        yield Field(field.key, "str", "1")


DESCRIPTIONS = re.compile("|".join(gguf_claims.HARMLESS))


def test_every_key_of_a_gguf_file_is_noticed(gguf):
    checkpoint, path, fields = gguf
    counts, missed = [0, 0], []
    for place, field in enumerate(fields):
        for other in others(field):
            rewrite(path, [*fields[:place], *([other] if other else []), *fields[place + 1 :]])
            faults, warnings = noticed(path, checkpoint)
            counts[0] += 1
            counts[1] += bool(faults or warnings)
            if not faults and not warnings:
                missed.append((field.key, "absent" if other is None else other.value))
    unexplained = [
        (key, value)
        for key, value in missed
        if not DESCRIPTIONS.fullmatch(key)
        and not (value == "absent" and key.startswith("tokenizer.ggml.add_"))
        and not (value == "absent" and key == "general.type")
    ]
    assert unexplained == []
    assert counts[0] > 80
    assert counts[1] > 0.5 * counts[0], counts
    assert not any(key.startswith(("qwen2.", "tokenizer.")) and value != "absent" for key, value in missed)


ADDED = {
    "qwen2.rope.scaling.type": ("str", "yarn"),
    "qwen2.rope.scaling.factor": ("f32", 4.0),
    "qwen2.rope.scale_linear": ("f32", 4.0),
    "qwen2.rope.scaling.yarn_log_multiplier": ("f32", 0.1),
    "qwen2.rope.dimension_count": ("u32", 8),
    "qwen2.attention.sliding_window": ("u32", 16),
    "qwen2.attention.causal": ("bool", False),
    "qwen2.attention.scale": ("f32", 0.5),
    "qwen2.attention.key_length": ("u32", 16 * 2),
    "qwen2.attention.value_length": ("u32", 32),
    "qwen2.attn_logit_softcapping": ("f32", 50.0),
    "qwen2.vocab_size": ("u32", 10),
    "qwen2.logit_scale": ("f32", 2.0),
    "qwen2.residual_scale": ("f32", 2.0),
    "qwen2.expert_count": ("u32", 8),
    "qwen2.a_key_of_tomorrow": ("u32", 8),
    "tokenizer.ggml.add_space_prefix": ("bool", True),
    "tokenizer.ggml.eot_token_id": ("u32", 3),
    "tokenizer.ggml.fim_pre_token_id": ("u32", 3),
    "tokenizer.huggingface.json": ("str", "{}"),
    "tokenizer.chat_template.tool_use": ("str", "{{ messages }}"),
    "general.sampling.temp": ("f32", 2.0),
    "general.sampling.mirostat": ("i32", 2),
    "adapter.type": ("str", "lora"),
}


@pytest.mark.parametrize("key", ADDED)
def test_a_key_that_a_runtime_reads_and_we_would_not_write_fails(gguf, key):
    checkpoint, path, fields = gguf
    rewrite(path, [*(field for field in fields if field.key != key), Field(key, *ADDED[key])])
    faults, _ = noticed(path, checkpoint)
    assert any(key in fault or "expected [" in fault for fault in faults), faults


def test_keys_that_say_what_is_so_anyway_are_silent_and_unknown_ones_warn(gguf):
    checkpoint, path, fields = gguf
    config = checkpoint.config
    plain = [
        Field("qwen2.vocab_size", "u32", config.vocab),
        Field("qwen2.rope.dimension_count", "u32", config.head_dim),
    ]
    plain += [Field("qwen2.rope.scaling.type", "str", "none"), Field("general.author", "str", "somebody")]
    rewrite(path, [*fields, *plain])
    assert noticed(path, checkpoint) == ((), ())
    rewrite(path, [*fields, Field("somebody.key", "str", "x")])
    faults, warnings = noticed(path, checkpoint)
    assert (faults, len(warnings)) == ((), 1)
    assert "somebody.key" in warnings[0]


OF_ANOTHER_KIND = {
    "general.name": ("u32", 1),
    "general.file_type": ("i32", 2),
    "split.count": ("u32", 1),
    "tokenizer.ggml.token_type_count": ("i32", 1),
    "tokenizer.ggml.scores": ("[i32]", [0] * 40),
    "qwen2.expert_count": ("i32", 0),
    "qwen2.attention.scale": ("f64", 0.0),
}


@pytest.mark.parametrize("key", OF_ANOTHER_KIND)
def test_a_harmless_key_of_a_kind_that_llama_cpp_does_not_read_fails(gguf, key):
    checkpoint, path, fields = gguf
    rewrite(path, [*(field for field in fields if field.key != key), Field(key, *OF_ANOTHER_KIND[key])])
    faults, _ = noticed(path, checkpoint)
    assert any(fault.startswith(f"{key} is of kind") for fault in faults), faults


def test_scores_are_read_for_as_many_tokens_as_there_are(gguf):
    checkpoint, path, fields = gguf
    count = len(next(field for field in fields if field.key == "tokenizer.ggml.tokens").value)
    for given, wrong in ((count, False), (count - 1, True)):
        rewrite(path, [*fields, Field("tokenizer.ggml.scores", "[f32]", [0.0] * given)])
        faults, _ = noticed(path, checkpoint)
        assert any("tokenizer.ggml.scores" in fault for fault in faults) == wrong, faults


def changed(fields, key, value):
    return [replace(field, value=value) if field.key == key else field for field in fields]


def test_tokens_that_take_over_another_ones_id_are_found(gguf):
    checkpoint, path, fields = gguf
    by_key = {field.key: field.value for field in fields}
    tokens, kinds = by_key["tokenizer.ggml.tokens"], by_key["tokenizer.ggml.token_type"]
    unused = kinds.index(5) if 5 in kinds else None
    if unused is not None:
        rewrite(path, changed(fields, "tokenizer.ggml.tokens", [*tokens[:unused], tokens[40], *tokens[unused + 1 :]]))
        assert any("no such token" in fault for fault in noticed(path, checkpoint)[0])
    special = next(number for number, kind in enumerate(kinds) if kind == 3)
    rewrite(path, changed(fields, "tokenizer.ggml.token_type", [*kinds[:special], 1, *kinds[special + 1 :]]))
    assert any("token_type" in fault for fault in noticed(path, checkpoint)[0])
    rewrite(path, changed(fields, "tokenizer.ggml.token_type", [*kinds[:special], 4, *kinds[special + 1 :]]))
    assert any("token_type" in warning for warning in noticed(path, checkpoint)[1])


def test_a_file_type_cannot_choose_its_gates(gguf):
    checkpoint, path, fields = gguf
    honest = kind_of_file(path)
    assert honest == "q4_0"
    for number in (1, 7, 9999):
        rewrite(path, changed(fields, "general.file_type", number))
        assert kind_of_file(path) == honest
        assert any("general.file_type" in fault for fault in noticed(path, checkpoint)[0])


def test_what_is_no_mix_is_held_to_the_limits_of_its_size(gguf):
    checkpoint, path, fields = gguf
    header = read_header(path)
    one = header.tensors["blk.0.ffn_up.weight"]
    wide = {name: replace(t, type_id=8) if name == one.name else t for name, t in header.tensors.items()}
    path.write_bytes(path.read_bytes() + b"\0" * 100_000)
    rewrite(path, fields, wide)
    assert kind_of_file(path) in ("q4_0", "iq4_nl", "q4_1", "q4_k_s")
    assert any("no mix of llama-quantize's" in warning for warning in noticed(path, checkpoint)[1])


SAME = " is not the checkpoint's; a sample of text gets the same tokens"


# --- folders --------------------------------------------------------------------------------------------------------------


def values(value):
    """Other JSON values in the place of one."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value * 2 + 3]
    if isinstance(value, str):
        return [value + "x"]
    if isinstance(value, list):
        return [[*value, 1], []]
    if isinstance(value, dict):
        return [value | {"x": 1}]
    return [True, 3]


HARMLESS_VALUES = {
    ("quantization_config", "desc_act", True): "g_idx is in its natural order, and stored",
    ("quantization_config", "damp_percent"): "left out, it is one that every reader has",
}


def deep(content):
    """(path of keys, content with one value changed or left out)."""
    for key, value in content.items():
        rest = {name: other for name, other in content.items() if name != key}
        yield (key,), rest
        yield from (
            ((key, other), rest | {key: other}) for other in values(value) if not isinstance(other, dict) or key == "x"
        )
        if isinstance(value, dict):
            for inner, was in value.items():
                left = {name: other for name, other in value.items() if name != inner}
                yield (key, inner), rest | {key: left}
                yield from (((key, inner, other), rest | {key: left | {inner: other}}) for other in values(was))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("gptq", "config.json"),
        ("awq", "config.json"),
        ("gptq", "generation_config.json"),
        ("gptq", "tokenizer_config.json"),
    ],
)
def test_every_key_of_a_folder_is_noticed(edited, name, file):
    checkpoint, found, open_file = edited
    path, content = open_file(name, file)
    changed, missed = 0, []
    reading = formats.folder_claims.READ[file]
    harmless = {*folder_claims.HARMLESS[file]} - {"quantization_config", "rope_theta"} | FORMATS[name].harmless
    for keys, other in deep(content):
        path.write_text(json.dumps(other))
        faults, warnings = noticed(found[name], checkpoint)
        changed += 1
        spelled = keys[:2] if keys[0] == "quantization_config" else keys[:1]
        default = reading.get(keys[0], ("nothing",))[0]
        same = len(keys) == 1 and (content[keys[0]] == default or keys[0] == "torch_dtype")
        same = same and keys[0] != "clean_up_tokenization_spaces"
        if not faults and not warnings and not harmless & set(spelled) and keys not in HARMLESS_VALUES and not same:
            missed.append(keys)
    absent = {
        ("quantization_config", key)
        for key in ("checkpoint_format", "version", "modules_to_not_convert", "model_file_base_name")
    }
    assert [keys for keys in missed if keys not in absent] == []
    assert changed >= len(content)


def test_what_auto_round_says_of_its_own_making_is_no_warning(edited):
    """The keys of auto-round 0.16.1's `auto_gptq`; codes of another kind than integers are refused."""
    checkpoint, found, open_file = edited
    path, content = open_file("gptq", "config.json")
    before = noticed(found["gptq"], checkpoint)
    made = {"autoround_version": "0.16.1", "provider": "auto-round", "iters": 200, "data_type": "int"}
    path.write_text(json.dumps(content | {"quantization_config": content["quantization_config"] | made}))
    assert noticed(found["gptq"], checkpoint) == before
    made["data_type"] = "mx_fp"
    path.write_text(json.dumps(content | {"quantization_config": content["quantization_config"] | made}))
    assert "data_type" in noticed(found["gptq"], checkpoint)[0][0]


def test_a_rope_in_either_spelling_is_one(edited):
    checkpoint, found, open_file = edited
    path, content = open_file("gptq", "config.json")
    theta = content.pop("rope_theta")
    path.write_text(json.dumps(content | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}))
    faults, warnings = noticed(found["gptq"], checkpoint)
    assert faults == ()
    assert warnings == ("config.json: rope_theta: missing; readers before transformers 5 take 10000",)
    path.write_text(json.dumps(content | {"rope_parameters": {"rope_type": "default", "rope_theta": theta * 2}}))
    assert "config.json: rope" in noticed(found["gptq"], checkpoint)[0][0]


def test_a_tokenizer_that_does_another_thing_fails_and_one_that_is_spelled_otherwise_does_not(edited):
    checkpoint, found, open_file = edited
    path, content = open_file("gptq", "tokenizer.json")
    merges = [merge.split(" ") if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    path.write_text(json.dumps(content | {"model": content["model"] | {"merges": merges}}))
    assert noticed(found["gptq"], checkpoint) == ((), ())
    path.write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}))
    assert any("same text gets other tokens" in fault for fault in noticed(found["gptq"], checkpoint)[0])
    path.write_text(json.dumps(content | {"model": content["model"] | {"ignore_merges": True}}))
    assert noticed(found["gptq"], checkpoint)[0]
    cut = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    path.write_text(json.dumps(content | {"truncation": cut}))
    assert noticed(found["gptq"], checkpoint) == ((), (f"tokenizer.json: truncation{SAME}",))


def test_every_key_of_the_copy_of_quantization_config_is_noticed(edited):
    """quantize_config.json, which AutoGPTQ and GPTQModel read before config.json."""
    checkpoint, found, open_file = edited
    path, content = open_file("gptq", "quantize_config.json")
    missed, changed = [], 0
    allowed = HARMLESS_VALUES.keys() | {
        ("quantization_config", "model_file_base_name"),
        ("quantization_config", "checkpoint_format"),
    }
    for keys, other in deep(content):
        if keys[0] in FORMATS["gptq"].harmless:
            continue
        path.write_text(json.dumps(other))
        changed += 1
        faults, warnings = noticed(found["gptq"], checkpoint)
        said = any("quantize_config.json" in text for text in (*faults, *warnings))
        absent = len(keys) == 1 and keys[0] in ("sym", "desc_act", "quant_method")  # what is taken without them
        if not said and not absent and ("quantization_config", *keys) not in allowed:
            missed.append(keys)
    assert missed == []
    assert changed >= 12
