"""Slices of two releases against each other: kept as evidence, compared in pairs, gated."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from qquant.calibration.slices import LENGTH, Slice, Sliced
from qquant.checks import evidence, gate, regression, slice_changes
from qquant.checks.evidence import Evidence, Facts, SliceMeans
from qquant.checks.fidelity import Fidelity
from qquant.checks.slices import SliceReading
from qquant.errors import InputError
from qquant.report.record import Verdict

FACTS = Facts("wiki", "a" * 64, 512, "llama.cpp", "b" * 64, "c" * 64)


def drawn(rng, mean, windows=20):
    return mean * np.exp(rng.normal(0, 0.3, windows))


def release(rng, **times):
    """Slices of a release that lost `times` of what a harmless one does, with the same hard and easy windows."""
    return {name: SliceMeans(name, drawn(rng, 0.02 * factor)) for name, factor in times.items()}


def later(then, rng, **times):
    """The next release on the same windows."""
    return {
        name: SliceMeans(old.tokens_sha256, old.kl * times.get(name, 1.0) * np.exp(rng.normal(0, 0.02, len(old.kl))))
        for name, old in then.items()
    }


def fidelity(windows=4, tokens=6):
    kl = torch.rand(windows, tokens, dtype=torch.float64) / 10
    right = kl < 0.05
    return Fidelity(kl + 1, torch.ones_like(kl), kl, right, -kl, right, right)


def test_slices_are_kept_as_evidence_and_read_back(tmp_path):
    then = release(np.random.default_rng(0), English=1, Thai=2)
    path, plain, whole = tmp_path / "e.safetensors", tmp_path / "p.safetensors", fidelity()
    evidence.write(path, whole, FACTS, then)
    evidence.write(plain, whole, FACTS)
    read = evidence.read(path)
    assert list(read.slices) == ["English", "Thai"]
    assert (read.slices["Thai"].kl == then["Thai"].kl).all()
    assert read.slices["Thai"].tokens_sha256 == "Thai"
    assert evidence.read(plain).slices == {}
    assert read.digest != evidence.read(plain).digest
    assert b'"slices"' not in plain.read_bytes()  # as earlier versions wrote it
    broken = path.read_bytes().replace(b'\\"windows\\": 20', b'\\"windows\\": 21', 1)
    assert broken != path.read_bytes()
    path.write_bytes(broken)
    with pytest.raises(InputError, match=r"damaged evidence: slices is float64 \[40\], not float64 \[41\]"):
        evidence.read(path)


def test_what_is_kept_is_named_by_the_tokens_that_were_read():
    short = np.arange(3 * LENGTH, dtype=np.int32).reshape(3, LENGTH)
    text = Sliced((Slice("English", "language", 2), Slice("Thai", "language", 1)), short, np.zeros((1, 1024), np.int32))
    readings = [SliceReading(name, "language", fidelity(2)) for name in ("English", "Thai", "positions 0 to 1,024")]
    kept = slice_changes.means(readings, text)
    assert len({one.tokens_sha256 for one in kept.values()}) == 3
    other = slice_changes.means(readings, replace(text, short=np.concatenate([short[:2], short[2:] + 1])))
    assert kept["English"].tokens_sha256 == other["English"].tokens_sha256
    assert kept["Thai"].tokens_sha256 != other["Thai"].tokens_sha256
    assert kept["Thai"].kl == pytest.approx(readings[1].fidelity.kl.mean(1))


def compared(then, now):
    means = {name: np.full(4, 0.02) for name in evidence.LOSSES}
    nothing = np.zeros((4, 2))
    both = [Evidence(FACTS, nothing, nothing, nothing > 0, means, slices) for slices in (then, now)]
    return [(change.loss, change.outcome) for change in regression._changes("a", *both)][3:]


def test_compare_names_the_slice_that_grew():
    rng = np.random.default_rng(0)
    then = release(rng, English=1, French=1.2, Thai=2)
    assert compared(then, then) == []
    assert compared(then, later(then, rng, Thai=1.2)) == [("KL divergence, Thai", "worse")]
    assert ("KL divergence, French", "better") in compared(then, later(then, rng, French=0.5))
    (only,) = compared(then, later(then, rng))
    assert only[1] == "inconclusive"
    other = {name: replace(one, tokens_sha256="other") for name, one in later(then, rng, Thai=9).items()}
    assert compared(then, other) == []


@pytest.mark.parametrize(
    ("times", "tolerance", "outcome"),
    [(1.0, 0.05, "pass"), (1.5, 0.05, "fail"), (1.06, 0.05, "inconclusive"), (1.5, 1.0, "pass"), (0.5, 0.05, "pass")],
)
def test_the_gate_against_the_earlier_release(times, tolerance, outcome):
    rng = np.random.default_rng(0)
    then = release(rng, **{f"language {index}": 1 for index in range(18)}, Thai=2)
    verdict = slice_changes.judge(then, later(then, rng, Thai=times), tolerance)
    assert verdict.outcome == outcome
    (report,) = verdict.gates
    assert report.limit == 1 + tolerance
    if outcome != "pass":
        assert verdict.reasons[0].startswith("worst slice against the earlier release: Thai has 1.")
        assert gate.with_gates(Verdict("pass"), verdict).outcome == outcome


def test_nothing_to_compare_is_no_gate_and_nothing_changed_passes():
    rng = np.random.default_rng(0)
    then = release(rng, English=1, Thai=2)
    assert slice_changes.judge({}, then, 0.05) is None
    assert slice_changes.judge(then, {}, 0.05) is None
    assert slice_changes.judge(then, then, 0.0).outcome == "pass"
    few = {"Thai": SliceMeans("Thai", np.full(20, 1e-7))}
    assert slice_changes.judge(few, {"Thai": SliceMeans("Thai", np.full(20, 3e-7))}, 0.05).outcome == "pass"


def test_releases_at_the_tolerance_fail_as_seldom_as_promised():
    rng = np.random.default_rng(1)
    failed, runs = 0, 60
    for _ in range(runs):
        then = {str(index): SliceMeans("", drawn(rng, 0.02, 16)) for index in range(18)}
        now = {name: SliceMeans("", 1.05 * old.kl * np.exp(rng.normal(0, 0.1, 16))) for name, old in then.items()}
        failed += slice_changes.judge(then, now, 0.05).outcome == "fail"
    assert failed <= 2


def test_reports_of_a_check_are_compared_by_slice(built, tmp_path, monkeypatch):
    """From the check to the command: the evidence has the slices, and the command shows the one that grew."""
    from qquant import pipeline
    from qquant.checks import kept
    from qquant.recipe import Checks
    from tests.checks.test_fidelity import check

    record = kept.record
    factor = 1.0

    def with_slices(out, measured, text, checkpoint):
        rng = np.random.default_rng(0)
        readings = {"Thai": SliceMeans("t", drawn(rng, 0.02) * factor)}
        record(out, replace(measured, slices=dict.fromkeys(measured.main, readings)), text, checkpoint)

    monkeypatch.setattr(pipeline.kept, "record", with_slices)
    check(built, Checks(windows=4, length=32), out=tmp_path / "a")
    factor = 2.0
    check(built, Checks(windows=4, length=32), out=tmp_path / "b")
    changes = {change.loss: change.outcome for change in regression.compare(tmp_path / "a", tmp_path / "b")}
    assert changes["KL divergence, Thai"] == "worse"
    assert json.dumps([vars(change) for change in regression.compare(tmp_path / "b", tmp_path / "a")])
