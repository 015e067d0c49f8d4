"""Types of single tensors: patterns of names, what they may ask for, and a file whose tensors are exactly those that were asked for."""

import re

import pytest
import torch

from qquant import pipeline, recipe
from qquant.errors import InputError, UsageError
from qquant.formats.gguf.inside import describe
from qquant.formats.gguf.patterns import allowed
from qquant.formats.gguf.types import TYPES
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.recipe.tensors import TENSOR_TYPES
from qquant.source.checkpoint import Checkpoint

MATRICES = {"token_embd.weight": (64, 256), "output.weight": (64, 256)} | {
    f"blk.{layer}.{role}.weight": (64, columns)
    for layer in range(12)
    for role, columns in (("attn_v", 256), ("ffn_down", 96))
}
HEAD = """
version: 1
name: t
calibration: {sources: [{bundled: books-en}], samples: 4, length: 48, default_system_share: 0}
checks: {windows: 2, length: 64}
artifacts:
"""


def test_every_type_that_is_written_can_be_asked_for():
    assert sorted(TENSOR_TYPES) == sorted(TYPES)


def test_the_longest_pattern_counts_whatever_the_order():
    types = {"*": "q8_0", "blk.*": "q4_0", "blk.?.attn_v": "q6_k", "blk.1[01].attn_v.weight": "q5_k", "output": "f16"}
    for given in (types, dict(reversed(types.items()))):
        found = allowed(given, MATRICES, "a")
        assert found["token_embd.weight"] == ("q8_0",)
        assert found["output.weight"] == ("f16",)
        assert found["blk.3.ffn_down.weight"] == found["blk.11.ffn_down.weight"] == ("q4_0",)
        assert found["blk.3.attn_v.weight"] == ("q6_k",)
        assert found["blk.11.attn_v.weight"] == ("q5_k",)


def test_a_name_counts_before_any_pattern():
    assert allowed({"output": "q6_k", "[o-o]utput*": "q8_0"}, MATRICES, "a")["output.weight"] == ("q6_k",)


def test_what_a_row_cannot_have_is_taken_from_the_choice():
    found = allowed({"blk.*": ("q4_k", "q5_0", "q8_0")}, MATRICES, "a")
    assert found["blk.0.ffn_down.weight"] == ("q5_0", "q8_0")
    assert found["blk.0.attn_v.weight"] == ("q4_k", "q5_0", "q8_0")
    assert "output.weight" not in found


@pytest.mark.parametrize(
    ("types", "error", "said"),
    [
        ({"outptu": "q8_0"}, UsageError, "types: outptu: fits no matrix of this model; .*blk.*.attn_v.*did you mean 'output'"),
        ({"blk.0.attn_norm": "q8_0"}, UsageError, "blk.0.attn_norm: fits no matrix"),
        ({"blk.0.*": "q8_0", "blk.*_v": "q4_0"}, UsageError, "equally long and both fit blk.0.attn_v. Name the"),
        ({"blk.4.ffn_down": "q4_k"}, InputError, "blk.4.ffn_down has rows of 96, and q4_k needs a multiple of 256; q5_0 is"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(types, error, said):
    with pytest.raises(error, match=f"artifact small: .*{said}"):
        allowed(types, MATRICES, "small")


def test_a_file_has_the_types_of_its_recipe(make_checkpoint, tmp_path):
    checkpoint = Checkpoint.open(make_checkpoint(hidden_size=256, intermediate_size=288, num_hidden_layers=2))
    entry = (
        "  - {name: gguf-my.own, format: gguf, type: q8_0, gates: {defaults: false},\n"
        '     types: {token_embd: q4_0, "blk.*.attn_v": q6_k, blk.1.attn_v: f16, "blk.1.ffn_*": q5_0}}\n'
    )
    loaded = recipe.parse(HEAD + entry)
    pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), tmp_path / "out", torch.device("cpu"), Quiet())
    (file,) = (tmp_path / "out").glob("model-GGUF/*.gguf")
    assert file.name == "model-my_own.gguf"
    types = {tensor["name"]: tensor["type"] for tensor in describe(file)["tensors"]}
    expected = {
        "token_embd.weight": "q4_0", "output.weight": "q8_0", "blk.0.attn_v.weight": "q6_k", "blk.1.attn_v.weight": "f16",
        "blk.0.ffn_up.weight": "q8_0", "blk.1.ffn_up.weight": "q5_0", "blk.1.ffn_down.weight": "q5_0", "blk.1.attn_q.weight": "q8_0",
    }  # fmt: skip
    assert {name: types[name].lower() for name in expected} == expected


def test_names_tell_files_apart(make_checkpoint):
    lines = ('{name: a, format: gguf, type: q8_0, types: {output: f16}}', '{name: b, format: gguf, type: q8_0}')  # fmt: skip
    loaded = recipe.parse(HEAD + "".join(f"  - {line}\n" for line in lines))
    assert loaded.clashes == ()
    plan = Plan.of(loaded, Checkpoint.open(make_checkpoint()))
    names = [file.name for artifact in plan.artifacts for file in artifact.files]
    assert len(set(names)) == 4
    assert all(re.search("[-_](a|q8_0)(.gguf)?$", name) for name in names)
