"""Who holds an output folder: the living keep it, the provably dead lose it, and what a killed write left is no stranger."""

import json
import os
import time

import pytest

from qquant.disk import lock
from qquant.disk.output import claim
from qquant.errors import EnvironmentMissingError, LockedError, UsageError
from qquant.processes import start_of


def owner(**changes):
    return lock.identity() | changes


@pytest.mark.parametrize(
    ("left", "free"),
    [
        (b"", True),
        (b"nonsense", True),
        (json.dumps(owner(pid=2**22 + 5, start="1")).encode(), True),
        (json.dumps(owner(pid=os.getppid(), start="1")).encode(), True),  # the number was used again
        (json.dumps(owner(pid=os.getppid(), boot="another")).encode(), True),
        (json.dumps(owner(pid=os.getppid(), start=start_of(os.getppid()))).encode(), False),
        (json.dumps(owner(host="elsewhere")).encode(), True),  # its beat stands still
    ],
    ids=["empty", "nonsense", "no-process", "number-used-again", "earlier-boot", "alive", "elsewhere-and-still"],
)
def test_a_lock_is_taken_over_from_the_provably_dead(tmp_path, monkeypatch, left, free):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    (tmp_path / "out" / ".partial").mkdir(parents=True)
    (tmp_path / "out" / ".partial" / "lock").write_bytes(left)
    if free:
        with claim(tmp_path / "out"):
            assert json.loads((tmp_path / "out" / ".partial" / "lock").read_bytes())["pid"] == os.getpid()
    else:
        with (
            pytest.raises(LockedError, match=rf"another build is writing to it \(process {os.getppid()} on "),
            claim(tmp_path / "out"),
        ):
            pass


def test_a_lock_of_another_host_that_beats_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    path = tmp_path / "out" / ".partial" / "lock"
    path.parent.mkdir(parents=True)
    path.write_bytes(json.dumps(owner(host="elsewhere")).encode())
    real = time.sleep
    monkeypatch.setattr(
        lock.time, "sleep", lambda s: (path.write_bytes(json.dumps(owner(host="elsewhere", beat=9)).encode()), real(s))
    )
    with pytest.raises(LockedError, match="on elsewhere"), claim(tmp_path / "out"):
        pass


def test_the_owner_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with claim(tmp_path / "out") as partial:
        time.sleep(0.5)
        assert json.loads((partial / "lock").read_bytes())["beat"] > 1


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with pytest.raises(EnvironmentMissingError, match="cannot be locked"), claim(tmp_path / "out"):
        pass


def test_a_temporary_file_of_a_killed_write_is_no_stranger(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".report.json.tmp").write_text("half")
    (tmp_path / "out" / ".partial.done").mkdir()
    with claim(tmp_path / "out"):
        pass
    assert not (tmp_path / "out" / ".partial.done").exists()
    (tmp_path / "out" / ".thesis.tmp").write_text("mine")
    with pytest.raises(UsageError, match="was not made by qquant"), claim(tmp_path / "out"):
        pass
