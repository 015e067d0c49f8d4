"""Predicted seconds: what they count is what the phases do, and rates are those of the machine."""

import json
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from qquant import ranks, reference
from qquant.artifact import timings
from qquant.checks import sanity
from qquant.cli import cli
from qquant.devices import policy
from qquant.families import decoder
from qquant.plan import machine, seconds
from qquant.plan.asked import Asked
from qquant.plan.plan import Plan
from qquant.plan.seconds import Rates, probe
from qquant.progress import Quiet
from qquant.recipe import parse
from qquant.recipe.changes import Flags
from qquant.solve import outside
from qquant.source.checkpoint import Checkpoint
from tests.bench.memory import write_hollow

CPU = torch.device("cpu")
ONE = Rates(1e9, 1e9, 1e9, 1e9, 1e9, 1e5, 1e9, 1e9)


def predicted(folder, *settings, rates=ONE, types=()):
    recipe, checkpoint = Asked(str(folder), "demo", flags=Flags(settings=settings, types=types)).open()
    return seconds.seconds(recipe, checkpoint, Plan.of(recipe, checkpoint), rates, CPU)


def test_counts_are_those_of_the_phases():
    assert seconds.TABLE_ROWS == outside.ROWS
    assert seconds.HEAD_ROWS == decoder.HEAD_ROWS
    assert seconds.HEAD_TOKENS == policy(CPU).head_tokens
    together = [group for group in sanity.GROUPS if len(group.prompts) > 1]
    assert len(together) < seconds.WRITTEN <= len(sanity.GROUPS)


def test_work_follows_the_recipe(demo):
    whole = predicted(demo)
    phases = ["read", "curvature", "embedding and head", "quantize", "write", "load", "check", "answer"]
    assert list(whole) == phases
    assert "embedding and head" not in predicted(
        demo,
        "artifacts.gguf-q8_0.solver=ggml",
        "artifacts.gguf-q4_0.solver=ggml",
        "artifacts.gguf-q4_0.propagate=false",
    )
    windows = [
        predicted(demo, f"checks.windows={count}", "checks.max_windows=null")["check"] for count in (40, 80, 120)
    ]
    assert windows[2] - windows[1] == pytest.approx(windows[1] - windows[0])
    samples = [predicted(demo, f"calibration.samples={count}")["curvature"] for count in (32, 64, 96)]
    assert samples[2] - samples[1] == pytest.approx(samples[1] - samples[0], rel=0.1)
    assert "curvature" not in predicted(demo, "calibration.objective=output")
    assert "answer" not in predicted(demo, "checks.answer_length=0")
    assert predicted(demo, "artifacts.gptq-int4.propagate=false")["quantize"] < whole["quantize"]
    assert predicted(demo, "artifacts.*.sweeps=0")["quantize"] < whole["quantize"]
    assert predicted(demo, types=("q8_0",))["check"] == pytest.approx(whole["check"] / 3, rel=0.1), (
        "two models, not six"
    )


def test_a_machine_twice_as_fast_takes_half(demo):
    twice = Rates(*(2 * rate for rate in asdict(ONE).values()))
    assert sum(predicted(demo, rates=twice).values()) == pytest.approx(sum(predicted(demo).values()) / 2)


def test_the_probe_is_short_and_sees_a_slower_machine(demo, monkeypatch):
    """By the processor's clock: other programs take turns with the tests."""
    _, checkpoint = Asked(str(demo), "demo").open()
    monkeypatch.setattr(seconds, "time", SimpleNamespace(perf_counter=time.process_time))
    began = time.process_time()
    rates = probe(checkpoint, CPU)
    assert time.process_time() - began < 5
    assert all(rate > 0 for rate in asdict(rates).values())
    assert rates.large < rates.elements
    real = seconds._a_second
    monkeypatch.setattr(seconds, "_a_second", lambda step, device: real(lambda: [step() for _ in range(16)], device))
    slower = probe(checkpoint, CPU)
    assert slower.exact < 0.7 * rates.exact


@pytest.mark.parametrize(("shape", "side"), [((64, 64), 256), ((600, 1100), 600), ((2200, 2100), 2048)])
def test_what_is_factored_is_as_wide_as_the_checkpoint(shape, side, monkeypatch):
    """Half as wide takes twice the seconds a multiplication, so that a layer of 7B was foreseen a third too slow."""
    seen, real = [], torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: seen.append(len(matrix)) or real(matrix))
    monkeypatch.setattr(seconds, "_a_second", lambda step, device: step() is not None)
    seconds.probe_of(shape, torch.float32, CPU)
    assert seen == [side]


def test_more_ranks_share_the_work(demo):
    """What all need stays; what is dealt shrinks; nobody is slower beside others."""
    recipe, checkpoint = Asked(str(demo), "demo").open()
    plan = Plan.of(recipe, checkpoint)
    by_world = [seconds.seconds(recipe, checkpoint, plan, ONE, CPU, world) for world in (1, 2, 4, 8)]
    for phase in ("curvature", "quantize", "check", "answer"):
        told = [found[phase] for found in by_world]
        assert told == sorted(told, reverse=True)
        assert told[1] < told[0]
    assert len({found["read"] for found in by_world}) == 1
    alone = Plan.of(recipe, checkpoint, ("gptq-int4",))
    one, both = (seconds.seconds(recipe, checkpoint, alone, ONE, CPU, world)["quantize"] for world in (1, 2))
    assert both == pytest.approx(one / (2 * ranks.GAIN)), "one artifact by both together"
    costs = {artifact.name: seconds.solving(checkpoint, plan, CPU, artifact) for artifact in plan.artifacts}
    assert costs["awq"] > costs["gptq-int4"] > costs["gptq-int8"], "scales are searched; no stream of its own"
    dealt = seconds.shares(checkpoint, plan, CPU, 2)
    assert sorted(artifact.name for hand in dealt for artifact in hand) == sorted(a.name for a in plan.artifacts)


