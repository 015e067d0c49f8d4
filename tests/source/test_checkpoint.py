"""Reading checkpoints: what is accepted, and one clear error for everything that is not."""

import hashlib
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qquant.errors import EnvironmentMissingError, InputError, UsageError
from qquant.source import safetensors_file
from qquant.source.checkpoint import Checkpoint
from qquant.source.hub import resolve


def rewrite(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("shards", "tied"), [(1, False), (3, True)])
def test_tensors_are_those_of_the_files(make_checkpoint, dtype, shards, tied):
    folder = make_checkpoint(dtype=dtype, shards=shards, tie_word_embeddings=tied)
    checkpoint = Checkpoint.open(folder)
    expected = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    assert set(checkpoint.tensors) == set(expected)
    for name, value in expected.items():
        assert torch.equal(checkpoint.tensor(name), value)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert torch.equal(checkpoint.rows("lm_head.weight", 10, 20), expected[head][10:20])
    assert checkpoint.dtype == {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]


def test_config_of_transformers_5_reads_the_same(make_checkpoint):
    folder = make_checkpoint()
    before = Checkpoint.open(folder).config
    edit_config(folder, rope_theta=None, rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"})
    assert Checkpoint.open(folder).config == before


def test_tied_checkpoint_may_hold_a_copy_of_the_head(make_checkpoint):
    folder = make_checkpoint(tie_word_embeddings=True)
    rewrite(folder, lambda t: t.__setitem__("lm_head.weight", t["model.embed_tokens.weight"].clone()))
    checkpoint = Checkpoint.open(folder)
    assert "lm_head.weight" in checkpoint.tensors
    assert torch.equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor("model.embed_tokens.weight"))


def slip(folder):
    edit_config(folder, intermediate_size=132)


def missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def truncated_shard(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def truncated_header(folder):
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def missing_tensor(folder):
    rewrite(
        folder,
        lambda t: t.pop("model.norm.weight"),
        next(f.name for f in folder.glob("*.safetensors") if "model.norm.weight" in load_file(f)),
    )


def wrong_dtype(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    file = next(f.name for f in folder.glob("*.safetensors") if name in load_file(f))
    rewrite(folder, lambda t: t.__setitem__(name, t[name].to(torch.int32)), file)


def mixed_dtypes(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    file = next(f.name for f in folder.glob("*.safetensors") if name in load_file(f))
    rewrite(folder, lambda t: t.__setitem__(name, t[name].float()), file)


def wrong_shape(folder):
    name = "model.layers.0.self_attn.k_proj.weight"
    file = next(f.name for f in folder.glob("*.safetensors") if name in load_file(f))
    rewrite(folder, lambda t: t.__setitem__(name, t[name][:32].contiguous()), file)


def foreign_tensor(folder):
    file = next(folder.glob("*.safetensors")).name
    rewrite(folder, lambda t: t.__setitem__("model.vision.weight", torch.zeros(2)), file)


def escaping_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../secret/model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lying_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "model-00003-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_index(folder):
    (folder / "model.safetensors.index.json").unlink()


def pickles(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def nothing(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()


DAMAGE = {
    slip: r"gate_proj.*\[128, 64\]; the config implies \[132, 64\]",
    missing_shard: r"model-00002-of-00003\.safetensors: missing shard \(\d+ tensors\)",
    truncated_shard: r"model-00002-of-00003\.safetensors: truncated: .* describes [\d,]+ bytes, the file has",
    truncated_header: r"model-00001-of-00003\.safetensors: header of",
    missing_tensor: r"index\.json: puts model\.norm\.weight into",
    wrong_dtype: r"layers\.1\.mlp\.up_proj\.weight .* is I32; expected one of BF16, F16, F32",
    mixed_dtypes: r"several dtypes: BF16, F32",
    wrong_shape: r"layers\.0\.self_attn\.k_proj\.weight .* is \[32, 64\]; the config implies \[64, 64\]",
    foreign_tensor: r"model\.vision\.weight .* is not a tensor of this model",
    escaping_index: r"'\.\./secret/model\.safetensors' is not the plain name",
    lying_index: r"puts .* into model-00003-of-00003",
    no_index: r"3 safetensors files without model\.safetensors\.index\.json",
    pickles: r"pytorch_model\.bin: is a pickle",
    nothing: r"holds no \.safetensors file",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damage_is_one_clear_error(make_checkpoint, damage):
    folder = make_checkpoint(shards=3)
    damage(folder)
    with pytest.raises(InputError, match=DAMAGE[damage]):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; qquant builds 'qwen2'"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "expected 'Qwen2ForCausalLM'"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map asks to run code"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        ({"hidden_size": "64"}, "hidden_size must be a positive int, got '64'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive int, got -1"),
        ({"num_key_value_heads": 3}, "do not divide into 3 key-value heads"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn' in rope_scaling is not supported"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn"}},
            "rope type 'yarn' in rope_scaling",
        ),
        (
            {"rope_parameters": {"rope_theta": 10000.0}},
            "rope_theta is 1000000.0, rope_theta in rope_parameters is 10000.0",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "holds another rope for 'full_attention'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types holds '1 of them'"),
        ({"is_causal": False}, "is_causal is False"),
        ({"dual_chunk_attention_config": {"chunk_size": 8192}}, "dual_chunk_attention_config is"),
        ({"compression_config": {"format": "pack-quantized"}}, "already quantized"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
    ],
)
def test_config_problems_are_named(make_checkpoint, changes, message):
    folder = make_checkpoint()
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        Checkpoint.open(folder)


def test_published_slip_is_caught_before_any_work(make_checkpoint):
    """14436 for 14336: config and tensors disagree, and the message shows both numbers."""
    folder = make_checkpoint(intermediate_size=336)
    edit_config(folder, intermediate_size=436)
    with pytest.raises(InputError) as caught:
        Checkpoint.open(folder)
    assert "[336, 64]" in str(caught.value)
    assert "[436, 64]" in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_when_read(make_checkpoint, value):
    folder = make_checkpoint()
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(folder, lambda t: t[name].__setitem__((3, 5), value))
    checkpoint = Checkpoint.open(folder)
    checkpoint.block(0)
    with pytest.raises(InputError, match=rf"{name} holds NaN or infinity"):
        checkpoint.block(1)


def test_no_tokenizer(make_checkpoint):
    folder = make_checkpoint()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        InputError, match=r"no tokenizer, looked for tokenizer\.json, and for vocab\.json with merges\.txt"
    ):
        Checkpoint.open(folder).require_tokenizer()


def test_references():
    assert resolve("bundled:tiny-qwen1.5")[0].name == "tiny-qwen1.5"
    with pytest.raises(UsageError, match="there is bundled:tiny-qwen1.5"):
        resolve("bundled:nothing")
    with pytest.raises(UsageError, match="no such file or folder, and it is no hub id"):
        resolve("no/such/folder")


def test_hub_out_of_reach(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(EnvironmentMissingError, match=r"Qwen/Qwen1\.5-0\.5B-Chat: cannot be fetched"):
        resolve("Qwen/Qwen1.5-0.5B-Chat")


def test_hub_id_is_pinned_to_a_commit(monkeypatch, make_checkpoint):
    import huggingface_hub

    folder, seen = make_checkpoint(), {}
    info = type("Info", (), {"sha": "c" * 40, "siblings": None})
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "model_info",
        lambda _, repo, revision, files_metadata: seen.update(asked=revision) or info,
    )
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, revision, allow_patterns: seen.update(got=revision) or str(folder),
    )
    checkpoint = Checkpoint.open("Qwen/Qwen1.5-0.5B-Chat", revision="main")
    assert seen == {"asked": "main", "got": "c" * 40}
    assert checkpoint.revision == "c" * 40
    assert checkpoint.name == "Qwen1.5-0.5B-Chat"


def test_hub_files_that_do_not_fit_are_not_fetched(monkeypatch):
    import huggingface_hub

    def file(name, size):
        return type("File", (), {"rfilename": name, "size": size, "lfs": None})

    files = [file("model.safetensors", 10**17), file("tf_model.h5", 10**18)]
    info = type("Info", (), {"sha": "c" * 40, "siblings": files})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(EnvironmentMissingError, match=r"takes 100,000,000,000,000,000 bytes in"):
        resolve("Qwen/Qwen1.5-0.5B-Chat")


def test_a_blob_of_the_hub_cache_is_its_name(make_checkpoint, tmp_path):
    """F4: what the hub said of a file is compared, where its cache still knows."""
    folder = make_checkpoint()
    right = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    snapshot, blobs = tmp_path / "c" / "snapshots" / "r", tmp_path / "c" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    folder.rename(snapshot)
    for name, good in ((right, True), ("0" * 64, False)):
        (snapshot / "model.safetensors").rename(blobs / name)
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/{name}")
        if good:
            Checkpoint.open(snapshot).content_hash()
            (snapshot / "model.safetensors").unlink()
            (blobs / name).rename(snapshot / "model.safetensors")
        else:
            with pytest.raises(InputError, match=r"its sha256 is .*, the hub's is 0000"):
                Checkpoint.open(snapshot).content_hash()


# --- the reader of headers -------------------------------------------------------------------------------------------

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [8], "data_offsets": [24, 32]},
}


def write_raw(path, header, data=b"\0" * 32, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def changed(name, **entry):
    return GOOD | {name: GOOD[name] | entry}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "must be a mapping"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":1,"a":2}', "repeated name 'a'"),
        ({"a": 1}, "must have dtype, shape and data_offsets"),
        (changed("a", dtype="F13"), "unknown dtype 'F13'"),
        (changed("a", dtype=["F32"]), "unknown dtype"),
        (changed("a", shape=[-2, 3]), "bad shape"),
        (changed("a", shape=[2.0, 3]), "bad shape"),
        (changed("a", shape=[True, 6]), "bad shape"),
        (changed("a", shape=[1] * 9), "bad shape"),
        (changed("a", shape=[2, 4]), "takes 32 bytes, data_offsets give 24"),
        (changed("a", data_offsets=[0]), "bad data_offsets"),
        (changed("b", data_offsets=[16, 24]), "overlap or hole"),
        ({"a": GOOD["a"]}, "followed by unknown bytes"),
        (GOOD | {"__metadata__": {"x": 1}}, "__metadata__ must map strings"),
    ],
)
def test_malformed_headers_are_refused(tmp_path, header, message):
    with pytest.raises(InputError, match=message):
        safetensors_file.read_header(write_raw(tmp_path / "x.safetensors", header))


