"""Functions recorded as CUDA graphs: what they give is what the function gives, whichever of their arguments changed."""

import pytest
import torch

from qquant.kernels.replay import KEPT, Replay, recorded


def scaled(count, x, y):
    """Something with a loop, a product and two results."""
    total = x.clone()
    for _ in range(count):
        total = total @ y
    return total, total.sum(1)


def test_elsewhere_it_is_the_function():
    replay = Replay(scaled)
    x, y = torch.rand(3, 4), torch.rand(4, 4)
    for _ in range(3):
        assert all(map(torch.equal, replay(2, x, y), scaled(2, x, y)))
    assert not replay.recordings


@pytest.mark.gpu
def test_a_recording_sees_what_changed():
    replay = Replay(scaled)
    y = torch.rand(4, 4, device="cuda")
    for turn in range(6):
        x = torch.rand(3, 4, device="cuda")
        if turn == 4:
            y *= 2  # the same tensor, changed in place
        if turn == 5:
            y = torch.rand(4, 4, device="cuda")
        found = [value.clone() for value in replay(2, x, y)]
        assert all(map(torch.equal, found, scaled(2, x, y)))
    assert list(replay.recordings.values()) != [None]
    assert torch.equal(replay(3, x, y)[0], scaled(3, x, y)[0])  # another value, another recording
    assert len(replay.recordings) == 2
    replay.forget()
    assert not replay.recordings


@pytest.mark.gpu
def test_only_the_last_recordings_are_kept():
    replay = Replay(scaled)
    for size in range(1, KEPT + 4):
        x, y = torch.rand(size, 4, device="cuda"), torch.rand(4, 4, device="cuda")
        for _ in range(3):
            assert torch.equal(replay(1, x, y)[0], scaled(1, x, y)[0])
    assert len(replay.recordings) == KEPT


@pytest.mark.gpu
def test_recorded_work_reads_what_stands_there_when_it_is_replayed():
    """As answers and the speed check use it: the same tensors, other values; and what cannot be recorded is an error."""
    x, y, into = torch.rand(3, 4, device="cuda"), torch.rand(4, 4, device="cuda"), torch.zeros(3, device="cuda")

    def work():
        into.copy_(scaled(2, x, y)[1])

    work()
    again = recorded(work)
    for _ in range(3):
        x.uniform_()
        again()
        assert torch.equal(into, scaled(2, x, y)[1])
    with pytest.raises(RuntimeError):
        recorded(lambda: float(into.sum()))
    assert torch.rand(3, device="cuda").isfinite().all()  # whoever draws numbers after a failure
