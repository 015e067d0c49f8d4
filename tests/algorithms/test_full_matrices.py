"""How many matrices [K, K] the solvers hold: of a wide linear each takes gigabytes. The bits are those of plain formulas."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qquant import devices
from qquant.algorithms import coupled, descent, gptq
from qquant.algorithms import gram as algorithms_gram
from qquant.algorithms.gram import with_damping
from qquant.algorithms.grid import UniformGrid
from qquant.algorithms.problem import Problem, solve, stacked
from qquant.kernels import gram as kernels_gram
from qquant.kernels import product
from qquant.kernels.product import SplitMatrix, halves
from tests.algorithms.test_gptq import problem
from tests.worlds.allocations import Allocations

ROWS, COLUMNS = 24, 192


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Blocks and pieces that are small beside the matrix."""
    monkeypatch.setattr(descent, "BLOCK", 64)
    monkeypatch.setattr(gptq, "PIECE", 1000)
    monkeypatch.setattr(algorithms_gram, "PIECE", 1000)


@pytest.fixture
def asked():
    """GPTQ with everything that follows it."""
    weight, gram = problem(ROWS, COLUMNS, 600)
    mixed = torch.randn(12, 12, generator=torch.Generator().manual_seed(5))
    rows = [mixed @ mixed.T + torch.eye(12)] * 2
    settings = SimpleNamespace(damping=0.01, sweeps=1)
    return Problem({"a": weight}, gram, UniformGrid(4, 32, True, "importance"), settings, rows, alone=True)


@pytest.fixture
def by_halves(monkeypatch):
    """Products as on a GPU, of upper and lower halves."""
    monkeypatch.setattr(descent, "split_matrix", lambda matrix: SplitMatrix(None, halves(matrix)))
    monkeypatch.setattr(descent, "split_in_place", lambda matrix: SplitMatrix(None, halves(matrix, matrix)))
    monkeypatch.setattr(product, "PIECE", 1000)


@pytest.fixture
def on_a_card(by_halves, monkeypatch):
    """And of the lower halves, which a card multiplies as they are, nothing is widened."""
    del by_halves
    monkeypatch.setattr(product, "_add_lower", lambda *_: None)


def test_the_factor_has_the_bits_of_the_formula(asked):
    matrix = asked.gram.matrix
    order = torch.argsort(matrix.diagonal(), descending=True, stable=True)
    back = order.flip(0)
    damped = matrix[back][:, back]
    damped.diagonal().add_(0.01 * float(matrix.diagonal().mean()))
    root = torch.linalg.cholesky(damped).flip(0, 1)
    upper = torch.linalg.solve_triangular(root, torch.eye(COLUMNS), upper=True)
    assert torch.equal(gptq.factorize(asked.gram, 0.01).upper, upper)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_in_another_order_takes_a_matrix(transposed):
    """Indices of every entry are 8 bytes each, and a GPU writes two of them: 19 GB of each for 110B's down projection."""
    generator = torch.Generator().manual_seed(3)
    matrix, order = torch.randn(COLUMNS, COLUMNS, generator=generator), torch.randperm(COLUMNS, generator=generator)
    matrix = matrix.mT if transposed else matrix
    with Allocations() as seen:
        placed = algorithms_gram.reordered(matrix, order)
    assert torch.equal(placed, matrix[order[:, None], order])
    assert placed.is_contiguous()
    assert seen.peak < 1.2 * placed.nbytes


def test_a_matrix_in_another_order_is_turned_as_it_is_written():
    generator = torch.Generator().manual_seed(4)
    matrix, order = torch.randn(COLUMNS, COLUMNS, generator=generator), torch.randperm(COLUMNS, generator=generator)
    with Allocations() as seen:
        placed = algorithms_gram.reordered(matrix, order, transposed=True)
    assert torch.equal(placed, matrix.mT[order[:, None], order])
    assert placed.is_contiguous()
    assert seen.peak < 1.2 * placed.nbytes


@pytest.mark.parametrize("count", [0, 1, 2, 7, 2000, 2001, 6543])
def test_values_are_turned_round_in_place(count):
    values = torch.arange(count)
    wanted = values.flip(0)
    gptq._reverse(values)
    assert torch.equal(values, wanted)


