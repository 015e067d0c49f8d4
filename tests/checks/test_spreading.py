"""A check on several ranks: the same numbers to the last bit, whoever read which window."""

import math

import numpy as np
import pytest
import torch

from qquant.checks import behaviour, spreading
from qquant.checks.behaviour import AnswerPairs, TokenLoss
from qquant.checks.fidelity import Peaks, Scored, measure
from qquant.progress import Quiet
from qquant.report.record import AnswerCounts, AnswerRun, Answers
from qquant.source.checkpoint import Checkpoint
from tests.checks.test_fidelity import CPU, Rolled
from tests.test_ranks import on_ranks


@pytest.mark.parametrize("first", [0, 12])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_windows_of_all_ranks_are_those_of_one(built, monkeypatch, world, first):
    """Seven windows in tiles of two: the last tile is smaller, and of five ranks one has nothing to read."""
    monkeypatch.setattr("qquant.checks.fidelity.TILE", 2 * (23 - first))
    monkeypatch.setattr("qquant.checks.spreading.TILE", 2 * (23 - first))
    source = Checkpoint.open(built[0])
    artifacts = {"a": Rolled(source), "b": source}
    windows = torch.randint(0, 8000, (7, 24), generator=torch.Generator().manual_seed(0))
    text, peaks = Scored(windows, first, 8000), Peaks()
    whole = measure(source, artifacts, text, CPU, Quiet(), peaks)

    def work(group):
        mine, read = Peaks(), []

        def some(part):
            read.append(len(part.windows))
            return measure(source, artifacts, part, CPU, Quiet(), mine)

        return spreading.windows(some, text, ["a", "b"], group), spreading.largest(mine, group), sum(read)

    found = on_ranks(world, work)
    assert sum(count for _, _, count in found) == 7
    assert found[0][2] > 0
    for numbers, largest, _ in found:
        assert largest.largest == peaks.largest
        for name in ("a", "b"):
            for key, column in vars(whole[name]).items():
                assert torch.equal(getattr(numbers[name], key), column), (name, key)


def test_a_peak_that_is_no_number_stays():
    def work(group):
        return spreading.largest(Peaks({(0, 1): math.nan if group.rank == 1 else 3.0, (group.rank, 0): 2.0}), group)

    for found in on_ranks(3, work):
        assert math.isnan(found.largest[0, 1])
        assert {key: peak for key, peak in found.largest.items() if key != (0, 1)} == {(r, 0): 2.0 for r in range(3)}


def test_every_artifact_is_asked_by_one_rank():
    sizes = {"a": 5, "b": 3, "c": 2, "d": 1}
    hands = on_ranks(2, lambda group: spreading.mine(sizes, group))
    assert sorted(hands[0] + hands[1]) == list("abcd")
    assert on_ranks(1, lambda group: spreading.mine(sizes, group)) == [list("abcd")]


def test_answers_and_problems_are_those_of_all():
    counts = AnswerCounts(3, 1.0, 0, 0, 0, 0, 0)
    run = AnswerRun(**vars(counts), dtype="bfloat16", worse=("runs",), baseline=counts)

    def work(group):
        mine = {f"artifact {group.rank}": Answers((run,))} if group.rank < 2 else {}
        problems = spreading.problems({f"p{group.rank}": "broken"} if group.rank else {}, group)
        return spreading.answers(mine, bool(mine), group), spreading.answers({}, group.rank == 1, group), problems

    for answers, none, problems in on_ranks(3, work):
        assert answers == {"artifact 0": Answers((run,)), "artifact 1": Answers((run,))}
        assert none == {}
        assert problems == {"p1": "broken", "p2": "broken"}


def test_questions_are_those_of_all():
    read = TokenLoss(np.array([0.1, math.inf]), np.array([1.0, 1 / 3]))
    kinds = {
        "a": [AnswerPairs("calls", [True, False], [True, True], read)],
        "b": [AnswerPairs("stops", [True], [False])],
    }

    def work(group):
        return behaviour.of_all({} if group.rank == 2 else {"ab"[group.rank]: kinds["ab"[group.rank]]}, group)

    for found in on_ranks(3, work):
        assert set(found) == {"a", "b"}
        assert found["b"] == kinds["b"]
        (one,) = found["a"]
        assert (one.name, one.right, one.right_baseline) == ("calls", [True, False], [True, True])
        assert one.read.kl.tolist() == read.kl.tolist()
        assert one.read.same_top.tolist() == read.same_top.tolist()
