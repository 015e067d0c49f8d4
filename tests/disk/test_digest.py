"""The sha256 of files, read in pieces."""

import hashlib
import tracemalloc
from threading import Event

import pytest

from qquant.artifact.draft import Beginning
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
