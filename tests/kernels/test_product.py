"""Products of float32 matrices on tensor cores: the formula in float32, and on a GPU what it keeps of float32's precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qquant.kernels.product import (
    SplitMatrix,
    add_products,
    halves,
    product,
    product_using_up,
    split_matrix,
    tensor_cores,
    three,
)


def ill_matched(rows, columns, seed):
    """Values over six orders of magnitude, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (6 * torch.rand(rows, columns, generator=generator) - 3)
    return torch.randn(rows, columns, generator=generator) * size


def error(found, a, b):
    """Of the worst entry, in units of what its terms add up to."""
    truth, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    return float(((found.double() - truth).abs() / scale).max())


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False))
def test_halves_add_up_and_the_upper_one_fits_a_tensor_core(value):
    x = torch.tensor([[value]])
    upper, lower = halves(x)
    assert torch.equal(upper + lower, x)
    assert int(upper.view(torch.int32)) % (1 << 13) == 0
    assert abs(float(lower)) <= 2.0**-10 * abs(value)


def test_three_products_are_one():
    a, b = ill_matched(33, 70, 0), ill_matched(70, 41, 1)
    assert error(three(a, halves(b)), a, b) < 2.0**-20
    upper, lower = halves(a)
    assert error(upper @ b, a, b) > 1e-4  # without the second term
    assert error(upper @ halves(b)[0] + lower @ halves(b)[0], a, b) > 1e-4  # without the third


def test_stacks_and_parts():
    a, b = ill_matched(24, 70, 2).view(2, 12, 70), ill_matched(90, 41, 3)
    some = SplitMatrix(b, halves(b)).part(slice(10, 80), slice(3, 37))
    assert error(product(a, some).view(24, 34), a.view(24, 70), b[10:80, 3:37]) < 2.0**-20
    assert torch.equal(product(a, split_matrix(b[10:80])), a @ b[10:80])


def test_the_switch_goes_back():
    before = torch.backends.cuda.matmul.allow_tf32
    seen = []

    def fail():
        with tensor_cores():
            seen.append(torch.backends.cuda.matmul.allow_tf32)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [True]
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [128, 1000, 4096])
def test_a_gpu_keeps_the_precision_of_float32(columns):
    a, b = ill_matched(256, columns, 4).cuda(), ill_matched(columns, 512, 5).cuda()
    whole, found = error(a @ b, a, b), error(product(a, split_matrix(b)), a, b)
    with tensor_cores():
        once = error(a @ b, a, b)
    print(f"{columns} columns: float32 {whole:.2e}, three products {found:.2e}, one {once:.2e}")
    assert found < 1e-5
    assert once > 10 * found


@pytest.mark.gpu
def test_sums_of_products_on_a_gpu_lose_nothing_of_16_bits():
    a, b = torch.randn(300, 96).bfloat16(), torch.randn(300, 160).bfloat16()
    total = torch.randn(96, 160)
    expected = total.double() + a.double().T @ b.double()
    found = add_products(total.cuda(), a.cuda(), b.cuda())
    assert torch.allclose(found.cpu().double(), expected, rtol=1e-5, atol=1e-4)


def test_sums_of_products_are_added_in_place():
    a, b, total = torch.randn(30, 9).bfloat16(), torch.randn(30, 16), torch.randn(9, 16)
    expected = total + a.float().T @ b
    assert add_products(total, a, b) is total
    assert torch.allclose(total, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7)])
def test_using_up_a_factor_changes_no_bit(shape):
    a, b = torch.randn(shape), torch.randn(7, 7)
    for matrix in (SplitMatrix(b), SplitMatrix(b, halves(b)), SplitMatrix(None, halves(b))):
        wanted = product(a, matrix)
        assert torch.equal(product_using_up(a.clone(), matrix), wanted)
