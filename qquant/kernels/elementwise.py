"""What stands between the matrix products of a decoder block, for many tokens: norm, rotary, gate, each read and written once.

    rms_norm   x / sqrt(mean(x^2) + epsilon), rounded, times weight             sums in float32, over the last dimension
    rotate     (x1, x2) -> (x1 c - x2 s, x2 c + x1 s), in place                 halves of a head, c and s of a token's position
    rotated    the same of query and key into new memory
    gate       silu(g) u
    difference x - y, rounded to bfloat16, of parts of rows

As `qquant.families.decoder` has them: every operator of torch rounds to the dtype of x, and so do the Triton kernels, so that bits differ
in sums and exponentials alone. For a few rows, and into a cache: `qquant.kernels.between`. By torch without Triton, on a CPU, and where a
gradient is wanted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qquant.kernels.jit import AVAILABLE, blocks, kernel, tl
from qquant.kernels.launcher import Launcher

BLOCK = 1024  # values of `gate` in a program
HEADS = 8  # of a program of `rotate`


def serves(x: Tensor) -> bool:
    """Whether the kernels run for x: a plain tensor on a GPU, in a dtype of activations, through which no gradient is wanted, outside of torch.compile."""
    there = AVAILABLE and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and type(x) is Tensor
    return there and not torch.compiler.is_compiling() and not _differentiated(x)


def _differentiated(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The norm of x [..., H] with weight [H], of one dtype."""
    if serves(x) and weight.dtype == x.dtype and not _differentiated(weight):
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