def test_damping_is_taken_back(asked):
    before = asked.gram.matrix.clone()
    with with_damping(asked.gram.matrix, 0.01) as damped:
        assert torch.equal(damped - torch.diag(damped.diagonal()), before - torch.diag(before.diagonal()))
        assert bool((damped.diagonal() > before.diagonal()).all())
    assert torch.equal(asked.gram.matrix, before)


def test_a_solve_holds_three_matrices(asked):
    """H, its root and the factor in GPTQ; then H and its columns in the order of a sweep."""
    with Allocations() as seen:
        solve(asked, ["rtn", "gptq", "sweeps", "coupled"])
    assert seen.squares(COLUMNS) == 3
    assert not seen.most[8 * COLUMNS**2]  # indices of their entries


@pytest.mark.usefixtures("on_a_card")
def test_a_sweep_by_halves_holds_three_matrices(asked):
    """H and the halves of H in the order of a sweep."""
    found = solve(asked, ["rtn", "gptq"])
    with Allocations() as seen:
        coupled.step(asked, descent.step(asked, found))
    assert seen.squares(COLUMNS) + seen.most[2 * COLUMNS**2] / 2 == 3


@pytest.mark.usefixtures("on_a_card")
def test_a_sweep_holds_five_numbers_for_every_weight(asked):
    """Steps, offsets, two halves of the error and what its product is; 2 GB each in the gate and up projections of 72B."""
    found = solve(asked, ["rtn", "gptq"])
    for step in (coupled.step, descent.step):
        with Allocations() as seen:
            step(asked, found)
        assert seen.most[4 * ROWS * COLUMNS] <= 5 + 1  # and the weights
        assert seen.at_peak[4 * ROWS * COLUMNS] + seen.at_peak[2 * ROWS * COLUMNS] / 2 <= 5 + 1


def test_linears_that_are_rows_of_one_matrix_are_not_copied():
    whole = torch.randn(6, 4)
    linears = dict(zip("abc", whole.split([1, 3, 2]), strict=True))
    assert stacked(linears).data_ptr() == whole.data_ptr()
    assert torch.equal(stacked(linears), whole)
    others = [{"b": linears["b"], "a": linears["a"]}, linears | {"b": linears["b"].clone()}, {"a": whole[:2, :2]} | {"c": whole[2:, :2]}]  # fmt: skip
    for other in others:
        assert torch.equal(stacked(other), torch.cat(list(other.values())))


@pytest.mark.usefixtures("by_halves")
def test_halves_give_nearly_the_codes_of_whole_matrices(asked):
    by_halves = solve(asked, ["rtn", "gptq", "sweeps", "coupled"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descent, "split_matrix", SplitMatrix)
        patch.setattr(descent, "split_in_place", SplitMatrix)
        whole = solve(asked, ["rtn", "gptq", "sweeps", "coupled"])
    assert float((by_halves.codes != whole.codes).float().mean()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_card_mirrors_sums_once_for_all_pieces(monkeypatch, dtype):
    """The bits of a matrix that is whole after every piece, of inputs in 16 bits."""

    def add_lower(total, x):
        assert x.dtype == torch.bfloat16
        kernels_gram.reference(added := torch.zeros_like(total), x)
        total += added.tril()

    monkeypatch.setattr("qquant.kernels.product.STRIP", 16)
    monkeypatch.setattr(algorithms_gram, "add_lower", add_lower)
    whole, late, again = (algorithms_gram.Gram.zeros(40) for _ in range(3))
    pieces, weights = torch.randn(3, 30, 40).to(dtype), torch.rand(3, 30)
    for x, s in zip(pieces, weights, strict=True):
        whole.add((x * s.sqrt().to(dtype).unsqueeze(1)).bfloat16())
    monkeypatch.setitem(devices.POLICIES, "cpu", replace(devices.POLICIES["cpu"], apart=True))
    mirrored, mirror = [], algorithms_gram.mirror
    monkeypatch.setattr(algorithms_gram, "mirror", lambda total: mirrored.append(len(total)) or mirror(total))
    late.unseen = []
    for x, s in zip(pieces, weights, strict=True):
        late.add(x, s)
    assert not mirrored
    assert not torch.equal(late.matrix, late.matrix.T)
    late.settle()
    assert mirrored == [40]
    assert torch.equal(late.matrix, whole.matrix)
    assert torch.equal(late.matrix, late.matrix.T)
    late.settle()
    assert mirrored == [40]
    again.unseen = []
    again.add(pieces[0])
    assert again.lower
    again.clear()
    assert not again.lower
