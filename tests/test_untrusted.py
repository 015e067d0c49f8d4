"""Files of strangers: every malformed case is one InputError; none hangs, crashes, or is accepted where the reference reader refuses."""

import json
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qquant import calibration, recipe, safetensors_file, untrusted, vocabulary
from qquant.artifact import open_weights
from qquant.calibration import Tokenizer
from qquant.calibration.template import FAILURES, Template
from qquant.checkpoint import Checkpoint, card_head
from qquant.errors import InputError
from qquant.formats import gguf_container, imatrix
from qquant.formats.gguf_container import Field, header_bytes, read_header
from qquant.formats.gguf_source import GgufSource
from qquant.plan import Plan
from tests.conftest import SMALL
from tests.test_checkpoint import GOOD, edit_config, low_rank, write_adapter, write_raw

FAST = settings(deadline=5000, max_examples=60)
numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("strange")


def refused(read, path, reference):
    """`read` refuses the file, or takes it and the reference does too."""
    try:
        read(path)
    except InputError:
        return
    reference(path)


def by_safetensors(path):
    with safe_open(path, framework="pt") as file:
        list(file.keys())


def by_gguf(path):
    import gguf

    gguf.GGUFReader(path)


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
def test_strange_configs(make_folder, changes):
    """F13: a config of any values is refused, or means the same model."""
    (make_folder / "config.json").write_text(json.dumps(SMALL | changes))
    try:
        Checkpoint.open(make_folder)
    except InputError:
        return


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory):
    from tests.conftest import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


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


# --- F14: tokenizers ---------------------------------------------------------------------------------------------------


@settings(deadline=5000, max_examples=25)
@given(st.sampled_from(["model", "vocab", "merges", "added_tokens", "pre_tokenizer", "normalizer", "decoder"]), values)
def test_strange_tokenizers(make_folder, part, value):
    path = make_folder / "tokenizer.json"
    before = path.read_bytes()
    content = json.loads(before)
    (content["model"] if part in ("vocab", "merges") else content)[part] = value
    path.write_text(json.dumps(content))
    try:
        Tokenizer.open(make_folder)
    except InputError:
        pass
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["vocab"].update(a=-1), "has the id -1"),
        (lambda c: c["model"]["vocab"].update(a=2**40), "has the id"),
        (lambda c: c["model"]["vocab"].update(newone=5), "used twice"),
        (lambda c: c["added_tokens"].append({"id": 5, "content": "x"}), "id 5 is"),
        (lambda c: c["added_tokens"].append({"id": "5", "content": "x"}), "expected `content`, and an `id`"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(a+)+$"), "can take forever"),
        (lambda c: c.update(pre_tokenizer={"type": "Nonsense"}), "no tokenizer"),
    ],
)
def test_tokenizer_faults_are_named(make_checkpoint, change, message):
    folder = make_checkpoint()
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        Tokenizer.open(folder)


def test_tokenizer_of_another_model_is_refused_by_plan(make_checkpoint):
    folder = make_checkpoint(vocab_size=4096)
    with pytest.raises(InputError, match=r"token 8191 .* lies beyond vocab_size 4096"):
        Checkpoint.open(folder).require_tokenizer()


@settings(deadline=5000, max_examples=25)
@given(
    st.sampled_from(["generation_config.json", "tokenizer_config.json"]),
    st.dictionaries(
        st.sampled_from(
            ["temperature", "top_k", "repetition_penalty", "bos_token", "eos_token", "chat_template", "add_bos_token"]
        ),
        values,
    ),
)
def test_strange_settings(make_folder, name, content):
    """What plan writes into a GGUF file is planned from any settings, or they are refused."""
    loaded = recipe.load("demo")
    before = (make_folder / name).read_bytes()
    (make_folder / name).write_text(json.dumps(content))
    try:
        Plan.of(loaded, Checkpoint.open(make_folder), ["gguf-q8_0"])
    except InputError:
        pass
    finally:
        (make_folder / name).write_bytes(before)


