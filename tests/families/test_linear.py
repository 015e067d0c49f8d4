"""Products by float32 where the CPU multiplies bfloat16 slowly: the definition in float64, rounded once, forth and back."""

from functools import partial

import pytest
import torch

from qquant import devices
from qquant.families import linear as products
from qquant.families.decoder import Block


@pytest.fixture(params=[True, False])
def slow(request, monkeypatch):
    """A CPU that has no instructions for bfloat16, or has."""
    monkeypatch.setattr(products, "multiplies", lambda dtype: dtype == torch.float32 or not request.param)
    return request.param


def drawn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(dtype)


def close(found, exact, scale):
    """As rounding once to 8 (float16: 11) bits and sums in float32 leave them."""
    assert found.shape == exact.shape
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[found.dtype]
    assert bool(((found.double() - exact).abs() <= exact.abs() * rounding + scale * 1e-5).all())


@pytest.mark.parametrize("piece", [1 << 22, 3 * 48])
@pytest.mark.parametrize("lead", [(7,), (2, 5), (3,)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_and_gradients_are_those_of_float64_rounded_once(slow, piece, lead, biased, dtype, monkeypatch):
    """Whatever piece of the weights is float32 at a time, and for a few rows, which torch multiplies."""
    monkeypatch.setattr(products, "PIECE", piece)
    made = partial(drawn, dtype=dtype)
    x, weight, bias = made(*lead, 48).requires_grad_(), made(20, 48), made(20) if biased else None
    y = products.linear(x, weight, bias)
    exact = x.detach().double() @ weight.double().T + (bias.double() if biased else 0)
    close(y.detach(), exact, exact.abs().max())
    g = made(*lead, 20)
    (gradient,) = torch.autograd.grad(y, x, g)
    exact = g.double() @ weight.double()
    close(gradient, exact, exact.abs().max())


def test_float32_is_chosen_where_it_is_faster(slow):
    assert products.by_float32(drawn(8, 8)) is slow
    assert products.by_float32(drawn(8, 8).half()) is slow
    assert not products.by_float32(drawn(8, 8).float())
    assert not products.by_float32(torch.empty(8, 8, dtype=torch.bfloat16, device="meta"))


def test_a_torch_without_mkldnn_multiplies_bfloat16_slowly(monkeypatch):
    """As on macOS, where the question whether it has instructions is no operator."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert not devices.multiplies.__wrapped__(torch.bfloat16)
    assert not devices.multiplies.__wrapped__(torch.float16)
    assert devices.multiplies.__wrapped__(torch.float32)


def test_attention_is_that_of_float32_rounded(slow):
    """Within bfloat16's rounding of what is mixed, in the dtype of its inputs."""
    query, key, value = (drawn(1, 2, 12, 16) * scale for scale in (1, 2, 3))
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True
    )
    found = Block.mixed(None, query, key, value)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).abs().max()) < 2**-6 * float(exact.abs().max())
