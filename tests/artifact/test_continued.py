"""Builds that were interrupted, repeated or damaged continue to the same bytes."""

import json
import os

import pytest
import torch

from qquant import pipeline
from qquant.artifact.draft import Draft
from qquant.errors import (
    UsageError,
)
from qquant.plan.plan import Plan
from qquant.recipe import Checks, Gates
from qquant.solve.solver import Solver
from qquant.source.checkpoint import Checkpoint
from tests.worlds.builds import CPU, contents, load_recipe, quiet, seconds


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("names", [("gptq-int4", "awq", "gguf-q4_0"), ("gptq-own",)])
def test_interrupted_build_continues_to_the_same_bytes(make_checkpoint, build, monkeypatch, names, stop):
    folder = make_checkpoint(num_hidden_layers=3)
    _, whole = build(folder, *names, out="whole")
    solved, finish = [], Solver.finish

    def dying(self, *given):
        if len(solved) == min(stop, 2 * len(names)):
            raise KeyboardInterrupt
        finish(self, *given)
        solved.append((self.draft.plan.name, self.layer))

    monkeypatch.setattr(Solver, "finish", dying)
    with pytest.raises(KeyboardInterrupt):
        build(folder, *names)
    before = list(solved)
    monkeypatch.setattr(
        Solver,
        "finish",
        lambda self, *given: finish(self, *given) or solved.append((self.draft.plan.name, self.layer)),
    )
    _, out = build(folder, *names)
    assert contents(out) == contents(whole)
    assert len(solved) == len(set(solved)), "a solved block was solved again"
    assert solved[: len(before)] == before
    assert not (out / ".partial").exists()
    for path in whole.glob("*/qquant-manifest.json"):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert {name: set(entry) for name, entry in seconds(out).items()} == {
        name: set(entry) for name, entry in seconds(whole).items()
    }


def test_journalled_bytes_are_checked_before_they_are_trusted(make_checkpoint, build, monkeypatch, tmp_path):
    folder = make_checkpoint()
    _, whole = build(folder, "gptq-int4", out="whole")
    monkeypatch.setattr(Draft, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(folder, "gptq-int4")
    file = tmp_path / "out" / ".partial" / "gptq-int4" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-50] ^= 1
    file.write_bytes(data)
    monkeypatch.undo()
    _, out = build(folder, "gptq-int4")
    assert contents(out) == contents(whole)


def test_a_line_of_a_journal_that_was_changed_is_not_believed(make_checkpoint, build, monkeypatch):
    """What it says of a unit goes into the manifest: a bit that fell over in a number, a name or a hash is a unit that is made again."""
    drafts = []

    def stopped(self, *_):
        drafts.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Draft, "finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        build(make_checkpoint(), "gptq-int4")
    (draft,) = drafts
    whole, believed = draft.journal.read_bytes(), []
    for place in range(whole.index(b"\n") + 1, len(whole), 41):
        for bit in (0, 3):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            draft.journal.write_bytes(changed)
            again = Draft(draft.plan, draft.partial, draft.key)
            again.open()
            if any(draft.units.get(name) != unit for name, unit in again.units.items()):
                believed.append((place, whole[place - 20 : place + 1]))
    assert believed == []
    draft.journal.write_bytes(whole)
    again = Draft(draft.plan, draft.partial, draft.key)
    again.open()
    assert again.units == draft.units
    assert draft.journal.read_bytes() == whole


def test_second_run_keeps_finished_artifacts(make_checkpoint, build, monkeypatch):
    folder = make_checkpoint()
    _, out = build(folder, "gptq-int4", "gguf-q4_0")
    before = contents(out)
    monkeypatch.setattr(Solver, "__init__", None)  # solving anything would fail
    report, _ = build(folder, "gptq-int4", "gguf-q4_0")
    assert contents(out) == before
    assert report.passed


def test_an_artifact_can_be_added_later(make_checkpoint, build):
    folder = make_checkpoint()
    _, out = build(folder, "gguf-q4_0")
    build(folder, "gguf-q4_0", "gguf-q8_0")
    assert {path.name for path in (out / "model-GGUF").iterdir()} == {
        "Modelfile-q4_0",
        "Modelfile-q8_0",
        "model-q4_0.gguf",
        "model-q8_0.gguf",
        "qquant-manifest.json",
    }
    manifest = json.loads((out / "model-GGUF" / "qquant-manifest.json").read_text())
    assert set(manifest["artifacts"]) == {"gguf-q4_0", "gguf-q8_0"}


@pytest.mark.parametrize("name", ["gptq-int4", "gguf-q4_0"])
def test_a_damaged_artifact_is_set_aside_and_built_again(make_checkpoint, build, name):
    folder = make_checkpoint()
    _, out = build(folder, name, "gguf-q8_0")
    before = contents(out)
    file = next(
        path for path in out.glob("model-*/*") if path.suffix in (".safetensors", ".gguf") and "q8_0" not in path.name
    )
    with file.open("r+b") as opened:
        opened.seek(-9, os.SEEK_END)
        opened.write(b"\x55")
    damaged = file.read_bytes()
    report, _ = build(folder, name, "gguf-q8_0")
    assert (out / ".damaged" / f"{name}-1" / file.name).read_bytes() == damaged
    assert any(f"{name}: was changed or damaged after it was built" in line for line in report.warnings)
    assert {path: data for path, data in contents(out).items() if not path.startswith(".damaged")} == before


