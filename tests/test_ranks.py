"""Several ranks: what they say to each other, who makes what, the same bytes on any number of them, and one end for all."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from qquant import doctor, pipeline, ranks
from qquant.artifact import owning
from qquant.cli import main, together
from qquant.disk import output
from qquant.errors import (
    GateFailedError,
    InputError,
    NumericalError,
    ShortMemoryError,
    StoppedError,
)
from qquant.plan.plan import Plan
from qquant.processes import dead, identity, start_of
from qquant.ranks import ALONE, Membership, Ranks, dealt
from qquant.source.checkpoint import Checkpoint
from tests.worlds import ROOT
from tests.worlds.builds import CPU, contents, load_recipe, quiet


def on_ranks(world, work, store=None):
    """What `work(ranks)` returns or raises on every rank, each a thread."""
    store, found = store or HashStore(), [None] * world

    def run(rank):
        try:
            found[rank] = work(Ranks(Membership(rank, world, rank), store))
        except Exception as error:  # noqa: BLE001  looked at by the caller
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_values_come_in_the_order_of_ranks():
    def work(group):
        time.sleep(0.05 * (2 - group.rank))
        return group.gather([group.rank]), group.gather_bytes(bytes([group.rank])), group.once(lambda: group.rank + 7)

    assert on_ranks(3, work) == [([[0], [1], [2]], [b"\0", b"\1", b"\2"], 7)] * 3


def test_the_first_goes_before():
    order = []

    def work(group):
        time.sleep(0.1 if group.first else 0)
        return group.after_first(lambda: order.append(group.rank) or len(order))

    assert on_ranks(3, work)[0] == 1
    assert order[0] == 0


@pytest.mark.parametrize("world", [1, 2, 3])
def test_artifacts_get_their_names_in_the_order_of_the_plan(tmp_path, world):
    """Whoever made them: several join one folder, whose manifest lists them in the order in which they came."""
    order, planned = [], [SimpleNamespace(name=name) for name in "abcdef"]

    def draft(artifact):
        def finish(out, origin, values):
            time.sleep(0.02 * random.random())
            order.append((artifact.name, values))

        return SimpleNamespace(plan=artifact, readings=lambda _: iter([lambda: artifact.name]), finish=finish)

    def work(group):
        mine = [draft(artifact) for artifact in planned if ord(artifact.name) % world == group.rank]
        owning.finish(mine, planned, tmp_path, None, CPU, group)

    assert on_ranks(world, work) == [None] * world
    assert order == [(name, [name]) for name in "abcdef"]


def test_what_was_said_is_forgotten():
    store = HashStore()
    on_ranks(2, lambda group: [group.meet() for _ in range(20)], store)
    assert store.num_keys() <= 4


@pytest.mark.parametrize("key", ["checkpoint", "recipe", "calibration", "qquant"])
def test_a_rank_that_sees_something_else_is_named(key):
    same = dict.fromkeys(("checkpoint", "recipe", "calibration", "qquant"), "a1")
    found = on_ranks(3, lambda group: group.agree(same | ({key: "b2"} if group.rank == 2 else {})))
    assert [type(error) for error in found] == [InputError] * 3
    assert f"rank 2 (never seen) has another {key} than rank 0: b2, not a1" in str(found[0])
    assert on_ranks(2, lambda group: group.agree(same)) == [None, None]


def test_a_rank_alone_asks_nobody():
    assert ALONE.gather(3) == [3]
    assert ALONE.once(lambda: "x") == "x"
    assert ALONE.ends("anything", 5)
    assert ALONE.lost() is None
    ALONE.agree({"a": "b"})


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, None),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "h", "MASTER_PORT": "1", "LOCAL_RANK": "1"},
            Membership(5, 8, 1),
        ),
    ],
)
def test_the_launcher_says_where_one_is(environment, place):
    assert Membership.of(environment) == place


def test_work_is_dealt_by_cost():
    costs = {"a": 7.0, "b": 5.0, "c": 4.0, "d": 3.0, "e": 1.0}
    hands = dealt(costs, 2)
    assert sorted(name for hand in hands for name in hand) == sorted(costs)
    assert [sum(costs[name] for name in hand) for hand in hands] == [10.0, 10.0]
    assert sorted(map(len, dealt(costs, 7))) == [0, 0, 1, 1, 1, 1, 1]
    assert sorted(map(len, dealt(dict.fromkeys("abcd", 0.0), 2))) == [2, 2]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("x.json: bad"), 5, "x.json: bad"),
        (NumericalError("block 3"), 7, "block 3"),
        (ShortMemoryError("block 3: out of memory"), 75, "block 3: out of memory. What is finished is kept"),
        (MemoryError(), 75, "out. What is finished is kept"),
        (StoppedError("stopped by SIGTERM"), 75, "stopped by SIGTERM. What is finished is kept"),
    ],
)
def test_one_rank_tells_an_error_for_all(capfd, error, status, line):
    store = HashStore()
    message = str(error) or "out"
    assert on_ranks(2, lambda group: together.told(error, message, group), store) == [status] * 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert line in said[0]


def test_an_error_that_names_a_rank_names_it_once(capfd):
    def disagree(group):
        facts = {"recipe": "b2", "calibration": "b2"} if group.rank else {"recipe": "a1", "calibration": "a1"}
        try:
            group.agree(facts)
        except InputError as error:
            if group.first:
                time.sleep(0.3)  # the other one tells it
            return together.told(error, str(error), group)

    assert on_ranks(2, disagree) == [InputError.exit_code] * 2
    said = capfd.readouterr().err
    assert said.startswith("error: rank 1 (never seen) has another recipe than rank 0")


def test_a_verdict_is_told_by_the_first(capfd):
    error = GateFailedError("q4_0: too far")
    assert on_ranks(3, lambda group: together.told(error, str(error), group)) == [None, 3, 3]
    assert capfd.readouterr().err == ""


def test_the_dead_are_known():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = identity()
    there = here | {"pid": child.pid, "start": start_of(child.pid)}
    assert not dead(here)
    assert not dead(there)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # not reaped
    assert dead(there)
    child.wait()
    assert dead(there)
    assert not dead(there | {"host": "elsewhere"})
    assert not dead(there | {"space": "pid:[1]"})


def test_a_rank_of_this_machine_that_is_gone_is_named_unless_it_left():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    group = Ranks(Membership(0, 2, 0), HashStore())
    group.write("who/0", identity())
    group.write("who/1", identity() | {"pid": child.pid, "start": start_of(child.pid)})
    assert group.lost() is None
    child.kill()
    child.wait()
    assert group.lost().startswith(f"rank 1 (process {child.pid} on ")
    group.write("left/1", child.pid)
    assert group.lost() is None
    assert ALONE.lost() is None


def test_a_rank_that_gives_no_sign_is_named(monkeypatch):
    """One that stands still, as if it were on another machine; and one that never came."""
    monkeypatch.setattr(ranks, "BEAT", 0.02)
    monkeypatch.setattr(ranks, "SILENT", 0.4)
    monkeypatch.setattr(HashStore, "clone", lambda self: self, raising=False)
    for store, limit in ((HashStore(), "SILENT"), (HashStore(), "ARRIVAL")):
        told = []
        monkeypatch.setattr(ranks, "ARRIVAL", 0.4 if limit == "ARRIVAL" else 1000.0)
        if limit == "SILENT":
            store.set("beat/1", "1")
        group = Ranks(Membership(0, 2, 0), store)
        with ranks.watched(group, lambda *words, told=told: told.append(words)):
            for _ in range(60):
                group.alive()
                time.sleep(0.02)
            store.set("left/1", "1")
        assert told, limit
        assert told[0][0].startswith("rank 1 (never seen) has not answered for "), limit
        assert told[0][1] == 75


def test_what_is_done_once_is_done_by_the_first():
    done = []

    def work(group):
        return group.once(lambda: done.append(group.rank) or group.rank + 5)

    assert on_ranks(3, work) == [5, 5, 5]
    assert done == [0]


def test_a_launcher_that_is_gone_stops_who_speaks():
    class Gone(HashStore):
        def set(self, *_):
            raise RuntimeError("connection reset")

    with pytest.raises(StoppedError, match="the launcher is gone: connection reset"):
        Ranks(Membership(0, 2, 0), Gone()).gather(1)


def test_a_rank_that_waits_for_another_is_not_stuck(monkeypatch):
    monkeypatch.setattr(ranks, "STUCK", 0.2)
    store = HashStore()
    waiting, late = Ranks(Membership(0, 2, 0), store), Ranks(Membership(1, 2, 1), store)
    said = threading.Timer(0.8, lambda: late.gather(2))
    said.start()
    watch = ranks._Watch(Ranks(Membership(0, 2, 0), store), waiting, lambda *_: None)
    asking = threading.Thread(target=lambda: waiting.gather(1))
    asking.start()
    time.sleep(0.5)
    assert watch._why() is None
    asking.join()
    said.join()


def test_the_first_goes_last(monkeypatch):
    """Its process may hold the store, which the others ask until they have left."""
    monkeypatch.setattr(ranks, "BEAT", 0.1)
    store = HashStore()
    later = threading.Timer(0.4, lambda: store.set("left/1", "1"))
    later.start()
    began = time.monotonic()
    ranks._leave(Ranks(Membership(0, 2, 0), store))
    assert store.check(["left/1"])
    assert time.monotonic() - began < ranks.LEAVING
    other = HashStore()
    ranks._leave(Ranks(Membership(1, 2, 0), other))  # waits for nobody
    assert not other.check(["left/0"])


def test_a_rank_that_is_stuck_says_so(monkeypatch):
    monkeypatch.setattr(ranks, "BEAT", 0.02)
    monkeypatch.setattr(ranks, "STUCK", 0.3)
    told = []
    store = HashStore()
    monkeypatch.setattr(HashStore, "clone", lambda self: self, raising=False)
    for rank in range(2):
        store.set(f"beat/{rank}", "1")
    group = Ranks(Membership(0, 2, 0), store)
    with ranks.watched(group, lambda *words: told.append(words)):
        store.set("left/1", "1")
        for _ in range(30):
            group.alive()
            time.sleep(0.02)
        assert told == []
        time.sleep(0.8)
    assert told[0][0].startswith(f"rank 0 (process {os.getpid()} on ")
    assert "is stuck" in told[0][0]
    assert told[0][1] == 75


def test_ranks_write_the_same_bytes_and_end_together():
    """Two and three ranks; then one is killed, and another stopped, and other numbers of ranks continue."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture_ranks", "3", "1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["violations"] == []
    assert found["SIGKILL"] == 2


