"""Verdicts: exactness, levels by simulation, order of gates, waivers, and evidence that says the same later."""

import dataclasses
import datetime
import math

import numpy as np
import pytest
import torch

from qquant.checks import evidence, gate, statistics
from qquant.checks.fidelity import Fidelity
from qquant.errors import InputError, UsageError
from qquant.recipe import Gates, Waiver
from tests.worlds.hub_release import write_build


def skewed(rng, mean, count=40):
    """Window means as KL divergence has them: positive, with a long tail."""
    return rng.gamma(4.0, mean / 4.0, count)


def test_student_against_published_quantiles():
    for p, degrees, t in [
        (0.95, 1, 6.3138),
        (0.95, 2, 2.92),
        (0.975, 5, 2.5706),
        (0.99, 10, 2.7638),
        (0.995, 11, 3.1058),
    ]:
        assert statistics.student(t, degrees) == pytest.approx(p, abs=2e-5)
        assert statistics.student(-t, degrees) == pytest.approx(1 - p, abs=2e-5)
        assert statistics.student_quantile(p, degrees) == pytest.approx(t, abs=1e-3)


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_interval_of_hardly_any_spread_is_a_number():
    windows = np.zeros(120)
    windows[:2] = -1
    low, high = statistics.interval(windows)
    assert low < windows.mean() < high
    assert not math.isnan(low)


@pytest.mark.parametrize(("to_wrong", "to_right"), [(0, 0), (6, 6), (12, 0), (30, 10)])
def test_interval_of_flips_covers(to_wrong, to_right):
    rng = np.random.default_rng(8)
    count = 300
    draws = rng.multinomial(count, [to_wrong / count, to_right / count, 1 - (to_wrong + to_right) / count], 1000)
    truth = (to_right - to_wrong) / count
    bounds = [statistics.flips(int(wrong), int(right), count, 0.0)[1] for wrong, right, _ in draws]
    assert np.mean([low <= truth <= high for low, high in bounds]) >= 0.93


def test_mcnemar():
    assert statistics.mcnemar(0, 0) == 1
    assert statistics.mcnemar(5, 0) == pytest.approx(1 / 32)
    assert statistics.mcnemar(1, 1) == pytest.approx(0.75)
    assert statistics.mcnemar(8, 2) == pytest.approx(56 / 1024)


def test_nothing_differs_by_exactly_nothing():
    loss = statistics.measure_loss(np.zeros(40), 0.0)
    assert (loss.mean, loss.error, loss.detectable) == (0.0, 0.0, 0.0)
    assert statistics.decide({"kl": loss})[0] == "pass"
    assert statistics.interval(np.zeros(40)) == (0.0, 0.0)
    assert statistics.decide({"kl": statistics.measure_loss(np.full(40, 0.1), 0.0)})[0] == "fail"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(value):
    windows = np.full(20, 0.001)
    windows[7] = value
    assert statistics.decide({"kl": statistics.measure_loss(windows, 10.0)})[0] == "fail"


def test_one_window_decides_nothing():
    assert statistics.decide({"kl": statistics.measure_loss(np.array([0.5]), 0.1)})[0] == "inconclusive"


@pytest.mark.parametrize("count", [6, 40])
def test_error_rates_hold_at_the_limit(count):
    """A loss that is exactly its limit is called worse, or better, in at most 5 % of runs (7 % within simulation error)."""
    rng = np.random.default_rng(1)
    outcomes = [
        statistics.decide({"kl": statistics.measure_loss(skewed(rng, 0.05, count), 0.05)})[0] for _ in range(300)
    ]
    assert outcomes.count("fail") <= 0.07 * 300
    assert outcomes.count("pass") <= 0.085 * 300


def test_twice_the_limit_never_passes_and_half_of_it_does():
    rng = np.random.default_rng(2)
    worse = [statistics.decide({"kl": statistics.measure_loss(skewed(rng, 0.10), 0.05)})[0] for _ in range(100)]
    better = [statistics.decide({"kl": statistics.measure_loss(skewed(rng, 0.025), 0.05)})[0] for _ in range(100)]
    assert worse.count("fail") >= 95
    assert worse.count("pass") == 0
    assert better.count("pass") >= 95