def _norm_constants(width: int, _: float) -> dict[str, Any]:
    lanes = 1 << (width - 1).bit_length()
    return {"WIDTH": lanes, "num_warps": min(16, max(1, lanes // 512))}


_launch_norm = Launcher(_rms_norm_kernel, _norm_constants)


def launch_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Run the kernel; arguments as of `rms_norm`, contiguous."""
    out, width = torch.empty_like(x), x.shape[-1]
    _launch_norm((x.numel() // width, 1), (x, weight, out), (width, epsilon))
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


def rotated(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor] | None:
    """Query and key [B, heads, T, d] turned to the positions of tables [B or 1, T, d]; None where the kernel does not serve."""
    if not (serves(query) and serves(key) and query.dtype == key.dtype == cosine.dtype == sine.dtype):
        return None
    apart = _tokens_apart(query), _tokens_apart(key)
    if not (apart[0] and apart[1] and cosine.shape == sine.shape and cosine.is_contiguous() and sine.is_contiguous()):
        return None
    return launch_rotated(query, key, cosine, sine, apart)


def _tokens_apart(x: Tensor) -> int:
    """Values from one token of x [B, heads, T, d] to the next if that is one number and a token's heads lie together, else 0."""
    if x.dim() != 4:
        return 0
    count, heads, length, width = x.shape
    sequence, head, token, value = x.stride()
    if value != 1 or width % 2 or (head != width and heads > 1) or not count * length:
        return 0
    if length == 1:
        return sequence if count > 1 else heads * width
    return token if count == 1 or sequence == length * token else 0


@kernel()
def _rotated_kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    query_at: tl.tensor,
    key_at: tl.tensor,
    cosine_at: tl.tensor,
    sine_at: tl.tensor,
    query_to: tl.tensor,
    key_to: tl.tensor,
    query_apart: tl.tensor,  # values from one token to the next, here and below
    key_apart: tl.tensor,
    length: tl.tensor,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,  # HALF, or the next power of two
    SHARED: tl.constexpr,  # whether sequences of `length` tokens have one table
) -> None:
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, WIDTH)
    there = i < HALF
    if head < HEADS:
        at = query_at + token * query_apart + head * (2 * HALF) + i
        to = query_to + (token * HEADS + head) * (2 * HALF) + i
    else:
        at = key_at + token * key_apart + (head - HEADS) * (2 * HALF) + i
        to = key_to + (token * KV + head - HEADS) * (2 * HALF) + i
    place = token % length if SHARED else token
    c_at, s_at = cosine_at + place * (2 * HALF) + i, sine_at + place * (2 * HALF) + i
    first, second = tl.load(at, mask=there, other=0.0), tl.load(at + HALF, mask=there, other=0.0)
    kind = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    cosine = tl.load(c_at, mask=there, other=0.0).to(tl.float32)
    sine = tl.load(s_at, mask=there, other=0.0).to(tl.float32)
    left = (first * cosine).to(kind).to(tl.float32) - (second * sine).to(kind).to(tl.float32)
    cosine = tl.load(c_at + HALF, mask=there, other=0.0).to(tl.float32)
    sine = tl.load(s_at + HALF, mask=there, other=0.0).to(tl.float32)
    right = (second * cosine).to(kind).to(tl.float32) + (first * sine).to(kind).to(tl.float32)
    tl.store(to, left.to(kind), mask=there)
    tl.store(to + HALF, right.to(kind), mask=there)


def _rotated_constants(_: int, __: int, ___: int, heads: int, kv: int, half: int, shared: bool) -> dict[str, Any]:
    widths = {"HALF": half, "WIDTH": 1 << (half - 1).bit_length()}
    return {"HEADS": heads, "KV": kv, **widths, "SHARED": shared, "num_warps": 1, "enable_fp_fusion": False}


_launch_rotated = Launcher(_rotated_kernel, _rotated_constants)


def launch_rotated(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, apart: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as of `rotated`, `apart` values from one token of query and key to the next."""
    count, heads, length, width = query.shape
    kv = key.shape[1]
    turned = query.new_empty(count, length, heads, width)
    turned_key = query.new_empty(count, length, kv, width)
    shared = count > 1 and len(cosine) == 1
    tensors, numbers = (query, key, cosine, sine, turned, turned_key), (*apart, length if shared else 1)
    _launch_rotated((count * length, heads + kv), tensors, numbers, (heads, kv, width // 2, shared))
    return turned.transpose(1, 2), turned_key.transpose(1, 2)


def gate(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) u of two tensors [..., F] of one shape and dtype; rows may lie apart, as those of two slices of one tensor do."""
    if serves(g) and serves(u) and g.dtype == u.dtype and g.shape == u.shape:
        apart = _rows_apart(g)
        if apart and apart == _rows_apart(u):
            return launch_gate(g, u, apart)
    return F.silu(g) * u


def _rows_apart(x: Tensor) -> int:
    """Values from one row of x [..., F] to the next, 0 where that is not one number, a row has gaps, or there are no values."""
    if x.is_contiguous():
        return x.shape[-1] if x.numel() else 0
    if x.stride(-1) != 1:
        return 0
    apart = inner = 0
    for size, stride in zip(x.shape[-2::-1], x.stride()[-2::-1], strict=True):
        if size > 1 and apart and stride != inner:
            return 0
        if size > 1:
            apart, inner = apart or stride, stride * size
    return apart


@kernel()
def _gate_kernel(
    g_at: tl.tensor,
    u_at: tl.tensor,
    out_at: tl.tensor,
    size: tl.tensor,
    apart: tl.tensor,  # values from one row of g or u to the next
    BLOCK: tl.constexpr,
) -> None:
    parts = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    c = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_at + row * apart + c, mask=c < size, other=0.0)
    u = tl.load(u_at + row * apart + c, mask=c < size, other=0.0)
    kind = g.dtype
    wide = g.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(kind).to(tl.float32)
    tl.store(out_at + row * size + c, (silu * u.to(tl.float32)).to(kind), mask=c < size)


_launch_gate = Launcher(_gate_kernel, lambda *_: {"BLOCK": BLOCK, "num_warps": 4})


def launch_gate(g: Tensor, u: Tensor, apart: int) -> Tensor:
    """Run the kernel; arguments as of `gate`, `apart` values from one row to the next."""
    *rows, width = g.shape
    out = g.new_empty(*rows, width)
    _launch_gate((math.prod(rows) * -(-width // BLOCK), 1), (g, u, out), (width, apart))
    return out


def difference(x: Tensor, y: Tensor) -> Tensor:
    """X - y of [T, K], rounded once to bfloat16, contiguous; rows of both may be parts of longer ones."""
    if serves(x) and x.dtype == y.dtype and x.stride(-1) == y.stride(-1) == 1:
        with torch.cuda.device_of(x):
            return launch_difference(x, y)
    return torch.sub(x, y, out=torch.empty(x.shape, dtype=torch.bfloat16, device=x.device))


@kernel()
def _difference_kernel(
    x_at: tl.tensor,
    y_at: tl.tensor,
    out_at: tl.tensor,
    x_row: tl.tensor,  # values from one row to the next
    y_row: tl.tensor,
    K: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + row * x_row + k, mask=k < K, other=0.0).to(tl.float32)
    y = tl.load(y_at + row * y_row + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out_at + row * K + k, (x - y).to(tl.bfloat16), mask=k < K)


def launch_difference(x: Tensor, y: Tensor) -> Tensor:
    """Run the kernel; arguments as of `difference`."""
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=x.device)
    block = min(2 * BLOCK, max(32, 1 << (columns - 1).bit_length()))
    _difference_kernel[(rows, blocks(columns, block))](
        x, y, out, x.stride(0), y.stride(0), columns, BLOCK=block, num_warps=max(1, block // 256)
    )
    return out
