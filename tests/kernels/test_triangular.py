"""Systems with a triangular matrix by blocks, against float64; and the solvers that use them where a card does."""

from dataclasses import replace

import pytest
import torch

from qquant.algorithms import coupled, gptq
from qquant.algorithms.gram import Gram
from qquant.devices import POLICIES
from qquant.kernels import triangular
from qquant.kernels.triangular import Upper
from qquant.solve import propagate
from tests.algorithms.test_gptq import problem


@pytest.fixture
def on_a_card(monkeypatch):
    """The ways of a GPU, in blocks of 16."""
    monkeypatch.setattr(triangular, "BLOCK", 16)
    monkeypatch.setitem(POLICIES, "cpu", replace(POLICIES["cpu"], by_blocks=True))


def factor(columns, device="cpu"):
    """R of H = R'R, float64, and the same in float32 on `device`."""
    x = torch.randn(3 * columns, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))
    upper = torch.linalg.cholesky(x.T @ x / columns + 0.01 * torch.eye(columns)).mT
    return upper, upper.float().to(device)


def far(found, expected):
    return float((found.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.usefixtures("on_a_card")
@pytest.mark.parametrize("columns", [16, 40, 64, 7])
@pytest.mark.parametrize("by_columns", [True, False])
def test_both_systems(columns, by_columns):
    exact, upper = factor(columns)
    upper = upper.mT.contiguous().mT if by_columns else upper.contiguous()
    right = torch.randn(9, columns)
    expected = torch.linalg.solve_triangular(exact, right.double(), upper=True, left=False)
    assert far(Upper(upper).solve(right.clone()), expected) < 1e-5
    expected = torch.linalg.solve_triangular(exact.mT, right.double(), upper=False, left=False)
    assert far(Upper(upper).solve_transposed(right.clone()), expected) < 1e-5


@pytest.mark.usefixtures("on_a_card")
def test_blocks_are_inverted_once_for_all_systems(monkeypatch):
    inverted, solve = [], torch.linalg.solve_triangular
    monkeypatch.setattr(
        torch.linalg, "solve_triangular", lambda a, *rest, **how: inverted.append(len(a)) or solve(a, *rest, **how)
    )
    upper = Upper(factor(40)[1])
    first = [upper.solve_transposed(upper.solve(torch.ones(rows, 40))) for rows in (2, 5)]
    assert inverted == [16, 16, 8]
    assert torch.equal(first[0][0], first[0][1])
    assert far(first[1], first[0][:1].double().expand(5, -1)) < 1e-5


@pytest.mark.usefixtures("on_a_card")
def test_an_inverse_stays_triangular():
    exact, upper = factor(40)
    found = Upper(upper).solve(torch.eye(40), triangular=True)
    assert far(found, torch.linalg.inv(exact)) < 1e-5
    assert not bool(found.tril(-1).any())


def test_solvers_give_what_they_give_on_a_cpu(request):
    _, gram = problem(6, 128, 500)
    correction, root = torch.randn(6, 128), torch.linalg.cholesky(torch.eye(12) + 0.1)
    mix, slope = torch.randn(2, 3, 6), torch.randn(2, 6, 8)
    small = root[:3, :3].expand(2, 3, 3)

    def results():
        again = Gram(gram.matrix, gram.absolute, gram.squares, gram.tokens)
        ridge = propagate._ridge(again)
        return (
            gptq.factorize(again, 0.01).upper,
            propagate._against(ridge)(correction.clone()),
            coupled._pull(small, mix, slope),
        )

    expected = results()
    request.getfixturevalue("on_a_card")
    for found, plain in zip(results(), expected, strict=True):
        assert far(found, plain.double()) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [3000, 4096])
def test_a_gpu_is_about_as_precise_as_float32(columns):
    exact, upper = factor(columns, "cuda")
    right = torch.randn(500, columns)
    expected = torch.cholesky_solve(right.double().T, exact.mT).T
    plain = torch.cholesky_solve(right.cuda().T, upper.mT).T
    again = Upper(upper)
    found = again.solve_transposed(again.solve(right.cuda()))
    print(f"{columns} columns: float32 {far(plain, expected):.1e}, by blocks {far(found, expected):.1e}")
    assert far(found, expected) < 10 * far(plain, expected) + 1e-5
