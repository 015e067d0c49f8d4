"""Linears that stay in 16 bits: what patterns mean, what the config says of them, and folders that hold, answer and pass with them."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from qquant import pipeline, recipe
from qquant.artifact.opening import open_weights
from qquant.errors import UsageError
from qquant.formats import claims_of, keeping
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.recipe import Checks, Gates
from qquant.source.checkpoint import Checkpoint

CPU = torch.device("cpu")
HEAD = """
version: 1
name: t
calibration: {sources: [{bundled: books-en}], samples: 6, length: 48, default_system_share: 0}
checks: {windows: 2, length: 64}
artifacts:
"""
KEEP = "keep: [model.layers.1.mlp.down_proj, 'model.layers.0.self_attn.[qkv]_proj']"
LINES = {
    "gptq": f"{{name: a, format: gptq, bits: 4, group_size: 32, gates: {{defaults: false}}, {KEEP}}}",
    "awq": f"{{name: a, format: awq, group_size: 32, ratios: 3, gates: {{defaults: false}}, {KEEP}}}",
}
KEPT = ["model.layers.0.self_attn." + word for word in ("q_proj", "k_proj", "v_proj")] + [
    "model.layers.1.mlp.down_proj"
]


def plan_of(line, checkpoint):
    loaded = recipe.parse(f"{HEAD}  - {line}\n")
    return loaded, Plan.of(loaded, checkpoint)


def test_patterns_mean_linears_that_share_an_input_together(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint())
    given = checkpoint.family, checkpoint.config, "a"
    assert sorted(keeping.kept(["model.layers.1.mlp.down_proj.weight", "*.0.self_attn.[qkv]_proj"], *given)) == sorted(
        KEPT
    )
    assert len(keeping.kept(["*.o_proj", "model.layers.*.mlp.*"], *given)) == 8
    assert keeping.kept([], *given) == ()
    with pytest.raises(
        UsageError, match=r"artifact a: keep: model.layers.7.*: fits no linear .*model.layers.\*.mlp.down_proj"
    ):
        keeping.kept(["model.layers.7.*"], *given)
    with pytest.raises(
        UsageError, match="keep: model.layers.1.mlp.up_proj without model.layers.1.mlp.gate_proj: they share"
    ):
        keeping.kept(["model.layers.1.mlp.up_proj"], *given)


@pytest.mark.parametrize("kind", LINES)
def test_a_folder_holds_says_and_is_judged_by_what_is_kept(make_checkpoint, tmp_path, kind):
    folder = make_checkpoint()
    checkpoint = Checkpoint.open(folder)
    loaded, plan = plan_of(LINES[kind], checkpoint)
    report = pipeline.build(loaded, checkpoint, plan, tmp_path / "out", CPU, Quiet())
    assert report.passed
    (place,) = (tmp_path / "out").glob("model-*")
    tensors, original = load_file(place / "model.safetensors"), load_file(folder / "model.safetensors")
    for name in KEPT:
        assert f"{name}.qweight" not in tensors
        if kind == "gptq":  # AWQ folds the scales of the next stage into v
            assert torch.equal(tensors[f"{name}.weight"], original[f"{name}.weight"])
    assert "model.layers.0.mlp.down_proj.qweight" in tensors
    config = json.loads((place / "config.json").read_text())["quantization_config"]
    assert said(config, "model.layers.0.self_attn.q_proj") == said(config, "model.layers.1.mlp.down_proj") == "numbers"
    assert said(config, "model.layers.0.self_attn.qkv_proj") == "numbers"
    assert said(config, "model.layers.0.self_attn.o_proj") == said(config, "model.layers.1.self_attn.q_proj") == "codes"
    assert claims_of(place, checkpoint).faults == ()
    weights = open_weights(place)
    kept = weights.tensor("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(kept, tensors["model.layers.1.mlp.down_proj.weight"].float())
    assert plan.artifacts[0].stored["model.layers.1.mlp.down_proj.weight"].numbers
    checked = pipeline.check([place], checkpoint, Checks(windows=2, length=64), Gates(defaults=False), CPU, Quiet())
    assert checked.passed


def said(config, module):
    """What a runtime takes a module for: by `dynamic` as vLLM and GPTQModel read it, or as AWQ's readers."""
    if config["quant_method"] == "awq":
        return "numbers" if any(name in module for name in config["modules_to_not_convert"]) else "codes"
    out = any(re.match(key.removeprefix("-:"), module) for key in config["dynamic"])
    (listed,) = config["modules_in_block_to_quantize"]
    if not module.endswith("qkv_proj"):
        assert out == (not any(module.endswith(name) for name in listed)), (
            "optimum, which reads the other key, says otherwise"
        )
    return "numbers" if out else "codes"


def test_a_config_that_says_otherwise_is_found(make_checkpoint, tmp_path):
    checkpoint = Checkpoint.open(make_checkpoint())
    loaded, plan = plan_of(LINES["gptq"], checkpoint)
    pipeline.build(loaded, checkpoint, plan, tmp_path / "out", CPU, Quiet())
    (place,) = (tmp_path / "out").glob("model-*")
    config = json.loads((place / "config.json").read_text())
    del config["quantization_config"]["dynamic"]
    (place / "config.json").write_text(json.dumps(config))
    assert any("dynamic" in fault for fault in claims_of(place, checkpoint).faults)


@pytest.mark.parametrize("kind", LINES)
def test_what_is_not_kept_has_the_bytes_of_before(make_checkpoint, kind):
    """Without `keep` no key is added."""
    checkpoint = Checkpoint.open(make_checkpoint())
    _, plan = plan_of(LINES[kind].replace(f", {KEEP}", ""), checkpoint)
    config = json.loads(next(file for file in plan.artifacts[0].files if file.name == "config.json").head)
    assert not {"dynamic", "modules_in_block_to_quantize"} & config["quantization_config"].keys()
    assert config["quantization_config"].get("modules_to_not_convert") is None
