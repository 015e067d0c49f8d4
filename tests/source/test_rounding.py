"""A float32 checkpoint read as bfloat16 gives what its rounded copy gives, byte for byte."""

import json

import pytest
import torch
from safetensors import safe_open

from qquant import pipeline, recipe
from qquant.errors import InputError, UsageError
from qquant.plan.asked import Asked
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.recipe.changes import Flags
from qquant.source.checkpoint import Checkpoint
from qquant.source.rounding import rounded

TEXT = """
version: 1
name: small
%s
calibration: {sources: [{bundled: books-en}], samples: 2, length: 32, default_system_share: 0}
checks: {windows: 2, length: 32}
artifacts:
  - {name: gptq, format: gptq, bits: 4, group_size: 32, solver: rtn, gates: {defaults: false}}
  - {name: q8_0, format: gguf, type: q8_0, gates: {defaults: false}}
"""


def build(folder, out, line=""):
    known = recipe.parse(TEXT % line)
    loaded, checkpoint = Asked(str(folder), known).open()
    plan = Plan.of(loaded, checkpoint, model="m")
    report = pipeline.build(loaded, checkpoint, plan, out, torch.device("cpu"), Quiet())
    return plan, report


def test_the_same_bytes_as_from_a_checkpoint_that_was_saved_so(make_checkpoint, tmp_path):
    wide, narrow = make_checkpoint("wide", dtype=torch.float32), make_checkpoint("narrow")
    plan, report = build(wide, tmp_path / "a", "dtype: bfloat16")
    other, expected = build(narrow, tmp_path / "b")
    assert not any("float32" in line for line in plan.warnings)
    assert [artifact.size for artifact in plan.artifacts] == [artifact.size for artifact in other.artifacts]
    assert report.baseline_bits == expected.baseline_bits == 16
    files = [file for one in plan.artifacts for file in (f"{one.folder}/{entry.name}" for entry in one.files)]
    assert files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    for name, row in zip(("gptq", "q8_0"), report.artifacts, strict=True):
        assert (row.name, row.verdict.faults) == (name, ())


def test_the_config_says_the_dtype_and_the_hash_is_another(make_checkpoint):
    folder = make_checkpoint("wide", dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    del config["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    checkpoint = Checkpoint.open(folder)
    half = rounded(checkpoint, "float16")
    assert (checkpoint.dtype, half.dtype) == ("F32", "F16")
    assert half.raw_config["dtype"] == "float16"
    assert half.content_hash() != checkpoint.content_hash()
    assert half.base_hash() == checkpoint.base_hash()
    assert rounded(checkpoint, None) is checkpoint
    name = "model.embed_tokens.weight"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert torch.equal(half.tensor(name), file.get_tensor(name).half())
    assert torch.equal(half.rows(name, 3, 5), half.tensor(name)[3:5])


def test_its_own_dtype_changes_nothing(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint("narrow"))
    assert rounded(checkpoint, "bfloat16") is checkpoint


def test_what_does_not_fit_is_named(make_checkpoint, monkeypatch):
    half = rounded(Checkpoint.open(make_checkpoint("wide", dtype=torch.float32)), "float16")
    monkeypatch.setattr("qquant.source.safetensors_file.read_tensor", lambda *_, **__: torch.tensor([1e6]))
    with pytest.raises(InputError, match=r"model\.norm\.weight does not fit torch\.float16; use dtype: bfloat16"):
        half.tensor("model.norm.weight")


def test_the_warning_names_the_word_that_ends_it(make_checkpoint):
    folder = make_checkpoint("wide", dtype=torch.float32)
    known, checkpoint = Asked(str(folder), recipe.parse(TEXT % "")).open()
    (told,) = [line for line in Plan.of(known, checkpoint).warnings if "float32" in line]
    setting = told.rpartition("--set ")[2]
    again, as_bfloat16 = Asked(str(folder), known, flags=Flags(settings=(setting,))).open()
    assert not any("float32" in line for line in Plan.of(again, as_bfloat16).warnings)
    with pytest.raises(UsageError, match="dtype: not an allowed value"):
        recipe.parse(TEXT % "dtype: float32")
