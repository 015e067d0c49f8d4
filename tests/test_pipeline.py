"""Builds end to end on small random checkpoints: artifacts, report, gates, resume, and what bad input leaves behind."""

import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant import pipeline, recipe
from qquant.artifact import draft
from qquant.artifact.draft import Draft
from qquant.artifact.opening import open_weights
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
from qquant.families import FAMILIES, decoder
from qquant.families.forward import StageInput
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.recipe import Checks, Gates
from qquant.solve import block as blocks
from qquant.solve import propagate
from qquant.solve.solver import Solver
from qquant.source.checkpoint import Checkpoint
from tests.worlds import GOLDEN

quiet = Quiet()

CPU = torch.device("cpu")
HEAD = """
version: 1
name: test
calibration:
  sources: [{bundled: books-en}]
  samples: 6
  length: 48
  default_system_share: 0
checks: {text: "bundled:wikitext-2-test", windows: 3, length: 64}
artifacts:
"""
# Too little text is read to decide a gate, so none is asked.
ARTIFACTS = {
    "gptq-int4": "{name: gptq-int4, format: gptq, bits: 4, group_size: 32, gates: {defaults: false}}",
    "gptq-128": "{name: gptq-128, format: gptq, bits: 4}",
    "gptq-int8": "{name: gptq-int8, format: gptq, bits: 8, group_size: 64, gates: {defaults: false}}",
    "gptq-row": "{name: gptq-row, format: gptq, bits: 8, group_size: -1, scale_search: minmax, gates: {defaults: false}}",
    "gptq-shared": "{name: gptq-shared, format: gptq, bits: 4, group_size: 32, propagate: false, gates: {defaults: false}}",
    "gptq-own": "{name: gptq-own, format: gptq, bits: 4, group_size: 32, propagate: true, gates: {defaults: false}}",
    "gptq-once": "{name: gptq-once, format: gptq, bits: 4, group_size: 32, propagate: false, sweeps: 0, gates: {defaults: false}}",
    "rtn": "{name: rtn, format: gptq, bits: 4, group_size: 32, solver: rtn, scale_search: minmax, gates: {defaults: false}}",
    "awq": "{name: awq, format: awq, group_size: 64, ratios: 4, gates: {defaults: false}}",
    "awq-unscaled": "{name: awq, format: awq, transform: none, group_size: 64, ratios: 4, gates: {defaults: false}}",
    "gguf-q8_0": "{name: gguf-q8_0, format: gguf, type: q8_0, gates: {defaults: false}}",
    "gguf-q4_0": "{name: gguf-q4_0, format: gguf, type: q4_0, gates: {defaults: false}}",
    "gguf-f16": "{name: gguf-f16, format: gguf, type: f16, gates: {defaults: false}}",
}


def load_recipe(tmp_path, names, text=HEAD):
    path = tmp_path / "test.yaml"
    path.write_text(text + "".join(f"  - {ARTIFACTS[name]}\n" for name in names))
    return recipe.load(str(path))


@pytest.fixture
def build(tmp_path):
    """`build(folder, *artifacts, out="out")` -> (report, out)."""

    def run(folder, *names, out="out", text=HEAD, adapter=None):
        loaded = load_recipe(tmp_path, names, text)
        checkpoint = Checkpoint.open(folder, adapter=adapter)
        report = pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), tmp_path / out, CPU, quiet)
        return report, tmp_path / out

    return run