@pytest.mark.parametrize("names", [("gptq-int4",), ("gguf-q4_0", "gguf-q8_0")], ids=["folder", "two files"])
def test_an_artifact_whose_manifest_was_deleted_is_set_aside_and_built_again(make_checkpoint, build, names):
    folder = make_checkpoint()
    _, out = build(folder, *names)
    before = contents(out)
    (manifest,) = out.glob("model-*/qquant-manifest.json")
    manifest.unlink()
    left = {path.name: path.read_bytes() for path in manifest.parent.iterdir()}
    report, _ = build(folder, *names)
    aside = out / ".damaged" / f"{names[0]}-1"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == left
    assert any(f"{names[0]}: was changed or damaged after it was built" in line for line in report.warnings)
    assert {path: data for path, data in contents(out).items() if not path.startswith(".damaged")} == before


def test_a_folder_of_our_name_and_other_files_is_refused(make_checkpoint, build):
    folder = make_checkpoint()
    _, out = build(folder, "gptq-int4")
    (manifest,) = out.glob("model-*/qquant-manifest.json")
    manifest.unlink()
    with (manifest.parent / "config.json").open("a") as file:
        file.write("\n")
    before = contents(out)
    with pytest.raises(UsageError, match="was not made by qquant"):
        build(folder, "gptq-int4")
    assert contents(out) == before


def test_another_build_in_the_folder_is_not_overwritten(make_checkpoint, build):
    build(make_checkpoint(), "gptq-int4")
    with pytest.raises(UsageError, match=r"holds gptq-int4 built from another recipe, checkpoint or version"):
        build(make_checkpoint("again/model", seed=1), "gptq-int4")


def test_importance_matrix_is_left_for_other_tools_and_taken_back(make_checkpoint, build, tmp_path):
    """The measured matrix, given back with --imatrix, gives the same blocks; another one gives others."""
    from qquant.formats.gguf import imatrix

    folder = make_checkpoint()
    _, out = build(folder, "gguf-q4_0")
    found = imatrix.read(out / "calibration" / "imatrix.gguf")
    assert found.counts["blk.1.ffn_down.weight"] == 6 * 48
    assert imatrix.read(out / "calibration" / "imatrix.dat").importance("blk.0.attn_q.weight").shape == (64,)
    checkpoint, loaded = Checkpoint.open(folder), load_recipe(tmp_path, ["gguf-q4_0"])

    def blocks(given, name):
        plan = Plan.of(loaded, checkpoint, imatrix=given)
        report = pipeline.build(loaded, checkpoint, plan, tmp_path / name, CPU, quiet)
        assert [text for text in report.warnings if "channels" in text and "zero;" in text] == given.remarks()
        data = (tmp_path / name / "model-GGUF" / "model-q4_0.gguf").read_bytes()
        return data[plan.artifacts[0].files[0].tensors[0].offset :]

    measured = (out / "model-GGUF" / "model-q4_0.gguf").read_bytes()
    assert measured.endswith(blocks(found, "same"))
    sums = {name: torch.rand(len(sums)) for name, sums in found.sums.items()}
    sums["blk.0.attn_q.weight"][:32] = 0
    other = imatrix.Imatrix(sums, found.counts, "other", "other.gguf")
    assert other.remarks()[0].startswith("other.gguf: 32 channels of 1 weights are zero; 2 whole groups")
    assert not measured.endswith(blocks(other, "other"))


def test_importance_matrix_survives_an_interruption(make_checkpoint, build, monkeypatch):
    folder = make_checkpoint()
    _, whole = build(folder, "gguf-q4_0", out="whole")
    monkeypatch.setattr(Draft, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(folder, "gguf-q4_0")
    monkeypatch.undo()
    _, out = build(folder, "gguf-q4_0")
    for name in ("imatrix.gguf", "imatrix.dat"):
        assert (out / "calibration" / name).read_bytes() == (whole / "calibration" / name).read_bytes()


def test_artifact_without_a_template_is_warned_about_and_not_failed(make_checkpoint, build):
    """AutoAWQ leaves the chat template behind; its weights are judged all the same."""
    folder = make_checkpoint()
    _, out = build(folder, "gptq-int8")
    (out / "model-GPTQ-Int8" / "chat_template.jinja").unlink()
    report = pipeline.check(
        [out / "model-GPTQ-Int8"],
        Checkpoint.open(folder),
        Checks(windows=2, length=64),
        Gates(defaults=False),
        CPU,
        quiet,
    )
    assert report.artifacts[0].verdict.outcome == "pass"
    assert any("chat_template.jinja: missing" in warning for warning in report.warnings)
