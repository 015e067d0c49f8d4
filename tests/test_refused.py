"""Bad input, a full disk and slips leave the output folder untouched, or with what is finished."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qquant import pipeline, recipe
from qquant.artifact import draft
from qquant.disk.output import claim
from qquant.errors import (
    EnvironmentMissingError,
    InputError,
    LockedError,
    NumericalError,
    QQuantError,
    StoppedError,
    UsageError,
)
from qquant.plan.plan import Plan
from qquant.source.checkpoint import Checkpoint
from tests.worlds.builds import ARTIFACTS, CPU, HEAD, contents, quiet


def test_foreign_folder_is_refused(make_checkpoint, build, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.txt: was not made by qquant"):
        build(make_checkpoint(), "gptq-int4")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_output_that_is_a_file(make_checkpoint, build, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        build(make_checkpoint(), "gptq-int4")


def test_two_builds_into_one_folder(make_checkpoint, build, tmp_path):
    with claim(tmp_path / "out"), pytest.raises(LockedError, match="another build is writing"):
        build(make_checkpoint(), "gptq-int4")


@pytest.mark.parametrize("existing", [False, True])
def test_nan_in_the_weights_leaves_nothing_behind(make_checkpoint, build, tmp_path, existing):
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    if existing:
        (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        build(folder, "gptq-int4")
    assert (tmp_path / "out").exists() == existing
    assert not existing or not list((tmp_path / "out").iterdir())


def test_activations_that_overflow_are_a_numerical_error(make_checkpoint, build):
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e38
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e30
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NumericalError, match="block 0"):
        build(folder, "gptq-int4")


def test_disk_without_room_is_found_before_work(make_checkpoint, build, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(EnvironmentMissingError, match=r"bytes are missing"):
        build(make_checkpoint(), "gptq-int4")
    assert not (tmp_path / "out").exists()


def test_disk_that_fills_up_keeps_what_is_finished(make_checkpoint, build, monkeypatch, tmp_path):
    folder = make_checkpoint()
    put, count = draft.put, []

    def full(path, position, data):
        count.append(1)
        if len(count) > 12:
            raise OSError(28, "No space left on device", str(path))
        put(path, position, data)

    monkeypatch.setattr(draft, "put", full)
    with pytest.raises(StoppedError, match=r"No space left on device \([\d,]+ bytes are free\)"):
        build(folder, "gptq-int4")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".partial"]
    monkeypatch.undo()
    _, out = build(folder, "gptq-int4")
    _, whole = build(folder, "gptq-int4", out="whole")
    assert contents(out) == contents(whole)


def test_shapes_that_do_not_fit_a_format(make_checkpoint, build):
    folder = make_checkpoint(intermediate_size=160)
    with pytest.raises(InputError, match=r"artifact awq: mlp\.down_proj \[64, 160\] .* group size 64"):
        build(folder, "awq")


def test_calibration_that_overlaps_the_held_out_text(make_checkpoint, build, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"word{i} and some more of it" for i in range(45)))
    copy = Path(shutil.copy(text, tmp_path / "copy.txt"))
    body = HEAD.replace("{bundled: books-en}", f"{{path: {text}}}").replace("bundled:wikitext-2-test", str(copy))
    with pytest.raises(InputError, match="shares"):
        build(make_checkpoint(), "gptq-int4", text=body)


def test_a_slip_in_packing_does_not_pass(make_checkpoint, build, monkeypatch):
    from qquant.formats.gptq import GptqLayout

    pack = GptqLayout.pack

    def slipped(self, quantized):
        packed = pack(self, quantized)
        packed["qzeros"] = packed["qzeros"] + 1
        return packed

    monkeypatch.setattr(GptqLayout, "pack", slipped)
    with pytest.raises(QQuantError, match="dequantizes to other values"):
        build(make_checkpoint(), "gptq-int4")


def test_bytes_lost_on_the_way_to_disk_are_found(make_checkpoint, build, monkeypatch, tmp_path):
    put = draft.put

    def lossy(path, position, data):
        put(path, position, memoryview(bytes(data)[:-1] + b"\x07") if "gptq" in str(path) else data)

    monkeypatch.setattr(draft, "put", lossy)
    with pytest.raises(QQuantError, match="read back differs"):
        build(make_checkpoint(), "gptq-int4")
    assert not (tmp_path / "out" / "model-GPTQ-Int4").exists()


def test_an_artifact_that_is_not_built_needs_no_earlier_release(make_checkpoint, tmp_path):
    """`--only` builds what it names, whatever report another artifact is to be compared with; what is built still needs its own."""
    other = "{name: later, format: gguf, type: q8_0, gates: {regression_vs: nowhere, defaults: false}}"
    path = tmp_path / "test.yaml"
    path.write_text(HEAD + f"  - {ARTIFACTS['gguf-q4_0']}\n  - {other}\n")
    loaded, checkpoint = recipe.load(str(path)), Checkpoint.open(make_checkpoint())
    plan = Plan.of(loaded, checkpoint, only=["gguf-q4_0"])
    report = pipeline.build(loaded, checkpoint, plan, tmp_path / "out", CPU, quiet)
    assert [row.name for row in report.artifacts] == ["gguf-q4_0"]
    with pytest.raises(UsageError, match="nowhere"):
        pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), tmp_path / "all", CPU, quiet)
