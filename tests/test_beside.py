"""Threads beside the computation, as on a GPU: the same bytes, and what fails in them ends the build and is continued."""

import errno
import threading
import time
from collections import Counter
from functools import partial

import pytest
import safetensors.torch
import torch

from qquant import devices
from qquant.artifact import behind, draft
from qquant.artifact.manifest import verify_files
from qquant.disk.digest import sha256_of
from qquant.errors import QQuantError, StoppedError
from qquant.formats import folder_read_back
from qquant.plan.plan import Plan
from qquant.solve import layers, outside, solver, walk
from qquant.source.checkpoint import Checkpoint
from tests.test_faults import NAMES, build, make_checkpoint
from tests.worlds.builds import ARTIFACTS, contents, load_recipe

assert build, make_checkpoint


def test_a_build_with_threads_gives_the_same_bytes(make_checkpoint, build, monkeypatch):
    folder = make_checkpoint()
    _, plain = build(folder, out="plain")
    monkeypatch.setattr(devices, "threads_help", lambda device: True)
    monkeypatch.setattr(devices, "cores", lambda: 3)
    _, threaded = build(folder, out="threaded")
    assert contents(threaded) == contents(plain)


def test_what_fails_beside_the_curvature_ends_the_build_and_is_continued(make_checkpoint, build, monkeypatch, tmp_path):
    """A full disk under the tensors outside the blocks; then a stop meanwhile, after which no thread writes on."""
    folder = make_checkpoint()
    _, plain = build(folder, out="plain")
    monkeypatch.setattr(devices, "threads_help", lambda device: True)
    put = draft.put

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(draft, "put", full)
        with pytest.raises(StoppedError, match="No space left on device"):
            build(folder)

    writing = threading.Event()

    def slow(*arguments):
        put(*arguments)
        writing.set()
        time.sleep(0.05)

    def stop(*_):
        writing.wait(5)
        raise StoppedError("stopped by SIGINT")

    with monkeypatch.context() as patch:
        patch.setattr(draft, "put", slow)
        patch.setattr(walk, "measure", stop)
        with pytest.raises(StoppedError, match="stopped by SIGINT"):
            build(folder)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qquant-")]
    last = (tmp_path / "out" / ".partial" / f"{NAMES[-1]}.journal").read_text().splitlines()
    assert len(last) == 1  # drafts that had not begun were left alone
    _, out = build(folder)
    assert contents(out) == contents(plain)


def blocks_written(monkeypatch, work):
    """`work(thread, draft, unit)` before a block of an artifact is synced."""
    close = draft.UnitWriter.close

    def closing(filling, *rest):
        work(threading.current_thread().name, filling.draft.plan.name, filling.unit)
        close(filling, *rest)

    monkeypatch.setattr(draft.UnitWriter, "close", closing)


def test_blocks_are_written_while_the_next_are_solved(make_checkpoint, build, monkeypatch):
    """One of each artifact at a time; without threads each where it was solved."""
    folder, seen = make_checkpoint(num_hidden_layers=3), []
    solve = solver.Solver.solve
    held, solved = threading.Event(), threading.Event()

    def wait(thread, name, unit):
        seen.append((thread.rpartition("_")[0], name, unit))
        if unit == "block 0" and name == NAMES[-1]:
            held.set()
            assert thread == "MainThread" or solved.wait(10)

    def solving(self, *rest):
        if self.layer == 1 and self.draft.plan.name == NAMES[-1]:
            held.wait(10)
            solved.set()
        return solve(self, *rest)

    monkeypatch.setattr(solver.Solver, "solve", solving)
    blocks_written(monkeypatch, wait)
    _, plain = build(folder, out="plain")
    monkeypatch.setattr(devices, "threads_help", lambda device: True)
    in_place = [entry[1:] for entry in seen]
    assert {thread for thread, _, _ in seen} == {""}
    for record in (seen, held, solved):
        record.clear()
    _, threaded = build(folder, out="threaded")
    assert {thread for thread, _, unit in seen if unit != outside.UNSOLVED} == {"qquant-write-behind"}
    assert ("qquant-write-behind", NAMES[-1], outside.UNSOLVED) in seen
    for name in NAMES:
        units = [unit for _, found, unit in seen if found == name]
        assert units.count(outside.UNSOLVED) == 1  # when it is done
        units.remove(outside.UNSOLVED)
        assert [outside.UNSOLVED, *units] == [unit for found, unit in in_place if found == name]
    assert contents(threaded) == contents(plain)


