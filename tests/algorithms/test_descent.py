"""Descent after GPTQ: the loss never rises, and the refitted scales are the least-squares answer."""

from dataclasses import replace

import pytest
import torch

from qquant.algorithms import coupled, descent
from qquant.algorithms.gptq import factorize, gptq
from qquant.algorithms.gram import with_damping
from qquant.algorithms.grid import UniformGrid, UniformParams, value_of
from qquant.devices import POLICIES
from qquant.formats.gguf import quantize
from tests.algorithms.test_gptq import problem


def damped_copy(gram):
    with with_damping(gram.matrix, 0.01) as matrix:
        return matrix.clone()


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    """Several blocks, and a rest, in the small matrices of these tests."""
    monkeypatch.setattr(descent, "BLOCK", 128)


def loss(weight, gram, codes, levels, grid):
    error = value_of(codes, *levels, grid) - weight
    return ((error.double() @ gram.double()) * error.double()).sum(1)


@pytest.fixture(params=[True, False], ids=["symmetric", "asymmetric"])
def solved(request):
    weight, gram = problem(24, 160, 700)
    grid = UniformGrid(4, 32, request.param, "importance")
    params = grid.fit(weight, factorize(gram, 0.01).cost(gram.tokens))
    codes = gptq(weight, factorize(gram, 0.01), params.step_and_offset(), grid)
    return weight, gram, damped_copy(gram), codes, params, grid


def test_a_sweep_lowers_the_loss_of_every_row_it_changes(solved):
    weight, _, damped, codes, params, grid = solved
    before = loss(weight, damped, codes, params.step_and_offset(), grid)
    for shift in (False, True):
        codes, earlier = descent.sweep(weight, damped, codes, params.step_and_offset(), grid, shift), codes
        after = loss(weight, damped, codes, params.step_and_offset(), grid)
        changed = (codes != earlier).any(1)
        assert bool((after <= before * (1 + 1e-5)).all())
        assert bool((after[~changed] == before[~changed]).all())
        before = after


def test_sweeps_gain_on_gptq(solved):
    weight, _, damped, codes, params, grid = solved
    before = float(loss(weight, damped, codes, params.step_and_offset(), grid).sum())
    for count in range(2):
        codes = descent.sweep(weight, damped, codes, params.step_and_offset(), grid, count == 1)
    assert float(loss(weight, damped, codes, params.step_and_offset(), grid).sum()) < 0.99 * before


@pytest.mark.parametrize(("bits", "sizes"), [(2, [32] * 5), (4, [128, 32])], ids=["few levels", "wide, a rest"])
def test_blocks_are_narrower_where_levels_are_few(bits, sizes):
    weight, gram = problem(24, 160, 700)
    grid = UniformGrid(bits, 32, True, "importance")
    params = grid.fit(weight, factorize(gram, 0.01).cost(gram.tokens))
    codes, damped = gptq(weight, factorize(gram, 0.01), params.step_and_offset(), grid), damped_copy(gram)
    stacks = descent.blocks_of(damped, False, grid).blocks[::3]
    assert [len(block) for stack in stacks for block in stack] == sizes
    before = loss(weight, damped, codes, params.step_and_offset(), grid)
    for shift in (False, True):
        codes = descent.sweep(weight, damped, codes, params.step_and_offset(), grid, shift)
    assert float(loss(weight, damped, codes, params.step_and_offset(), grid).sum()) < 0.99 * float(before.sum())


def test_a_block_target_is_the_least_squares_answer(solved, monkeypatch):
    """The continuous optimum of one block, all else held, by a float64 solve."""
    weight, _, damped, codes, params, grid = solved
    seen = []
    block = descent.gptq_block
    monkeypatch.setattr(descent, "gptq_block", lambda target, *rest: seen.append(target) or block(target, *rest))
    descent.sweep(weight, damped, codes, params.step_and_offset(), grid, shift=False)
    first = torch.arange(descent.BLOCK)
    first = first[torch.argsort(damped.diagonal()[first], descending=True, stable=True)]
    rest = torch.arange(descent.BLOCK, weight.shape[1])
    h, error = damped.double(), (value_of(codes, *params.step_and_offset(), grid) - weight).double()
    answer = weight[:, first].double() - torch.linalg.solve(h[first][:, first], h[first][:, rest] @ error[:, rest].T).T
    assert torch.allclose(seen[0].double(), answer, atol=1e-3)


