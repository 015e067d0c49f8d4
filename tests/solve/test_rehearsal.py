"""The miniature of a build: it goes through what the build will, changes nothing that the build can see, and ends where nobody waits for it."""

import tempfile
from dataclasses import replace
from threading import Event
from unittest.mock import Mock

import pytest
import torch

from qquant import devices
from qquant.algorithms import coupled
from qquant.errors import StoppedError
from qquant.plan.plan import Plan
from qquant.solve import rehearsal, solver
from qquant.source.checkpoint import Checkpoint
from tests.worlds.builds import CPU, load_recipe


@pytest.fixture
def beside(tmp_path, make_checkpoint, monkeypatch):
    """`beside` for artifacts by name, on the CPU, narrower and with fewer tokens still."""
    monkeypatch.setattr(rehearsal, "LENGTH", 32)
    monkeypatch.setattr(rehearsal, "threads_help", lambda device: True)
    checkpoint = Checkpoint.open(make_checkpoint())

    def make(*names):
        recipe = load_recipe(tmp_path, names)
        return rehearsal.beside(recipe, checkpoint, Plan.of(recipe, checkpoint), tmp_path / "out", CPU)

    make.checkpoint = checkpoint
    return make


def counted(monkeypatch, owner, name, calls):
    inner = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(name) or inner(*args, **kwargs))


def test_it_takes_the_ways_of_the_build_and_leaves_nothing(beside, tmp_path, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    calls, state = [], torch.get_rng_state()
    for owner, name in ((rehearsal.walk, "measure"), (coupled, "sweep"), (solver.Solver, "finish")):
        counted(monkeypatch, owner, name, calls)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with beside("gptq-int4") as ready:
        ready()
    assert {"measure", "sweep", "finish"} <= set(calls), caplog.text
    assert calls.count("finish") == 1
    assert not list((tmp_path / "temporary").glob("qquant-*"))
    assert not (tmp_path / "out").exists()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def planned(monkeypatch):
    """Names of the artifacts of each rehearsal, in place of it."""
    calls = []
    monkeypatch.setattr(rehearsal, "_solve", lambda recipe, small, parts, *_: calls.append([one.name for one in parts]))
    return calls


def test_one_artifact_of_each_folder_format_that_is_lacking_is_rehearsed(beside, tmp_path, monkeypatch):
    calls = planned(monkeypatch)
    names = ["gptq-int4", "awq", "gptq-int8", "gguf-q4_0"]
    with beside(*names) as ready:
        ready()
    (tmp_path / "out" / "model-AWQ").mkdir(parents=True)
    with beside(*names) as ready:
        ready()
    assert list(map(sorted, calls)) == [["awq", "gptq-int4"], ["gptq-int4"]]


def test_nothing_is_rehearsed_or_hashed_early_on_a_cpu(beside, monkeypatch):
    calls = planned(monkeypatch)
    monkeypatch.setattr(rehearsal, "threads_help", devices.threads_help)
    counted(monkeypatch, Checkpoint, "hash_weights", calls)
    with beside("gptq-int4") as ready:
        ready()
    assert calls == []


def test_weights_are_hashed_beside_and_a_build_that_ends_waits_for_neither(beside, make_checkpoint, monkeypatch):
    """The hash is known then, the one that it is without threads; an error ends both within a piece."""
    planned(monkeypatch)
    hashes, calls = Checkpoint.open(make_checkpoint()).content_hash(), []
    opened = []
    counted(monkeypatch, Checkpoint, "hash_weights", opened)
    with beside("gptq-int4") as ready:
        ready()
        monkeypatch.setattr(Checkpoint, "_digests", lambda *_: calls.append("again"))
        assert beside.checkpoint.content_hash() == hashes
    assert (opened, calls) == (["hash_weights"], [])


def test_a_rehearsal_stops_between_blocks_and_does_not_end_a_build(beside, caplog):
    stop = Event()
    stop.set()
    with pytest.raises(StoppedError):
        rehearsal._Stopped(stop).check_stop()
    for error in (RuntimeError("CUDA out of memory"), StoppedError("ended"), OSError("disk full")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rehearsal, "_solve", Mock(side_effect=error))
            with beside("gptq-int4") as ready:
                ready()


def test_a_miniature_keeps_what_kernels_are_chosen_by(make_checkpoint):
    small = rehearsal.miniature(Checkpoint.open(make_checkpoint()))
    wide = replace(
        small.config, hidden=8192, intermediate=24576, heads=64, kv_heads=8, head_dim=128, layers=80, vocab=152064
    )
    narrow = rehearsal._narrow(wide)
    assert (narrow.hidden, narrow.intermediate, narrow.layers) == (2560, 5120, 1)
    assert (narrow.heads, narrow.kv_heads, narrow.head_dim, narrow.vocab) == (20, 1, 128, 4096)
    assert rehearsal._narrow(small.config) == small.config
    name = "model.layers.0.mlp.up_proj.weight"
    value = small.tensor(name)
    assert value.shape == small.tensors[name].shape
    assert value.dtype == torch.bfloat16
    assert torch.equal(small.rows(name, 3, 9), value[3:9])