def test_header_length_is_bounded_by_file_and_limit(tmp_path):
    for length in (10**6, 2**63, 2**64 - 1):
        with pytest.raises(InputError, match="truncated or not safetensors"):
            safetensors_file.read_header(write_raw(tmp_path / "x.safetensors", GOOD, length=length))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_no_bytes_crash_the_reader(tmp_path_factory, noise, cut):
    path = write_raw(tmp_path_factory.getbasetemp() / "fuzz.safetensors", GOOD)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] + noise + whole[cut + len(noise) :])
    try:
        safetensors_file.read_header(path)
    except InputError:
        return
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:  # what we accept, the reference reader accepts
        list(file.keys())


# --- adapters --------------------------------------------------------------------------------------------------------


def write_adapter(folder, tensors, **changes):
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def low_rank():
    return {f"{Q}.lora_A.weight": torch.randn(4, 64), f"{Q}.lora_B.weight": torch.randn(64, 4)}


@pytest.mark.parametrize(
    ("changes", "scale"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"alpha_pattern": {"q_proj": 2}}, 0.5)]
)
def test_adapter_is_merged_as_tensors_are_read(make_checkpoint, tmp_path, changes, scale):
    folder, tensors = make_checkpoint(), low_rank()
    base, merged = (
        Checkpoint.open(folder),
        Checkpoint.open(folder, adapter=write_adapter(tmp_path / "lora", tensors, **changes)),
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    delta = scale * tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    assert torch.equal(merged.tensor(name), (base.tensor(name).float() + delta).bfloat16())
    assert torch.equal(merged.rows(name, 3, 9), merged.tensor(name)[3:9])
    other = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(merged.tensor(other), base.tensor(other))
    assert merged.fingerprint != base.fingerprint
    assert merged.content_hash() != base.content_hash()


def test_modules_to_save_replace_the_base(make_checkpoint, tmp_path):
    head = torch.randn(8192, 64)
    adapter = write_adapter(tmp_path / "lora", low_rank() | {"base_model.model.lm_head.weight": head})
    merged = Checkpoint.open(make_checkpoint(), adapter=adapter)
    assert torch.equal(merged.rows("lm_head.weight", 5, 9), head[5:9].bfloat16())


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        (low_rank, {"peft_type": "IA3"}, "only 'LORA'"),
        (low_rank, {"use_dora": True}, "use_dora is true"),
        (low_rank, {"bias": "all"}, "bias is 'all'"),
        (
            lambda: {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)},
            {},
            "does not belong",
        ),
        (lambda: {f"{Q}.lora_A.weight": torch.zeros(4, 64)}, {}, "has only lora_A"),
        (lambda: low_rank() | {f"{Q}.lora_B.weight": torch.zeros(32, 4)}, {}, r"do not give \[64, 64\]"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(make_checkpoint, tmp_path, tensors, changes, message):
    with pytest.raises(InputError, match=message):
        Checkpoint.open(make_checkpoint(), adapter=write_adapter(tmp_path / "lora", tensors(), **changes))


def test_adapter_folder_must_be_one(make_checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        Checkpoint.open(make_checkpoint(), adapter=tmp_path)
    folder = write_adapter(tmp_path / "lora", low_rank())
    shutil.move(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    with pytest.raises(InputError, match="pickled adapter_model.bin is not read"):
        Checkpoint.open(make_checkpoint(), adapter=folder)
