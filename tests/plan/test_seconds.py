"""Predicted seconds: what they count is what the phases do, and rates are those of the machine."""

import time

import pytest
import torch

from qquant.checks import sanity
from qquant.plan import seconds
from qquant.plan.asked import Asked
from qquant.plan.plan import Plan
from qquant.plan.seconds import Rates, probe
from qquant.recipe.changes import Flags
from qquant.solve import curvature, outside

CPU = torch.device("cpu")
ONE = Rates(1e9, 1e9, 1e9, 1e5)


def predicted(folder, *settings, rates=ONE, types=()):
    recipe, checkpoint = Asked(str(folder), "demo", flags=Flags(settings=settings, types=types)).open()
    return seconds.seconds(recipe, checkpoint, Plan.of(recipe, checkpoint), rates, CPU)


def test_counts_are_those_of_the_phases():
    assert seconds.BACKWARD == curvature.BACKWARD
    assert len(sanity.QUESTIONS) == seconds.ANSWERS
    assert seconds.TABLE_ROWS == outside.ROWS


def test_work_follows_the_recipe(demo):
    whole = predicted(demo)
    assert list(whole) == ["curvature", "embedding and head", "quantize", "check", "answer"]
    assert "embedding and head" not in predicted(
        demo,
        "artifacts.gguf-q8_0.solver=ggml",
        "artifacts.gguf-q4_0.solver=ggml",
        "artifacts.gguf-q4_0.propagate=false",
    )
    assert predicted(demo, "checks.windows=80")["check"] == pytest.approx(2 * whole["check"])
    assert predicted(demo, "calibration.samples=48")["curvature"] == pytest.approx(whole["curvature"] / 2)
    assert "curvature" not in predicted(demo, "calibration.objective=output")
    assert "answer" not in predicted(demo, "checks.answer_length=0")
    assert predicted(demo, "artifacts.gptq-int4.propagate=false")["quantize"] < whole["quantize"]
    assert predicted(demo, "artifacts.*.sweeps=0")["quantize"] < whole["quantize"]
    assert predicted(demo, types=("q8_0",))["check"] == pytest.approx(whole["check"] / 3), "two models instead of six"


def test_a_machine_twice_as_fast_takes_half(demo):
    twice = Rates(2e9, 2e9, 2e9, 2e5)
    assert sum(predicted(demo, rates=twice).values()) == pytest.approx(sum(predicted(demo).values()) / 2)


def test_the_probe_is_short_and_sees_a_slower_machine(demo, monkeypatch):
    _, checkpoint = Asked(str(demo), "demo").open()
    began = time.perf_counter()
    rates = probe(checkpoint, CPU)
    assert time.perf_counter() - began < 5
    assert rates.forward > 1e7
    assert rates.elements > 1e6
    assert rates.small > 1e2
    real = seconds._a_second
    monkeypatch.setattr(seconds, "_a_second", lambda step, device: real(lambda: [step() for _ in range(4)], device))
    slower = probe(checkpoint, CPU)
    assert slower.exact < 0.7 * rates.exact
