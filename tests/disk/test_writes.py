"""Files that are written whole from pieces: their bytes in order, on the disk before they have their name, however little a call takes."""

import errno
import os
from pathlib import Path

import pytest

from qquant.disk import writes

PIECES = [b"head", memoryview(b"0123456789"), b"", bytearray(b"xyz"), b"\n"]
WHOLE = b"".join(PIECES)


@pytest.fixture
def calls(monkeypatch):
    """What is done to files, in order: the name of the call, and of the file or folder."""
    seen = []

    def path_of(which):
        return Path(os.readlink(f"/proc/self/fd/{which}")).name if isinstance(which, int) else Path(which).name

    for name in ("pwrite", "fsync", "rename"):
        inner = getattr(os, name)

        def watched(which, *rest, name=name, inner=inner):
            seen.append((name, path_of(which)))
            return inner(which, *rest)

        monkeypatch.setattr(os, name, watched)
    return seen


@pytest.mark.parametrize(
    "pieces", [PIECES, [WHOLE], [b""], [b"", WHOLE]], ids=["several", "one", "none", "empty-first"]
)
def test_a_file_is_its_pieces_in_order(tmp_path, pieces):
    path = tmp_path / "file"
    path.write_bytes(b"what stood there before, and was longer than what comes")
    writes.write_pieces(path, pieces)
    assert path.read_bytes() == b"".join(pieces)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_its_bytes_are_on_the_disk_before_it_has_its_name(tmp_path, calls):
    """The last write is synced before the rename, and the folder with the new name after it."""
    writes.write_pieces(tmp_path / "file", PIECES)
    renamed = calls.index(("rename", ".file.tmp"))
    written = [at for at, call in enumerate(calls) if call == ("pwrite", ".file.tmp")]
    assert ("fsync", ".file.tmp") in calls[written[-1] : renamed]
    assert calls[renamed + 1 :] == [("fsync", tmp_path.name)]


@pytest.mark.parametrize("most", [1, 3])
def test_a_call_that_takes_less_than_it_was_given_is_made_again(tmp_path, monkeypatch, most):
    """As near a full disk or a limit, and a signal in between."""
    inner, signals = os.pwrite, iter([True, False] * 100)

    def short(descriptor, data, position):
        if next(signals):
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        return inner(descriptor, data[:most], position)

    monkeypatch.setattr(os, "pwrite", short)
    writes.write_pieces(tmp_path / "file", PIECES)
    assert (tmp_path / "file").read_bytes() == WHOLE


def test_what_fails_between_two_pieces_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path, put, count = tmp_path / "file", writes.put, iter(range(9))
    path.write_bytes(b"before")

    def full(*arguments):
        if next(count) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(*arguments)

    monkeypatch.setattr(writes, "put", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        writes.write_pieces(path, PIECES)
    assert path.read_bytes() == b"before"
    monkeypatch.setattr(writes, "put", put)
    writes.write_pieces(path, PIECES)  # over the temporary file that was left
    assert path.read_bytes() == WHOLE
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
