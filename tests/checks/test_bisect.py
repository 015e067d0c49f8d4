"""What bisect answers is what a recipe says, for tables of words too, and the recipe that it writes builds that."""

import json

import pytest
import torch
from click.testing import CliRunner

from qquant import pipeline, recipe
from qquant.artifact.opening import open_weights
from qquant.checks import bisect as bisection
from qquant.cli import cli
from qquant.errors import UsageError
from qquant.formats import FORMATS
from qquant.formats.gguf.inside import describe
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.source.checkpoint import Checkpoint

CPU = torch.device("cpu")
HEAD = """
version: 1
name: t
calibration: {sources: [{bundled: books-en}], samples: 4, length: 48, default_system_share: 0}
checks: {windows: 2, length: 64}
artifacts:
"""
LINES = {
    "gguf": "{name: gguf-q4_0, format: gguf, type: q4_0, gates: {defaults: false}}",
    "gptq": "{name: gptq, format: gptq, bits: 4, group_size: 32, solver: rtn, propagate: false, gates: {defaults: false}}",
    "awq": "{name: awq, format: awq, group_size: 32, solver: rtn, ratios: 4, gates: {defaults: false}}",
}


@pytest.fixture
def artifact(make_checkpoint, tmp_path):
    """`artifact(kind, **config)` -> its path and the checkpoint's folder."""

    def make(kind, **options):
        folder = make_checkpoint(**options)
        loaded, checkpoint = recipe.parse(f"{HEAD}  - {LINES[kind]}\n"), Checkpoint.open(folder)
        plan = Plan.of(loaded, checkpoint)
        pipeline.build(loaded, checkpoint, plan, tmp_path / "out", CPU, Quiet())
        place = tmp_path / "out" / plan.artifacts[0].folder
        return FORMATS[kind].path_of(place, [file.name for file in plan.artifacts[0].files]), folder

    return make


def bisected(path, folder, limit, *more):
    words = [
        "bisect",
        path,
        "--against",
        folder,
        "--windows",
        2,
        "--length",
        32,
        "--device",
        "cpu",
        "--max-kl",
        limit,
        *more,
    ]
    return CliRunner().invoke(cli, [*map(str, words)])


@pytest.mark.parametrize("tied", [False, True])
def test_tables_of_a_gguf_file_are_candidates(artifact, tied):
    path, folder = artifact("gguf", tie_word_embeddings=tied)
    names = [table.name for table in bisection.tables(open_weights(path))]
    assert names == (["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"])
    done = bisected(path, folder, 1e-9, "--json")
    answer = json.loads(done.stdout)
    assert {"model.embed_tokens", *(() if tied else ("lm_head",))} <= {gain["name"] for gain in answer["gains"]}
    assert answer["kl_restored"] == 0.0, "all that is not in 16 bits was restored"
    assert answer["recipe_entry"]["types"]["token_embd"] == "bf16"


def test_folders_and_checkpoints_have_no_such_candidates(artifact):
    path, folder = artifact("gptq")
    assert bisection.tables(open_weights(path)) == bisection.tables(Checkpoint.open(folder)) == []


@pytest.mark.parametrize("kind", LINES)
def test_the_recipe_that_is_written_builds_what_was_found(artifact, tmp_path, kind):
    path, folder = artifact(kind)
    written = tmp_path / "kept.yaml"
    first = json.loads(bisected(path, folder, 1e9, "--json").stdout)
    assert first["restored"] == []
    assert first["recipe_entry"] == {}
    answer = json.loads(bisected(path, folder, first["kl_divergence"] / 2, "--json", "--recipe", written).stdout)
    assert answer["restored"]
    loaded, checkpoint = recipe.load(written), Checkpoint.open(folder)
    (spec,) = loaded.artifacts
    assert spec.name.endswith("-kept")
    assert spec.solver == recipe.parse(f"{HEAD}  - {LINES[kind]}\n").artifacts[0].solver
    plan = Plan.of(loaded, checkpoint)
    report = pipeline.build(loaded, checkpoint, plan, tmp_path / "again", CPU, Quiet())
    assert report.passed
    kept = {
        name for name, stored in plan.artifacts[0].stored.items() if stored.numbers and name in matrices(checkpoint)
    }
    wanted = {
        name
        for part in answer["restored"]
        for name in matrices(checkpoint)
        if name.startswith(part) or part_of(name, part)
    }
    assert wanted <= kept
    if kind == "gguf":
        (file,) = (tmp_path / "again").glob("model-GGUF/*.gguf")
        types = {tensor["name"]: tensor["type"].lower() for tensor in describe(file)["tensors"]}
        assert all(types[f"{name}.weight"] == kind for name, kind in answer["recipe_entry"]["types"].items())


def matrices(checkpoint):
    family, config = checkpoint.family, checkpoint.config
    return {*family.matrices(config), family.embedding, family.head}


def part_of(name, part):
    """Whether a weight is of a stage."""
    stages = {"self_attn.qkv": "qkv", "mlp.gate_up": "gate up"}
    return any(part.endswith(stage) and name.startswith(part.removesuffix(stage)) for stage in stages)


def test_the_lines_are_printed_for_files_of_other_tools_too(artifact, tmp_path):
    path, folder = artifact("gguf")
    (path.parent / "qquant-manifest.json").unlink()
    done = bisected(path, folder, 1e-9)
    assert "in a recipe's entry of it:\n    type: q4_0\n    types:\n" in done.stdout
    refused = bisected(path, folder, 1e-9, "--recipe", tmp_path / "kept.yaml")
    assert isinstance(refused.exception, UsageError)
    assert "has no qquant-manifest.json, so the recipe" in str(refused.exception)
