"""The GGUF container and its metadata, read back by the `gguf` package."""

import hashlib
import json

import gguf as gguf_package
import pytest
import torch
from gguf import GGUFReader
from gguf.metadata import Metadata
from gguf.utility import size_label

from qquant.algorithms.checksum import as_bytes, checksum
from qquant.calibration import Tokenizer
from qquant.errors import InputError, QQuantError
from qquant.formats import FORMATS
from qquant.formats.gguf import container, imatrix, metadata
from qquant.formats.gguf.container import Field, header_bytes, read_header
from qquant.formats.gguf.read_back import _reader
from qquant.formats.gguf.tokenizer import gguf_tokenizer
from qquant.recipe import GgufArtifact, load
from qquant.source.checkpoint import Checkpoint
from tests.worlds import GOLDEN


def fields_of(folder, name, **changes):
    spec = GgufArtifact(**{"name": "x", "format": "gguf", "type": "q8_0", "imatrix": False} | changes)
    return {field.key: field.value for field in metadata.metadata(Checkpoint.open(folder), spec, load("demo"), name)}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen1.5-0.5B-Chat", 620_000_000),
        ("Qwen1.5-7B", 7_700_000_000),
        ("Qwen1.5-110B-Chat", 111_000_000_000),
        ("tiny-qwen1.5", 9_300_000),
        ("my-model", 9_300_000),
        ("my-model-v2", 9_300_000),
        ("v2", 9_300_000),
        ("qwen-7b1-instruct", 7_100_000_000),
        ("Qwen-2-1_5b-code-lora-v0.3", 1_540_000_000),
        ("large-model-7B-128k-q4_0", 7_700_000_000),
        ("model-mini-large", 9_300_000),
        ("7B-model", 7_700_000_000),
        ("merge-8x7B-7B-7B-chat", 7_700_000_000),
        ("a  model", 1_000_000),
        ("-x--y-", 1_000_000),
    ],
)
def test_names_are_split_as_the_converter_splits_them(name, parameters):
    _, _, base, finetune, version, label = Metadata.get_model_id_components(name, parameters)
    ours = {field.key: field.value for field in metadata._naming(name, parameters)}
    assert ours["general.name"] == Metadata.id_to_title(name)
    assert ours.get("general.basename") == base
    assert ours.get("general.finetune") == finetune
    assert ours.get("general.version") == version
    assert ours["general.size_label"] == (label or size_label(parameters, 0, 0, 0))


@pytest.mark.parametrize(
    "parameters", [999, 12_345, 1_500_000, 9_331_968, 12_600_000, 463_987_712, 7_721_324_544, 72_000_000_000]
)
def test_size_labels(parameters):
    assert metadata.size_label(parameters) == size_label(parameters, 0, 0, 0)


