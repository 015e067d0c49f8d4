"""GPTQ against its definition: after each column, the rest is the exact least-squares answer."""

from dataclasses import replace

import pytest
import torch

from qquant.algorithms.gptq import LADDER, NotPositiveDefiniteError, factorize, gptq
from qquant.algorithms.gram import Gram
from qquant.algorithms.grid import UniformGrid, nearest, value_of
from qquant.devices import POLICIES


def problem(rows, columns, tokens, seed=0, dtype=torch.float32):
    """Correlated inputs with outlier channels, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=dtype) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator, dtype=dtype) @ (mix + torch.eye(columns, dtype=dtype))
    x[:, :: max(1, columns // 4)] *= 6
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    gram = Gram.zeros(columns)
    gram.add(x)
    return weight.float(), gram


def by_definition(weight, gram, levels, grid, damping):
    """Round one column, then re-solve all remaining columns by least squares (float64), in activation order."""
    step, offset = (value.double() for value in levels)
    h = gram.matrix.double().clone()
    order = torch.argsort(gram.matrix.diagonal(), descending=True, stable=True)
    h.diagonal().add_(damping * float(gram.matrix.diagonal().mean()))
    original, codes = weight.double(), torch.zeros_like(weight, dtype=torch.uint8)
    fixed = original.clone()  # rounded columns hold grid values; the rest hold the current best answer
    for place, column in enumerate(order.tolist()):
        group = column // grid.width
        code = ((fixed[:, column] + offset[:, group]) / step[:, group]).round().clamp(0, grid.levels - 1)
        codes[:, column] = code.to(torch.uint8)
        fixed[:, column] = step[:, group] * code - offset[:, group]
        done, rest = order[: place + 1], order[place + 1 :]
        # minimise (fixed - original) H (fixed - original)' over the free columns, the done ones held
        error = fixed[:, done] - original[:, done]
        fixed[:, rest] = original[:, rest] - torch.linalg.solve(h[rest][:, rest], h[rest][:, done] @ error.T).T
    return codes


@pytest.mark.parametrize(("rows", "columns", "width"), [(8, 24, 8), (5, 64, 32), (16, 160, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_those_of_the_definition(rows, columns, width, symmetric):
    weight, gram = problem(rows, columns, 4 * columns)
    grid = UniformGrid(4, width, symmetric, "minmax")
    levels = grid.fit(weight).step_and_offset()
    ours = gptq(weight, factorize(gram, 0.01), levels, grid)
    slow = by_definition(weight, gram, levels, grid, 0.01)
    assert (ours == slow).float().mean() > 0.995  # ties apart


def test_blocks_do_not_change_the_answer(monkeypatch):
    weight, gram = problem(6, 128, 500)
    grid = UniformGrid(4, 32, symmetric=True, search="minmax")
    levels = grid.fit(weight).step_and_offset()
    whole = gptq(weight, factorize(gram, 0.01), levels, grid)
    monkeypatch.setitem(POLICIES, "cpu", replace(POLICIES["cpu"], spread=16))
    assert (gptq(weight, factorize(gram, 0.01), levels, grid) == whole).float().mean() > 0.995


@pytest.mark.parametrize("seed", range(3))
def test_output_error_is_far_below_round_to_nearest(seed):
    weight, gram = problem(32, 128, 600, seed)
    grid = UniformGrid(4, 32, symmetric=True, search="minmax")
    levels = grid.fit(weight).step_and_offset()

    def loss(codes):
        return float(gram.energy(value_of(codes, *levels, grid) - weight).sum())

    assert loss(gptq(weight, factorize(gram, 0.01), levels, grid)) < 0.6 * loss(nearest(weight, *levels, grid))


def test_factor_is_the_upper_cholesky_of_the_inverse():
    _, gram = problem(1, 48, 200)
    factor = factorize(gram, 0.01)
    h = gram.matrix.double()[factor.order][:, factor.order]
    h.diagonal().add_(0.01 * float(gram.matrix.diagonal().mean()))
    expected = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    assert torch.allclose(factor.upper.double(), expected, rtol=1e-3, atol=1e-6)
    assert bool((gram.matrix.diagonal()[factor.order].diff() <= 0).all())


def test_a_factor_is_computed_once_per_damping(monkeypatch):
    _, gram = problem(1, 16, 64)
    first = factorize(gram, 0.01)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
    assert factorize(gram, 0.01) is first


def test_damping_climbs_until_it_works_and_is_reported():
    gram = Gram.zeros(8)
    gram.tokens = 8
    gram.matrix = torch.eye(8)
    gram.matrix[0, 1] = gram.matrix[1, 0] = 1.03  # smallest eigenvalue -0.03
    assert factorize(gram, 0.01).damping == pytest.approx(0.05)


def test_hopeless_matrix_is_refused_by_name():
    gram = Gram.zeros(4)
    gram.matrix = -torch.eye(4) + 2 * torch.ones(4, 4)
    gram.matrix[0, 0] = float("nan")
    with pytest.raises(NotPositiveDefiniteError, match=f"{0.01 * LADDER[-1]:g}"):
        factorize(gram, 0.01)


def test_dead_channels_are_rounded_to_nearest():
    weight, gram = problem(4, 32, 200)
    gram.matrix[7, :] = gram.matrix[:, 7] = 0
    grid = UniformGrid(4, 32, symmetric=True, search="minmax")
    levels = grid.fit(weight).step_and_offset()
    assert torch.equal(gptq(weight, factorize(gram, 0.01), levels, grid)[:, 7], nearest(weight, *levels, grid)[:, 7])


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    weight, gram = problem(4, 32, 200)
    gram.matrix = torch.diag(gram.matrix.diagonal())
    grid = UniformGrid(4, 32, symmetric=True, search="minmax")
    levels = grid.fit(weight).step_and_offset()
    assert torch.equal(gptq(weight, factorize(gram, 0.01), levels, grid), nearest(weight, *levels, grid))


def test_gram_is_the_sum_over_tokens_whatever_the_samples():
    x = torch.randn(30, 6)
    whole, parts = Gram.zeros(6), Gram.zeros(6)
    whole.add(x)
    for piece in x.split(7):
        parts.add(piece)
    assert torch.allclose(whole.matrix, x.T @ x, atol=1e-4)
    assert torch.allclose(whole.matrix, parts.matrix, atol=1e-4)
    assert whole.tokens == parts.tokens == 30
    assert torch.allclose(whole.importance, x.square().mean(0), atol=1e-5)
    weight = torch.randn(3, 6)
    assert torch.allclose(whole.energy(weight), (x @ weight.T).square().sum(0), rtol=1e-4)