def test_artifacts_are_dealt_among_gpus_by_what_they_took_there(tmp_path):
    """A block of the 7B shape takes 1.6 s for GPTQ-Int4 and about 2.3 for GPTQ-Int8, whose streams are float32 (tests/bench/README.md)."""
    checkpoint, gpu = Checkpoint.open(write_hollow(tmp_path / "7B", "7B", 1)), torch.device("cuda")
    entries = ["gptq-int4, format: gptq, bits: 4", "gptq-int8, format: gptq, bits: 8", "awq, format: awq"]
    entries += [f"{name}, format: gguf, type: {name}, solver: ggml" for name in ("q4_k_m", "q8_0")]
    text = (
        "version: 1\nname: all\ncalibration: {sources: [{bundled: books-en}], samples: 128, length: 2048}\nartifacts:\n"
    )
    plan = Plan.of(parse(text + "".join(f"  - {{name: {entry}}}\n" for entry in entries)), checkpoint)
    costs = {artifact.name: seconds.solving(checkpoint, plan, gpu, artifact) for artifact in plan.artifacts}
    hands = [{artifact.name for artifact in hand} for hand in seconds.shares(checkpoint, plan, gpu, 2)]
    assert {"gptq-int4", "gptq-int8"} in hands, "AWQ's takes longest"
    assert costs["gptq-int8"] / costs["gptq-int4"] == pytest.approx(2.3 / 1.6, rel=0.25)


def test_a_machine_is_remembered_by_device_and_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.measured(CPU) is None
    found = machine.Machine(machine.SCHEMA, "cpu", 1, {"quantize": 0.5, "check": 3.0}, {"256": ONE})
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


def test_a_measured_machine_is_foreseen_by_the_rates_that_were_measured(demo, monkeypatch):
    """Not by those of another second, on which it may be half as fast; of products in between by the widths beside them."""
    _, checkpoint = Asked(str(demo), "demo").open()
    found = {"64": Rates(1e9, *(8 * [1e9])), "1024": Rates(1.6e10, *(8 * [1e9]))}
    known = machine.Machine(machine.SCHEMA, "cpu", 1, {}, found)
    monkeypatch.setattr(machine, "typical", lambda _: (900, 256))
    assert known.rates_for(checkpoint).forward == pytest.approx(4e9)
    for width, forward in ((32, 1e9), (64, 1e9), (1024, 1.6e10), (5120, 1.6e10)):
        monkeypatch.setattr(machine, "typical", lambda _, width=width: (width, 9000))
        assert known.rates_for(checkpoint).forward == pytest.approx(forward)
    assert known.rates_for(SimpleNamespace(dtype="F16")).forward == pytest.approx(1e9), "computed in float32"
    monkeypatch.setattr("qquant.plan.machine.measured", lambda _: known)
    monkeypatch.setattr(seconds, "probe", lambda *_: pytest.fail("the machine was measured"))
    result = CliRunner().invoke(cli, ["plan", str(demo), "--recipe", "demo", "--time", "--json"])
    assert json.loads(result.stdout)["seconds"]


def test_the_reference_build_measures_every_phase(monkeypatch):
    """On a fake clock on which every step takes two seconds, and every count is one second."""
    progress, steps = Quiet(), iter(range(0, 10**6, 2))
    monkeypatch.setattr("qquant.progress.time", SimpleNamespace(monotonic=lambda: next(steps)))
    monkeypatch.setattr(reference.seconds, "seconds", lambda *_: {"curvature": 1.0, "check": 4.0, "slices": 1.0})

    def build(recipe, checkpoint, plan, out, device, clock):
        assert [artifact.name for artifact in plan.artifacts] == list(reference.ONLY)
        assert recipe.calibration.samples == 16
        for phase, done in (("curvature", 0), ("curvature", 1), ("quantize", 1), ("check", 1)):
            clock.advance(phase, done, 1)

    monkeypatch.setattr(reference.pipeline, "build", build)
    monkeypatch.setattr(reference, "_probed", lambda _: {"256": ONE})
    assert reference.measure(CPU, progress).factors == {"curvature": 4.0, "check": 0.5}


def test_what_was_foreseen_stands_beside_what_it_took(tmp_path):
    timings.write({"a": {"block 0": 1.5}}, tmp_path)
    whole = {"seconds": timings.Foretold(12.0, 10.0), "peak_bytes": timings.Foretold(5e8, None)}
    timings.foresee(tmp_path, {"quantize": 8.0004, "report": 1.0}, {"quantize": 7.0}, whole)
    assert json.loads((tmp_path / "timings.json").read_text()) == {
        "schema": "qquant-timings-1",
        "artifacts": {"a": {"block 0": 1.5}},
        "phases": {"quantize": {"took": 8.0, "foreseen": 7.0}, "report": {"took": 1.0}},
        "seconds": {"took": 12.0, "foreseen": 10.0},
        "peak_bytes": {"took": 5e8},
    }