@pytest.mark.parametrize(
    "processor", [5, [], {"processors": 3}, {"processors": [None, {"type": "TemplateProcessing", "single": [1, 2]}]}]
)
def test_strange_post_processors(make_checkpoint, processor):
    from qquant.formats.gguf_metadata import _added_around

    assert _added_around({"post_processor": processor}, {}) == {}


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
    folder = shutil.copytree(Path(__file__).parent / "golden" / "artifacts" / "autogptq-int4", tmp_path / "a")
    if damage == "config":
        edit_config(folder, quantization_config=["gptq"])
    else:
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("qweight"))
        save_file(tensors | {name: tensors[name].float()}, path)
    with pytest.raises(InputError, match=r"expected a mapping|quant_method|is F32; expected I32"):
        open_weights(folder)


# --- F16, F17: paths ---------------------------------------------------------------------------------------------------

ESCAPES = ("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "C:x.safetensors", ".x.safetensors", "x\0.safetensors", "", "a.bin", 5, None, "x.safetensors\n")  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_names_files_of_its_folder_only(make_checkpoint, name, monkeypatch):
    folder = make_checkpoint(shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(safetensors_file, "read_header", None)  # refused before anything is opened
    with pytest.raises(InputError, match="is not the plain name"):
        Checkpoint.open(folder)


@FAST
@given(st.dictionaries(st.text(max_size=5), values, max_size=3), values)
def test_strange_indexes(make_folder, weights, metadata):
    path = make_folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": metadata, "weight_map": weights}))
    try:
        with pytest.raises(InputError):
            Checkpoint.open(make_folder)
    finally:
        path.unlink()


FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE",
)


def outside(path):
    path.rename(path.parent.parent / "outside") if path.exists() else (path.parent.parent / "outside").write_text("{}")
    path.symlink_to(path.parent.parent / "outside")


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def circle(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("put", [outside, pipe, device, circle])
def test_links_pipes_and_devices_are_refused(make_checkpoint, put, name):
    folder = make_checkpoint()
    put(folder / name)
    began = time.process_time()

    def read_all():
        Checkpoint.open(folder).require_tokenizer()
        Tokenizer.open(folder)
        return Checkpoint.open(folder).side_files

    with pytest.raises(InputError, match=r"link out of its folder|not a regular file|not found"):
        read_all()
    assert time.process_time() - began < 5


def test_links_of_a_hub_cache_are_read(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    repository = tmp_path / "models--Q--M"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    checkpoint = Checkpoint.open(snapshot)
    checkpoint.require_tokenizer()
    assert Tokenizer.open(snapshot).size == 8192
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../elsewhere/config.json")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(InputError, match="link out of its folder"):
        Checkpoint.open(snapshot)


# --- F19: GGUF ---------------------------------------------------------------------------------------------------------


def gguf_file(path, fields=(), tensors=(("t", (2, 32), 0, 256),), data=None):
    head, _, size = header_bytes([Field("general.architecture", "str", "qwen2"), *fields], tensors)
    path.write_bytes(head + b"\0" * (size - len(head) if data is None else data))
    return path


def test_the_49_bytes_that_hang_the_reference_reader(tmp_path):
    """One array of 2**40 values of a kind that the reference reads without looking at the file's end."""
    path = tmp_path / "x.gguf"
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**40)
    )
    assert path.stat().st_size == 49
    began = time.process_time()
    with pytest.raises(InputError, match=r"array of 1,099,511,627,776 values"):
        read_header(path)
    assert time.process_time() - began < 1


@FAST
@given(
    st.integers(0, 400),
    st.one_of(st.binary(min_size=1, max_size=12), numbers.map(lambda n: struct.pack("<Q", n % 2**64))),
)
def test_strange_gguf_files(place, at, bytes_):
    fields = [Field("a", "[str]", ["x", "y"]), Field("general.alignment", "u32", 32), Field("b", "[i32]", [1, 2])]
    path = gguf_file(place / "x.gguf", fields, [("t", (2, 32), 0, 256), ("u", (3, 32), 8, 102)])
    data = bytearray(path.read_bytes())
    data[at : at + len(bytes_)] = bytes_
    path.write_bytes(data)
    refused(read_header, path, by_gguf)


def broken_gguf():
    whole = [("t", (2, 32), 0, 256), ("u", (2, 32), 0, 256)]
    yield (
        "nested array",
        lambda p: p.write_bytes(
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + struct.pack("<Q", 1)
            + b"k"
            + struct.pack("<IIQIQ", 9, 9, 1, 4, 0)
            + b"\0" * 64
        ),
    )
    yield "five dimensions", lambda p: gguf_file(p, tensors=[("t", (1, 1, 1, 1, 32), 0, 128)])
    yield "empty tensor", lambda p: gguf_file(p, tensors=[("t", (0, 32), 0, 0)])
    yield "unknown type", lambda p: gguf_file(p, tensors=[("t", (2, 32), 99, 256)])
    yield "not whole blocks", lambda p: gguf_file(p, tensors=[("t", (2, 33), 8, 68)])
    yield "ends beyond", lambda p: gguf_file(p, data=100)
    yield "overflow", lambda p: gguf_file(p, tensors=[("t", (2**40, 2**40), 0, 64)])
    yield "overlap", lambda p: gguf_file(p, tensors=[(whole[0][0], whole[0][1], 0, 32), whole[1]])
    yield "alignment of 64 bits", lambda p: gguf_file(p, [Field("general.alignment", "u64", 32)])
    yield "alignment of 3", lambda p: gguf_file(p, [Field("general.alignment", "u32", 3)])
    yield "repeated field", lambda p: gguf_file(p, [Field("general.architecture", "str", "qwen2")])
    yield "repeated tensor", lambda p: gguf_file(p, tensors=[whole[0], whole[0]])
    yield "other byte order", lambda p: p.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    yield "no GGUF", lambda p: p.write_bytes(b"GGML" + b"\0" * 100)
    yield "empty", lambda p: p.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "make"), list(broken_gguf()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_malformed_gguf_files_are_refused(tmp_path, name, make):
    make(tmp_path / "x.gguf")
    with pytest.raises(InputError):
        read_header(tmp_path / "x.gguf")


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.key_length", "context_length"])
@pytest.mark.parametrize("value", [2**31, -1, 0, 1.5])
def test_gguf_numbers_that_no_model_has(tmp_path, key, value):
    good = {"block_count": 1, "embedding_length": 32, "feed_forward_length": 64, "attention.head_count": 1}
    good |= {"attention.head_count_kv": 1, "context_length": 64, "attention.layer_norm_rms_epsilon": 1e-6, key: value}
    kinds = {int: "i64", float: "f64"}
    fields = [Field(f"qwen2.{name}", kinds[type(number)], number) for name, number in good.items()]
    began = time.process_time()
    with pytest.raises(InputError):
        GgufSource.open(gguf_file(tmp_path / "x.gguf", fields, [("token_embd.weight", (8, 32), 0, 1024)]))
    assert time.process_time() - began < 2


def test_many_and_long_values_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_container, "ELEMENT_LIMIT", 100)
    with pytest.raises(InputError, match="array of 60 values"):
        read_header(gguf_file(tmp_path / "x.gguf", [Field("a", "[u8]", [1] * 60), Field("b", "[u8]", [1] * 60)]))
    monkeypatch.setattr(gguf_container, "HEADER_LIMIT", 1000)
    with pytest.raises(InputError, match="string of 2,000 bytes"):
        read_header(gguf_file(tmp_path / "x.gguf", [Field("a", "str", "x" * 2000)]))