def test_no_rank_goes_before_the_first_has_tidied_up(tmp_path, monkeypatch):
    """Who leaves earlier ends with 0, though the first may die there, or fail."""
    monkeypatch.setattr(output, "crash_point", lambda point: time.sleep(0.3))

    def work(group):
        with output.claim(tmp_path / "out", group):
            pass
        return os.listdir(tmp_path / "out")

    assert on_ranks(3, work) == [[], [], []]


def test_torchrun(make_checkpoint, tmp_path):
    """As a user types it: one table, and the bytes of a single process."""
    loaded, folder = load_recipe(tmp_path, ["rtn", "gguf-q8_0"]), make_checkpoint()
    command = ["build", str(folder), "--recipe", str(tmp_path / "test.yaml"), "--out", str(tmp_path / "out")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qquant"]
    two = subprocess.run([sys.executable, *launcher, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("baseline (16 bit)") == 1
    assert two.stderr.count("quantize: block 2 of 2") == 1
    found = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "two")
    checkpoint = Checkpoint.open(folder)
    pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), tmp_path / "out", CPU, quiet)
    assert contents(tmp_path / "out") == found


def test_a_command_for_one_is_refused_once(monkeypatch, capsys):
    for rank, told in enumerate(("error: plan: is not for several ranks; run it without a launcher", "")):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit) as caught:
            main(["plan", "--recipe", "demo"])
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith(told)
        assert bool(said) == bool(told)


