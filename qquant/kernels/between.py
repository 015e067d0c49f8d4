"""What stands between the matrix products of a decoder block, for few rows: norms, rotary, one token's attention, the gate.

    add_norm   s = x + y;  n = s / sqrt(mean(s^2) + epsilon) * weight                       sums in float32
    rotate     q, k of every head turned by the angle of their position; k and v go into the cache, q comes back
    attend     softmax(q k' / sqrt(d)) v over the positions 0 .. position of a static cache, for one row of q a sequence
    gate       silu(g) * u of the fused product [g, u]

Each is one Triton kernel on CUDA that starts before the one before it is done (`jit.starts_early`), and plain torch elsewhere. Where
the products take microseconds, five torch operators each would take as long as the products, and so would Triton's own launcher
(`qquant.kernels.launcher`). Positions are int32 on the device, one
for each of B sequences, so that a captured graph serves every step. Keys and values of a layer are [B, kv, capacity, d].

`attend` gives every head SPLITS programs, each a share of the positions with its own running maximum and sum; the last to arrive
puts the shares together in their order, so results do not depend on who was last.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qquant.kernels.jit import AVAILABLE, blocks, gdc, jit, kernel, tl
from qquant.kernels.launcher import Launcher

SPLITS = 16  # programs of a head
SPAN = 32  # positions at a time
GATED = 256  # values of `gate` in a program


def _on_gpu(x: Tensor) -> bool:
    return AVAILABLE and x.is_cuda


@jit
def _start(EARLY: tl.constexpr) -> None:
    if EARLY:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()


# -- norms


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(sum, norm) of x and y [M, H], or of x alone, in their dtype; weight [H]."""
    if _on_gpu(x):
        return launch_add_norm(x, y, weight, epsilon)
    total = x if y is None else x + y
    return total, F.rms_norm(total, (total.shape[-1],), weight, epsilon)