@FAST
@given(st.sampled_from(["gguf", "dat"]), st.integers(0, 600), st.binary(min_size=1, max_size=8))
def test_strange_importance_matrices(place, kind, at, noise):
    good = imatrix.Imatrix({"blk.0.attn_q.weight": torch.rand(8), "blk.0.attn_k.weight": torch.rand(8)}, {"blk.0.attn_q.weight": 5, "blk.0.attn_k.weight": 5}, "d")  # fmt: skip
    data = bytearray(good.gguf_bytes() if kind == "gguf" else good.dat_bytes())
    data[at : at + len(noise)] = noise
    (place / "i").write_bytes(data)
    try:
        imatrix.read(place / "i")
    except InputError:
        return


@pytest.mark.parametrize("count", [float("nan"), float("inf"), -1.0])
def test_counts_that_are_none(tmp_path, count):
    head, _, _ = header_bytes(
        [Field("general.type", "str", "imatrix")], [("a.counts", (1,), 0, 4), ("a.in_sum2", (8,), 0, 32)]
    )
    (tmp_path / "i").write_bytes(head + struct.pack("<f", count) + b"\0" * 28 + b"\0" * 32)
    with pytest.raises(InputError, match="was counted"):
        imatrix.read(tmp_path / "i")


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


@pytest.mark.parametrize("pattern", ["(a+)+$", "(q|q)*x", "[", "a*" * 50, "(?:x)" * 3, "q" * 500])
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


