"""Builds end to end on small random checkpoints: artifacts, report, and what stands in them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qquant import pipeline
from qquant.artifact.opening import open_weights
from qquant.errors import InputError, StoppedError
from qquant.families import decoder
from qquant.plan.plan import Plan
from qquant.solve import writing
from qquant.solve.solver import Solver
from qquant.source.checkpoint import Checkpoint
from tests.worlds.builds import CPU, HEAD, contents, load_recipe, seconds
from tests.worlds.watched import Told

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
    # samples x layers, for any number of artifacts: twice for curvature, once to solve; those of 8 bits take a stream in float32 along
    assert building == [torch.bfloat16] * 3 * 6 * 2


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
        difference = stored.tensor(layer.name).double() - weight
        error = torch.trace(difference @ gram @ difference.T) / torch.trace(weight @ gram @ weight.T)
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


def test_a_checkpoint_with_its_adapter_writes_its_calibration_once(make_checkpoint, build, tmp_path, monkeypatch):
    from tests.source.test_checkpoint import low_rank, write_adapter

    folder, text = make_checkpoint(), HEAD.replace("bundled: books-en", "generated: true")
    plain, _ = build(folder, "rtn", out="plain", text=text)
    adapter = write_adapter(tmp_path / "lora", low_rank())
    first, out = build(folder, "rtn", text=text, adapter=adapter)
    assert first.calibration["sha256"] != plain.calibration["sha256"]  # the merged weights wrote
    (source,) = first.calibration["sources"]
    assert source["name"] == "generated by this checkpoint (text, temperature 1, seed 0, bundled openings)"
    assert first.calibration["tokens"] == 6 * 48
    manifest = json.loads((out / "model-GPTQ-Int4" / "qquant-manifest.json").read_text())
    (asked,) = manifest["artifacts"]["rtn"]["recipe"]["calibration"]["sources"]
    assert (asked["generated"], asked["openings"]) == (True, None)
    monkeypatch.setattr(writing, "write_rows", None)  # nothing is written again
    second, _ = build(folder, "rtn", text=text, adapter=adapter)
    assert second.calibration == first.calibration


def test_a_recipe_without_generated_text_is_recorded_as_it_was(make_checkpoint, build):
    _, out = build(make_checkpoint(), "rtn")
    manifest = json.loads((out / "model-GPTQ-Int4" / "qquant-manifest.json").read_text())
    (asked,) = manifest["artifacts"]["rtn"]["recipe"]["calibration"]["sources"]
    assert not {"generated", "openings"} & asked.keys()


def test_a_build_that_goes_on_tells_what_was_solved_before(make_checkpoint, tmp_path):
    """Streams go through a solved block in a small part of the time: as steps of the rest they told a rate that nobody reached."""
    checkpoint, loaded = Checkpoint.open(make_checkpoint()), load_recipe(tmp_path, ["gptq-int4", "awq"])
    plan = Plan.of(loaded, checkpoint)

    class Stopped(Told):
        def check_stop(self):
            if self.steps.get("quantize", [])[-1:] == [(1, 2)]:
                raise StoppedError("stopped")

    first, second = Stopped(), Told()
    with pytest.raises(StoppedError):
        pipeline.build(loaded, checkpoint, plan, tmp_path / "out", CPU, first)
    assert first.steps["quantize"] == [(0, 2), (1, 2)]
    assert "resume" not in first.steps
    pipeline.build(loaded, checkpoint, plan, tmp_path / "out", CPU, second)
    assert second.steps["resume"] == [(0, 1), (1, 1)]
    assert second.steps["quantize"] == [(1, 2), (2, 2)]
    assert second.steps["write"] == [(0, 1), (1, 1)]
