"""Builds that cannot fit are refused before they begin, with what would fit."""

from dataclasses import replace

import pytest

from qquant import pipeline, recipe
from qquant.cli import main
from qquant.errors import EnvironmentMissingError
from qquant.plan import capacity
from qquant.plan.capacity import SURE, Free, lacking
from qquant.plan.plan import Plan
from qquant.source.checkpoint import Checkpoint
from tests.worlds.builds import CPU, quiet

GB = 1 << 30


@pytest.fixture(scope="module")
def asked(demo):
    """The demo's recipe, its checkpoint and plan."""
    known, checkpoint = recipe.load("demo"), Checkpoint.open(demo)
    return known, checkpoint, Plan.of(known, checkpoint)


def test_what_fits_for_sure_or_perhaps_is_not_refused(asked):
    need = asked[2].needs["cpu"].least
    assert lacking(*asked, Free("cpu", need, need)) is None
    assert lacking(*asked, Free("cpu", int(SURE * need) + 1, int(SURE * need) + 1)) is None
    assert "GB of memory at the least" in lacking(*asked, Free("cpu", int(SURE * need) - 1, int(SURE * need) - 1))


def test_what_would_fit_is_said(asked):
    need = asked[2].needs["cuda"].least
    line = lacking(*asked, Free("cuda", int(0.5 * need), 64 * GB))
    assert "the GPU" in line
    assert "--device cpu" in line
    assert "\n" not in line
    assert "Nothing less" in lacking(*asked, Free("cuda", 1, 1))
    assert "--device cpu" not in lacking(*asked, Free("cuda", 1, 1))


def test_a_host_that_is_too_small_for_a_gpu_build_is_refused(asked):
    assert "the host's memory" in lacking(*asked, Free("cuda", 80 * GB, 1 << 20))


@pytest.fixture
def nearly_full(monkeypatch):
    """A machine with 100 MB."""
    monkeypatch.setattr(capacity, "free_memory", lambda device: 100 << 20)
    monkeypatch.setattr(capacity, "host_memory", lambda: 100 << 20)


def test_a_build_is_refused_before_it_begins(asked, tmp_path, nearly_full):
    known, checkpoint, plan = asked
    with pytest.raises(EnvironmentMissingError, match="0.1 GB are free"):
        pipeline.build(known, checkpoint, plan, tmp_path / "out", CPU, quiet)
    assert not (tmp_path / "out").exists()


def test_plan_refuses_for_the_device_that_is_named(demo, capsys, nearly_full):
    for device, status in (("cpu", "6"), ("auto", "0")):
        with pytest.raises(SystemExit, match=status):
            main(["plan", str(demo), "--recipe", "demo", "--device", device])
    assert "GB are free" in capsys.readouterr().err


def test_no_more_is_needed_of_a_gpu_where_all_has_given_way(asked):
    need = asked[2].needs["cuda"]
    assert need.least <= need.device
    assert replace(need, step="") != need, "the step is said"
