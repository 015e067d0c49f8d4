"""Threads beside the main one: order, how far they run ahead, whose error is raised when, and that none is left."""

import threading
import time

import pytest
import torch

from qquant.background import in_parallel, prefetch, start_early, write_behind
from qquant.devices import threads_help


def threads_left():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("qquant-")]


def eventually(true):
    """Whether it becomes true."""
    end = time.monotonic() + 5
    while not true() and time.monotonic() < end:
        time.sleep(0.001)
    return true()


@pytest.mark.parametrize("threaded", [True, False])
def test_values_come_in_the_order_of_the_keys(threaded):
    with prefetch(lambda key: key * key, reversed(range(5)), threaded) as values:
        assert list(values) == [16, 9, 4, 1, 0]
    with prefetch(str, [], threaded) as values:
        assert list(values) == []


def test_one_value_is_read_ahead_and_no_more():
    begun = []
    with prefetch(lambda key: begun.append(key) or key, range(9), threaded=True) as values:
        for key in range(4):
            assert next(values) == key
            assert eventually(lambda key=key: begun == list(range(key + 2)))
            time.sleep(0.01)
            assert begun == list(range(key + 2))
    assert threads_left() == []


def test_nothing_is_read_ahead_without_threads():
    begun = []
    with prefetch(lambda key: begun.append(key) or key, range(9), threaded=False) as values:
        next(values)
        assert begun == [0]


@pytest.mark.parametrize("threaded", [True, False])
def test_an_error_of_reading_comes_in_its_turn(threaded):
    def read(key):
        if key == 2:
            raise OSError("damaged")
        return key

    found = []
    with pytest.raises(OSError, match="damaged"), prefetch(read, range(5), threaded) as values:
        found.extend(values)
    assert found == [0, 1]
    assert threads_left() == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_thread_is_left_when_the_caller_fails(error):
    done = []
    with pytest.raises(error), prefetch(range, range(5), threaded=True) as values, write_behind(threaded=True) as later:  # noqa: PT012
        next(values)
        later(lambda: (time.sleep(0.05), done.append(1)))
        raise error
    assert done == [1]
    assert threads_left() == []


def one_at_a_time():
    """Work that must not be done beside other such work, and what was done."""
    running, done = [], []

    def work(number):
        running.append(number)
        assert running == [number]
        time.sleep(0.002)
        done.append(running.pop())

    return work, done


@pytest.mark.parametrize("threaded", [True, False])
def test_work_is_done_in_order_one_at_a_time(threaded):
    work, done = one_at_a_time()

    with write_behind(threaded) as later:
        for number in range(5):
            later(lambda number=number: work(number))
            assert len(done) >= (number if threaded else number + 1)
    assert done == [0, 1, 2, 3, 4]
    assert threads_left() == []


def test_work_comes_from_several_threads_and_is_done_one_after_another():
    work, done = one_at_a_time()

    with write_behind(threaded=True) as later:

        def give(first):
            for number in range(first, first + 20):
                later(lambda number=number: work(number))

        givers = [threading.Thread(target=give, args=(first,)) for first in (0, 100, 200)]
        for giver in givers:
            giver.start()
        for giver in givers:
            giver.join()
    assert sorted(done) == [*range(20), *range(100, 120), *range(200, 220)]
    assert threads_left() == []


def test_several_hands_do_as_much_at_a_time_and_all_is_done():
    running, most, done, lock = [], [], [], threading.Lock()

    def work(number):
        with lock:
            running.append(number)
            most.append(len(running))
        time.sleep(0.02)
        with lock:
            running.remove(number)
            done.append(number)

    with write_behind(threaded=True, hands=3) as later:
        for number in range(9):
            later(lambda number=number: work(number))
    assert sorted(done) == list(range(9))
    assert 1 < max(most) <= 3


def test_an_error_of_one_of_several_hands_is_raised():
    def fail():
        raise OSError("full")

    with pytest.raises(OSError, match="full"), write_behind(threaded=True, hands=3) as later:  # noqa: PT012
        later(fail)
        later(lambda: None)


def test_an_error_of_work_is_raised_by_the_next_call_or_at_the_end():
    def fail():
        raise OSError("full")

    reached = []
    with pytest.raises(OSError, match="full"), write_behind(threaded=True) as later:  # noqa: PT012
        later(fail)
        reached.append("next")
        later(lambda: reached.append("never"))
    assert reached == ["next"]
    with pytest.raises(OSError, match="full"), write_behind(threaded=True) as later:
        later(fail)
    assert threads_left() == []