@pytest.mark.parametrize("shape", [(0, 64), (64,), ()])
def test_adapters_of_strange_shapes(make_checkpoint, tmp_path, shape):
    tensors = low_rank()
    first = next(iter(tensors))
    with pytest.raises(InputError):
        Checkpoint.open(
            make_checkpoint(), adapter=write_adapter(tmp_path / "lora", tensors | {first: torch.zeros(shape)})
        )


# --- F21: templates ----------------------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "x" * 2000}], "add_generation_prompt": False}
RUNAWAY = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{{ ['a'] * 1000000000 }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set a = messages[0].content.replace('x', messages[0].content) %}{{ a.replace('x', a) }}",
    "{% set a = messages[0].content|replace('x', messages[0].content) %}{{ a|replace('x', a) }}",
    "{{ messages[0].content.ljust(1000000000) }}",
    "{{ messages[0].content|center(1000000000) }}",
    "{{ '%1000000000d' % 5 }}",
    "{{ '{:>1000000000}'.format(5) }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ (5).to_bytes(10000000000, 'big') }}",
    "{{ 10 ** 10 ** 10 }}",
    "{% set ns = namespace(x=9) %}{% for i in range(90) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ messages|tojson(indent=1000000000) }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{{ 1 / 0 }}",
    "{{ messages[10 ** 3].content }}",
    "{{ lipsum() }}",
    "{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}",
    "{{ 'x' * 1000 }}" * 9000,
]


@pytest.mark.parametrize("source", RUNAWAY, ids=lambda source: source[:50])
def test_templates_cannot_run_away_or_reach_out(source):
    began = time.process_time()
    with pytest.raises((InputError, *FAILURES)):
        Template(source, "test").render(CHAT)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ messages['__class__'] }}"]
)
def test_what_templates_may_not_see_is_not_there(source):
    assert Template(source, "test").render(CHAT) == ""


@FAST
@given(st.text(st.sampled_from("{%}} for if in messages x[]().|~*+-'\"0123456789\n"), max_size=60))
def test_no_template_crashes(source):
    try:
        Template("{{" + source + "}}", "test").render(CHAT)
    except (InputError, *FAILURES):
        return


def test_templates_tell_the_same_day_every_day():
    assert Template("{{ strftime_now('%d %b %Y') }}", "test").render(CHAT) == "05 Feb 2024"


def test_a_template_that_fails_is_the_checkpoints_fault(make_checkpoint):
    folder = make_checkpoint()
    (folder / "chat_template.jinja").write_text("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
    with pytest.raises(InputError, match="the chat template refuses"):
        Tokenizer.open(folder).render([{"role": "user", "content": "hi"}])
    assert calibration is not None
    assert vocabulary.read(folder).largest == 8191
