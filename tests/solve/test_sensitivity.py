"""Expected losses of tensors: near what a model loses, the same after a kill, and a recipe that builds the same bytes."""

import json

import pytest
import torch

from qquant import calibration, pipeline, recipe
from qquant.calibration import Tokenizer
from qquant.checks import fidelity
from qquant.checks.review import held_out
from qquant.cli import main
from qquant.errors import StoppedError
from qquant.formats import by_size
from qquant.formats.gguf import quantize
from qquant.plan.plan import Plan
from qquant.recipe import Checks
from qquant.solve import sensitivity
from qquant.solve.moments import Moments
from qquant.source.checkpoint import Checkpoint
from tests.solve.test_curvature import CPU, quiet
from tests.worlds.watched import Watched

HEAD = """
version: 1
name: t
calibration: {sources: [{bundled: wikitext-2-valid}], samples: 8, length: 64, default_system_share: 0, curvature_tokens: 384}
checks: {windows: 2, length: 64}
artifacts:
"""
SIZED = "{name: small, format: gguf, size: 3MB, solver: gptq, sweeps: 0, gates: {defaults: false}}"
FEW = SIZED.replace("size", "types: {'*': [q3_k, q4_k, q8_0]}, size")


def loaded(*lines):
    return recipe.parse(HEAD + "".join(f"  - {line}\n" for line in lines))


class Rounded:
    """A checkpoint with one tensor as a type stores it."""

    def __init__(self, checkpoint, name, kind):
        self.family, self.config, self.checkpoint, self.name = checkpoint.family, checkpoint.config, checkpoint, name
        weight = checkpoint.tensor(name).float()
        self.value = quantize.dequantize(quantize.quantize(weight, kind), kind)

    def tensor(self, name):
        return self.value if name == self.name else self.checkpoint.tensor(name)

    def rows(self, name, start, stop):
        return self.value[start:stop] if name == self.name else self.checkpoint.rows(name, start, stop)


def test_expected_losses_are_what_the_model_loses(demo, tmp_path, monkeypatch):
    """Rounded tensor by tensor; the estimate is of second order and takes inputs and gradients as independent."""
    checkpoint = Checkpoint.open(demo)
    names = {
        "model.embed_tokens.weight": "q3_k",
        "lm_head.weight": "q3_k",
        "model.layers.0.self_attn.v_proj.weight": "q2_k",
        "model.layers.3.mlp.up_proj.weight": "q3_k",
        "model.layers.5.mlp.down_proj.weight": "q3_k",
    }
    wanted = loaded(
        "{name: a, format: gguf, size: 5MB, imatrix: false, solver: ggml, types: {'*': [q2_k, q3_k, q4_k]}}"
    )
    wanted = wanted.model_copy(
        update={
            "calibration": wanted.calibration.model_copy(
                update={"samples": 12, "length": 128, "curvature_tokens": 1536}
            )
        }
    )
    tokens = calibration.load(wanted.calibration, Tokenizer.open(demo), template_expected=False)
    samples = [torch.as_tensor(sample, dtype=torch.int64) for sample in tokens.tokens]
    trials = {"a": by_size(wanted.artifacts[0]).trials(checkpoint, wanted.artifacts[0], wanted, "m")}
    found = sensitivity.measured(checkpoint, samples, trials, Moments(tmp_path), CPU, quiet, 1536)["a"]
    text = held_out(Checks(windows=12, length=128), Tokenizer.open(demo))
    models = {name: Rounded(checkpoint, name, kind) for name, kind in names.items()}
    measured = fidelity.measure(checkpoint, models, text.scored(text.windows), CPU, quiet)
    for name, kind in names.items():
        assert 0.4 < found[name][kind] / measured[name].mean_kl < 2.5, name