def test_looking_more_often_asks_for_more_proof():
    rng = np.random.default_rng(3)
    loss = statistics.measure_loss(rng.normal(0.0435, 0.02, 40), 0.05)
    assert 0.01 < loss.p_within < 0.05
    assert statistics.decide({"kl": loss})[0] == "pass"
    assert statistics.decide({"kl": loss}, looks=5)[0] == "inconclusive"


def test_the_detectable_difference_is_detected():
    rng = np.random.default_rng(4)
    reach = statistics.measure_loss(rng.normal(0.0, 1.0, 4000), 0.0).detectable * math.sqrt(4000 / 40)
    found = [statistics.measure_loss(rng.normal(reach, 1.0, 40), 0.0).p_beyond <= 0.05 for _ in range(200)]
    assert 0.7 < np.mean(found) < 0.9


def test_interval_covers():
    rng = np.random.default_rng(5)
    bounds = [statistics.interval(skewed(rng, 1.0)) for _ in range(200)]
    assert 0.9 <= np.mean([low <= 1.0 <= high for low, high in bounds]) <= 0.99


# --- verdicts -----------------------------------------------------------------------------------------------------------


def means(nll=0.0, kl=0.0, top1=0.0, spread=0.1, count=40):
    rng = np.random.default_rng(6)
    noise = 1 + spread * rng.standard_normal(count)
    return {"nll": nll * noise, "kl": kl * noise, "top1": top1 * noise}


def test_no_gates_pass():
    assert gate.judge(Gates(), means(1, 1, 1)).outcome == "pass"


@pytest.mark.parametrize(
    ("gates", "word"),
    [
        (Gates(perplexity_ratio=1.05), "perplexity ratio 1.1"),
        (Gates(kl_divergence=0.01), "mean KL divergence 0.0"),
        (Gates(top1_agreement=0.95), "top-1 agreement 0.8"),
    ],
)
def test_each_gate_fails_by_name(gates, word):
    verdict = gate.judge(gates, means(0.1, 0.02, 0.12))
    assert verdict.outcome == "fail"
    assert verdict.reasons[0].startswith(word)
    assert "95 % interval" in verdict.reasons[0]
    assert gate.judge(gates, means(0.01, 0.005, 0.01)).outcome == "pass"


def test_intervals_are_in_the_units_of_the_recipe():
    (found,) = gate.judge(Gates(top1_agreement=0.9), means(top1=0.05)).gates
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(0.95, abs=0.01)
    assert found.limit == pytest.approx(0.9)


def test_intervals_of_shares_are_shares():
    few = np.array([0.0] * 39 + [0.02])
    most = Gates(top1_agreement=0.9, kl_divergence=0.1)
    for losses in (few, 1 - few):
        kl, top1 = gate.judge(most, {"nll": losses, "kl": losses, "top1": losses}).gates
        assert 0 <= top1.low <= top1.value <= top1.high <= 1
        assert 0 <= kl.low <= kl.value


def test_one_window_bounds_nothing():
    (found,) = gate.judge(Gates(perplexity_ratio=1.1), means(0.05, count=1)).gates
    assert (found.low, found.high) == (0.0, math.inf)
    assert found.outcome == "inconclusive"


def test_perplexity_does_not_judge_eight_bits_where_something_finer_does():
    gates = Gates(perplexity_ratio=1.0001, kl_divergence=0.01)
    noisy = means(0.0001, 0.005, 0.01) | {"nll": np.random.default_rng(0).normal(0.0001, 0.01, 40)}
    assert gate.judge(gates, noisy).outcome == "inconclusive"
    assert gate.judge(gates, noisy, eight_bit=True).outcome == "pass"
    assert gate.judge(Gates(perplexity_ratio=1.0001), noisy, eight_bit=True).outcome == "inconclusive"