def test_refitted_scales_are_the_least_squares_answer(solved):
    weight, _, damped, codes, params, grid = solved
    new = descent.refit(weight, damped, codes, params)
    h = damped.double()
    signed = codes.double() - params.zeros.double().repeat_interleave(grid.width, dim=1)
    for row in (0, 7, 23):
        basis = torch.zeros(5, 160, dtype=torch.float64)
        for group in range(5):
            inside = slice(32 * group, 32 * group + 32)
            basis[group, inside] = signed[row, inside]
        answer = torch.linalg.solve(basis @ h @ basis.T, basis @ h @ weight[row].double())
        assert torch.allclose(new.scales[row].double(), answer, rtol=2e-3)


def test_refit_keeps_rows_that_would_lose(solved):
    weight, _, damped, codes, params, grid = solved
    best = descent.refit(weight, damped, codes, params)
    again = descent.refit(weight, damped, codes, best)
    assert bool(
        (
            loss(weight, damped, codes, again.step_and_offset(), grid)
            <= loss(weight, damped, codes, best.step_and_offset(), grid) * (1 + 1e-6)
        ).all()
    )
    silent = descent.refit(
        weight * 0,
        damped,
        torch.full_like(codes, 8),
        UniformParams(params.scales, torch.full_like(params.zeros, 8)),
    )
    assert bool(torch.isfinite(silent.scales).all())


def test_the_cost_of_a_column_is_what_an_error_costs_after_compensation():
    """1 / U_jj^2 is the conditional variance of column j given the columns after it: the Schur complement."""
    _, gram = problem(1, 24, 200)
    factor = factorize(gram, 0.01)
    h = gram.matrix.double()[factor.order][:, factor.order]
    h.diagonal().add_(0.01 * float(gram.matrix.diagonal().mean()))
    weights = factor.cost(gram.tokens)[factor.order].double() * gram.tokens
    for j in (0, 5, 22):
        rest = slice(j + 1, None)
        schur = h[j, j] - h[j, rest] @ torch.linalg.solve(h[rest, rest], h[rest, j])
        assert float(weights[j]) == pytest.approx(float(schur), rel=1e-3)
    assert float(weights[23]) == pytest.approx(float(h[23, 23]), rel=1e-3)


def coupled_loss(weight, gram, rows, codes, levels, grid):
    error = (value_of(codes, *levels, grid) - weight).double()
    return float((torch.block_diag(*rows).double() * (error @ gram.double() @ error.T)).sum())


