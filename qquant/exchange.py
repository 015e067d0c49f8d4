"""Tensors that ranks hand each other while they compute: NCCL between GPUs, gloo between CPUs, by torch.distributed.

What is shared out are calibration samples, in turn: sample s is run by rank s mod N. Sums over samples (Gram matrices, row curvature)
are made by one rank each, their owner, to whom the samples' parts travel, N samples at a time:

    for the samples s, s + 1, ... s + N - 1:    every rank runs one;  deliver: all parts to their owners;  owners add them in their order

so a sum has the terms, the order and the bits that one rank gives it, on any number of ranks. Adding up partial sums would move less where
there are more tokens than columns, and would make bytes depend on how samples are shared out. What travels for the H of one block, with
T tokens of b bytes, is T b (sum of the widths K of its stages): for the 7B shape and 262,144 tokens 12.2 GB in all on any number of ranks, a
share 1 / N of it from each, of which (N - 1) / N goes to others; partial sums would be 4 N (sum of K^2) bytes, 0.69 GB a rank. Between GPUs of one host
that is some hundredths of a second, beside one for the forward pass; on CPUs the products take 10 to 100 times as long as the way.

Before tensors go, all ranks say what is coming, through gloo, and wait there for the slowest: who waits gives signs of life, and a peer
that is lost is named by `ranks.watched`, which ends the process. A rank alone has everything already; torch.distributed is not imported.

NCCL refuses ranks that share a GPU: where two do, tensors of all go by the host and gloo, and the first rank says so.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from qquant.errors import StoppedError
from qquant.ranks import ALONE as NOBODY
from qquant.ranks import BEAT, STUCK, Ranks, dealt

SAYING = 1 << 16  # bytes that a rank can say at once
ALIGNED = 512  # bytes; a sum may depend on where its terms begin
LOG = logging.getLogger(__name__)
BY_HOST = "ranks share a GPU, which NCCL refuses: what they hand each other goes by the host, through gloo"
ENOUGH = 4  # BEATs in which the watch finds out who is lost
Parcels = Sequence[Sequence[Tensor]]  # tensors by rank


class Exchange:
    """This rank among those of a build. All must call its methods alike, in the same order; with one rank they give back what they got."""

    def __init__(self, ranks: Ranks = NOBODY, device: torch.device | None = None) -> None:
        self.ranks, self.device = ranks, device or torch.device("cpu")
        self.rank, self.world, self.first = ranks.rank, ranks.world, ranks.first
        self.place = self.device  # where tensors are as they go
        self.connected = False

    # --- who does what --------------------------------------------------------------------------------------------------

    def mine(self, count: int) -> range:
        """The samples of this rank among so many."""
        return range(self.rank, count, self.world)

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Which rank makes which sum, so that none has much more to do than another; `costs` alike on all ranks."""
        return {name: rank for rank, names in enumerate(dealt(costs, self.world)) for name in names}

    # --- what is handed over --------------------------------------------------------------------------------------------

    def in_turn(self, count: int, give: Callable[[int], Parcels]) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Every one of `count` samples in order, with what its rank has for this one.

        `give`: a sample of this rank's -> tensors for each rank; called in the order of the samples.
        """
        nothing: Parcels = [()] * self.world
        for start in range(0, count, self.world):
            index = start + self.rank
            received = self.deliver(give(index) if index < count else nothing)
            for source in range(min(self.world, count - start)):
                yield start + source, received[source]

    def share(self, tensors: Sequence[Tensor]) -> Parcels:
        """The tensors of all ranks."""
        return self.deliver([tensors] * self.world)

    def in_order(self, mine: Sequence[Tensor], count: int) -> list[Tensor]:
        """The tensors of all `count` samples, in order, from those of this rank's samples."""
        parcels = self.share(mine)
        return [parcels[index % self.world][index // self.world] for index in range(count)]

    def from_rank(self, source: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What rank `source` has, on all."""
        return self.deliver([tensors if self.rank == source else ()] * self.world)[source]

    def to_first(self, tensors: Sequence[Tensor]) -> Parcels:
        """The tensors of all ranks, on the first; nothing elsewhere."""
        return self.deliver([tensors, *[()] * (self.world - 1)])

    def deliver(self, parcels: Parcels) -> Parcels:
        """What every rank has for this one; `parcels`: what this one has for every rank.

        Raises:
            StoppedError: a rank is lost.
        """
        if self.world == 1:
            return parcels
        others = [rank for rank in range(self.world) if rank != self.rank]
        coming = [told[self.rank] for told in self.say([[_kind(x) for x in parcel] for parcel in parcels])]
        outgoing = {rank: self._packed(parcels[rank]) for rank in others if parcels[rank]}
        incoming = {
            rank: torch.empty(_places(coming[rank])[-1], dtype=torch.uint8, device=self.place)
            for rank in others
            if coming[rank]
        }
        self.ranks.sent += sum(buffer.numel() for buffer in outgoing.values())
        self._moved(outgoing, incoming)
        return [
            parcels[rank] if rank == self.rank else _unpacked(incoming.get(rank), coming[rank], self.device)
            for rank in range(self.world)
        ]

    def say(self, value: Any) -> list[Any]:
        """The values of all ranks in their order: what JSON has, and little of it.

        Raises:
            StoppedError: a rank is lost.
        """
        if self.world == 1:
            return [value]
        self._connect()
        from torch import distributed

        text = json.dumps(value).encode()
        assert len(text) <= SAYING - 8
        mine = torch.zeros(SAYING, dtype=torch.uint8)
        mine[: 8 + len(text)] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        said = [torch.empty_like(mine) for _ in range(self.world)]
        try:
            work = distributed.all_gather(said, mine, async_op=True)
            pause = 2e-5
            while not work.is_completed():
                self.ranks.alive()
                time.sleep(pause)
                pause = min(1.5 * pause, 2e-3)
            work.wait()
        except RuntimeError as error:  # torch.distributed.DistError among others
            raise self._lost(error) from None
        texts = [bytes(one.numpy()) for one in said]
        return [json.loads(one[8 : 8 + int.from_bytes(one[:8], "little")]) for one in texts]

    # --- how ------------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self.connected:
            return
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast gains nothing between pairs, and hangs on some hosts
        from torch import distributed

        if shares_card(self.device, self.ranks):
            self.place = torch.device("cpu")
            if self.first:
                LOG.warning("%s", BY_HOST)
        backend = "cpu:gloo,cuda:nccl" if self.place.type == "cuda" else "gloo"
        try:
            distributed.init_process_group(
                backend,
                store=self.ranks.apart(f"exchange {self.ranks.met}"),
                rank=self.rank,
                world_size=self.world,
                timeout=timedelta(seconds=STUCK),
            )
            if self.place.type == "cuda":  # not all need be there when the first pair connects, but now
                distributed.all_reduce(torch.zeros(1, device=self.device))
        except RuntimeError as error:
            raise self._lost(error) from None
        self.connected = True

    def _packed(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors as bytes, ready to go."""
        starts = _places([_kind(x) for x in tensors])
        packed = torch.empty(starts[-1], dtype=torch.uint8, device=self.place)
        for x, start in zip(tensors, starts, strict=False):
            size = x.numel() * x.element_size()
            packed[start : start + size].view(x.dtype).view(x.shape).copy_(x)
        return packed

    def _moved(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Send and receive, all at once."""
        from torch import distributed

        ways = [distributed.P2POp(distributed.isend, buffer, rank) for rank, buffer in outgoing.items()]
        ways += [distributed.P2POp(distributed.irecv, buffer, rank) for rank, buffer in incoming.items()]
        if not ways:
            return
        try:
            for work in distributed.batch_isend_irecv(ways):
                work.wait()
        except RuntimeError as error:
            raise self._lost(error) from None
        self.ranks.alive()

    def _lost(self, error: RuntimeError) -> StoppedError:
        """What to raise when a peer is gone; before that the watch has time to end this process by its own word."""
        late = time.monotonic() + ENOUGH * BEAT
        while time.monotonic() < late and not self.ranks.lost():
            time.sleep(BEAT / 10)
        said = (str(error).splitlines() or [""])[0]
        return StoppedError(self.ranks.lost() or f"the connection to another rank broke ({said[:120]})")

    def close(self) -> None:
        """Let go of the others."""
        if self.connected:
            from torch import distributed

            distributed.destroy_process_group()
            self.connected = False


ALONE = Exchange()


def shares_card(device: torch.device, ranks: Ranks) -> bool:
    """Whether any two of the ranks compute on one GPU."""
    card = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else f"cpu of {ranks.rank}"
    return len(set(ranks.gather(card))) < ranks.world


@contextmanager
def opened(ranks: Ranks, device: torch.device) -> Iterator[Exchange]:
    """An exchange between `ranks`, that connects when something is first said."""
    exchange = Exchange(ranks, device)
    yield exchange
    if exchange.connected:
        exchange.say(None)  # nobody goes while others still read
    exchange.close()


def _kind(x: Tensor) -> list[Any]:
    return [str(x.dtype).removeprefix("torch."), list(x.shape)]


def _places(kinds: Sequence[Sequence[Any]]) -> list[int]:
    """Where tensors begin in a parcel, and its size."""
    starts = [0]
    for dtype, shape in kinds:
        size = math.prod(shape) * getattr(torch, dtype).itemsize
        starts.append(starts[-1] + -(-size // ALIGNED) * ALIGNED)
    return starts


def _unpacked(packed: Tensor | None, kinds: Sequence[Sequence[Any]], device: torch.device) -> list[Tensor]:
    if packed is None:
        return []
    packed, tensors = packed.to(device), []
    for (name, shape), start in zip(kinds, _places(kinds), strict=False):
        dtype: torch.dtype = getattr(torch, name)
        tensors.append(packed[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape))
    return tensors