def contents(folder):
    """Every file below `folder` and its bytes, but for seconds, reports, and manifests, which hold the whole recipe."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(("report.", "timings.", "qquant-manifest"))
    }


def seconds(folder):
    """What took how long, by artifact."""
    return json.loads((folder / "timings.json").read_text())["artifacts"]


VARIANTS = {
    "bf16": {},
    "fp16, grouped queries": {"dtype": torch.float16, "num_key_value_heads": 2},
    "fp32, tied, shards": {"dtype": torch.float32, "tie_word_embeddings": True, "shards": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_artifact_is_what_was_planned_and_close_to_the_source(make_checkpoint, build, tmp_path, variant):
    folder = make_checkpoint("Qwen1.5-Test-Chat", **VARIANTS[variant])
    names = ("gptq-int4", "gptq-int8", "gptq-row", "awq", "gguf-q8_0", "gguf-q4_0", "gguf-f16")
    text = HEAD  # two GPTQ artifacts of 8 bit would share a folder, so the second is built on its own
    report, out = build(folder, *(name for name in names if name != "gptq-row"), text=text)
    other, _ = build(folder, "gptq-row", out="row", text=text)
    loaded = load_recipe(tmp_path, [name for name in names if name != "gptq-row"])
    checkpoint = Checkpoint.open(folder)
    for planned in Plan.of(loaded, checkpoint).artifacts:
        for file in planned.files:
            path = out / planned.folder / file.name
            assert path.stat().st_size == file.size, path
            if file.copy_of:
                assert path.read_bytes() == file.copy_of.read_bytes()
    assert {path.name for path in out.iterdir()} == {
        "Qwen1.5-Test-Chat-GPTQ-Int4", "Qwen1.5-Test-Chat-GPTQ-Int8", "Qwen1.5-Test-Chat-AWQ", "Qwen1.5-Test-Chat-GGUF",
        "calibration", "evidence", "report.html", "report.json", "report.md", "source.json", "timings.json",
    }  # fmt: skip
    assert (out / "Qwen1.5-Test-Chat-GGUF" / "qwen1_5-test-chat-q8_0.gguf").is_file()
    rows = {row.name: row for row in (*report.artifacts, *other.artifacts)}
    assert rows["gguf-f16"].kl_divergence < 1e-5
    for name in ("gptq-int8", "gguf-q8_0", "gptq-row"):
        assert rows[name].kl_divergence < 0.002, name
    for name in ("gptq-int4", "awq", "gguf-q4_0"):
        assert 0.0005 < rows[name].kl_divergence < 0.3, name
    assert report.passed


@pytest.mark.parametrize(("hidden", "remedy"), [(192, "Give it group_size: 64 or 32"), (80, "No group_size fits: pad")])
def test_a_group_size_that_does_not_fit_is_answered_with_those_that_do(make_checkpoint, tmp_path, hidden, remedy):
    folder = make_checkpoint(hidden_size=hidden, num_attention_heads=2, num_key_value_heads=2, intermediate_size=256)
    loaded = load_recipe(tmp_path, ["gptq-128"])
    with pytest.raises(InputError, match=rf"q_proj \[{hidden}, {hidden}\] needs .* {remedy}"):
        Plan.of(loaded, Checkpoint.open(folder))


@pytest.mark.parametrize("tied", [True, False])
def test_folder_holds_what_loaders_expect(make_checkpoint, build, tied):
    folder = make_checkpoint(tie_word_embeddings=tied)
    _, out = build(folder, "gptq-int4")
    made = out / "model-GPTQ-Int4"
    tensors = load_file(made / "model.safetensors")
    assert ("lm_head.weight" in tensors) == (not tied)
    assert {name.split(".")[-2] for name in tensors if name.endswith(".bias")} == {"q_proj", "k_proj", "v_proj"}
    source = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert torch.equal(tensors[name], source[name])
    config = json.loads((made / "config.json").read_text())
    assert {key: value for key, value in config.items() if key != "quantization_config"} == json.loads(
        (folder / "config.json").read_text()
    )
    assert json.loads((made / "quantize_config.json").read_text()) == config["quantization_config"]
    assert config["quantization_config"]["desc_act"] is False
    assert config["quantization_config"]["sym"] is True


def test_shards_have_an_index(make_checkpoint, build):
    folder = make_checkpoint()
    text = HEAD.replace("calibration:", "shard_size: 1000000\ncalibration:")
    report, out = build(folder, "gptq-int4", text=text)
    made = out / "model-GPTQ-Int4"
    index = json.loads((made / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert {name for shard in shards for name in load_file(made / shard)} == set(index["weight_map"])
    assert report.artifacts[0].kl_divergence < 0.3


def test_same_inputs_give_the_same_bytes_alone_or_together(make_checkpoint, build):
    folder = make_checkpoint()
    _, together = build(folder, "gptq-int4", "awq", "gguf-q4_0")
    _, alone = build(folder, "awq", out="alone")
    whole, part = contents(together), contents(alone)
    del part["source.json"]  # says on how many ranks each artifact of its build can be served
    for name, content in part.items():
        assert whole[name] == content, name


def test_the_forward_runs_once_per_linear_and_token(make_checkpoint, build, monkeypatch):
    folder = make_checkpoint()
    calls = []
    forward = decoder.Block.forward
    monkeypatch.setattr(
        decoder.Block,
        "forward",
        lambda self, x, observe=None: calls.append((len(x), self.dtype)) or forward(self, x, observe),
    )
    build(folder, "gptq-int4", "gptq-int8", "awq", "gguf-q4_0", "gguf-q8_0")
    building = [dtype for count, dtype in calls if count == 48]  # calibration samples; the check's windows are 64 long
    # samples x layers, for any number of artifacts: twice for curvature, once to solve; once in float32 for those of 8 bits
    assert building.count(torch.bfloat16) == 3 * 6 * 2
    assert building.count(torch.float32) == 6 * 2
    assert len(building) == 4 * 6 * 2


def test_gptq_beats_round_to_nearest(make_checkpoint, build):
    folder = make_checkpoint(hidden_size=128, intermediate_size=256)
    report, _ = build(folder, "gptq-int4", text=HEAD.replace("samples: 6", "samples: 16"))
    plain, _ = build(folder, "rtn", out="rtn")
    assert report.artifacts[0].kl_divergence < 0.8 * plain.artifacts[0].kl_divergence
    for layer in report.artifacts[0].layers:
        assert layer.error <= layer.steps["rtn"]
    assert all(set(layer.steps) == {"rtn"} for layer in plain.artifacts[0].layers)


def test_error_after_each_step_is_recorded(make_checkpoint, build, monkeypatch):
    """In w H w' of what is missing over that of the weights, computed here in float64 from the finished file."""
    folder = make_checkpoint(hidden_size=128, intermediate_size=256)
    asked, round_ = {}, Solver._round

    def watched(self, linears, gram, *rest):
        asked.update(
            {self._name(linear): (weight.double(), gram.matrix.double()) for linear, weight in linears.items()}
        )
        return round_(self, linears, gram, *rest)

    monkeypatch.setattr(Solver, "_round", watched)
    once, out = build(folder, "gptq-once")
    stored = open_weights(out / "model-GPTQ-Int4")
    for layer in once.artifacts[0].layers:
        weight, gram = asked[layer.name]
        missing = stored.tensor(layer.name).double() - weight
        error = torch.trace(missing @ gram @ missing.T) / torch.trace(weight @ gram @ weight.T)
        assert set(layer.steps) == {"rtn", "gptq"}
        assert layer.error == layer.steps["gptq"] == pytest.approx(float(error), rel=1e-4)
    swept, _ = build(folder, "gptq-shared", out="swept")
    for layer, first in zip(swept.artifacts[0].layers, once.artifacts[0].layers, strict=True):
        assert list(layer.steps) == ["rtn", "gptq", "sweeps", "coupled"]
        assert layer.steps["gptq"] == pytest.approx(first.steps["gptq"], rel=1e-6)
        assert layer.error == layer.steps["coupled"]
    errors = [layer.steps for layer in swept.artifacts[0].layers]
    assert sum(one["sweeps"] for one in errors) < 0.99 * sum(one["gptq"] for one in errors)


