"""Loading in a clean process: what loads, what does not and why, and that one bad artifact does not hide the others."""

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant import pipeline, recipe
from qquant.checkpoint import Checkpoint
from qquant.checks import loading, review
from qquant.plan import Plan
from qquant.recipe import Checks, Gates
from tests.conftest import write_checkpoint

CPU = torch.device("cpu")
RECIPE = """
version: 1
name: loading
calibration: {sources: [{bundled: books-en}], samples: 2, length: 32, default_system_share: 0}
checks: {windows: 2, length: 32}
artifacts:
  - {name: gptq, format: gptq, bits: 4, group_size: 32, rounding: rtn, gates: {defaults: false}}
  - {name: awq, format: awq, group_size: 64, ratios: 2, rounding: rtn, gates: {defaults: false}}
  - {name: q4_0, format: gguf, type: q4_0, imatrix: false, gates: {defaults: false}}
"""


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(checkpoint folder, paths of a GPTQ folder, an AWQ folder and a GGUF file)."""
    place = tmp_path_factory.mktemp("loading")
    folder = write_checkpoint(place / "model", tie_word_embeddings=True)
    (place / "recipe.yaml").write_text(RECIPE)
    loaded, checkpoint = recipe.load(place / "recipe.yaml"), Checkpoint.open(folder)
    report = pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), place / "out", CPU, quiet)
    return folder, [type(place)(artifact.path) for artifact in report.artifacts]


def copied(origin, target, change):
    shutil.copytree(origin, target)
    change(target)
    return target


def edit_json(name, **entries):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def without_scales(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_is_broken_is_named_and_hides_nothing(built, tmp_path):
    """Good ones before, between and after bad ones, in one call."""
    _, (gptq, awq, gguf) = built
    number = copied(gptq, tmp_path / "number", edit_json("config.json", attention_dropout="much"))
    tensor = copied(awq, tmp_path / "tensor", without_scales)
    found = loading.faults([gptq, number, awq, tensor, gguf])
    assert set(found) == {number, tensor}
    assert "attention_dropout" in found[number]
    assert "up_proj" in found[tensor]


def test_the_process_is_clean_and_bounded(built, monkeypatch):
    """Nothing of the parent is imported there; what takes too long, or dies, is a finding."""
    _, (gptq, _, gguf) = built
    asked = []

    def run(command, **options):
        asked.append((command, options))
        raise subprocess.TimeoutExpired(command, options["timeout"], b"one line\n" if len(command) == 5 else b"")

    monkeypatch.setattr(loading.subprocess, "run", run)
    assert loading.faults([gptq, gguf]) == {gguf: "not loaded after 180 s"}
    assert asked[0][1]["cwd"] == "/"
    assert asked[0][1]["env"]["HF_HUB_OFFLINE"] == "1"
    died = subprocess.CompletedProcess([], -11, b"", b"")
    monkeypatch.setattr(loading.subprocess, "run", lambda *_, **__: died)
    assert loading.faults([gptq]) == {gptq: "the process died of SIGSEGV"}


def test_a_check_fails_what_does_not_load(built, tmp_path, monkeypatch):
    folder, (gptq, _, _) = built
    monkeypatch.setattr(review, "loading", loading)
    broken = copied(gptq, tmp_path / "broken", edit_json("config.json", attention_dropout="much"))
    gates = Gates(defaults=False)
    report = pipeline.check([broken, gptq], Checkpoint.open(folder), Checks(windows=2, length=32), gates, CPU, quiet)
    first, second = (artifact.verdict for artifact in report.artifacts)
    assert [reason for reason in first.reasons if reason.startswith("does not load in a clean process")]
    assert second.outcome == "pass"
