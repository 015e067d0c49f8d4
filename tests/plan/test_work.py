"""What a plan counts is what the solver and the streams do: their products, factors and column loops, counted while they run."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qquant.algorithms import coupled, descent, gptq
from qquant.algorithms.gram import Gram
from qquant.algorithms.grid import UniformGrid
from qquant.algorithms.problem import Problem, solve
from qquant.devices import policy
from qquant.plan import work
from qquant.plan.work import Sizes, Work
from qquant.recipe.solvers import SOLVERS
from qquant.solve import backward

CPU = torch.device("cpu")
SIZES = Sizes(policy(CPU).swept, policy(CPU).refitted)
PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0, "baddbmm": 1}  # name -> place of the first factor


class Counting(TorchDispatchMode):
    """Multiplications and additions of the products, and of the factors, that run within it."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            a, b = args[PRODUCTS[name] : PRODUCTS[name] + 2]
            self.found["exact"] += 2 * a.numel() * b.shape[-1]
        elif name == "linalg_cholesky_ex":
            self.found["factor"] += args[0].numel() * args[0].shape[-1] / 3
        elif name == "linalg_solve_triangular":
            self.found["factor"] += args[0].shape[-1] * args[1].numel()
        elif name == "_linalg_solve_ex":
            self.found["factor"] += 2 / 3 * args[0].numel() * args[0].shape[-1]
        return func(*args, **(kwargs or {}))


def counted(linears, columns, sweeps, curved, monkeypatch):
    """What `solve` does with random linears of so many rows each."""
    made = torch.Generator().manual_seed(3)
    gram = Gram.zeros(columns)
    gram.add(torch.randn(2 * columns, columns, generator=made))
    weights = {str(name): torch.randn(rows, columns, generator=made) for name, rows in enumerate(linears)}
    spans = [min(work.SPAN, rows - start) for rows in linears for start in range(0, rows, work.SPAN)]
    rows = [torch.eye(span) + 0.1 for span in spans] if curved else None
    grid = UniformGrid(4, 128, True, "importance")
    problem = Problem(weights, gram, grid, SimpleNamespace(damping=0.01, sweeps=sweeps), rows, alone=True)
    mode = Counting()
    for module in (gptq, descent):
        inner = module.gptq_block

        def looped(w, *more, inner=inner):
            mode.found["columns"] += w.shape[1]
            mode.found["cells"] += w.numel()
            return inner(w, *more)

        monkeypatch.setattr(module, "gptq_block", looped)
    with mode:
        solve(problem, SOLVERS["gptq"].steps)
    return mode.found


@pytest.mark.parametrize(
    ("linears", "columns", "sweeps", "curved"),
    [
        ((256,), 512, 0, False),
        ((384, 128), 512, 2, False),
        ((384, 384, 128), 512, 2, True),
        ((256,), 2048, 2, True),
        ((4096,), 128, 1, True),
    ],
)
def test_a_solve_is_counted_as_it_is_done(linears, columns, sweeps, curved, monkeypatch):
    found = counted(linears, columns, sweeps, curved, monkeypatch)
    told = work.solving([(rows, columns) for rows in linears], sweeps, curved, SIZES)
    assert told.columns == found["columns"]
    assert told.cells == found["cells"]
    assert told.exact == pytest.approx(found["exact"], rel=0.15)
    assert told.factor == pytest.approx(found["factor"], rel=0.15)


def test_constants_are_those_of_the_code():
    assert work.PARTS == coupled.PARTS
    assert work.BLOCK == descent.BLOCK
    assert work.SPAN == backward.ROWS


def test_large_tensors_are_told_from_those_in_the_caches():
    assert work.passes(8.0, 1 << work.CACHED) == Work(elements=8.0)
    assert work.passes(8.0, 1 << work.FRESH) == Work(large=8.0)
    between = work.passes(8.0, 1 << (work.CACHED + 1))
    assert between.elements + between.large == pytest.approx(8.0)
    assert 0 < between.large < between.elements


def test_work_adds_up_kind_by_kind():
    assert Work(exact=1, cells=2) + Work(exact=3) == Work(exact=4, cells=2)
    assert Work.of([Work(factor=1), Work(factor=2)]) * 2 == Work(factor=6)