def test_seconds_stand_beside_the_report_and_in_no_artifact(make_checkpoint, build):
    folder = make_checkpoint()
    _, out = build(folder, "gptq-int4", "awq")
    first = seconds(out)
    for entry in first.values():
        for block in ("model.layers.0", "model.layers.1"):
            stages = [entry[f"{block}.{stage}"] for stage in ("qkv", "o", "gate_up", "down")]
            assert 0 < sum(stages) <= entry[block]
    build(folder, "gptq-int4", "awq", "gguf-q8_0")
    assert {name: seconds(out)[name] for name in first} == first
    assert set(seconds(out)) == {*first, "gguf-q8_0"}
    assert all(b"seconds" not in path.read_bytes() for path in out.rglob("qquant-manifest.json"))


def test_inputs_of_the_last_stage_let_go_of_the_passage_without_quantization():
    """Else its activations stay in memory: Python up to 3.12.3 keeps what a closed generator held."""
    ways = [iter([StageInput("down", torch.ones(1)), StageInput("", torch.zeros(1))]) for _ in range(2)]
    held = _passage(ways[0])
    known = weakref.ref(held)
    passes = {7: [held, _passage(ways[1])]}
    del held
    found = list(propagate._inputs(passes, last=True))
    assert [place for place, _, _ in found] == [7]
    assert known() is None
    assert [next(way)[0] for way in passes[7]] == [""]


