"""Float32 rows as float16 and powers of two: what is lost, and what fits."""

import pytest
import torch

from qquant.kernels.scaled_half import TOP, half_rows, scaled_product


def of_many_sizes(rows, columns, seed):
    """Rows of sizes from 1e-30 to 1e30, whose values are of six more."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (60 * torch.rand(rows, 1, generator=generator) - 30)
    spread = 10 ** (6 * torch.rand(rows, columns, generator=generator) - 3)
    return torch.randn(rows, columns, generator=generator) * sizes * spread


def require_rows(x, found):
    """Each value within 2^-11 of it, or 2^-38 of its row's largest; scales are powers of two."""
    values, scale = found.values.double(), found.scale.double()
    off = (values * scale - x.double()).abs()
    top = x.double().abs().amax(-1, keepdim=True)
    assert bool((off <= torch.maximum(2.0**-11 * x.double().abs(), 2.0**-38 * top)).all())
    assert bool((torch.frexp(found.scale).mantissa == 0.5).all())
    assert bool((values.abs().amax(-1) >= 2.0**TOP).all())
    assert bool((values.abs().amax(-1) <= 2.0 ** (TOP + 1)).all())


def off(y, x, weight):
    """The largest error of a sum, of the sum of magnitudes."""
    truth = x.double() @ weight.double().T
    return float(((y.double() - truth).abs() / (x.double().abs() @ weight.double().abs().T)).max())


@pytest.mark.parametrize("shape", [(24, 70), (2, 12, 70), (1, 70)])
def test_rows_of_any_size_fit(shape):
    x = of_many_sizes(24, 70, 9)[: len(torch.empty(shape).flatten(0, -2))].view(shape)
    require_rows(x, half_rows(x))


def test_zeros_and_what_is_not_finite():
    x = torch.tensor([[0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0], [1e-44, 1e-45], [3e38, -3e38]])
    found = half_rows(x)
    values = found.values.float() * found.scale
    assert bool(found.scale[[0, 3, 4]].isfinite().all())
    assert torch.equal(values[0], x[0])
    assert not bool(values[1:3].isfinite().all(1).any())
    assert torch.allclose(values[4], x[4], rtol=1e-3)


@pytest.mark.parametrize("biased", [True, False])
def test_products(biased):
    x, weight = torch.randn(2, 12, 70) * 1e5, torch.randn(41, 70) * 1e-6
    bias = torch.randn(41) if biased else None
    y = scaled_product(half_rows(x), half_rows(weight), bias)
    assert y.shape == (2, 12, 41)
    assert off((y - bias if biased else y).flatten(0, 1), x.flatten(0, 1), weight) < 2.0**-10


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(24, 70), (1000, 4096), (64, 11008), (3, 30000)])
def test_products_on_a_gpu(rows, columns):
    x, weight, bias = of_many_sizes(rows, columns, 1).clamp(-1e15, 1e15), torch.randn(96, columns), torch.randn(96)
    made = half_rows(x.cuda())
    require_rows(x, type(made)(*(part.cpu() for part in made)))
    y = scaled_product(made, half_rows(weight.cuda()), None).cpu()
    assert off(y, x, weight) < 2.0**-10
    biased = scaled_product(made, half_rows(weight.cuda()), bias.cuda()).cpu()
    assert torch.allclose(biased, y + bias, rtol=1e-6)
    broken = torch.zeros(2, columns)
    broken[0, -1] = torch.nan
    broken[1, 0] = torch.inf
    assert not bool(half_rows(broken.cuda()).values.float().isfinite().all(1).any())
