"""The harness of `make torture`, small: builds and what follows them, killed at every place and starved of everything."""

import json
import subprocess
import sys

import pytest

from tests.worlds import ROOT


def torture(*arguments, module="tests.torture"):
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["violations"] == [], found
    return found


@pytest.fixture(scope="module")
def tortured():
    return torture("sample", 14)


def test_builds_that_are_killed(tortured):
    """Every named place once, and a random time; 200 under `slow`, 1,000 by `make torture`."""
    assert tortured["builds"] == 14
    assert tortured["kills by place"] >= 13
    assert 13 <= tortured["named places"] <= 14


@pytest.mark.slow
def test_builds_that_are_killed_200_times():
    found = torture("kill", 200, 1)
    assert found["builds"] == 200
    assert min(found[f"kills by {way}"] for way in ("place", "time", "call")) > 50


def test_calls_that_fail_one_after_another(tortured):
    """Some of 800 calls; every tenth under `slow`, every single one by `make torture`."""
    assert tortured["ENOSPC: calls"] > 500
    assert tortured["ENOSPC: status 75"] >= 1


@pytest.mark.slow
def test_every_tenth_call_fails():
    torture("calls", 10)


@pytest.mark.slow
def test_commands_after_a_build_are_killed_and_starved():
    """check, publish, sign, verify, and publish and patch at a hub."""
    found = torture(10, module="tests.torture_release")
    assert min(found[f"{name}: calls"] for name in ("check", "publish", "sign")) >= 5


def test_a_disk_that_is_full(tortured):
    if "full: status 75" not in tortured:
        pytest.skip("mounting a small disk needs root on Linux")
    assert tortured["full: status 75"] == 2


def test_eight_builds_at_once(tortured):
    assert tortured["own folders"] == 8
    assert tortured["one folder: 0 9 9 9 9 9 9 9"] == 1