def _passage(way):
    yield from way


def test_propagated_artifact_makes_up_for_what_came_before(make_checkpoint, build):
    folder = make_checkpoint(hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    text = HEAD.replace("samples: 6", "samples: 24")
    shared, first = build(folder, "gptq-shared", text=text)
    own, second = build(folder, "gptq-own", out="own", text=text)
    a, b = (load_file(out / "model-GPTQ-Int4" / "model.safetensors") for out in (first, second))
    assert torch.equal(a["model.layers.0.self_attn.q_proj.qweight"], b["model.layers.0.self_attn.q_proj.qweight"])
    assert not torch.equal(a["model.layers.1.mlp.down_proj.qweight"], b["model.layers.1.mlp.down_proj.qweight"])
    assert own.artifacts[0].kl_divergence < shared.artifacts[0].kl_divergence


def test_the_correction_is_the_ridge_regression_of_what_is_missing():
    """For weights W' = W + correction: W' x~ is nearest to W x + (r - r~) under the ridge, computed by stacking rows."""
    generator = torch.Generator().manual_seed(3)
    weight, x, own, r, q = (
        torch.randn(*shape, generator=generator) for shape in ((5, 8), (40, 8), (40, 8), (40, 5), (40, 5))
    )
    own = x + 0.3 * own
    stage = FAMILIES["qwen2"].stage("o")
    weights = {f"{stage.linears[0]}.weight": weight}
    view = blocks.View(None, 0, weights, torch.float32, None)
    inputs = [
        propagate.Inputs(place, StageInput("o", x[part], r[part]), StageInput("o", own[part], q[part]))
        for place, part in enumerate((slice(0, 25), slice(25, None)))
    ]
    gram, targets = propagate._targets(view, stage, weights, inputs)
    found = (targets[f"{stage.linears[0]}.weight"] - weight) / propagate.SHARE
    wanted = (x @ weight.T + r - q) - own @ weight.T  # what W x~ lacks
    ridge = (propagate.RIDGE * gram.matrix.diagonal().mean()).sqrt()
    stacked = torch.cat([own, ridge * torch.eye(8)]).double(), torch.cat([wanted, torch.zeros(8, 5)]).double()
    expected = torch.linalg.lstsq(*stacked).solution.T
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_adapter_is_part_of_the_model(make_checkpoint, build, tmp_path):
    from tests.source.test_checkpoint import low_rank, write_adapter

    folder = make_checkpoint()
    adapter = write_adapter(tmp_path / "lora", low_rank())
    report, out = build(folder, "gptq-int8", adapter=adapter)
    assert report.artifacts[0].kl_divergence < 0.002
    base = Checkpoint.open(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = Checkpoint.open(folder, adapter=adapter).tensor(name).float()
    made = open_weights(out / "model-GPTQ-Int8").tensor(name)
    assert (made - merged).abs().max() < 0.1 * (base.tensor(name).float() - merged).abs().max()


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


# --- bad input leaves the output folder untouched ---------------------------------------------------------------------


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


# --- gates and checks -------------------------------------------------------------------------------------------------


def test_gate_fails_with_its_reason(make_checkpoint, build):
    ARTIFACTS["strict"] = (
        "{name: strict, format: gptq, bits: 4, group_size: 64, solver: rtn, gates: {kl_divergence: 0.000001, defaults: false}}"
    )
    report, out = build(make_checkpoint(), "strict")
    assert not report.passed
    assert "mean KL divergence" in report.artifacts[0].verdict.reasons[0]
    assert "above the limit 1e-06" in (out / "report.md").read_text()
    assert json.loads((out / "report.json").read_text())["verdict"] == "fail"


def test_checkpoint_against_itself_differs_by_exactly_nothing(make_checkpoint):
    folder = make_checkpoint()
    report = pipeline.check(
        [folder], Checkpoint.open(folder), Checks(windows=2, length=64), Gates(defaults=False), CPU, quiet
    )
    row = report.artifacts[0]
    assert (row.kl_divergence, row.perplexity_ratio, row.top1_agreement) == (0.0, 1.0, 1.0)


def test_check_refuses_another_models_artifact(make_checkpoint, build):
    _, out = build(make_checkpoint(), "gptq-int4")
    wider = make_checkpoint("wider", hidden_size=128)
    with pytest.raises(InputError, match="is not a quantization of"):
        pipeline.check([out / "model-GPTQ-Int4"], Checkpoint.open(wider), Checks(), Gates(defaults=False), CPU, quiet)


def test_numbers_of_the_check_equal_transformers(make_checkpoint, build):
    """Perplexity and KL divergence from full logits of transformers' model with our dequantized weights."""
    import transformers

    from qquant.calibration import Tokenizer, heldout

    folder = make_checkpoint()
    report, out = build(folder, "gptq-int4")
    made = open_weights(out / "model-GPTQ-Int4")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, _ = heldout("bundled:wikitext-2-test", Tokenizer.open(folder))
    windows = torch.as_tensor(ids[: 3 * 64]).long().view(3, 64)
    with torch.no_grad():
        base = model(windows).logits[:, 32:-1].double().log_softmax(-1)
        model.load_state_dict({name: made.tensor(name) for name in model.state_dict()})
        other = model(windows).logits[:, 32:-1].double().log_softmax(-1)
    nll = -other.gather(-1, windows[:, 33:, None])
    assert report.artifacts[0].perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-5)
    assert report.artifacts[0].kl_divergence == pytest.approx(
        float((base.exp() * (base - other)).sum(-1).mean()), rel=1e-3
    )
    assert report.artifacts[0].top1_agreement == pytest.approx(
        float((base.argmax(-1) == other.argmax(-1)).double().mean())
    )


MADE = GOLDEN / "artifacts"  # by other tools


@pytest.mark.parametrize("name", ["autogptq-int4", "autogptq-int8", "gptqmodel-int4", "gptqmodel-awq"])
def test_artifacts_of_other_tools_are_read(name):
    checks = Checks(windows=16, length=64)
    report = pipeline.check(
        [MADE / name],
        Checkpoint.open(MADE / "source"),
        checks,
        Gates(perplexity_ratio=1.05, defaults=False),
        CPU,
        quiet,
    )
    assert report.passed
    assert report.artifacts[0].kl_divergence < 0.01
    assert report.artifacts[0].kl_divergence > 0


def test_broken_artifact_of_another_tool_fails():
    checks = Checks(windows=2, length=256)
    report = pipeline.check(
        [MADE / "autoawq-int4-broken"],
        Checkpoint.open(MADE / "source"),
        checks,
        Gates(perplexity_ratio=1.1, defaults=False),
        CPU,
        quiet,
    )
    assert not report.passed
    assert report.artifacts[0].perplexity_ratio > 1.5
