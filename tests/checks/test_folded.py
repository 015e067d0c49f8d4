"""Scales that are folded into neighbouring weights, in artifacts of any format: checks fit them, and still see what is broken."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant import pipeline, recipe
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.recipe import Checks, Gates
from qquant.source.checkpoint import Checkpoint

CPU = torch.device("cpu")
LOUD = 150.0  # how much more a few channels carry: what scales are folded for
RECIPE = """
version: 1
name: folded
calibration: {sources: [{bundled: books-en}], samples: 4, length: 48, default_system_share: 0}
checks: {windows: 2, length: 32}
artifacts:
  - {name: folded, format: %s, bits: 4, group_size: 32, transform: awq, ratios: 4, propagate: false, gates: {defaults: false}}
"""


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """A checkpoint in which every eighth channel of a norm is loud."""
    from tests.conftest import write_checkpoint

    folder = write_checkpoint(tmp_path_factory.mktemp("loud") / "model")
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("layernorm.weight"):
            value[::8] *= LOUD
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["gptq", "awq"])
def folded(request, loud, tmp_path_factory):
    """(report, artifact) of one with folded scales, in each layout that has them."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    loaded, checkpoint = recipe.parse(RECIPE % request.param), Checkpoint.open(loud)
    plan = Plan.of(loaded, checkpoint)
    report = pipeline.build(loaded, checkpoint, plan, out, CPU, Quiet())
    return report, out / plan.artifacts[0].folder


def check(artifact, checkpoint):
    checks = Checks(windows=2, length=32)
    report = pipeline.check([artifact], Checkpoint.open(checkpoint), checks, Gates(defaults=False), CPU, Quiet())
    return report.artifacts[0].verdict


def test_folded_scales_are_no_fault_whatever_the_format(folded, loud):
    report, artifact = folded
    norm = "model.layers.0.input_layernorm.weight"
    mine, theirs = (load_file(place / "model.safetensors")[norm].float() for place in (artifact, loud))
    assert (mine - theirs).norm() > 0.7 * theirs.norm()  # far enough to be called another vector, were it not folded
    assert report.artifacts[0].verdict.reasons == ()
    assert check(artifact, loud).reasons == ()


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_scales_that_are_not_folded_are_not_fitted(make_checkpoint, tmp_path, kind):
    """A norm of another model is a fault, in the AWQ layout too where no scales were folded into it."""
    folder = make_checkpoint()
    loaded, checkpoint = (
        recipe.parse(RECIPE.replace("transform: awq", "transform: none") % kind),
        Checkpoint.open(folder),
    )
    plan = Plan.of(loaded, checkpoint)
    pipeline.build(loaded, checkpoint, plan, tmp_path / "out", CPU, Quiet())
    artifact = tmp_path / "out" / plan.artifacts[0].folder
    assert check(artifact, folder).reasons == ()
    tensors = load_file(artifact / "model.safetensors")
    norm = "model.layers.1.post_attention_layernorm.weight"
    tensors[norm] = 3 * tensors[norm].flip(0)
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})
    assert check(artifact, folder).reasons == (f"{norm} is not the checkpoint's vector",)


def test_a_swapped_weight_is_a_fault_where_scales_are_folded(folded, loud):
    _, artifact = folded
    tensors = load_file(artifact / "model.safetensors")
    gate, up = (f"model.layers.1.mlp.{name}_proj.qweight" for name in ("gate", "up"))
    save_file(
        tensors | {gate: tensors[up], up: tensors[gate]}, artifact / "model.safetensors", metadata={"format": "pt"}
    )
    reasons = check(artifact, loud).reasons
    assert len(reasons) == 2
    assert all("is not the checkpoint's weight" in reason for reason in reasons)
