"""One command by several processes, as `torchrun` starts them: what they say to each other, and how all end when one does.

    rank 0        holds the lock, decides what is lacking, gives names to what is finished, and prints
    every rank    reads the checkpoint for itself, and does its part of the work

Ranks meet in the launcher's store: what they say is small (names, digests, the numbers of a check), and a rank that waits there is
never stuck in a collective that another has left. Values are JSON, tensors the bytes of a safetensors file; nothing is unpickled.

Each rank signs every BEAT seconds, from a thread that looks after the others meanwhile:

    a process of this machine is gone                          died
    a signature stands still for SILENT seconds                does not answer (another machine, stopped, swapped out)
    a rank's own work gives no sign for STUCK seconds          is stuck; it says so itself
    the store is gone                                          the launcher died

The first that knows tells it, all others end in silence, all with the same status: what is journalled stays, and the same command
continues on as many ranks as one likes. Without a launcher there is one rank, nothing is imported, and no call here does anything.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from qquant.errors import InputError, StoppedError
from qquant.processes import dead, identity

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # its type stubs export nothing

BEAT = 1.0  # seconds
ARRIVAL = 300.0  # seconds until every rank has come
SILENT = 60.0
STUCK = 3600.0
GAIN = 0.6  # of the time of ranks that is of use where they work together
LEAVING = 10.0  # seconds that the first rank waits for the others at the end: the store may be its own
LAUNCHER = "the launcher is gone"
Value = TypeVar("Value")
Lost = Callable[[str, int], None]  # (what is to be told, or nothing; exit status): ends the process


@dataclass(frozen=True)
class Membership:
    """Which of how many ranks a process is."""

    rank: int
    world: int
    local: int  # among those of its machine
    beside: int = 1  # how many its machine has

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Membership | None:
        """The membership that a launcher states in the environment; None without one, or where the process is the only one."""
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            return None
        local, beside = environment.get("LOCAL_RANK", "0"), environment.get("LOCAL_WORLD_SIZE", "1")
        member = cls(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(local), int(beside))
        return member if member.world > 1 else None


@dataclass(eq=False)
class Ranks:
    """This rank among all. Every rank must call `gather`, `meet`, `once`, `after_first` and `agree` alike, in the same order."""

    member: Membership = Membership(0, 1, 0)
    store: Store | None = None
    met: int = 0  # how often
    sent: int = 0  # bytes of tensors that this rank handed others (`qquant.exchange`)
    sign: float = field(default_factory=time.monotonic)  # when work last gave one

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""
        return self.member.rank

    @property
    def world(self) -> int:
        """How many there are."""
        return self.member.world

    @property
    def first(self) -> bool:
        """Whether this one speaks for all."""
        return self.member.rank == 0

    def alive(self) -> None:
        """Say that work goes on."""
        self.sign = time.monotonic()

    # --- what is said ---------------------------------------------------------------------------------------------------

    def gather_bytes(self, value: bytes) -> list[bytes]:
        """The values of all ranks, in their order.

        Raises:
            StoppedError: the launcher is gone.
        """
        if self.store is None:
            return [value]
        self.met += 1
        try:
            self.store.set(f"{self.met}/{self.rank}", value)  # type: ignore[arg-type]  # bytes are right
            gathered = [self._wait(self.store, f"{self.met}/{rank}") for rank in range(self.world)]
            self.store.delete_key(f"{self.met - 1}/{self.rank}")  # all who are here have read it
        except RuntimeError as error:  # torch.distributed.DistError
            raise StoppedError(f"{LAUNCHER}: {error}") from None
        return gathered

    def _wait(self, store: Store, key: str) -> bytes:
        pause = 0.002
        while not store.check([key]):
            self.alive()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return store.get(key)

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks in their order: what JSON has."""
        if self.store is None:
            return [value]
        return [json.loads(said) for said in self.gather_bytes(json.dumps(value).encode())]

    def meet(self) -> None:
        """Wait for all."""
        self.gather(None)

    def once(self, work: Callable[[], Value]) -> Value:
        """What `work` gives on the first rank, which alone does it: what JSON has."""
        if self.store is None:
            return work()
        return self.gather(work() if self.first else None)[0]  # type: ignore[return-value]  # the first has done it

    def after_first(self, work: Callable[[], Value]) -> Value:
        """What `work` gives here: the first rank does it, then the others do, who find what it left."""
        if not self.first:
            self.meet()
        value = work()
        if self.first:
            self.meet()
        return value

    def agree(self, facts: Mapping[str, str]) -> None:
        """Go on only if every rank has the same facts.

        Raises:
            InputError: one has others.
        """
        for rank, theirs in enumerate(said := self.gather(dict(facts))):
            for name, value in said[0].items():
                if theirs.get(name) != value:
                    raise InputError(
                        f"rank {rank} ({self.where(rank)}) has another {name} than rank 0: {theirs.get(name)}, not {value}. "
                        "Give all ranks the same files and versions"
                    )

    def apart(self, purpose: str) -> Store:
        """A part of the launcher's store that nothing else uses, for process groups of torch; of several ranks only."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # as above

        assert self.store is not None
        return PrefixStore(purpose, self.store)

    # --- how it ends ------------------------------------------------------------------------------------------------------

    def ends(self, message: str, status: int) -> bool:
        """Tell all ranks that the work ends; whether this rank is the first to say so, and should print it."""
        if self.store is None:
            return True
        mine = json.dumps({"rank": self.rank, "message": message, "status": status}).encode()
        try:
            return self.store.compare_set("ended", "", mine.decode()) == mine
        except RuntimeError:
            return self.first

    def where(self, rank: int) -> str:
        """Process and machine of a rank."""
        try:
            who = self._read(f"who/{rank}")
        except RuntimeError:
            who = None
        return f"process {who['pid']} on {who['host']}" if who else "never seen"

    def lost(self) -> str | None:
        """A rank of this machine that is gone without a word, named; None, too, where the launcher is gone, who would know."""
        with suppress(RuntimeError):
            for rank in range(self.world if self.store else 0):
                who = self._read(f"who/{rank}")
                if who and not self._read(f"left/{rank}") and dead(who):
                    return f"rank {rank} ({self.where(rank)}) died; see what the system says of it (short memory ends processes so)"
        return None

    def _read(self, key: str) -> Any:
        return json.loads(self.store.get(key)) if self.store is not None and self.store.check([key]) else None

    def write(self, key: str, value: object) -> None:
        """Leave a note for the others."""
        if self.store is not None:
            self.store.set(key, json.dumps(value))


ALONE = Ranks()


def dealt(costs: Mapping[str, float], world: int) -> list[list[str]]:
    """Names by rank, so that the rank with most to do has little: the dearest first, each to whom has least."""
    hands: list[list[str]] = [[] for _ in range(world)]
    for name in sorted(costs, key=lambda name: -costs[name]):
        min(hands, key=lambda hand: (sum(costs[one] for one in hand), len(hand))).append(name)
    return hands


def helps(costs: Mapping[str, float], hands: Sequence[Sequence[str]]) -> bool:
    """Whether all are done earlier together than with a hand for each rank."""
    longest = max(sum(costs[name] for name in hand) for hand in hands)
    return longest > sum(costs.values()) / (GAIN * len(hands))


@dataclass
class _Watch:
    """Signs for its rank, and looks after the others."""

    ranks: Ranks  # with a connection of its own
    working: Ranks
    lost: Lost
    began: float = field(default_factory=time.monotonic)
    beats: dict[int, tuple[object, float]] = field(default_factory=dict)  # the last signature, and since when it stands
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Beat, and look for the end of other ranks, until `stop` or the end."""
        count = 0
        while not self.stop.wait(BEAT):
            count += 1
            try:
                self.ranks.write(f"beat/{self.ranks.rank}", count)
                ended, why = self.ranks._read("ended"), self._why()
            except RuntimeError:
                ended, why = None, LAUNCHER
            if self.stop.is_set():
                return
            if ended:
                self.lost("", int(ended["status"]))
            elif why:
                self.lost(why if self.ranks.ends(why, StoppedError.exit_code) else "", StoppedError.exit_code)

    def _why(self) -> str | None:
        """What is wrong, if anything is."""
        now = time.monotonic()
        if now - self.working.sign > STUCK:
            return f"rank {self.ranks.rank} ({self.ranks.where(self.ranks.rank)}) is stuck: no step of its work has ended for {STUCK:.0f} s"
        for rank in range(self.ranks.world):
            said = self.ranks._read(f"beat/{rank}")
            last, since = self.beats.get(rank, (None, self.began))
            if said != last or self.ranks._read(f"left/{rank}"):
                self.beats[rank] = said, now
            elif now - since > (SILENT if last is not None else ARRIVAL):
                return f"rank {rank} ({self.ranks.where(rank)}) has not answered for {now - since:.0f} s"
        return self.ranks.lost()


