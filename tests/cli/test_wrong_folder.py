"""A folder or file of another kind than the command wants: one line says what it is, and what to type."""

import pytest
from click.testing import CliRunner

from qquant.cli import cli
from qquant.errors import InputError, UsageError
from qquant.formats import detect
from qquant.plan.plan import Plan
from qquant.recipe.changes import Flags, changed
from qquant.source.checkpoint import Checkpoint
from tests.worlds.builds import BASE


def run(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


def test_a_folder_that_holds_models_names_them(tmp_path):
    (tmp_path / "model-GGUF").mkdir()
    for name in ("model-q4_0.gguf", "model-q8_0.gguf"):
        (tmp_path / "model-GGUF" / name).write_bytes(b"GGUF")
    (tmp_path / "model-AWQ").mkdir()
    (tmp_path / "model-AWQ" / "config.json").write_text("{}")
    for folder, found in (
        (tmp_path / "model-GGUF", "holds model-q4_0.gguf, model-q8_0.gguf; name one, e.g. "),
        (tmp_path, "holds model-AWQ/, model-GGUF/model-q4_0.gguf, model-GGUF/model-q8_0.gguf; name one"),
    ):
        for look in (detect, Checkpoint.open):
            with pytest.raises(InputError, match=found):
                look(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no config\.json, so it is no model folder"):
        detect(tmp_path / "empty")


def test_an_importance_matrix_is_no_model(tmp_path):
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "imatrix.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="has no config"):
        detect(tmp_path)
    (tmp_path / "m-AWQ").mkdir()
    (tmp_path / "m-AWQ" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds m-AWQ/; name one"):
        detect(tmp_path)


@pytest.mark.parametrize("more", [[], ["--bytes"]])
def test_verify_of_an_output_folder_names_what_is_in_it(tmp_path, more):
    (tmp_path / "m-AWQ").mkdir()
    (tmp_path / "m-AWQ" / "qquant-manifest.json").write_text("{}")
    (tmp_path / "calibration").mkdir()
    message = str(run("verify", tmp_path, *more).exception)
    assert (
        message == f"{tmp_path}: holds no qquant-manifest.json; name the folders in it: qquant verify {tmp_path}/m-AWQ"
    )


def test_an_artifact_of_the_hub_is_told_how_it_comes_here(demo):
    result = run("check", "somebody/Model-AWQ", "--against", demo)
    assert "hf download somebody/Model-AWQ --local-dir Model-AWQ" in str(result.exception)
    assert str(run("inspect", "somebody/Model-AWQ").exception) == str(result.exception)
    assert "hf download" not in str(run("check", "somewhere", "--against", demo).exception)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="is a file; a checkpoint is the folder of the 16-bit model"):
        Checkpoint.open(tmp_path / "m.gguf")


def test_a_pointer_of_git_lfs_is_named(make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="is a pointer of Git LFS, not the file. Fetch it: git lfs pull"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("first", "second", "file"),
    [
        ("format: awq, group_size: 64", "format: awq, group_size: 32", "model-AWQ/config.json"),
        (
            "format: gptq, bits: 4, group_size: 64",
            "format: gptq, bits: 4, group_size: 32",
            "model-GPTQ-Int4/config.json",
        ),
        ("format: gguf, type: q4_0", "format: gguf, type: q4_0, solver: gptq", "model-GGUF/model-q4_0.gguf"),
    ],
)
def test_two_artifacts_of_one_file_are_refused(make_checkpoint, first, second, file):
    settings = (f"artifacts=[{{name: a, {first}}}, {{name: b, {second}}}]",)
    both, checkpoint = changed(BASE, Flags(settings=settings)), Checkpoint.open(make_checkpoint())
    with pytest.raises(UsageError, match=f"artifacts a and b would both write {file}"):
        Plan.of(both, checkpoint)
    assert Plan.of(both, checkpoint, ["b"]).artifacts[0].name == "b"


def test_a_folder_of_artifacts_is_told_apart_from_a_model(tmp_path):
    (tmp_path / "m-AWQ").mkdir()
    (tmp_path / "m-AWQ" / "config.json").write_text("{}")
    result = run("inspect", tmp_path)
    assert str(result.exception) == f"{tmp_path}: holds m-AWQ/; name one, e.g. {tmp_path}/m-AWQ"


def test_verify_takes_a_file_by_its_folder(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    result = run("verify", tmp_path / "m.gguf")
    assert f"{tmp_path}: holds no qquant-manifest.json" in str(result.exception)