def test_regression_against_an_earlier_release():
    gates = Gates(regression_vs="x")
    then = means(kl=0.02, top1=0.05)
    assert gate.judge(gates, then, then).outcome == "pass"
    assert gate.judge(gates, means(kl=0.019, top1=0.05), then).outcome == "pass"
    verdict = gate.judge(gates, means(kl=0.025, top1=0.05), then)
    assert verdict.outcome == "fail"
    assert "against the earlier release" in verdict.reasons[0]
    assert gate.judge(gates, means(), means()).outcome == "pass"


def test_waiver():
    gates = Gates(kl_divergence=0.01, waiver=Waiver(reason="one known layer", who="A. Person", until="2026-05-01"))
    failed = gate.judge(gates, means(kl=0.02))
    held = gate.waived(failed, gates, datetime.date(2026, 5, 1))
    assert held.outcome == "waived"
    assert held.reasons == failed.reasons
    assert "A. Person" in held.waiver
    assert "one known layer" in held.waiver
    ended = gate.waived(failed, gates, datetime.date(2026, 5, 2))
    assert ended.outcome == "fail"
    assert "has ended" in ended.reasons[-1]
    passed = gate.judge(gates, means(kl=0.001))
    assert gate.waived(passed, gates, datetime.date(2026, 1, 1)) == passed


# --- evidence -----------------------------------------------------------------------------------------------------------

FACTS = evidence.Facts(name="t", sha256="a", tokens_sha256="b", length=9, protocol="sliding", checkpoint="c")


def measured(seed=0, shape=(5, 13)):
    draw = torch.Generator().manual_seed(seed)
    base = torch.rand(shape, generator=draw, dtype=torch.float64) * 5
    nll = base + torch.randn(shape, generator=draw, dtype=torch.float64) * 0.1
    kl = torch.rand(shape, generator=draw, dtype=torch.float64).pow(4)
    same = torch.rand(shape, generator=draw) < 0.9
    return Fidelity(nll, base, kl, same, (-nll).exp() - (-base).exp(), same, same)


def test_evidence_says_the_same_later(tmp_path):
    found = measured()
    path = tmp_path / "evidence" / "a.safetensors"
    evidence.write(path, found, FACTS)
    back = evidence.read(path)
    for name, values in found.window_means().items():
        assert np.array_equal(back.means[name], values), name
    assert np.array_equal(back.same_top, found.same_top.numpy())
    assert np.allclose(back.kl, found.kl.numpy(), rtol=0.04, atol=1e-6)
    assert np.allclose(back.nll, (found.nll - found.nll_baseline).numpy(), rtol=0.06, atol=1e-5)
    assert back.facts == FACTS
    first = path.read_bytes()
    evidence.write(path, found, FACTS)
    assert path.read_bytes() == first


def test_evidence_is_small(tmp_path):
    path = tmp_path / "evidence" / "a.safetensors"
    evidence.write(path, measured(shape=(40, 255)), FACTS)
    assert path.stat().st_size / (40 * 255) < 2.35


def test_infinite_divergence_survives(tmp_path):
    found = measured()
    found.kl[2, 3] = math.inf
    evidence.write(tmp_path / "e" / "a.safetensors", found, FACTS)
    back = evidence.read(tmp_path / "e" / "a.safetensors")
    assert math.isinf(back.means["kl"][2])
    assert back.kl[2, 3] == pytest.approx(64.0)


def test_damaged_evidence_is_refused(tmp_path):
    path = tmp_path / "e" / "a.safetensors"
    evidence.write(path, measured(), FACTS)
    content = path.read_bytes()
    for bad in (content[:-7], b"", content.replace(b"qquant-evidence-1", b"qquant-evidence-9")):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=r"a\.safetensors"):
            evidence.read(path)


def test_report_without_evidence(tmp_path):
    with pytest.raises(UsageError, match=r"no report\.json"):
        evidence.of_report(tmp_path)
    with pytest.raises(UsageError, match="no evidence beside the report"):
        evidence.of_report(write_build(tmp_path / "build"))


def test_only_equal_texts_are_compared():
    with pytest.raises(InputError, match="protocol"):
        evidence.require_comparable(FACTS, dataclasses.replace(FACTS, protocol="llama.cpp"), "x")
