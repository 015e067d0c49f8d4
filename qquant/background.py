"""Work beside the main thread: the next value is read, and the last one written, while the present one is computed with.

    prefetch      read -> compute -> read -> compute      becomes   compute | compute | ...     one value is read ahead
                                                                    read    | read    | ...
    write_behind  compute -> write -> compute -> write    becomes   compute | compute | ...     one value is being written, or a few
                                                                    write   | write   | ...
    start_early   work -> compute -> use it               becomes   compute | use it            what takes long is begun early
                                                                    work    |
    in_parallel   work -> work -> use them -> work ...    becomes   use them | use them | ...   by as many threads as there are cores
                                                                    work     | work     |
                                                                    work     | work     |

The first two hold one value more in host memory, and no more. An error of the thread is raised in the main thread, in its turn, and no thread
outlives its `with`, whatever ends that. Threads read files, hash and write; where CUDA graphs are recorded they leave the GPU alone, since a copy
that comes from another thread breaks that. Without threads the same calls are made in place, one after another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Lock
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
Work = Callable[[], None]
Task = Callable[[], Value]  # gives a value
Tasks = Callable[[], Iterable[Task[Value]]]  # of a group, listed when its turn comes near


@contextmanager
def prefetch(read: Callable[[Key], Value], keys: Iterable[Key], threaded: bool) -> Iterator[Iterator[Value]]:
    """`read(key)` of each key in turn; with `threaded` the next one is read while the caller works on the last."""
    if not threaded:
        yield map(read, keys)
        return
    with ThreadPoolExecutor(1, "qquant-prefetch") as pool:
        yield _one_ahead(pool, read, keys)


def _one_ahead(pool: ThreadPoolExecutor, read: Callable[[Key], Value], keys: Iterable[Key]) -> Iterator[Value]:
    coming: deque[Future[Value]] = deque()
    for key in keys:
        coming.append(pool.submit(read, key))
        if len(coming) > 1:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


@contextmanager
def write_behind(threaded: bool, hands: int = 1) -> Iterator[Callable[[Work], None]]:
    """A function that takes work from any thread; with `threaded` it leaves it to one, and waits first while `hands` works are not done.

    With more hands than one works end in any order. The error of a piece of work is raised whenever another is handed over, which is not done then, and at the end of the `with`; one of
    the `with` itself goes first.
    """
    if not threaded:
        yield lambda work: work()
        return
    with ThreadPoolExecutor(hands, "qquant-write-behind") as pool:
        doing: deque[Future[None]] = deque()
        turn = Lock()

        def do(work: Work) -> None:
            with turn:
                while len(doing) >= hands:
                    doing[0].result()  # stays where it is if it failed: nothing is done after it
                    doing.popleft()
                doing.append(pool.submit(work))

        yield do
        while doing:
            doing.popleft().result()


@contextmanager
def start_early(work: Callable[[Event], Value], threaded: bool) -> Iterator[Callable[[], Value]]:
    """A function that waits for the value of `work`, which is begun now; without `threaded` it is done now.

    The event that `work` gets is set at the end of the `with`, so that it need not go on where nobody waits for it.
    """
    stop = Event()
    if not threaded:
        value = work(stop)
        yield lambda: value
        return
    with ThreadPoolExecutor(1, "qquant-start-early") as pool:
        doing = pool.submit(work, stop)
        try:
            yield doing.result
        finally:
            stop.set()


@contextmanager
def in_parallel(groups: Iterable[Tasks[Value]], threads: int) -> Iterator[Iterator[list[Value]]]:
    """The values of the works of each group in turn; so many threads do the works of as many groups, in any order.

    The first error in the order of the works is raised in the turn of its group. With one thread each group is worked on in its turn,
    in place. Torch's calls on the CPU are not spread over threads once more.
    """
    if threads <= 1:
        yield ([work() for work in group()] for group in groups)
        return
    import torch

    spread = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "qquant-in-parallel", torch.set_num_threads, (1,))
    try:
        yield _ahead(pool, groups, threads)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(spread)


def _ahead(pool: ThreadPoolExecutor, groups: Iterable[Tasks[Value]], most: int) -> Iterator[list[Value]]:
    """`most` groups are begun at a time: one long work in each keeps all threads busy."""
    coming: deque[tuple[Future[list[Task[Value]]], Sequence[Future[Value]]]] = deque()
    for group in groups:
        listed = pool.submit(_listed, group)
        coming.append((listed, [] if listed.exception() else [pool.submit(work) for work in listed.result()]))
        if len(coming) >= most:
            yield _values(*coming.popleft())
    while coming:
        yield _values(*coming.popleft())


def _listed(group: Tasks[Value]) -> list[Task[Value]]:
    return list(group())


def _values(listed: Future[list[Task[Value]]], works: Sequence[Future[Value]]) -> list[Value]:
    listed.result()  # its error, if it has one
    return [work.result() for work in works]