def test_blocks_are_solved_while_embedding_and_head_are_written(make_checkpoint, build, monkeypatch):
    """Where they are numbers; the thread that writes them waits here for the first block."""
    folder = make_checkpoint()
    _, plain = build(folder, NAMES[0], out="plain")
    begun, write, solve = threading.Event(), walk.write_unsolved, solver.Solver.solve

    def writing(checkpoint, drafts, *rest):
        assert not drafts or begun.wait(20)
        write(checkpoint, drafts, *rest)

    def solving(self, *rest):
        begun.set()
        return solve(self, *rest)

    monkeypatch.setattr(devices, "threads_help", lambda device: True)
    monkeypatch.setattr(walk, "write_unsolved", writing)
    monkeypatch.setattr(solver.Solver, "solve", solving)
    _, beside = build(folder, NAMES[0], out="beside")
    assert contents(beside) == contents(plain)


def test_blocks_are_solved_while_tables_are_written_that_no_stream_begins_with(make_checkpoint, build, monkeypatch):
    """Those of a GGUF file whose types are searched; the thread that writes them waits here for the first block."""
    monkeypatch.setitem(ARTIFACTS, "searched", "{name: searched, format: gguf, type: q4_0, solver: ggml}")
    folder, name = make_checkpoint(), "searched"
    _, plain = build(folder, name, out="plain")
    begun, solve = threading.Event(), solver.Solver.solve

    def wait(thread, found, unit):
        assert unit != outside.UNSOLVED or begun.wait(20)

    def solving(self, *rest):
        begun.set()
        return solve(self, *rest)

    monkeypatch.setattr(devices, "threads_help", lambda device: True)
    blocks_written(monkeypatch, wait)
    monkeypatch.setattr(solver.Solver, "solve", solving)
    _, beside = build(folder, name, out="beside")
    assert contents(beside) == contents(plain)


@pytest.mark.parametrize("unit", ["rest", "block 0", "block 1"])
def test_a_block_that_cannot_be_written_ends_the_build_and_is_continued(
    make_checkpoint, build, monkeypatch, tmp_path, unit
):
    """The artifact says so that is solved next, or whose files are closed first; and no later block is journalled."""
    folder = make_checkpoint()
    _, plain = build(folder, out="plain")
    monkeypatch.setattr(devices, "threads_help", lambda device: True)

    def full(thread, name, found):
        if found == unit and name != NAMES[0]:
            time.sleep(0.1 * (name == NAMES[1]))
            raise OSError(errno.ENOSPC, "No space left on device", name)

    with monkeypatch.context() as patch:
        blocks_written(patch, full)
        told = NAMES[1] if unit == "block 1" else NAMES[2]  # those that walk on a stream of their own are closed first
        with pytest.raises(StoppedError, match=f"{told}: No space left on device"):
            build(folder)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qquant-")]
    for name in NAMES[1:]:
        journal = (tmp_path / "out" / ".partial" / f"{name}.journal").read_text()
        assert unit not in journal
        assert "block 1" not in journal
    _, out = build(folder)
    assert contents(out) == contents(plain)


def test_a_file_that_reads_back_wrong_is_told_whether_or_not_it_is_hashed_meanwhile(
    make_checkpoint, build, monkeypatch
):
    folder = make_checkpoint()
    read = draft.Draft.readings

    def damaged(draft, device):
        path = next(draft.folder / file.name for file in draft.plan.files if file.tensors)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return read(draft, device)

    monkeypatch.setattr(draft.Draft, "readings", damaged)
    for threaded in (False, True):
        monkeypatch.setattr(devices, "threads_help", lambda device, threaded=threaded: threaded)
        monkeypatch.setattr(devices, "cores", lambda: 3)
        with pytest.raises(QQuantError, match="read back differs from what was written"):
            build(folder, "gptq-int8", out=str(threaded))


def test_files_are_read_back_from_their_beginning_while_the_rest_is_written(make_checkpoint, build, monkeypatch):
    """So that their end alone is left to be hashed and compared, and every tensor is compared once."""
    folder, read, ends = make_checkpoint(), behind.Beginning.read, []
    compare, compared = folder_read_back._compare_bytes, Counter()

    def counted(library, path, written):
        compared.update((name, threading.current_thread().name.rstrip("_0123456789")) for name in written)
        compare(library, path, written)

    monkeypatch.setattr(folder_read_back, "_compare_bytes", counted)

    def watched(beginning, path, stop):
        before = beginning.bytes
        read(beginning, path, stop)
        ends.append((path.name, threading.current_thread().name.rstrip("_0123456789"), before, beginning.bytes))

    monkeypatch.setattr(behind.Beginning, "read", watched)
    monkeypatch.setattr(devices, "threads_help", lambda device: True)
    _, out = build(folder, "gptq-int8")
    (made,) = (path.parent for path in out.glob("*/qquant-manifest.json"))
    assert verify_files(made)
    writing = [place for place in ends if place[:2] == ("model.safetensors", "qquant-write-behind")]
    ((_, _, left, size),) = (
        place for place in ends if place[0] == "model.safetensors" and place[1] != "qquant-write-behind"
    )
    assert [place[2] for place in writing[1:]] == [place[3] for place in writing[:-1]]
    assert 0 < left == writing[-1][3] < size == (made / "model.safetensors").stat().st_size
    early = {name for name, thread in compared if thread == "qquant-write-behind"}
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.qweight"} <= early
    assert "model.layers.1.mlp.up_proj.qweight" not in early
    assert set(compared.values()) == {1}
    assert {name for name, _ in compared} == set(safetensors.torch.load_file(made / "model.safetensors"))


