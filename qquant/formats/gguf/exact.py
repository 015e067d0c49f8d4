"""ggml's float32 arithmetic to the last bit: sums in its order, its nearest integer, and reciprocals that round alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qquant.resources import lazy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from qquant.kernels import ggml_search as gpu
else:
    torch, gpu = lazy("torch"), lazy("qquant.kernels.ggml_search")
    np = lazy("numpy")


_MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
SAFE = 2.0**21  # below this nearest_int() is round() with room to spare


def on_cpu(x: Tensor) -> bool:
    """Whether sums, and values of which there is one per block, are left to numpy."""
    return x.device.type == "cpu"


def nearest_int(x: Tensor) -> Tensor:
    """Int32: nearest integer, ties to even, for |x| < 2^22; outside, the wrapped value that ggml's bit trick gives."""
    return _mantissa(x + _MAGIC).sub_(0x400000)


def nearest_code(x: Tensor, centre: int, top: int) -> Tensor:
    """Uint8 codes: `nearest_int(x) + centre`, clamped to 0 .. top; destroys `x`."""
    return _mantissa(x.add_(_MAGIC)).sub_(0x400000 - centre).clamp_(0, top).to(torch.uint8)


def _mantissa(shifted: Tensor) -> Tensor:
    if not on_cpu(shifted):
        shifted.masked_fill_(shifted.isnan(), _MAGIC)  # x86's NaN has the mantissa of MAGIC, others' differ
    return shifted.view(torch.int32).bitwise_and_(0x7FFFFF)


def square_root(x: Tensor) -> Tensor:
    """Correctly rounded float32 square root, in place."""
    if on_cpu(x):
        np.sqrt(x.numpy(), out=x.numpy())
        return x
    return x.copy_(x.double().sqrt_())


def sum_in_order(x: Tensor) -> Tensor:
    """Float32 sum over dimension -2 of `x` [..., E, B], strictly from left to right, starting at +0."""
    return Space(x).tensor(summed(x))


def squares_in_order(x: Tensor) -> Tensor:
    """`sum_in_order(x * x)` for `x` [E, B]."""
    return Space(x).tensor(dot(x, x))


def summed(x: Tensor) -> Array:
    if on_cpu(x) and x.shape[-1] > 1:
        # numpy adds row to row along a slow axis; its pairwise summation is for the fast axis only
        x = x if x.stride(-1) == 1 else x.contiguous()
        return np.add.reduce(x.numpy(), axis=-2, initial=0.0)
    if gpu.runs(x):
        return gpu.sum_in_order(x)
    total = torch.zeros_like(x[..., 0, :])
    for element in x.unbind(-2):
        total.add_(element)
    return Space(x).array(total)


def dot(*factors: Tensor) -> Array:
    """Sum in order of the product of two or three `factors` [c, E, B] or [E, B], every product rounded on its own."""
    if on_cpu(factors[0]) and factors[0].shape[-1] > 1 and _einsum_rounds_products():
        return _einsum(*(factor.numpy() for factor in factors))
    return summed(functools.reduce(torch.mul, factors))


def _einsum(*factors: Array) -> Array:
    inputs = ["ceb" if factor.ndim == 3 else "eb" for factor in factors]
    return np.einsum(f"{','.join(inputs)}->{'cb' if 'ceb' in inputs else 'b'}", *factors)


@functools.cache
def _einsum_rounds_products() -> bool:
    """Whether numpy's einsum, which saves passes through memory, multiplies and adds in order and without fusing the two.

    It is so in the builds for x86-64, but nothing promises it: so try, with lengths that reach its vector loop and tail.
    """
    random = np.random.default_rng(0)
    for width in (2, 16, 67):
        a, b = random.standard_normal((2, 32, width), np.float32)
        c, d = random.standard_normal((2, 3, 32, width), np.float32)
        for factors in ((a, b), (a, b, a), (a, c), (a, c, b), (a, c, d)):
            products = functools.reduce(np.multiply, factors)
            total = functools.reduce(np.add, np.moveaxis(products, -2, 0))
            if not (_einsum(*factors) == total).all():
                return False
    return True


class Space:
    """Where values of which there is one per block live: numpy on a CPU, whose calls cost a fraction of torch's."""

    def __init__(self, x: Tensor) -> None:
        self.device = x.device
        cpu = on_cpu(x)
        self.xp: Any = np if cpu else torch
        self.array: Callable[[Tensor], Array] = torch.Tensor.numpy if cpu else _same
        self.tensor: Callable[[Array], Tensor] = torch.from_numpy if cpu else _same
        self.indices: Callable[[Array], Array] = np.flatnonzero if cpu else indices


def _same(value: Any) -> Any:
    return value


def indices(mask: Tensor) -> Tensor:
    """Int64: where `mask` [B] is true."""
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if on_cpu(mask) else mask.nonzero().squeeze(1)


def divide(numerator: float, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, correctly rounded (`float / tensor` multiplies with a reciprocal)."""
    return torch.div(torch.full((1,), numerator, dtype=torch.float32, device=denominator.device), denominator)


Array = Any  # a numpy array on a CPU, else a tensor