def curvature(*sizes):
    generator = torch.Generator().manual_seed(5)
    made = []
    for size in sizes:
        gradients = torch.randn(4 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
        rows = gradients.T @ gradients
        made.append(rows / rows.diagonal().mean())
    return made


def test_a_coupled_sweep_lowers_the_loss_over_rows_and_columns(solved):
    weight, _, gram, codes, params, grid = solved
    rows = curvature(16, 8)
    levels = params.step_and_offset()
    damped = [part + coupled.DAMPING * part.diagonal().mean() * torch.eye(len(part)) for part in rows]
    before = coupled_loss(weight, gram, damped, codes, levels, grid)
    for shift in (False, True, False):
        codes = coupled.sweep(weight, gram, codes, levels, grid, shift, rows)
        after = coupled_loss(weight, gram, damped, codes, levels, grid)
        assert after <= before * (1 + 1e-5)
        before = after


def test_coupled_rows_gain_where_the_curvature_says_so(solved):
    weight, _, gram, codes, params, grid = solved
    rows = curvature(16, 8)
    levels = params.step_and_offset()
    alone = both = codes
    for count in range(2):
        alone = descent.sweep(weight, gram, alone, levels, grid, count == 1)
        both = coupled.sweep(weight, gram, both, levels, grid, count == 1, rows)
    ratio = coupled_loss(weight, gram, rows, both, levels, grid) / coupled_loss(weight, gram, rows, alone, levels, grid)
    assert ratio < 0.8


def test_the_target_of_coupled_rows_is_the_least_squares_answer(solved, monkeypatch):
    """With the rest held, the gradient of the loss at the target of a subset and a block is zero: here of the first."""
    weight, _, gram, codes, params, grid = solved
    rows = curvature(12, 12)
    seen = []
    block = descent.gptq_block
    monkeypatch.setattr(descent, "gptq_block", lambda target, *rest: seen.append(target) or block(target, *rest))
    coupled.sweep(weight, gram, codes, params.step_and_offset(), grid, False, rows)
    columns = descent.blocks_of(gram, False, grid).order[: descent.BLOCK]
    value = value_of(codes, *params.step_and_offset(), grid).double()
    for place in (0, 1):
        damped = (rows[place] + coupled.DAMPING * rows[place].diagonal().mean() * torch.eye(12)).double()
        mine, subset = slice(12 * place, 12 * place + 12), torch.arange(0, 12, coupled.PARTS)
        start = (damped @ (value - weight.double())[mine] @ gram.double())[subset][:, columns]
        moved = value[mine].clone()
        moved[subset[:, None], columns] = seen[0].view(2, len(subset), -1)[place].double()
        gradient = (damped @ (moved - weight.double()[mine]) @ gram.double())[subset][:, columns]
        assert float(gradient.norm() / start.norm()) < 1e-3


def test_batches_of_rows_give_the_codes_of_each_alone(solved, monkeypatch):
    weight, _, gram, codes, params, grid = solved
    rows = curvature(8, 5, 8, 3)
    together = coupled.sweep(weight, gram, codes, params.step_and_offset(), grid, False, rows)
    monkeypatch.setitem(POLICIES, "cpu", replace(POLICIES["cpu"], swept=1))
    assert (
        float(
            (coupled.sweep(weight, gram, codes, params.step_and_offset(), grid, False, rows) == together).float().mean()
        )
        > 0.999
    )


def test_rows_without_curvature_are_left_alone(solved):
    weight, _, gram, codes, params, grid = solved
    rows = [curvature(16)[0], torch.zeros(8, 8)]
    swept = coupled.sweep(weight, gram, codes, params.step_and_offset(), grid, False, rows)
    assert torch.equal(swept[16:], codes[16:])
    assert not torch.equal(swept[:16], codes[:16])


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q8_0"])
def test_parameters_of_block_types_suit_their_codes_better(kind):
    weight, gram = problem(12, 512, 900)
    grid = quantize.grid(kind)
    params = grid.fit(weight, factorize(gram, 0.01).cost(gram.tokens))
    codes = gptq(weight, factorize(gram, 0.01), params.step_and_offset(), grid)
    damped = damped_copy(gram)
    values = value_of(codes, *params.step_and_offset(), grid)
    factors = params.linear_form(codes)
    made = sum(c.float().repeat_interleave(512 // c.shape[1], 1) * basis for c, basis in factors)
    assert torch.allclose(made, values, atol=1e-5)
    for integers in params.integers(codes):
        one_more = params.with_integers(integers.name, integers.values + 1)
        assert torch.allclose(value_of(codes, *one_more.step_and_offset(), grid) - values, integers.unit, atol=1e-5)
    before = loss(weight, damped, codes, params.step_and_offset(), grid)
    fitted = descent.refit(weight, damped, codes, params)
    after = loss(weight, damped, codes, fitted.step_and_offset(), grid)
    assert bool((after <= before * (1 + 1e-5)).all())
    chosen = descent.choose_integers(
        weight, damped, codes, fitted, lambda p: value_of(codes, *p.step_and_offset(), grid)
    )
    last = loss(weight, damped, codes, chosen.step_and_offset(), grid)
    assert bool((last <= after * (1 + 1e-5)).all())
    if kind in ("q2_k", "q3_k", "q4_k"):
        assert float(last.sum()) < 0.99 * float(before.sum())
    blocks = quantize.pack(codes, chosen)
    again, stored = quantize.unpack(blocks, kind)
    assert torch.equal(again, codes)
    assert torch.equal(
        value_of(again, *stored.step_and_offset(), grid), value_of(codes, *chosen.step_and_offset(), grid)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(32, 32), (24, 12)], ids=["a batch, recorded", "one after the other"])
def test_coupled_sweeps_end_as_low_on_a_gpu(rows):
    weight, gram = problem(sum(rows), 256, 900)
    grid = UniformGrid(4, 32, True, "importance")
    params = grid.fit(weight, factorize(gram, 0.01).cost(gram.tokens))
    codes = gptq(weight, factorize(gram, 0.01), params.step_and_offset(), grid)
    damped, matrices = damped_copy(gram), curvature(*rows)
    ends = []
    for device in ("cpu", "cuda"):
        given = [x.to(device) for x in (weight, damped, codes)]
        levels = tuple(level.to(device) for level in params.step_and_offset())
        found = coupled.sweep(*given, levels, grid, False, [matrix.to(device) for matrix in matrices]).cpu()
        ends.append(coupled_loss(weight, damped, matrices, found, params.step_and_offset(), grid))
    assert ends[1] == pytest.approx(ends[0], rel=0.01)


@pytest.mark.parametrize("rows", [1, 5, 63, 64, 65, 127, 128, 1000, 4097])
def test_rows_together_leave_no_piece_of_a_few(rows):
    """Of a matrix with a round number of rows: a product of a few rows has other bits than one of many."""
    together = descent.in_whole(rows)
    assert 1 <= together <= rows
    assert rows - together < descent.PIECE
    if rows >= descent.PIECE:
        for height in (64, 128, 192, 4096, 11008):
            assert min(map(len, torch.empty(height, 0).split(together))) >= descent.PIECE
    assert descent.in_whole(0) == 1
