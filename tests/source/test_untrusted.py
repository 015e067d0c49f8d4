"""Headers, configs and hooks of strangers: one InputError; none hangs, crashes, or is accepted where the reference refuses."""

import json
import re
import shutil
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qquant.artifact.opening import open_weights
from qquant.errors import InputError
from qquant.source import safetensors_file, untrusted
from qquant.source.checkpoint import Checkpoint
from qquant.source.hub import card_head
from tests.conftest import SMALL
from tests.source.test_checkpoint import GOOD, edit_config, low_rank, write_adapter, write_raw
from tests.worlds import GOLDEN
from tests.worlds.strange import FAST, numbers, refused, values


def by_safetensors(path):
    with safe_open(path, framework="pt") as file:
        list(file.keys())


# --- F4, F13, F18: headers ---------------------------------------------------------------------------------------------


@FAST
@given(
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(values, st.sampled_from(["F32", "U8", "BF16", "F8_E4M3"])),
            "shape": st.one_of(values, st.lists(numbers, max_size=5)),
            "data_offsets": st.one_of(values, st.lists(numbers, min_size=2, max_size=2)),
        }
    )
)
def test_strange_entries_of_a_header(place, entry):
    refused(safetensors_file.read_header, write_raw(place / "x", GOOD | {"a": entry}), by_safetensors)


@FAST
@given(st.integers(0, 200), st.integers(0, 40))
def test_truncated_and_grown_files(place, cut, more):
    path = write_raw(place / "x", GOOD)
    whole = path.read_bytes()
    changed = whole[:cut] if cut < len(whole) else whole + b"\0" * more
    path.write_bytes(changed)
    if changed != whole:
        with pytest.raises(InputError):
            safetensors_file.read_header(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"\\ud800":' + json.dumps(GOOD["b"] | {"data_offsets": [0, 8]}).encode() + b"}", "surrogate"),
        (json.dumps({"a": {"dtype": "F32", "shape": [2**62, 4, 0], "data_offsets": [0, 0]}}).encode(), "overflows"),
        (b" " + json.dumps(GOOD).encode(), "must be a mapping"),
        (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "nested deeper"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,-0]}}', r"bad data_offsets \[0, -0.0\]"),
        (b'{"__metadata__":{"a":NaN}}', "NaN is not a JSON number"),
        (b"{" + b",".join(b'"%d":1' % i for i in range(250_000)) + b"}", "at most 200,000 tensors"),
    ],
)
def test_what_the_reference_refuses_too(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        safetensors_file.read_header(write_raw(tmp_path / "x", text))


def bombs():
    """Headers of nearly 25 MB, each the worst of its kind."""
    yield "empty lists", b'{"a":[' + b"[]," * 8_000_000 + b"[]]}"
    yield (
        "empty tensors",
        b"{" + b",".join(b'"%06d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(400_000)) + b"}",
    )
    yield "late repeat", b"{" + b",".join(b'"%07d":0' % i for i in range(1_000_000)) + b',"0999999":0}'
    yield "one string", b'{"__metadata__":{"a":"' + b"x" * 24_000_000 + b'"}}'
    yield "one number", b'{"a":' + b"1" * 24_000_000 + b"}"
    yield "deep", b'{"a":' + b"[" * 12_000_000 + b"}"


@pytest.mark.parametrize(("name", "text"), list(bombs()), ids=lambda value: value if isinstance(value, str) else "")
def test_header_bombs_cost_little(tmp_path, name, text):
    path, began = write_raw(tmp_path / "x", text, data=b""), time.process_time()
    if name == "one string":
        safetensors_file.read_header(path)
    else:
        with pytest.raises(InputError):
            safetensors_file.read_header(path)
    assert time.process_time() - began < 5


@FAST
@given(st.dictionaries(st.sampled_from([*SMALL, "head_dim", "rope_scaling", "rope_parameters"]), values, min_size=1))
def test_strange_configs(strange_folder, changes):
    """F13: a config of any values is refused, or means the same model."""
    before = (strange_folder / "config.json").read_bytes()
    (strange_folder / "config.json").write_text(json.dumps(SMALL | changes))
    try:
        Checkpoint.open(strange_folder)
    except InputError:
        pass
    finally:
        (strange_folder / "config.json").write_bytes(before)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 5000},
        {"rms_norm_eps": float("inf")},
        {"architectures": 5},
        {"hidden_size": 10**30},
        {"vocab_size": 2**40},
    ],
)
def test_numbers_that_no_model_has_are_refused_at_once(make_checkpoint, changes):
    folder = make_checkpoint()
    edit_config(folder, **changes)
    began = time.process_time()
    with pytest.raises(InputError):
        Checkpoint.open(folder)
    assert time.process_time() - began < 1


def test_a_card_with_a_bomb_is_no_card(tmp_path):
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    (tmp_path / "README.md").write_text(f"---\n{bomb}license: mit\n---\n")
    assert card_head(tmp_path / "README.md") == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert card_head(tmp_path / "README.md") == {"license": "mit"}


@pytest.mark.parametrize("damage", ["dtype", "config"])
def test_artifacts_of_strange_make(tmp_path, damage):
    folder = shutil.copytree(GOLDEN / "artifacts" / "autogptq-int4", tmp_path / "a")
    if damage == "config":
        edit_config(folder, quantization_config=["gptq"])
    else:
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("qweight"))
        save_file(tensors | {name: tensors[name].float()}, path)
    with pytest.raises(InputError, match=r"expected a mapping|quant_method|is F32; expected I32"):
        open_weights(folder)


