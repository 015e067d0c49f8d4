"""Loading in a clean process: what loads, what does not and why, and that one bad artifact does not hide the others."""

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant import pipeline
from qquant.checkpoint import Checkpoint
from qquant.checks import loading, review
from qquant.recipe import Checks, Gates

CPU = torch.device("cpu")


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def paths(built):
    """A GPTQ folder, an AWQ folder and a GGUF file."""
    return [next(built[1].glob(pattern)) for pattern in ("*-Int4", "*-AWQ", "*-GGUF/*.gguf")]


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


def test_what_is_broken_is_named_and_hides_nothing(paths, tmp_path):
    """Good ones before, between and after bad ones, in one call."""
    gptq, awq, gguf = paths
    number = copied(gptq, tmp_path / "number", edit_json("config.json", attention_dropout="much"))
    tensor = copied(awq, tmp_path / "tensor", without_scales)
    found = loading.faults([gptq, number, awq, tensor, gguf])
    assert set(found) == {number, tensor}
    assert "attention_dropout" in found[number]
    assert "up_proj" in found[tensor]


def test_the_process_is_clean_and_bounded(paths, monkeypatch):
    """Nothing of the parent is imported there; what takes too long, or dies, is a finding."""
    gptq, _, gguf = paths
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


def test_a_check_fails_what_does_not_load(built, paths, tmp_path, monkeypatch):
    folder, gptq = built[0], paths[0]
    monkeypatch.setattr(review, "loading", loading)
    broken = copied(gptq, tmp_path / "broken", edit_json("config.json", attention_dropout="much"))
    gates = Gates(defaults=False)
    report = pipeline.check([broken, gptq], Checkpoint.open(folder), Checks(windows=2, length=32), gates, CPU, quiet)
    first, second = (artifact.verdict for artifact in report.artifacts)
    assert [reason for reason in first.reasons if reason.startswith("does not load in a clean process")]
    assert second.outcome == "pass"