def test_a_tensor_that_is_not_what_was_written_ends_a_build_before_the_last_block(make_checkpoint, build, monkeypatch):
    """The thread that reads back says so while others are solved."""
    folder, close, solved = make_checkpoint(num_hidden_layers=6), draft.UnitWriter.close, []

    def damaged(writer, record, seconds=None):
        if writer.unit == "block 0":
            file, tensor = writer.places["model.layers.0.mlp.up_proj.qweight"]
            with (writer.draft.folder / file.name).open("r+b") as content:
                content.seek(tensor.offset)
                content.write(b"not this")
        for _ in range(100 * (writer.unit == "block 1")):  # what is read back is read
            time.sleep(0.1 * writer.draft.behind.busy)
        solved.append(writer.unit)
        close(writer, record, seconds)

    monkeypatch.setattr(draft.UnitWriter, "close", damaged)
    monkeypatch.setattr(devices, "threads_help", lambda device: True)
    with pytest.raises(QQuantError, match=r"tensor model.layers.0.mlp.up_proj.qweight read back differs"):
        build(folder, "gptq-int8")
    assert "block 0" in solved
    assert "block 5" not in solved


def test_what_is_written_again_is_hashed_again(tmp_path, make_checkpoint, monkeypatch):
    recipe, checkpoint = load_recipe(tmp_path, ["gptq-int8"]), Checkpoint.open(make_checkpoint())
    one = draft.Draft(Plan.of(recipe, checkpoint).artifacts[0], tmp_path / "partial", "key")
    one.open()
    name, other, *_ = one.places
    file, first = one.places[name]
    monkeypatch.setattr(devices, "threads_help", lambda device: True)
    with one.write_behind(torch.device("cpu")):
        for value in (1, 2):
            one.submit(
                partial(one.write, "rest", [(name, 0, torch.full((first.nbytes,), value, dtype=torch.uint8))], ())
            )
            one.submit(lambda: None)  # the first is done
            while one.behind.ahead.get(file.name, behind.Beginning()).compared != {name}:
                time.sleep(0.01)
    assert one.behind.ahead[file.name].bytes == one.places[other][1].offset
    with pytest.raises(QQuantError, match="were never written"):
        list(one.readings(torch.device("cpu")))
    assert one._hashed(file.name) == (file.name, sha256_of(one.folder / file.name))


@pytest.mark.parametrize("gpu", [True, False])
def test_a_build_beside_a_gpu_hashes_its_checkpoint_once_while_it_reads(build, make_checkpoint, monkeypatch, gpu):
    folder, calls = make_checkpoint(), []
    for name in ("hash_weights", "_digests"):
        inner = getattr(Checkpoint, name)
        monkeypatch.setattr(Checkpoint, name, lambda self, *how, n=name, f=inner: calls.append(n) or f(self, *how))
    monkeypatch.setattr(layers, "threads_help", lambda device: gpu)
    build(folder, "gguf-q4_0")
    assert calls == (["hash_weights", "_digests"] if gpu else ["_digests"])


def test_a_hash_that_nobody_waits_for_is_seen(make_checkpoint, monkeypatch):
    """One that came to its end is not taken again; what was stopped before its end is, and what a thread found is told."""
    folder, digests, calls = make_checkpoint(), Checkpoint._digests, []
    truth = Checkpoint.open(folder).content_hash()

    def counted(self, stop, *how):
        calls.append(threading.current_thread().name.rpartition("_")[0])
        if calls[1:]:
            return digests(self, stop, *how)
        monkeypatch.setattr(stop, "is_set", stop.is_set if ends else lambda: True)
        return digests(self, stop, *how)

    monkeypatch.setattr(Checkpoint, "_digests", counted)
    for ends in (True, False):
        checkpoint = Checkpoint.open(folder)
        calls.clear()
        with checkpoint.hashed_beside(threaded=True):
            for thread in threading.enumerate():
                if thread.name.startswith("qquant-start-early"):
                    while "_weights" not in vars(checkpoint) and ends:
                        time.sleep(0.01)
        assert checkpoint.content_hash() == truth
        assert calls == ["qquant-start-early"] + [""] * (not ends)
