"""Products of activations with 16-bit weights: as torch makes them, or by float32 on CPUs that have no instructions for bfloat16.

    y = round(float(x) float(W)' + float(b))        the gradient of x: round(float(g) float(W))

Sums are float32 either way, and rounded once; their order differs. Without AVX-512 or AMX torch multiplies bfloat16 and float16 one by one, 4 to 20 times
as slowly as float32 (tests/bench/LOG.md), so rows of W are made float32 a piece at a time. Left out: a few rows of x, for which reading
the weights takes longest; gradients of weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from qquant.devices import multiplies

FEW = 4  # rows of x that torch multiplies as they are
PIECE = 1 << 22  # weights that are float32 at a time


def by_float32(x: Tensor) -> bool:
    """Whether products of x are faster in float32."""
    return x.device.type == "cpu" and not multiplies(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x W' + b [..., N] of x [..., K] and weight [N, K], in the dtype of both."""
    if not by_float32(x) or x.numel() <= FEW * x.shape[-1]:
        return F.linear(x, weight, bias)
    product: Tensor = _ByFloat32.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product


class _ByFloat32(Function):
    """A product and the gradient of its first factor, by float32."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        rows = x.reshape(-1, x.shape[-1]).float()
        y = x.new_empty(len(rows), len(weight))
        for span in _spans(weight):
            part = rows @ weight[span].float().T
            y[:, span] = part if bias is None else part.add_(bias[span])
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients  # type: ignore[attr-defined]
        rows = gradient.reshape(-1, len(weight))
        total = torch.zeros(len(rows), weight.shape[1])
        for span in _spans(weight):
            total.addmm_(rows[:, span].float(), weight[span].float())
        return total.to(gradient.dtype).view(*gradient.shape[:-1], weight.shape[1]), None, None


def _spans(weight: Tensor) -> list[slice]:
    step = max(1, PIECE // weight.shape[1])
    return [slice(start, min(start + step, len(weight))) for start in range(0, len(weight), step)]