def test_metadata_is_what_llama_cpp_needs(make_checkpoint):
    folder = make_checkpoint(vocab_size=8200, num_key_value_heads=2)
    fields = fields_of(folder, "Qwen1.5-0.5B-Chat", type="q4_0", imatrix=True)
    assert fields["general.architecture"] == "qwen2"
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["qwen2.attention.head_count_kv"] == 2
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 8200
    assert fields["tokenizer.ggml.tokens"][8190:8194] == ["<|im_start|>", "<|im_end|>", "[PAD8192]", "[PAD8193]"]
    assert fields["tokenizer.ggml.token_type"][8189:8194] == [metadata.CONTROL] * 3 + [metadata.UNUSED] * 2
    assert fields["tokenizer.ggml.eos_token_id"] == 8191
    assert "tokenizer.ggml.add_bos_token" not in fields, "no file of this tokenizer says"
    settings = json.loads((folder / "generation_config.json").read_text())
    assert fields["general.sampling.penalty_repeat"] == settings["repetition_penalty"]
    assert fields["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()
    assert fields["general.file_type"] == 2
    assert fields["quantize.imatrix.entries_count"] == 14
    assert list(fields)[-6:-4] == ["general.quantization_version", "general.file_type"]


@pytest.mark.parametrize(
    ("processor", "settings", "expected"),
    [
        ({"type": "ByteLevel"}, {}, (False, False)),
        ({"type": "ByteLevel"}, {"add_bos_token": True}, (False, False)),
        (None, {"add_bos_token": False}, (False, None)),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}]}, {}, (False, False)),
        (
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<|endoftext|>"}}, {"Sequence": {"id": "A"}}],
            },
            {},
            (True, None),
        ),
    ],
)
def test_tokens_around_a_text_are_those_of_the_tokenizer(make_checkpoint, processor, settings, expected):
    folder = make_checkpoint()
    for name, change in (("tokenizer.json", {"post_processor": processor}), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    fields = fields_of(folder, "model")
    assert tuple(fields.get(f"tokenizer.ggml.add_{role}_token") for role in ("bos", "eos")) == expected


def test_the_card_and_the_parent_of_a_fine_tuned_model(make_checkpoint):
    folder = make_checkpoint(_name_or_path="Qwen/Qwen1.5-7B", head_dim=16)
    (folder / "README.md").write_text("---\nlicense: [mit, other]\ntags: chat\nbase_model: Qwen/Qwen1.5-7B\n---\n")
    fields = fields_of(folder, "Mine-7B")
    assert fields["general.name"] == "Mine 7B", "not the parent's, which the converter would take"
    assert fields["general.license"] == "mit,other"
    assert fields["general.tags"] == ["chat"]
    assert fields["general.base_model.0.organization"] == "Qwen"
    assert fields["general.base_model.0.repo_url"].endswith("/Qwen/Qwen1.5-7B")
    assert fields["qwen2.attention.key_length"] == fields["qwen2.attention.value_length"] == 16


FILES = json.loads((GOLDEN / "llama_quantize.json").read_text())


@pytest.mark.parametrize("kind", FILES)
def test_whole_files_are_llama_quantizes(demo, kind):
    """sha256 of the file that its converter and llama-quantize made of the demo checkpoint, metadata included."""
    checkpoint, (type_name, *given) = Checkpoint.open(demo), kind.split("+")
    measured = imatrix.read(GOLDEN / "tiny.imatrix.gguf") if given else None
    spec = GgufArtifact(name="x", format="gguf", type=type_name, imatrix=bool(given), solver="ggml")
    planned = FORMATS["gguf"].plan(checkpoint, spec, load("demo"), "tiny-qwen1.5", measured)
    names = {checkpoint.family.gguf_name(name): name for name in planned.stored}
    digest = hashlib.sha256(planned.files[0].head)
    for tensor in planned.files[0].tensors:
        importance = measured.importance(tensor.name) if measured else None
        stored = FORMATS["gguf"].store(planned, names[tensor.name], checkpoint.tensor(names[tensor.name]), importance)
        digest.update(as_bytes(stored[tensor.name]))
        digest.update(b"\0" * (-tensor.nbytes % 32))
    assert digest.hexdigest() == FILES[kind]


def test_the_gguf_package_reads_the_plan(make_checkpoint, tmp_path):
    planned = FORMATS["gguf"].plan(
        Checkpoint.open(make_checkpoint()), GgufArtifact(name="x", format="gguf", type="q8_0"), load("demo"), "model"
    )
    file, modelfile = planned.files
    assert modelfile.name == "Modelfile-q8_0"
    path = tmp_path / file.name
    path.write_bytes(file.head + b"\0" * (file.size - len(file.head)))
    reader = GGUFReader(path)
    assert [(tensor.name, int(tensor.data_offset)) for tensor in reader.tensors] == [
        (t.name, t.offset) for t in file.tensors
    ]
    ours = read_header(path)
    for key, field in ours.fields.items():
        value = reader.get_field(key).contents()
        assert (value == field.value) if not isinstance(value, float) else value == pytest.approx(field.value)
    assert [tensor.name for tensor in ours.tensors.values()] == [tensor.name for tensor in reader.tensors]


@pytest.mark.parametrize("kind", ["q4_k_m", "f16"])
@pytest.mark.parametrize("ours", [False, True])
def test_what_is_read_back_is_compared_tensor_by_tensor(make_checkpoint, tmp_path, monkeypatch, kind, ours):
    """Bytes and values, in whatever pieces they are decoded, all by the package or, as on a GPU, by us; of the vocabulary nothing is kept in memory."""
    monkeypatch.setattr("qquant.devices.threads_help", lambda _: ours)
    checkpoint = Checkpoint.open(make_checkpoint(hidden_size=256, intermediate_size=512))
    layout = FORMATS["gguf"]
    planned = layout.plan(checkpoint, GgufArtifact(name="x", format="gguf", type=kind), load("demo"), "model")
    file = planned.files[0]
    path = tmp_path / file.name
    content = bytearray(file.head.ljust(file.size, b"\0"))
    places = {tensor.name: tensor for tensor in file.tensors}
    written, values = {}, {}
    for name in planned.stored:
        ((stored, data),) = layout.store(planned, name, checkpoint.tensor(name), None).items()
        content[places[stored].offset : places[stored].offset + places[stored].nbytes] = as_bytes(data)
        written[stored] = hashlib.sha256(as_bytes(data)).hexdigest()
        if name.endswith("proj.weight"):
            values[name] = checksum(layout.restore(planned, name, {stored: data}))
    path.write_bytes(content)

    def failures(values):
        found = []
        back = layout.read_back([path], torch.device("cpu"))
        for compare in (*back.tensors(written, values), *back.values(values)):
            try:
                compare()
            except QQuantError as error:
                found.append(str(error))
        return found

    for size in (256, 1 << 10, 1 << 18):
        monkeypatch.setattr("qquant.formats.gguf.read_back.DECODED", size)
        monkeypatch.setattr("qquant.formats.gguf.read_back.READ_BACK", size)
        assert failures(values) == []
    wrong = {"model.layers.1.mlp.up_proj.weight": "0"}
    assert failures(values | wrong) == [
        f"{path}: tensor blk.1.ffn_up.weight decodes to other values than were solved for"
    ]
    with monkeypatch.context() as patch:
        decode = gguf_package.quants.dequantize
        patch.setattr(gguf_package.quants, "dequantize", lambda data, kind: decode(data, kind) * 1.001)
        told = failures(values)
        assert len(told) == len(values)
        assert all("decodes to other values than" in line for line in told)
    written["output_norm.weight"] = "0"
    assert failures(values) == [f"{path}: tensor output_norm.weight read back differs from what was written"]
    ours, theirs = _reader(gguf_package, path), GGUFReader(path)
    assert [(t.name, t.data_offset, t.n_bytes, t.tensor_type) for t in ours.tensors] == [
        (t.name, t.data_offset, t.n_bytes, t.tensor_type) for t in theirs.tensors
    ]
    assert ours.fields.keys() == theirs.fields.keys()
    kept = [sum(len(field.parts) for field in reader.fields.values()) for reader in (ours, theirs)]
    assert kept[0] < 1000 < kept[1]


def test_a_vocabulary_that_is_padded_is_read_back(make_checkpoint, tmp_path):
    folder = make_checkpoint(vocab_size=8200)
    spec = GgufArtifact(name="x", format="gguf", type="q8_0")
    (file, _) = FORMATS["gguf"].plan(Checkpoint.open(folder), spec, load("demo"), "model").files
    path = tmp_path / file.name
    path.write_bytes(file.head.ljust(file.size, b"\0"))
    text = "<|im_start|>user\nTwo words<|im_end|>"
    assert gguf_tokenizer(path, read_header(path)).encode(text) == Tokenizer.open(folder).encode(text)


def test_a_vocabulary_is_read_and_encoded_once_for_all_files_of_a_checkpoint(make_checkpoint, monkeypatch):
    """Eight times in a plan of eleven artifacts: 5 to 7 s for the 152,000 tokens of Qwen1.5."""
    checkpoint, recipe, alone = Checkpoint.open(make_checkpoint()), load("demo"), {}
    kinds = ("q8_0", "q4_0", "q5_1")

    def planned(source, kind):
        return FORMATS["gguf"].plan(source, GgufArtifact(name=kind, format="gguf", type=kind), recipe, "tiny")

    for kind in kinds:
        alone[kind] = planned(Checkpoint.open(checkpoint.path), kind).files[0].head
    read, encoded, encode = [], [], container._string
    vocabulary = metadata._vocabulary
    monkeypatch.setattr(metadata, "_vocabulary", lambda one: read.append(one) or vocabulary(one))
    monkeypatch.setattr(container, "_string", lambda text: encoded.append(text) or encode(text))
    together = {kind: planned(checkpoint, kind).files[0].head for kind in kinds}
    assert together == alone
    assert len(read) == 1
    tokens = len(checkpoint.vocabulary.tokens) + len(checkpoint.vocabulary.merges)
    assert tokens < len(encoded) < 1.5 * tokens


def test_token_beyond_the_vocabulary_is_refused(make_checkpoint):
    folder = make_checkpoint(vocab_size=8000)
    with pytest.raises(InputError, match=r"token 8191 .* lies beyond vocab_size 8000"):
        fields_of(folder, "model")


def test_tokenizer_of_pairs_and_of_strings_give_the_same_merges(make_checkpoint):
    folder = make_checkpoint()
    before = fields_of(folder, "model")["tokenizer.ggml.merges"]
    content = json.loads((folder / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in merges]
    content["model"]["merges"] = [" ".join(pair) for pair in pairs] if isinstance(merges[0], list) else pairs
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert fields_of(folder, "model")["tokenizer.ggml.merges"] == before


BOMB = (
    b"GGUF"
    + (3).to_bytes(4, "little")
    + (0).to_bytes(8, "little")
    + (1).to_bytes(8, "little")
    + (1).to_bytes(8, "little")
    + b"k"
)
BOMB += (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + (1 << 40).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not start|needs 4 bytes"),
        (b"GGML", "does not start with 'GGUF'"),
        (b"GGUF" + (9).to_bytes(4, "little"), "GGUF version 9"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16, "tensors and"),
        (BOMB, r"array of 1,099,511,627,776 values"),
        (header_bytes([Field("a", "u32", 1), Field("a", "u32", 2)], [])[0], "appears twice"),
        (header_bytes([Field("general.alignment", "u32", 3)], [])[0], "general.alignment 3"),
        (header_bytes([Field("a", "u32", 1)], [("t", (2, 2, 2, 2, 2), 0, 128)])[0], "5 dimensions"),
    ],
)
def test_malformed_files_are_refused_at_once(tmp_path, data, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_header(path)
