"""Gates and checks of whole builds, and of what other tools made."""

import json

import pytest
import torch

from qquant import pipeline
from qquant.artifact.opening import open_weights
from qquant.errors import (
    InputError,
)
from qquant.recipe import Checks, Gates
from qquant.source.checkpoint import Checkpoint
from tests.worlds import GOLDEN
from tests.worlds.builds import ARTIFACTS, CPU, quiet


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
