"""The matrices of the problems for group scales: their torch form and, on a GPU, the kernel against the definition in float64."""

import pytest
import torch

from qquant.errors import InputError
from qquant.kernels.group_products import group_products
from tests.worlds.interpreter_cases import group_products_error, group_products_problem


@pytest.mark.parametrize(("width", "bases"), [(32, 1), (24, 2)])
def test_the_torch_form_is_the_definition(width, bases):
    problem = group_products_problem(7, 4, width, bases)
    system = torch.full((7, bases, 4, bases, 4), torch.nan)
    group_products(system, *problem, width)
    assert group_products_error(system, *problem, width) <= 1e-6


def test_what_does_not_fit_is_refused():
    bases, h = group_products_problem(7, 4, 32, 1)
    system = torch.empty(7, 1, 4, 1, 4)
    for arguments in ((system, bases, h, 30), (system[:5], bases, h, 32), (system, [bases[0].half()], h, 32)):
        with pytest.raises(InputError, match="group_products takes"):
            group_products(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "groups", "width", "bases"),
    [(4096, 32, 128, 1), (300, 86, 128, 1), (200, 43, 32, 1), (130, 6, 256, 2), (64, 6, 96, 1), (100, 5, 16, 2)],
)
def test_the_kernel_on_a_gpu(rows, groups, width, bases):
    problem = group_products_problem(rows, groups, width, bases)
    system = torch.full((rows, bases, groups, bases, groups), torch.nan, device="cuda")
    group_products(system, [basis.cuda() for basis in problem[0]], problem[1].cuda(), width)
    assert group_products_error(system.cpu(), *problem, width) <= 5e-6
