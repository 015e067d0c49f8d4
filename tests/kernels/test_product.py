"""Products of float32 matrices on tensor cores: the formula in float32, and on a GPU what it keeps of float32's precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qquant.kernels.product import (
    SplitMatrix,
    add_product,
    add_product_to,
    add_products,
    add_square,
    halves,
    multiplied,
    product,
    product_using_up,
    split_in_place,
    split_matrix,
    stretched,
    stretched_product,
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


@pytest.mark.parametrize("shape", [(24, 70), (2, 12, 70), (1, 70)])
def test_halves_side_by_side(shape):
    a, b = ill_matched(24, 70, 9)[: len(torch.empty(shape).flatten(0, -2))].view(shape), ill_matched(41, 70, 10)
    parts = stretched(a)
    assert parts.shape == (*shape[:-1], 210)
    found = stretched_product(parts, stretched(b, 2))
    assert found.shape == (*shape[:-1], 41)
    assert error(found.flatten(0, -2), a.flatten(0, -2), b.T) < 2.0**-16
    held = b.bfloat16()  # a weight that bfloat16 holds needs no lower half
    assert (
        error(stretched_product(parts, torch.cat([held, held], 1)).flatten(0, -2), a.flatten(0, -2), held.float().T)
        < 2.0**-16
    )


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
def test_long_products_and_squares_on_a_gpu():
    x, weight = ill_matched(10_000, 1000, 12).cuda(), ill_matched(300, 1000, 13).cuda()
    found, whole = (
        error(y, x, weight.T) for y in (stretched_product(stretched(x), stretched(weight, 2)), x @ weight.T)
    )
    total = torch.zeros(1000, 1000, device="cuda")
    add_square(total, x)
    print(f"side by side: float32 {whole:.2e}, halves {found:.2e}; square {error(total, x.T, x):.2e}")
    assert (
        found < 2.0**-15
    )  # 1.8e-5 on an H200, of the largest sums of magnitudes: halves of 8 bits leave out 2^-17 of each factor
    assert error(total, x.T, x) < 2.0**-16  # the lower halves of squares have one sign, and add up
    assert torch.equal(total, total.T)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(300, 4096), (7, 100), (65, 1024)])
def test_halves_on_a_gpu(shape):
    x = ill_matched(*shape, 8).cuda()
    wide = torch.randn(shape[0], shape[1] + 8, device="cuda")
    wide[:, 4:-4] = x
    for values in (x, wide[:, 4:-4]):
        for found, expected in zip(halves(values), halves(x.cpu()), strict=True):
            assert torch.equal(found.cpu(), expected)
    used = x.clone()
    assert torch.equal(halves(used, used).lower16, halves(x).lower16)
    assert torch.equal(used, halves(x).upper)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(300, 4096), (7, 100)])
def test_a_matrix_that_is_used_up_on_a_gpu_is_split_as_one_that_stays(shape):
    """Its own memory holds the upper half, so that no third matrix is there meanwhile."""
    x = ill_matched(*shape, 9).cuda()
    wanted, used = split_matrix(x), x.clone()
    found = split_in_place(used)
    assert found.matrix is None
    assert found.halves.upper.data_ptr() == used.data_ptr()
    for one, other in zip(found.halves, wanted.halves, strict=True):
        assert torch.equal(one, other)


def test_on_a_cpu_a_matrix_stays_as_it_is():
    x = torch.randn(5, 7)
    assert split_in_place(x).values() is x
    assert split_matrix(x).values() is x


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
    for matrix in (SplitMatrix(b), SplitMatrix(None, halves(b))):
        wanted = product(a, matrix)
        assert torch.equal(product_using_up(a.clone(), matrix), wanted)