# --- F20: hooks --------------------------------------------------------------------------------------------------------

HOOKS = [
    ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}),
    ("config.json", {"_attn_implementation_internal": "evil/kernel"}),
    ("config.json", {"attn_implementation": "evil/kernel"}),
    ("config.json", {"trust_remote_code": True}),
    ("config.json", {"text_config": {"deeper": [{"auto_map": {"AutoModel": "evil.Model"}}]}}),
    ("config.json", {"transformers_weights": "../../x.bin"}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
    ("generation_config.json", {"custom_generate": "evil/repo"}),
]


@pytest.mark.parametrize(("name", "hook"), HOOKS)
def test_hooks_are_refused(make_checkpoint, name, hook):
    folder = make_checkpoint()
    content = json.loads((folder / name).read_text()) | hook
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match="asks to run code"):
        Checkpoint.open(folder)


@FAST
@given(values, st.lists(st.integers(0, 2), max_size=6))
def test_hooks_are_found_at_any_depth(inner, way):
    value = {"auto_map": {"x": "y"}}
    for turn in way:
        value = [inner, value] if turn == 0 else {"a": value, "b": inner} if turn == 1 else {"c": [value]}
    with pytest.raises(InputError, match="auto_map"):
        untrusted.refuse_hooks({"top": value}, "x")


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(q|q)*x", "[", "a*" * 50, "(?:x)" * 3, "q" * 500, "(.|.|.|.)" * 21, "a?" * 40]
)
def test_patterns_of_adapters_are_bounded(make_checkpoint, tmp_path, pattern):
    adapter = write_adapter(tmp_path / "lora", low_rank(), alpha_pattern={pattern: 4})
    began = time.process_time()
    with pytest.raises(InputError, match="alpha_pattern"):
        Checkpoint.open(make_checkpoint(), adapter=adapter)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("alpha", ["8", None, True, 1e300, [1]])
def test_scales_of_adapters_are_numbers(make_checkpoint, tmp_path, alpha):
    with pytest.raises(InputError, match="lora_alpha"):
        Checkpoint.open(make_checkpoint(), adapter=write_adapter(tmp_path / "lora", low_rank(), lora_alpha=alpha))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa"}, "changed the base's weights before training"),
        ({"init_lora_weights": "pissa_niter_16"}, "changed the base's weights before training"),
        ({"init_lora_weights": "loftq"}, "changed the base's weights before training"),
        ({"r": 8}, "r is 8 for model.layers.0.self_attn.q_proj, whose lora_A has 4 rows"),
        ({"rank_pattern": {"q_proj": 2}}, "r is 2 for"),
        ({"use_rslora": "no"}, "use_rslora is 'no'"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication is"),
        ({"lora_bias": True}, "lora_bias is True"),
    ],
)
def test_adapters_that_are_no_plain_update_are_refused(make_checkpoint, tmp_path, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Checkpoint.open(make_checkpoint(), adapter=write_adapter(tmp_path / "lora", low_rank(), **changes))


HEAD = {"base_model.model.lm_head.weight": torch.zeros(8192, 64)}


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save names lm_head, and lm_head.weight is not in"),
        ({"modules_to_save": ["lm_head", "norm"]}, HEAD, "modules_to_save names norm, and model.norm.weight is not in"),
        (
            {"modules_to_save": ["mlp"]},
            {},
            "modules_to_save names mlp, and model.layers.0.mlp.gate_proj.weight is not in",
        ),
        ({"modules_to_save": ["score"]}, {}, "modules_to_save names score, which the base model does not have"),
        ({"modules_to_save": "lm_head"}, HEAD, "modules_to_save is 'lm_head'; expected a list of names"),
        ({"modules_to_save": [["lm_head"]]}, HEAD, "expected a list of names"),
    ],
)
def test_an_adapter_without_a_module_that_it_saves_is_refused(make_checkpoint, tmp_path, changes, tensors, message):
    """PEFT trains such a module whole; with the base's in its place it would be another model, of which nothing tells."""
    with pytest.raises(InputError, match=re.escape(message)):
        Checkpoint.open(make_checkpoint(), adapter=write_adapter(tmp_path / "lora", low_rank() | tensors, **changes))


@pytest.mark.parametrize("saved", [None, [], ["lm_head"]])
def test_an_adapter_with_all_that_it_saves_is_merged(make_checkpoint, tmp_path, saved):
    adapter = write_adapter(tmp_path / "lora", low_rank() | HEAD, modules_to_save=saved)
    assert not Checkpoint.open(make_checkpoint(), adapter=adapter).rows("lm_head.weight", 0, 9).any()


def test_adapters_of_norms_are_refused(make_checkpoint, tmp_path):
    norm = "base_model.model.model.layers.0.input_layernorm"
    tensors = {f"{norm}.lora_A.weight": torch.randn(4, 64), f"{norm}.lora_B.weight": torch.randn(64, 4)}
    with pytest.raises(InputError, match="is no matrix"):
        Checkpoint.open(make_checkpoint(), adapter=write_adapter(tmp_path / "lora", tensors))


@pytest.mark.parametrize("shape", [(0, 64), (64,), ()])
def test_adapters_of_strange_shapes(make_checkpoint, tmp_path, shape):
    tensors = low_rank()
    first = next(iter(tensors))
    with pytest.raises(InputError):
        Checkpoint.open(
            make_checkpoint(), adapter=write_adapter(tmp_path / "lora", tensors | {first: torch.zeros(shape)})
        )
