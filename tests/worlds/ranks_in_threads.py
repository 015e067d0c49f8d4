"""Ranks that are threads of one process, and hand each other tensors through a board: `in_threads(3, work)` -> what `work(exchange)` gave each."""

import threading

from qquant.exchange import Exchange
from qquant.ranks import Membership, Ranks

PATIENCE = 60  # seconds


class Board:
    """What all ranks gave, and where they wait for each other."""

    def __init__(self, world):
        self.given, self.barrier = [None] * world, threading.Barrier(world, timeout=PATIENCE)


class InThreads(Exchange):
    """One of them; copies are handed over, as by any way between processes."""

    def __init__(self, rank, world, board):
        super().__init__(Ranks(Membership(rank, world, rank)))
        self.board, self.handed = board, 0

    def say(self, value):
        """The values of all."""
        self.board.given[self.rank] = value
        self.board.barrier.wait()
        said = list(self.board.given)
        self.board.barrier.wait()
        return said

    def deliver(self, parcels):
        """The parcels of all for this one."""
        self.handed += sum(x.nbytes for rank, parcel in enumerate(parcels) if rank != self.rank for x in parcel)
        return [[x.clone() for x in parcels[self.rank]] for parcels in self.say(parcels)]


def in_threads(world, work):
    """What `work(exchange)` gave every rank; the first error of any, raised."""
    board, found, wrong = Board(world), [None] * world, []

    def run(rank):
        try:
            found[rank] = work(InThreads(rank, world, board))
        except BaseException as error:  # noqa: BLE001  raised by the caller
            wrong.append(error)
            board.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise next((error for error in wrong if not isinstance(error, threading.BrokenBarrierError)), wrong[0])
    return found
