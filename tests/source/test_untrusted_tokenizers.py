"""Tokenizers of strangers: one InputError. What they do when they run is in test_confined.py."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qquant import recipe
from qquant.calibration import Tokenizer
from qquant.errors import InputError
from qquant.plan.plan import Plan
from qquant.source.checkpoint import Checkpoint
from tests.worlds.strange import values

# --- F14: tokenizers ---------------------------------------------------------------------------------------------------


@settings(deadline=5000, max_examples=25)
@given(st.sampled_from(["model", "vocab", "merges", "added_tokens", "pre_tokenizer", "normalizer", "decoder"]), values)
def test_strange_tokenizers(strange_folder, part, value):
    path = strange_folder / "tokenizer.json"
    before = path.read_bytes()
    content = json.loads(before)
    (content["model"] if part in ("vocab", "merges") else content)[part] = value
    path.write_text(json.dumps(content))
    try:
        Tokenizer.open(strange_folder)
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
        (lambda c: c["model"].update(dropout=0.5), "BPE dropout 0.5"),
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
def test_strange_settings(strange_folder, name, content):
    """What plan writes into a GGUF file is planned from any settings, or they are refused."""
    loaded = recipe.load("demo")
    before = (strange_folder / name).read_bytes()
    (strange_folder / name).write_text(json.dumps(content))
    try:
        Plan.of(loaded, Checkpoint.open(strange_folder), ["gguf-q8_0"])
    except InputError:
        pass
    finally:
        (strange_folder / name).write_bytes(before)


@pytest.mark.parametrize(
    "processor", [5, [], {"processors": 3}, {"processors": [None, {"type": "TemplateProcessing", "single": [1, 2]}]}]
)
def test_strange_post_processors(make_checkpoint, processor):
    from qquant.formats.gguf.metadata import _added_around

    assert _added_around({"post_processor": processor}, {}) == {}