def test_after_an_error_nothing_more_is_done():
    """Though the caller should try again."""
    done = []

    def fail():
        raise MemoryError("first")

    with pytest.raises(MemoryError, match="first"), write_behind(threaded=True) as later:  # noqa: PT012
        later(fail)
        for _ in range(3):
            with pytest.raises(MemoryError, match="first"):
                later(lambda: done.append(1))
    assert done == []


def test_an_error_of_the_caller_goes_before_one_of_its_work():
    def fail():
        raise OSError("full")

    with pytest.raises(ValueError, match="mine"), write_behind(threaded=True) as later:  # noqa: PT012
        later(fail)
        raise ValueError("mine")


def test_what_is_worked_on_is_not_held():
    """A value that was handed out, and work that was done, are let go."""
    import weakref

    class Value:
        pass

    with prefetch(lambda _: Value(), range(3), threaded=True) as values:
        value = weakref.ref(next(values))
        assert eventually(lambda: value() is None)


@pytest.mark.parametrize("threaded", [True, False])
def test_what_is_begun_early_gives_its_value_or_its_error(threaded):
    with start_early(lambda stop: 3, threaded) as value:
        assert value() == 3

    def fail(stop):
        raise OSError("full")

    with pytest.raises(OSError, match="full"), start_early(fail, threaded) as value:
        value()
    assert threads_left() == []


def test_what_is_begun_early_is_told_that_nobody_waits():
    stopped = []
    with pytest.raises(ValueError, match="mine"), start_early(lambda stop: stopped.append(stop.wait(5)), threaded=True):
        raise ValueError("mine")
    assert stopped == [True]
    assert threads_left() == []


@pytest.mark.parametrize("threads", [1, 3])
def test_works_done_abreast_give_their_values_in_order(threads):
    def group(number):
        return lambda: (lambda work=work: (number, work) for work in range(number + 1))

    spread = torch.get_num_threads()
    with in_parallel(map(group, range(4)), threads) as values:
        assert list(values) == [[(number, work) for work in range(number + 1)] for number in range(4)]
    with in_parallel([], threads) as values:
        assert list(values) == []
    assert torch.get_num_threads() == spread
    assert threads_left() == []


def test_works_of_as_many_groups_as_threads_are_done_at_once():
    """A group with one long work, like an artifact of one large file, does not hold up the others; without threads nothing is begun early."""
    begun, met = [], threading.Barrier(4, timeout=30)

    def group(number):
        def works():
            begun.append(number)
            return [met.wait]

        return works

    with in_parallel(map(group, range(8)), threads=4) as values:
        assert sorted(number for _ in range(4) for number in next(values)) == [0, 1, 2, 3]
        assert len(begun) < 8, "a group is listed when its turn comes near"
        assert len(list(values)) == 4
    begun.clear()
    met = threading.Barrier(1)
    with in_parallel(map(group, (2, 3)), threads=1) as values:
        next(values)
        assert begun == [2]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("place", ["listing", "work"])
def test_the_first_error_in_order_is_raised_in_the_turn_of_its_group(threads, place):
    """Those after it come earlier; what has not begun is not done."""
    done = []

    def fail(after, what):
        time.sleep(after)
        raise OSError(what)

    def group(number):
        def works():
            if number == 1 and place == "listing":
                fail(0, "first")
            slow = [lambda: fail(0.05, "first")] if number == 1 else []
            return [lambda: done.append(number), *slow, *[lambda: fail(0, "later")] * (number == 1)]

        return works

    found = []
    with pytest.raises(OSError, match="first"), in_parallel(map(group, range(9)), threads) as values:
        found.extend(values)
    assert found == [[None]]
    assert max(done) < 4
    assert threads_left() == []


def test_works_that_nobody_waits_for_are_not_begun():
    done = []
    works = [lambda: (time.sleep(0.01), done.append(1)) for _ in range(100)]
    with pytest.raises(ValueError, match="mine"), in_parallel([lambda: works] * 2, threads=2) as values:  # noqa: PT012
        next(values)
        raise ValueError("mine")
    assert 100 <= len(done) < 120
    assert threads_left() == []


def test_threads_pay_on_a_gpu():
    assert threads_help(torch.device("cuda"))
    assert not threads_help(torch.device("cpu"))
