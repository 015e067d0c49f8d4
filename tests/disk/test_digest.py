"""The sha256 of files, read in pieces."""

import hashlib
import signal
import tracemalloc
from pathlib import Path
from threading import Event, Timer

import pytest

from qquant.artifact.behind import Beginning
from qquant.disk import digest


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 14, 30])
def test_a_file_of_any_number_of_pieces_is_read_whole(tmp_path, monkeypatch, size):
    monkeypatch.setattr(digest, "PIECE", 7)
    content = bytes(range(size))
    (tmp_path / "file").write_bytes(content)
    assert digest.sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    for stops in ([size], [size // 2, size // 2, size], [100]):
        beginning = Beginning()
        for stop in stops:
            beginning.read(tmp_path / "file", stop)
            assert beginning.bytes == min(stop, size)
        assert beginning.digest.hexdigest() == hashlib.sha256(content).hexdigest()


def test_who_is_told_to_stop_has_read_a_beginning(tmp_path):
    (tmp_path / "file").write_bytes(b"weights")
    stop = Event()
    stop.set()
    read = digest.digest_of(tmp_path / "file", stop)
    assert read.hexdigest() == hashlib.sha256().hexdigest()


@pytest.fixture
def started(monkeypatch):
    """The processes that hash."""
    started, start = [], digest.subprocess.Popen
    monkeypatch.setattr(
        digest.subprocess, "Popen", lambda *what, **how: started.append(start(*what, **how)) or started[-1]
    )
    return started


@pytest.mark.parametrize("name", ["file", "-c", "with 'quotes' and\nlines"])
def test_a_process_of_its_own_says_the_same(tmp_path, monkeypatch, started, name):
    monkeypatch.chdir(tmp_path)
    path, content = Path(name), bytes(range(256)) * 4000
    path.write_bytes(content)
    assert digest.sha256_apart(path, Event()) == hashlib.sha256(content).hexdigest()
    assert [child.returncode for child in started] == [0]


def test_who_can_start_no_process_hashes_by_itself(tmp_path, monkeypatch, started):
    path = tmp_path / "file"
    path.write_bytes(b"weights")
    monkeypatch.setattr(digest, "PROGRAM", "raise SystemExit(3)")
    assert digest.sha256_apart(path, Event()) == hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(digest.sys, "executable", str(tmp_path / "nothing"))
    assert digest.sha256_apart(path, Event()) == hashlib.sha256(b"weights").hexdigest()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        digest.sha256_apart(path, Event())


def test_a_process_that_nobody_waits_for_is_ended(tmp_path, monkeypatch, started):
    stop = Event()
    monkeypatch.setattr(digest, "PROGRAM", "import time; time.sleep(60)")
    Timer(0.3, stop.set).start()
    assert digest.sha256_apart(tmp_path, stop) == ""
    assert [child.returncode for child in started] == [-signal.SIGKILL]


def test_a_small_file_takes_little_memory(tmp_path):
    """Every thread that hashes had 16 MB of its own, for a file of a kilobyte as well; a plan says nothing of these."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    for read in (lambda: digest.sha256_of(path), lambda: Beginning().read(path, 1000)):
        tracemalloc.start()
        read()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100_000
