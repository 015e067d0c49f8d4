"""Threads beside the main one: order, how far they run ahead, whose error is raised when, and that none is left."""

import threading
import time

import pytest
import torch

from qquant.background import ahead, behind, beside, pays


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("qquant-")]


def eventually(true):
    """Whether it becomes true."""
    end = time.monotonic() + 5
    while not true() and time.monotonic() < end:
        time.sleep(0.001)
    return true()


@pytest.mark.parametrize("threaded", [True, False])
def test_values_come_in_the_order_of_the_keys(threaded):
    with ahead(lambda key: key * key, reversed(range(5)), threaded) as values:
        assert list(values) == [16, 9, 4, 1, 0]
    with ahead(str, [], threaded) as values:
        assert list(values) == []


def test_one_value_is_read_ahead_and_no_more():
    begun = []
    with ahead(lambda key: begun.append(key) or key, range(9), threaded=True) as values:
        for key in range(4):
            assert next(values) == key
            assert eventually(lambda key=key: begun == list(range(key + 2)))
            time.sleep(0.01)
            assert begun == list(range(key + 2))
    assert threads() == []


def test_nothing_is_read_ahead_without_threads():
    begun = []
    with ahead(lambda key: begun.append(key) or key, range(9), threaded=False) as values:
        next(values)
        assert begun == [0]


@pytest.mark.parametrize("threaded", [True, False])
def test_an_error_of_reading_comes_in_its_turn(threaded):
    def read(key):
        if key == 2:
            raise OSError("damaged")
        return key

    found = []
    with pytest.raises(OSError, match="damaged"), ahead(read, range(5), threaded) as values:
        found.extend(values)
    assert found == [0, 1]
    assert threads() == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_thread_is_left_when_the_caller_fails(error):
    done = []
    with pytest.raises(error), ahead(range, range(5), threaded=True) as values, behind(threaded=True) as later:  # noqa: PT012
        next(values)
        later(lambda: (time.sleep(0.05), done.append(1)))
        raise error
    assert done == [1]
    assert threads() == []


@pytest.mark.parametrize("threaded", [True, False])
def test_work_is_done_in_order_one_at_a_time(threaded):
    done, running = [], []

    def work(number):
        running.append(number)
        assert running == [number]
        time.sleep(0.002)
        done.append(running.pop())

    with behind(threaded) as later:
        for number in range(5):
            later(lambda number=number: work(number))
            assert len(done) >= (number if threaded else number + 1)
    assert done == [0, 1, 2, 3, 4]
    assert threads() == []


def test_an_error_of_work_is_raised_by_the_next_call_or_at_the_end():
    def fail():
        raise OSError("full")

    reached = []
    with pytest.raises(OSError, match="full"), behind(threaded=True) as later:  # noqa: PT012
        later(fail)
        reached.append("next")
        later(lambda: reached.append("never"))
    assert reached == ["next"]
    with pytest.raises(OSError, match="full"), behind(threaded=True) as later:
        later(fail)
    assert threads() == []


def test_an_error_of_the_caller_goes_before_one_of_its_work():
    def fail():
        raise OSError("full")

    with pytest.raises(ValueError, match="mine"), behind(threaded=True) as later:  # noqa: PT012
        later(fail)
        raise ValueError("mine")


def test_what_is_worked_on_is_not_held():
    """A value that was handed out, and work that was done, are let go."""
    import weakref

    class Value:
        pass

    with ahead(lambda _: Value(), range(3), threaded=True) as values:
        value = weakref.ref(next(values))
        assert eventually(lambda: value() is None)


@pytest.mark.parametrize("threaded", [True, False])
def test_what_is_begun_early_gives_its_value_or_its_error(threaded):
    with beside(lambda stop: 3, threaded) as value:
        assert value() == 3

    def fail(stop):
        raise OSError("full")

    with pytest.raises(OSError, match="full"), beside(fail, threaded) as value:
        value()
    assert threads() == []


def test_what_is_begun_early_is_told_that_nobody_waits():
    stopped = []
    with pytest.raises(ValueError, match="mine"), beside(lambda stop: stopped.append(stop.wait(5)), threaded=True):
        raise ValueError("mine")
    assert stopped == [True]
    assert threads() == []


def test_threads_pay_on_a_gpu():
    assert pays(torch.device("cuda"))
    assert not pays(torch.device("cpu"))
