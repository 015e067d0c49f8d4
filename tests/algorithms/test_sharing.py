"""A problem that ranks solve together has the answer of one of them alone, bit by bit, and each has a part of the work."""

import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qquant import devices
from qquant.algorithms import descent, gptq, sharing
from qquant.algorithms.gram import Gram
from qquant.algorithms.grid import UniformGrid
from qquant.algorithms.problem import Problem, solve
from qquant.formats.gguf import quantize
from qquant.kernels.gptq_block import gptq_block
from qquant.recipe.solvers import SOLVERS
from tests.worlds.ranks_in_threads import in_threads

STEPS = SOLVERS["gptq"].steps
LINEARS = {"q": 272, "k": 128, "v": 160}  # rows
COUPLED = (256, 16, 128, 160)  # rows of each G
GRIDS = {
    "symmetric": UniformGrid(4, 32, True, "importance"),
    "asymmetric": UniformGrid(4, 32, False, "importance"),
    "q4_k": quantize.grid("q4_k"),
    "q3_k": quantize.grid("q3_k"),
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Several blocks of columns; BLAS as a rank of a build has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(descent, "BLOCK", 192)
    yield
    torch.set_num_threads(threads)


def given(grid, exchange=None, linears=LINEARS, coupled=COUPLED, columns=256, sweeps=2):
    """The same problem whenever it is asked for."""
    made = torch.Generator().manual_seed(5)
    x = torch.randn(900, columns, generator=made) @ (
        torch.eye(columns) + torch.randn(columns, columns, generator=made) / 16
    )
    gram = Gram.zeros(columns)
    gram.add(x)
    rows = []
    for size in coupled:
        g = torch.randn(2 * size, size, generator=made)
        rows.append(g.T @ g / (2 * size) + 0.3)
    weights = {name: 0.02 * torch.randn(size, columns, generator=made) for name, size in linears.items()}
    settings = SimpleNamespace(damping=0.01, sweeps=sweeps)
    return Problem(weights, gram, grid, settings, rows, alone=True, **({"exchange": exchange} if exchange else {}))


def told(solution):
    """Everything that a solution says, to be compared."""
    params = {name: dict(params.stored()) for name, params in solution.params.items()}
    return solution.codes, params, solution.damping, solution.steps, solution.fallbacks


def equal(one, other):
    codes, params, *facts = one
    return (
        torch.equal(codes, other[0])
        and all(torch.equal(x, other[1][name][key]) for name, stored in params.items() for key, x in stored.items())
        and facts == list(other[2:])
    )


@pytest.mark.parametrize(
    ("grid", "world"),
    [("symmetric", 2), ("symmetric", 3), ("symmetric", 8), ("asymmetric", 3), ("q4_k", 4), ("q3_k", 3)],
)
def test_ranks_find_what_one_finds(grid, world):
    """On linears that no rank's rows end with, coupled rows of several sizes, and subsets of fewer rows than ranks could take."""
    alone = told(solve(given(GRIDS[grid]), STEPS))
    found = in_threads(world, lambda exchange: told(solve(given(GRIDS[grid], exchange), STEPS)))
    for rank, theirs in enumerate(found):
        assert equal(alone, theirs), rank


def test_ranks_find_what_one_finds_where_there_are_fewer_rows_than_they_could_share():
    few = {"linears": {"a": 20}, "coupled": (20,), "columns": 64}
    alone = told(solve(given(GRIDS["symmetric"], **few), STEPS))
    for theirs in in_threads(3, lambda exchange: told(solve(given(GRIDS["symmetric"], exchange, **few), STEPS))):
        assert equal(alone, theirs)


def test_a_linear_that_ends_worse_is_rounded_on_all_ranks_alike(monkeypatch):
    """What decides is the error of all its rows."""
    step = gptq.step

    def worse(problem, earlier):
        solution = step(problem, earlier)
        rows = list(problem.linears)
        for name, codes in problem.split(solution.codes).items():
            if name == "k" and rows:
                codes.fill_(7)
        return solution

    monkeypatch.setattr(gptq, "step", worse)
    alone = told(solve(given(GRIDS["symmetric"], sweeps=0), STEPS))
    assert list(alone[4]) == ["k"]
    for theirs in in_threads(3, lambda exchange: told(solve(given(GRIDS["symmetric"], exchange, sweeps=0), STEPS))):
        assert equal(alone, theirs)


@pytest.mark.parametrize(("world", "times"), [(1, 4), (2, 2)])
def test_ranks_factor_the_blocks_of_h_once_for_descent_and_coupled_rows(world, times, monkeypatch):
    """Shifted and not; every rank needs all of them. One rank alone spares the memory."""
    factored, seen = descent._factored, Counter()

    def counted(gram, size):
        seen[threading.get_ident()] += 1
        return factored(gram, size)

    monkeypatch.setattr(descent, "_factored", counted)
    in_threads(world, lambda exchange: solve(given(GRIDS["symmetric"], exchange), STEPS))
    assert set(seen.values()) == {times}
    monkeypatch.setattr(descent, "WIDE", 128)
    seen.clear()
    in_threads(world, lambda exchange: solve(given(GRIDS["symmetric"], exchange), STEPS))
    assert set(seen.values()) == {4}, "wide ones are not kept"


@pytest.mark.parametrize(("free", "times"), [(1 << 40, 2), (1 << 20, 4)])
def test_a_card_that_has_room_keeps_them_too(free, times, monkeypatch):
    alone, factored, seen = told(solve(given(GRIDS["symmetric"]), STEPS)), descent._factored, []
    monkeypatch.setitem(devices.POLICIES, "cpu", replace(devices.POLICIES["cpu"], apart=True))
    monkeypatch.setattr("qquant.algorithms.problem.free_memory", lambda device: free)
    monkeypatch.setattr(descent, "_factored", lambda gram, size: seen.append(size) or factored(gram, size))
    assert equal(alone, told(solve(given(GRIDS["symmetric"]), STEPS)))
    assert len(seen) == times


def test_each_rank_has_its_part_of_the_work(monkeypatch):
    """Rows that go through the column loop, by rank: of two ranks half, of four a quarter or a little more."""
    most = {}
    for world in (1, 2, 4):
        seen = Counter()

        def counted(w, *rest, seen=seen):
            seen[threading.get_ident()] += w.numel()
            return gptq_block(w, *rest)

        def work(exchange):
            return solve(given(GRIDS["symmetric"], exchange, {"a": 1024}, (1024,)), STEPS)

        monkeypatch.setattr(descent, "gptq_block", counted)
        monkeypatch.setattr(gptq, "gptq_block", counted)
        in_threads(world, work)
        most[world] = max(seen.values())
    assert most[2] == most[1] / 2
    assert most[4] == most[1] / 4


def test_spans_are_even_and_none_is_short():
    assert sharing.spans(96, 3, 16) == [slice(0, 32), slice(32, 64), slice(64, 96)]
    assert sharing.spans(100, 2, 16) == [slice(0, 48), slice(48, 100)]
    assert sharing.spans(40, 3, 16) == [slice(0, 16), slice(16, 40), slice(40, 40)]
    assert sharing.spans(9, 2, 16) == [slice(0, 9), slice(9, 9)]
    for count in range(200):
        for world in (1, 2, 3, 4, 8):
            found = sharing.spans(count, world, 16)
            assert [span.start for span in found] == [0, *(span.stop for span in found[:-1])]
            assert found[-1].stop == count
            sizes = [span.stop - span.start for span in found]
            assert all(size == 0 or size >= min(16, count) for size in sizes)
            assert max(sizes) - min(sizes) < 32


def test_nothing_is_shared_where_one_machine_gives_rows_other_bits(monkeypatch):
    tried = []

    def keeps(columns, world, device, threads):
        tried.append((columns, world))
        return len(tried) != 2

    monkeypatch.setattr(sharing, "keeps_bits", keeps)
    assert in_threads(3, lambda exchange: sharing.shares(64, exchange)) == [False] * 3
    assert in_threads(3, lambda exchange: sharing.shares(64, exchange)) == [True] * 3
    assert tried == [(64, 3)] * 6


def test_it_is_seen_where_rows_have_other_bits(monkeypatch):
    """As where a BLAS sums in another order for fewer rows."""
    assert sharing.keeps_bits.__wrapped__(128, 2, "cpu", 1)
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: matmul(a, b) if len(a) > 100 else matmul(a.flip(1), b.flip(0))
    )
    assert not sharing.keeps_bits.__wrapped__(128, 2, "cpu", 1)
