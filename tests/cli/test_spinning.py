"""Threads sleep soon where other programs want the cores, and are left as they are everywhere else."""

import subprocess
import sys

import pytest

from qquant.cli import spinning
from tests.worlds import importing


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`load(running)`: what the system says of threads that run, ours among them."""
    monkeypatch.setattr(spinning, "LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(spinning.os, "cpu_count", lambda: 16)

    def says(running):
        (tmp_path / "loadavg").write_text(f"4.00 3.44 2.62 {running}/105 15376\n")

    return says


@pytest.mark.parametrize(("running", "gives_way"), [(1, False), (2, False), (3, True), (40, True)])
def test_others_that_want_an_eighth_of_the_cores(load, running, gives_way):
    load(running)
    environment = {}
    spinning.give_way(environment)
    assert environment == ({"GOMP_SPINCOUNT": "1000"} if gives_way else {})


@pytest.mark.parametrize("own", spinning.OWN)
def test_what_the_user_said_stays(load, own):
    load(40)
    environment = {own: "ACTIVE"}
    spinning.give_way(environment)
    assert environment == {own: "ACTIVE"}


@pytest.mark.parametrize("text", [None, "", "1.0 1.0", "1 2 3 x/y 5", "1 2 3 4 5"])
def test_a_system_that_does_not_say(load, text):
    load(1)
    if text is None:
        spinning.LOAD.unlink()
    else:
        spinning.LOAD.write_text(text)
    environment = {}
    spinning.give_way(environment)
    assert not environment


def test_one_look_among_others_decides_nothing(load, monkeypatch):
    load(40)
    monkeypatch.setattr(spinning.time, "sleep", lambda _: load(1))
    environment = {}
    spinning.give_way(environment)
    assert not environment


def test_nothing_has_loaded_openmp_before_it_is_decided():
    program = "import sys, qquant.cli\nassert 'torch' not in sys.modules\nassert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, env=importing())
