"""Predicted seconds: what they count is what the phases do, and rates are those of the machine."""

import time
from types import SimpleNamespace

import pytest
import torch

from qquant import reference
from qquant.checks import sanity
from qquant.plan import machine, seconds
from qquant.plan.asked import Asked
from qquant.plan.plan import Plan
from qquant.plan.seconds import Rates, probe
from qquant.progress import Quiet
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


def test_more_ranks_share_the_work(demo):
    """What all need stays; what is dealt shrinks; nobody is slower beside others."""
    recipe, checkpoint = Asked(str(demo), "demo").open()
    plan = Plan.of(recipe, checkpoint)
    by_world = [seconds.seconds(recipe, checkpoint, plan, ONE, CPU, world) for world in (1, 2, 4, 8)]
    assert {found["curvature"] for found in by_world} == {by_world[0]["curvature"]}
    for phase in ("quantize", "check", "answer"):
        told = [found[phase] for found in by_world]
        assert told == sorted(told, reverse=True)
        assert told[1] < told[0]
    assert by_world[1]["check"] == pytest.approx(by_world[0]["check"] / 2)
    costs = {artifact.name: seconds.solving(checkpoint, plan, CPU, artifact) for artifact in plan.artifacts}
    assert costs["awq"] > costs["gptq-int4"] > costs["gptq-int8"], "scales are searched; no stream of its own"
    dealt = seconds.shares(checkpoint, plan, CPU, 2)
    assert sorted(artifact.name for hand in dealt for artifact in hand) == sorted(a.name for a in plan.artifacts)


def test_a_machine_is_remembered_by_device_and_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.measured(CPU) is None
    found = machine.Machine(machine.SCHEMA, "cpu", 1, {"quantize": 0.5, "check": 3.0})
    path = machine.keep(found, CPU)
    assert path.parent == tmp_path / "qquant"
    assert machine.measured(CPU) == found
    assert found.foreseen({"quantize": 10.0, "slices": 2.0, "curvature": 7.0}) == {
        "quantize": 5.0,
        "slices": 6.0,
        "curvature": 7.0,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert machine.measured(CPU) is None
    finally:
        torch.set_num_threads(threads)
    path.write_text(path.read_text().replace("0.5", '"much"'))
    assert machine.measured(CPU) is None


def test_the_reference_build_measures_every_phase(monkeypatch):
    """On a fake clock on which every step takes two seconds, and every count is one second."""
    progress, steps = Quiet(), iter(range(0, 10**6, 2))
    monkeypatch.setattr("qquant.progress.time", SimpleNamespace(monotonic=lambda: next(steps)))
    monkeypatch.setattr(reference.seconds, "seconds", lambda *_: {"curvature": 1.0, "check": 4.0, "slices": 1.0})

    def build(recipe, checkpoint, plan, out, device, clock):
        assert [artifact.name for artifact in plan.artifacts] == list(reference.ONLY)
        assert recipe.calibration.samples == 32
        for phase, done in (("curvature", 0), ("curvature", 1), ("quantize", 1), ("check", 1)):
            clock.advance(phase, done, 1)

    monkeypatch.setattr(reference.pipeline, "build", build)
    assert reference.measure(CPU, progress).factors == {"curvature": 4.0, "check": 0.5}