@kernel()
def _add_norm_kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    x_at: tl.tensor,
    y_at: tl.tensor,
    weight_at: tl.tensor,
    sum_at: tl.tensor,
    norm_at: tl.tensor,
    H: tl.tensor,
    epsilon: tl.tensor,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    h = tl.arange(0, WIDTH)
    weight = tl.load(weight_at + h, mask=h < H, other=0.0).to(tl.float32)
    _start(EARLY)
    at = tl.program_id(0) * H + h
    x = tl.load(x_at + at, mask=h < H, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(y_at + at, mask=h < H, other=0.0).to(tl.float32)
        rounded = x.to(sum_at.dtype.element_ty)
        tl.store(sum_at + at, rounded, mask=h < H)
        x = rounded.to(tl.float32)
    norm = x * tl.rsqrt(tl.sum(x * x, 0) / H + epsilon) * weight
    tl.store(norm_at + at, norm.to(norm_at.dtype.element_ty), mask=h < H)


def _norm_constants(width: int, _: float, add: bool) -> dict[str, Any]:
    lanes = 1 << (width - 1).bit_length()
    return {"WIDTH": lanes, "ADD": add, "num_warps": min(16, max(1, lanes // 256))}


_launch_norm = Launcher(_add_norm_kernel, _norm_constants)


def launch_add_norm(x: Tensor, y: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments as of `add_norm`, contiguous."""
    rows, width = x.shape
    total, norm = x if y is None else torch.empty_like(x), torch.empty_like(x)
    tensors = x, x if y is None else y, weight, total, norm
    _launch_norm((rows, 1), tensors, (width, epsilon), (y is not None,))
    return total, norm


# -- rotary positions and the cache


def rotate(qkv: Tensor, table: Tensor, rows: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Turned q [M, heads * d] of the fused qkv [M, (heads + 2 kv) * d] of M tokens, each with its row of the cache and its place in it.

    table: float32 [positions, d], the cosines of d / 2 angles and then their sines. rows, positions: int32 [M]. keys, values:
    [B, kv, capacity, d], written.
    """
    if _on_gpu(qkv):
        return launch_rotate(qkv, table, rows, positions, keys, values)
    _, kv, _, width = keys.shape
    heads = qkv.shape[1] // width - 2 * kv
    cosine, sine = (half.unsqueeze(1) for half in table[positions].chunk(2, -1))
    query, key, value = qkv.view(len(qkv), -1, width).split([heads, kv, kv], dim=1)

    def turned(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(x.dtype)

    keys[rows, :, positions] = turned(key)
    values[rows, :, positions] = value
    return turned(query).reshape(len(qkv), -1)


@kernel("capacity")
def _rotate_kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    qkv_at: tl.tensor,
    table_at: tl.tensor,
    rows_at: tl.tensor,
    places_at: tl.tensor,
    q_at: tl.tensor,
    keys_at: tl.tensor,
    values_at: tl.tensor,
    capacity: tl.tensor,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    m, head = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, HALF)
    _start(EARLY)
    position = tl.load(places_at + m)
    row = tl.load(rows_at + m).to(tl.int64)
    at = qkv_at + (m * (HEADS + 2 * KV) + head) * (2 * HALF) + c
    first, second = tl.load(at), tl.load(at + HALF)
    if head < HEADS + KV:
        cosine = tl.load(table_at + position * (2 * HALF) + c)
        sine = tl.load(table_at + position * (2 * HALF) + HALF + c)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first = (a * cosine - b * sine).to(first.dtype)
        second = (b * cosine + a * sine).to(second.dtype)
    if head < HEADS:
        to = q_at + (m * HEADS + head) * (2 * HALF) + c
    elif head < HEADS + KV:
        to = keys_at + ((row * KV + head - HEADS) * capacity + position) * (2 * HALF) + c
    else:
        to = values_at + ((row * KV + head - HEADS - KV) * capacity + position) * (2 * HALF) + c
    tl.store(to, first)
    tl.store(to + HALF, second)


def _rotate_constants(_: int, heads: int, kv: int, half: int) -> dict[str, Any]:
    return {"HEADS": heads, "KV": kv, "HALF": half, "num_warps": 1}


_launch_rotate = Launcher(_rotate_kernel, _rotate_constants)


def launch_rotate(qkv: Tensor, table: Tensor, rows: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Run the kernel; arguments as of `rotate`, contiguous."""
    _, kv, capacity, width = keys.shape
    count, outputs = qkv.shape
    heads = outputs // width - 2 * kv
    query = qkv.new_empty(count, heads * width)
    tensors = qkv, table, rows, positions, query, keys, values
    _launch_rotate((count, heads + 2 * kv), tensors, (capacity,), (heads, kv, width // 2))
    return query


# -- attention of one row a sequence


def attend(query: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """[B, heads * d] of query [B, heads * d], each over places 0 .. its `position` int32 [B] of keys, values [B, kv, capacity, d]."""
    if _on_gpu(query):
        return launch_attend(query, keys, values, position, SPLITS)
    _, kv, _, width = keys.shape
    mixed = torch.empty_like(query)
    for row, last in enumerate(position.tolist()):
        q = query[row].view(1, -1, 1, width)
        key, value = keys[row, None, :, : last + 1], values[row, None, :, : last + 1]
        out = F.scaled_dot_product_attention(q, key, value, enable_gqa=q.shape[1] != kv)
        mixed[row] = out.reshape(-1)
    return mixed


@kernel("capacity")
def _attend_kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    q_at: tl.tensor,
    keys_at: tl.tensor,
    values_at: tl.tensor,
    position_at: tl.tensor,
    out_at: tl.tensor,
    share_at: tl.tensor,  # float32 [B * heads, splits, d + 2]: weighted values, maximum, sum
    counters_at: tl.tensor,
    capacity: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # heads that share keys and values
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    head, part = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, WIDTH)
    span = tl.arange(0, BLOCK)
    _start(EARLY)
    count = tl.load(position_at + head // HEADS) + 1  # `head` counts those of all sequences
    share = (count + PARTS - 1) // PARTS
    first = part * share
    last = tl.minimum(first + share, count)
    query = tl.load(q_at + head * WIDTH + c).to(tl.float32) * scale
    base = (head // GROUP).to(tl.int64) * capacity * WIDTH
    largest = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(first, last, BLOCK):  # every row of the block keeps a maximum of its own
        there = start + span < last
        at = base + (start + span)[:, None] * WIDTH + c[None, :]
        key = tl.load(keys_at + at, mask=there[:, None], other=0.0).to(tl.float32)
        value = tl.load(values_at + at, mask=there[:, None], other=0.0).to(tl.float32)
        score = tl.where(there, tl.sum(key * query[None, :], 1), -1e30)
        above = tl.maximum(largest, score)
        shrink = tl.exp(largest - above)
        weight = tl.where(there, tl.exp(score - above), 0.0)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * value
        largest = above
    highest = tl.max(largest, 0)
    shrink = tl.exp(largest - highest)
    to = share_at + (head * PARTS + part) * (WIDTH + 2)
    tl.store(to + c, tl.sum(acc * shrink[:, None], 0))
    tl.store(to + WIDTH, highest)
    tl.store(to + WIDTH + 1, tl.sum(total * shrink, 0))
    tl.debug_barrier()  # every thread's share is written before one thread announces it
    if tl.atomic_add(counters_at + head, 1, sem="acq_rel") == PARTS - 1:
        p = tl.arange(0, PARTS)
        rows = share_at + (head * PARTS + p) * (WIDTH + 2)
        maxima = tl.load(rows + WIDTH, cache_modifier=".cg")
        weights = tl.exp(maxima - tl.max(maxima, 0))
        sums = tl.load(rows + WIDTH + 1, cache_modifier=".cg")
        mixed = tl.sum(tl.load(rows[:, None] + c[None, :], cache_modifier=".cg") * weights[:, None], 0)
        tl.store(out_at + head * WIDTH + c, (mixed / tl.sum(sums * weights, 0)).to(out_at.dtype.element_ty))
        tl.store(counters_at + head, 0)


@functools.lru_cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(1 << 14, dtype=torch.int32, device=device)


def _attend_constants(_: int, __: float, heads: int, group: int, width: int, splits: int) -> dict[str, Any]:
    return {"HEADS": heads, "GROUP": group, "WIDTH": width, "PARTS": splits, "BLOCK": SPAN, "num_warps": 4}


_launch_attend = Launcher(_attend_kernel, _attend_constants)


def launch_attend(query: Tensor, keys: Tensor, values: Tensor, position: Tensor, splits: int) -> Tensor:
    """Run the kernel; arguments as of `attend`, contiguous. One stream at a time: its counters are shared."""
    count, kv, capacity, width = keys.shape
    heads = query.shape[1] // width
    out = torch.empty_like(query)
    shares = torch.empty((count * heads, splits, width + 2), dtype=torch.float32, device=query.device)
    tensors = query, keys, values, position, out, shares, _counters(query.device)
    _launch_attend((count * heads, splits), tensors, (capacity, width**-0.5), (heads, heads // kv, width, splits))
    return out


# -- the gate


def gate(gate_up: Tensor) -> Tensor:
    """[M, F] of the fused product [M, 2 F]."""
    if _on_gpu(gate_up):
        return launch_gate(gate_up)
    first, second = gate_up.chunk(2, -1)
    return F.silu(first) * second


@kernel()
def _gate_kernel(
    from_at: tl.tensor, to_at: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr, EARLY: tl.constexpr
) -> None:
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0)
    _start(EARLY)
    g = tl.load(from_at + row * 2 * size + c, mask=c < size, other=0.0).to(tl.float32)
    u = tl.load(from_at + row * 2 * size + size + c, mask=c < size, other=0.0).to(tl.float32)
    product = (g / (1.0 + tl.exp(-g))).to(to_at.dtype.element_ty).to(tl.float32) * u
    tl.store(to_at + row * size + c, product.to(to_at.dtype.element_ty), mask=c < size)


_launch_gate = Launcher(_gate_kernel, lambda _: {"BLOCK": GATED, "num_warps": 2})


def launch_gate(gate_up: Tensor) -> Tensor:
    """Run the kernel; argument as of `gate`, contiguous."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    _launch_gate((rows, blocks(size, GATED)), (gate_up, out), (size,))
    return out