def test_the_doctor_sees_whether_a_folder_is_one(tmp_path, monkeypatch):
    """Names and locks of one folder; then each rank has a folder of its own, as on two machines without a shared file system."""
    assert (
        on_ranks(3, lambda group: [finding.state for finding in doctor._shared(tmp_path / "out", group)])
        == [["ok", "ok"]] * 3
    )
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(doctor, "LATE", 0.3)

    def apart(folder, group):
        (folder / str(group.rank)).mkdir(exist_ok=True)
        return seen(folder / str(group.rank), group), locked(folder / str(group.rank), group)

    seen, locked = doctor._seen, doctor._locked
    (tmp_path / "made").mkdir()
    found = on_ranks(2, lambda group: apart(tmp_path / "made", group))
    assert found[0] == ("rank-1's file is not seen: give all ranks one file system", "")
    assert found[1] == ("rank-0's file is not seen: give all ranks one file system", "two ranks were given one lock")


def test_the_doctor_tells_the_worst_of_all_ranks(tmp_path, monkeypatch):
    def collective(backend, device, group):
        state = doctor.WARNING if group.rank == 1 else doctor.OK
        return doctor.Finding(f"sum by {backend}", state, "no route" if group.rank else "right")

    monkeypatch.setattr(doctor, "_collective", collective)
    alone = [doctor.Finding("room", doctor.OK, "much"), doctor.Finding("memory", doctor.WARNING, "1 GB")]
    found = on_ranks(2, lambda group: doctor.group(tmp_path, CPU, group, alone))
    assert found[0] == found[1]
    told = [(one.name, one.state, one.text) for one in found[0]]
    assert told[1] == ("sum by gloo", "warning", "rank 1: no route")
    assert told[2:4] == [("folder of all ranks", "ok", "works"), ("lock across ranks", "ok", "works")]
    assert told[4:] == [("rank 1: memory", "warning", "1 GB")]


def test_the_doctor_does_not_ask_nccl_where_ranks_share_a_card(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_collective", lambda backend, *rest: doctor.Finding(backend, doctor.OK, "right"))
    for shared, found in ((True, ("sum by nccl", doctor.WARNING)), (False, ("nccl", doctor.OK))):
        monkeypatch.setattr(doctor, "shares_card", lambda device, ranks, shared=shared: shared)
        told = on_ranks(2, lambda group: doctor.group(tmp_path, torch.device("cuda"), group, []))
        assert (told[0][2].name, told[0][2].state) == found


def test_who_is_left_when_the_launcher_is_gone_ends_as_the_others(capfd):
    """The first rank, who tells why, may be gone with the store before another asks what happened."""

    class Gone(HashStore):
        def check(self, keys):
            raise RuntimeError("Connection reset by peer")

        def compare_set(self, *rest):
            raise RuntimeError("Broken pipe")

    group = Ranks(Membership(1, 3, 1), Gone())
    assert group.lost() is None
    assert together.told(StoppedError("the connection to another rank broke"), "it broke", group) == 75
    assert capfd.readouterr().err == ""