def join(member: Membership) -> Ranks:
    """This process among its ranks, at the store that its launcher names in the environment."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # as above
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", member.rank, member.world))
    return Ranks(member, PrefixStore("qquant", store))


@contextmanager
def watched(ranks: Ranks, lost: Lost) -> Iterator[None]:
    """Meanwhile a thread looks after the other ranks, and calls `lost` where one is; nothing for one rank alone."""
    if ranks.store is None:
        yield
        return
    apart = Ranks(ranks.member, ranks.store.clone())  # type: ignore[attr-defined]  # it has

    apart.write(f"who/{ranks.rank}", identity())
    watch = _Watch(apart, ranks, lost)
    thread = threading.Thread(target=watch.run, daemon=True, name="qquant-ranks")
    thread.start()
    try:
        yield
    finally:
        watch.stop.set()
        thread.join()
        with suppress(RuntimeError):
            _leave(apart)


def _leave(ranks: Ranks) -> None:
    """Say that this rank goes on purpose; the first one, whose process may hold the store, goes last."""
    ranks.write(f"left/{ranks.rank}", os.getpid())
    late = time.monotonic() + LEAVING
    while ranks.first and time.monotonic() < late:
        if all(ranks._read(f"left/{rank}") or ranks.lost() for rank in range(ranks.world)):
            return
        time.sleep(BEAT / 10)
