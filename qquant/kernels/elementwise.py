"""What stands between the matrix products of a decoder block, for many tokens: norm, rotary, gate, each read and written once.

    rms_norm   x / sqrt(mean(x^2) + epsilon), rounded, times weight             sums in float32, over the last dimension
    rotate     (x1, x2) -> (x1 c - x2 s, x2 c + x1 s), in place                 halves of a head, c and s of a token's position
    gate       silu(g) u

As `qquant.families.decoder` has them: every operator of torch rounds to the dtype of x, and so do the Triton kernels, so that bits differ
in sums and exponentials alone. For a few rows, and into a cache: `qquant.kernels.between`. Without Triton, and on a CPU, by torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qquant.kernels.jit import AVAILABLE, blocks, kernel, tl

BLOCK = 1024  # values of `gate` in a program
HEADS = 8  # of a program of `rotate`


def serves(x: Tensor) -> bool:
    """Whether the kernels run for x: on a GPU, in a dtype of activations."""
    return AVAILABLE and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The norm of x [..., H] with weight [H], of one dtype."""
    if serves(x) and weight.dtype == x.dtype:
        with torch.cuda.device_of(x):
            return launch_rms_norm(x.contiguous(), weight.contiguous(), epsilon)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


@kernel()
def _rms_norm_kernel(
    x_at: tl.tensor, weight_at: tl.tensor, out_at: tl.tensor, H: tl.tensor, epsilon: tl.tensor, WIDTH: tl.constexpr
) -> None:
    h = tl.arange(0, WIDTH)
    at = tl.program_id(0).to(tl.int64) * H + h
    x = tl.load(x_at + at, mask=h < H, other=0.0).to(tl.float32)
    weight = tl.load(weight_at + h, mask=h < H, other=0.0).to(tl.float32)
    norm = x * tl.rsqrt(tl.sum(x * x, 0) / H + epsilon)
    rounded = norm.to(out_at.dtype.element_ty).to(tl.float32)
    tl.store(out_at + at, (rounded * weight).to(out_at.dtype.element_ty), mask=h < H)


def launch_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Run the kernel; arguments as of `rms_norm`, contiguous."""
    out, width = torch.empty_like(x), x.shape[-1]
    lanes = 1 << (width - 1).bit_length()
    _rms_norm_kernel[(x.numel() // width,)](
        x, weight, out, width, epsilon, WIDTH=lanes, num_warps=min(16, max(1, lanes // 512))
    )
    return out


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Heads x [B, heads, T, d] turned to the positions of tables [T, d], whose halves are equal; a GPU does it in place."""
    if serves(x) and x.dim() == 4 and x.stride(-1) == 1 and cosine.dtype == sine.dtype == x.dtype:
        with torch.cuda.device_of(x):
            return launch_rotate(x, cosine.contiguous(), sine.contiguous())
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


@kernel("heads", "length")
def _rotate_kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    x_at: tl.tensor,
    cosine_at: tl.tensor,
    sine_at: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    x_sequence: tl.tensor,  # values from one to the next, here and below
    x_head: tl.tensor,
    x_token: tl.tensor,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,  # HALF, or the next power of two
    BH: tl.constexpr,
) -> None:
    t = tl.program_id(0)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    i = tl.arange(0, WIDTH)
    there = (i < HALF)[None, :] & (h < heads)[:, None]
    cosine = tl.load(cosine_at + t * (2 * HALF) + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sine_at + t * (2 * HALF) + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    start = tl.program_id(2).to(tl.int64) * x_sequence + t.to(tl.int64) * x_token
    first_at = x_at + start + h.to(tl.int64)[:, None] * x_head + i[None, :]
    first = tl.load(first_at, mask=there, other=0.0)
    second = tl.load(first_at + HALF, mask=there, other=0.0)
    kind = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    left = (first * cosine).to(kind).to(tl.float32) - (second * sine).to(kind).to(tl.float32)
    right = (second * cosine).to(kind).to(tl.float32) + (first * sine).to(kind).to(tl.float32)
    tl.store(first_at, left.to(kind), mask=there)
    tl.store(first_at + HALF, right.to(kind), mask=there)


def launch_rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Run the kernel; arguments as of `rotate`, the values of a head together."""
    sequences, heads, length, width = x.shape
    half = width // 2
    _rotate_kernel[(length, blocks(heads, HEADS), sequences)](
        x, cosine, sine, heads, length, *x.stride()[:3], HALF=half, WIDTH=1 << (half - 1).bit_length(), BH=HEADS, num_warps=4, enable_fp_fusion=False
    )  # fmt: skip
    return x


def gate(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) u of two tensors of one shape and dtype."""
    if serves(g) and g.is_contiguous() and u.is_contiguous() and g.dtype == u.dtype:
        with torch.cuda.device_of(g):
            return launch_gate(g, u)
    return F.silu(g) * u


@kernel()
def _gate_kernel(g_at: tl.tensor, u_at: tl.tensor, out_at: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_at + at, mask=at < size, other=0.0)
    u = tl.load(u_at + at, mask=at < size, other=0.0)
    kind = g.dtype
    wide = g.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(kind).to(tl.float32)
    tl.store(out_at + at, (silu * u.to(tl.float32)).to(kind), mask=at < size)


def launch_gate(g: Tensor, u: Tensor) -> Tensor:
    """Run the kernel; arguments as of `gate`, contiguous."""
    out = torch.empty_like(g)
    _gate_kernel[(blocks(g.numel(), BLOCK),)](g, u, out, g.numel(), BLOCK=BLOCK, num_warps=4)
    return out
