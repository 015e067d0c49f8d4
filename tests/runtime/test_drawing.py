"""How strangers' artifacts say that answers are drawn: every field, hurt, is one InputError or a setting that transformers takes."""

import json
import shutil

import pytest
import torch

import qquant
from qquant.artifact.opening import open_weights
from qquant.dequantization import dequantize
from qquant.errors import InputError, UsageError
from qquant.formats.gguf.container import Field, read_header
from qquant.formats.gguf.tokenizer import gguf_tokenizer
from qquant.progress import Quiet
from qquant.runtime import drawing
from qquant.runtime.answering import Answerer
from qquant.source.checkpoint import Checkpoint
from tests.formats.test_claims import rewrite
from tests.report.test_strange_records import survives
from tests.runtime.test_runtime import MADE, built, gguf

SETTINGS = {
    "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "eos_token_id": [2, 1], "pad_token_id": 1,
    "bos_token_id": 0, "max_length": 40, "suppress_tokens": [3], "bad_words_ids": [[4, 5]], "transformers_version": "5", "cache_config": {"x": 1},
}  # fmt: skip
VOCABULARY = 64


def test_every_setting_of_a_folder(tmp_path):
    path = tmp_path / "generation_config.json"

    def read(content):
        path.write_text(json.dumps(content))
        drawing.of_folder(tmp_path, {}, VOCABULARY).made()

    read(SETTINGS)
    assert survives(read, SETTINGS, 1) > 100


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"temperature": 0, "do_sample": True}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"eos_token_id": VOCABULARY}, "eos_token_id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"bad_words_ids": "x"}, "bad_words_ids"),
        ({"num_return_sequences": 4, "num_beams": 1, "do_sample": False}, "num_return_sequences"),
    ],
)
def test_what_transformers_would_fail_on_is_named(tmp_path, said, what):
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=rf"generation_config\.json: .*{what}"):
        drawing.of_folder(tmp_path, {}, VOCABULARY).made()


def test_an_id_of_config_json_is_refused_before_transformers_sees_it(tmp_path):
    folder = shutil.copytree(MADE / "autogptq-int4", tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    for wrong in ("x", 10**30, -0.5, [[]]):
        (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": wrong}))
        with pytest.raises(InputError, match=r"config\.json: .*pad_token_id"):
            qquant.load(folder, "cpu")


@pytest.mark.parametrize("wrong", ["x", [], {"a": 1}, 5, True])
def test_a_dtype_of_config_json_is_refused_as_the_artifacts(tmp_path, wrong):
    folder = shutil.copytree(MADE / "autogptq-int4", tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": wrong, "dtype": wrong}))
    with pytest.raises(InputError, match=r"config\.json: dtype"):
        qquant.load(folder, "cpu")
    with pytest.raises(InputError, match=r"config\.json: dtype"):
        dequantize(folder, tmp_path / "out", None, torch.device("cpu"), Quiet())


@pytest.fixture(scope="module")
def file(demo, tmp_path_factory):
    """A GGUF file."""
    return built(Checkpoint.open(demo), tmp_path_factory.mktemp("drawing"), [gguf("q8_0")])["q8_0"]


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("tokenizer.ggml.tokens", "u32", 7),
        ("tokenizer.ggml.eos_token_id", "str", "x"),
        ("tokenizer.ggml.padding_token_id", "u32", 2**32 - 1),
        ("general.sampling.temp", "str", "x"),
        ("general.sampling.top_p", "f32", float("nan")),
    ],
)
def test_a_gguf_file_is_held_to_the_same(file, tmp_path, key, kind, value):
    path = tmp_path / "a.gguf"
    shutil.copy(file, path)
    rewrite(
        path, [*(field for field in read_header(path).fields.values() if field.key != key), Field(key, kind, value)]
    )
    with pytest.raises(InputError, match=r"a\.gguf: "):
        qquant.load(path, "cpu")


def test_a_temperature_of_0_is_the_likeliest_token(file, tmp_path):
    path = tmp_path / "a.gguf"
    shutil.copy(file, path)
    fields = [field for field in read_header(path).fields.values() if field.key != "general.sampling.temp"]
    rewrite(path, [*fields, Field("general.sampling.temp", "f32", 0.0)])
    assert drawing.of_gguf(open_weights(path)).made().do_sample is False


def test_a_template_that_writes_nothing_is_named(file, tmp_path):
    path = tmp_path / "a.gguf"
    shutil.copy(file, path)
    fields = [field for field in read_header(path).fields.values() if field.key != "tokenizer.chat_template"]
    rewrite(path, [*fields, Field("tokenizer.chat_template", "str", "")])
    with pytest.raises((InputError, UsageError), match="template"):
        Answerer.open(path, "cpu").encode_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("key", ["tokens", "merges", "token_type"])
@pytest.mark.parametrize(
    ("kind", "value"), [("u32", 7), ("str", "x"), ("[u32]", [1, 2]), ("[f32]", [1.0]), ("bool", True)]
)
def test_arrays_of_a_tokenizer_are_of_their_kinds(file, tmp_path, key, kind, value):
    path = tmp_path / "a.gguf"
    shutil.copy(file, path)
    fields = read_header(path).fields.values()
    rewrite(
        path, [Field(field.key, kind, value) if field.key == f"tokenizer.ggml.{key}" else field for field in fields]
    )
    with pytest.raises(InputError, match=rf"a\.gguf: tokenizer\.ggml\.{key} is of kind"):
        gguf_tokenizer(path, read_header(path))


def test_a_tokenizer_without_tokens_is_told_as_that(file, tmp_path):
    path = tmp_path / "a.gguf"
    shutil.copy(file, path)
    fields = read_header(path).fields.values()
    rewrite(path, [field for field in fields if field.key != "tokenizer.ggml.tokens"])
    with pytest.raises(InputError, match=r"a\.gguf: has no tokens"):
        gguf_tokenizer(path, read_header(path))