def test_every_matrix_has_a_loss_for_every_type_that_fits_and_more_bits_lose_less(make_checkpoint, tmp_path):
    for tied in (False, True):
        folder = make_checkpoint(
            f"m{tied}", hidden_size=256, intermediate_size=288, num_hidden_layers=1, tie_word_embeddings=tied
        )
        checkpoint, wanted = Checkpoint.open(folder), loaded(SIZED)
        plan = Plan.of(wanted, checkpoint)
        settled = pipeline.choose_types(wanted, checkpoint, plan, tmp_path / f"s{tied}", CPU, quiet)
        losses = json.loads((tmp_path / f"s{tied}" / "losses.json").read_text())["losses"]["small"]
        matrices = {name for name, shape in checkpoint.family.shapes(checkpoint.config).items() if len(shape) == 2}
        assert losses.keys() == matrices
        for name, by_type in losses.items():
            narrow = name.endswith("down_proj.weight")
            assert ("q4_k" in by_type) == (not narrow)
            assert by_type["bf16"] == 0 < by_type["q8_0"] < by_type["q5_0"] < by_type["q4_0"]
        assert settled.unsettled == ()
        assert settled.artifacts[0].files[0].size <= 3_000_000


def test_a_build_by_size_a_killed_one_and_the_recipe_that_names_its_types_write_the_same_bytes(
    make_checkpoint, tmp_path, monkeypatch
):
    checkpoint = Checkpoint.open(make_checkpoint(hidden_size=256, intermediate_size=256, num_hidden_layers=1))
    wanted = loaded(FEW)

    def build(recipe_, out, progress=quiet):
        planned = Plan.of(recipe_, checkpoint)
        pipeline.build(recipe_, checkpoint, planned, tmp_path / out, CPU, progress)
        return next((tmp_path / out).glob("model-GGUF/*.gguf"))

    def stop(phase, done, of):
        if (phase, done) == ("quantize", 1):
            raise StoppedError("as asked")

    file = build(wanted, "out")
    assert file.name == "model-small.gguf"
    assert 2_900_000 < file.stat().st_size <= 3_000_000
    with pytest.raises(StoppedError):
        build(wanted, "stopped", Watched(stop))
    kept = (tmp_path / "stopped" / "losses.json").read_bytes()
    assert kept == (tmp_path / "out" / "losses.json").read_bytes()
    monkeypatch.setattr(sensitivity, "measured", None)  # is not asked again
    assert build(wanted, "stopped").read_bytes() == file.read_bytes()
    build(wanted, "out")  # finished, and stays so
    monkeypatch.undo()
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "recipe",
                "types",
                str(checkpoint.path),
                "--recipe",
                str(written(tmp_path)),
                "--out",
                str(tmp_path / "chosen.yaml"),
            ]
        )
    assert caught.value.code == 0
    literal = recipe.load(tmp_path / "chosen.yaml")
    assert literal.artifacts[0].type is not None
    assert build(literal, "literal").read_bytes() == file.read_bytes()
    build(literal, "out")  # the very artifact


def written(folder):
    path = folder / "asked.yaml"
    path.write_text(HEAD + f"  - {FEW}\n")
    return path


def test_losses_of_another_question_or_changed_ones_are_measured_again(make_checkpoint, tmp_path):
    checkpoint = Checkpoint.open(make_checkpoint(hidden_size=256, intermediate_size=256, num_hidden_layers=1))

    def losses(line):
        wanted = loaded(line)
        pipeline.choose_types(wanted, checkpoint, Plan.of(wanted, checkpoint), tmp_path, CPU, quiet)
        return json.loads((tmp_path / "losses.json").read_text())

    other = FEW.replace("solver: gptq, sweeps: 0", "solver: ggml")
    first = losses(FEW)
    assert losses(FEW) == first
    again = losses(other)
    assert again["key"] != first["key"]
    assert again["losses"] != first["losses"]
    again["losses"]["small"]["lm_head.weight"]["q8_0"] = 0.0
    (tmp_path / "losses.json").write_text(json.dumps(again))
    assert losses(other)["losses"]["small"]["lm_head.weight"]["q8_0"] > 0
    (tmp_path / "losses.json").write_text("{")
    assert losses(FEW) == first


def test_size_needs_an_objective_that_measures_what_the_model_loses():
    text = HEAD.replace("curvature_tokens: 384", "objective: output") + f"  - {SIZED}\n"
    with pytest.raises(recipe.UsageError, match=r"artifacts\[0\].size: types are chosen by what the model loses"):
        recipe.parse(text)
