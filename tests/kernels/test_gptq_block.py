"""The column loop of GPTQ: its torch form against the definition in float64, views, and strips."""

import pytest
import torch

from qquant.kernels.gptq_block import gptq_block, in_strips
from tests.worlds.interpreter_cases import gptq_definition, gptq_problem, relative


@pytest.mark.parametrize("columns", [1, 16, 40, 128])
@pytest.mark.parametrize("levels", [16, 256])
def test_gptq_block_is_its_definition(columns, levels):
    problem = gptq_problem(300, columns, levels, per_column=columns == 40)
    before = [t.clone() for t in problem]
    codes, errors = gptq_block(*problem, levels)
    true_codes, true_errors = gptq_definition(*problem, levels)
    assert (codes == true_codes).float().mean() >= 0.999
    same = (codes == true_codes).all(1)
    assert relative(errors[same], true_errors[same]) <= 1e-4
    assert codes.is_contiguous()
    assert errors.is_contiguous()
    for now, then in zip(problem, before, strict=True):
        assert torch.equal(now, then), "an input changed"


def test_gptq_block_takes_views():
    w, u, step, offset = gptq_problem(50, 64, 16, per_column=False)
    expected = gptq_block(w, u, step, offset, 16)
    column_major = u.T.contiguous().T
    one_step = step[:, :1].expand(-1, 64)
    found = gptq_block(torch.cat([w, w], 1)[:, :64], column_major, one_step, offset, 16)
    assert torch.equal(found[0], expected[0])


def test_gptq_block_in_strips():
    w, u, step, offset = gptq_problem(40, 300, 16, per_column=True)

    def work(*arguments):
        *given, into = arguments
        for target, value in zip(into, gptq_block(*given), strict=True):
            target.copy_(value)

    codes, errors = in_strips(work, w, u, step, offset, 16)
    expected_codes, expected = gptq_block(w, u, step, offset, 16)
    assert float((codes != expected_codes).float().mean()) < 1e-3  # ties
    same = (codes == expected_codes).all(1)
    assert relative(errors[same], expected[same].double()) < 1e-4
