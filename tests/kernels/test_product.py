"""Products of float32 matrices on tensor cores: the formula in float32, and on a GPU what it keeps of float32's precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qquant.kernels.product import (
    SplitMatrix,
    add_product,
    add_product_to,
    add_square,
    halves,
    multiplied,
    product,
    split_matrix,
    tensor_cores,
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
    upper, upper16, lower16 = halves(x)
    assert int(upper.view(torch.int32)) % (1 << 13) == 0
    assert abs(float(x - upper)) <= 2.0**-10 * abs(value)
    assert torch.equal(upper16, upper.bfloat16())
    assert torch.equal(lower16, (x - upper).bfloat16())


def test_three_products_are_one():
    a, b = ill_matched(33, 70, 0), ill_matched(70, 41, 1)
    assert error(multiplied(halves(a), halves(b)), a, b) < 2.0**-17
    for half, lower in enumerate(("first", "second")):
        without = [halves(a), halves(b)]
        without[half] = without[half]._replace(lower16=torch.zeros_like(without[half].lower16))
        assert error(multiplied(*without), a, b) > 1e-4, f"the lower half of the {lower} is not used"


def test_stacks_and_parts():
    a, b = ill_matched(24, 70, 2).view(2, 12, 70), ill_matched(90, 41, 3)
    some = SplitMatrix(None, halves(b)).part(slice(10, 80), slice(3, 37))
    assert error(product(a, some).view(24, 34), a.view(24, 70), b[10:80, 3:37]) < 2.0**-17
    assert torch.equal(product(a, split_matrix(b[10:80])), a @ b[10:80])


def test_squares_are_added_and_stay_symmetric(monkeypatch):
    monkeypatch.setattr("qquant.kernels.product.ROWS", 10)
    monkeypatch.setattr("qquant.kernels.product.STRIP", 16)
    x, total = ill_matched(33, 41, 11), torch.zeros(41, 41)
    add_square(total, x)
    assert error(total, x.T, x) < 2.0**-17
    assert torch.equal(total, total.T)
    once = total.clone()
    add_square(total, x)
    assert error(total, 2 * x.T, x) < 2.0**-16
    assert torch.equal(total, total.T)
    assert not torch.equal(total, once)


def test_products_that_are_added():
    a, b, total = ill_matched(24, 70, 6), ill_matched(70, 41, 7), torch.randn(24, 41)
    split, plain = SplitMatrix(None, halves(b)), SplitMatrix(b)
    for beta, alpha in ((1, 1), (-1, -1), (2, 1)):
        expected = torch.addmm(total, a, b, beta=beta, alpha=alpha)
        assert torch.equal(add_product(total, a, plain, beta, alpha), expected)
        found = add_product(total, a, split, beta, alpha) - beta * total
        assert error(found, alpha * a, b) < 1e-5
    for matrix in (plain, split):
        into = torch.zeros(24, 50)
        add_product_to(into[:, 5:46], a, matrix, alpha=-1)
        assert error(into[:, 5:46], -a, b) < 2.0**-17
        assert not bool(into[:, [*range(5), *range(46, 50)]].any())


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
def test_long_squares_on_a_gpu():
    x, total = ill_matched(10_000, 1000, 12).cuda(), torch.zeros(1000, 1000, device="cuda")
    add_square(total, x)
    print(f"square {error(total, x.T, x):.2e}")
    assert error(total, x.T, x) < 2.0**-16  # the lower halves of squares have one sign, and add up
    assert torch.equal(total, total.T)
