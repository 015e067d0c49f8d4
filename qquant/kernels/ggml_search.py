"""The searches of `qquant.formats.gguf_search` on a GPU, to the same last bit: one lane a block of weights.

In torch a search is hundreds of passes over all blocks, because ggml's sums run from left to right and each candidate starts from the
one before. Here a lane holds one block's sums in registers and walks through its 16 or 32 elements itself, in the same order; its
weights stay in the first-level cache through all candidates.

    lane b:   for each candidate:   for each element e:   code = nearest(x[e, b] * inverse), sums += ...      x, w: [E, B]

The definitions are in `gguf_search`, and tests compare the bytes. They rest on three things: products and sums are not
fused (`enable_fp_fusion=False`), quotients are correctly rounded (`div_rn`), and `_nearest` is ggml's trick with its wrapping. NaN and
infinity, which the callers refuse, are the one place where results may differ. The codebook search of IQ4 is left to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qquant.kernels.jit import AVAILABLE, blocks, jit, kernel, tl

LANES = 128  # blocks of a program: one a thread, so that a thread reads the codes that it wrote itself
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def runs(x: Tensor) -> bool:
    """Whether the kernels take tensors of this device."""
    return AVAILABLE and x.is_cuda


@jit
def _nearest(x: tl.tensor) -> tl.tensor:
    """Int32: ties to even below 2^22, the wrapped value of ggml's trick beyond."""
    shifted = x + 12582912.0
    shifted = tl.where(shifted == shifted, shifted, 12582912.0)  # noqa: PLR0124 false for NaN
    return (shifted.to(tl.int32, bitcast=True) & 0x7FFFFF) - 0x400000


@jit
def _clamped(code: tl.tensor, LOWEST: tl.tensor, HIGHEST: tl.tensor) -> tl.tensor:
    return tl.minimum(tl.maximum(code, LOWEST), HIGHEST)


@jit
def _pair(x_at: tl.tensor, w_at: tl.tensor, at: tl.tensor, there: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """A value and its weight."""
    return tl.load(x_at + at, mask=there, other=0.0), tl.load(w_at + at, mask=there, other=0.0)


@jit
def _peak(x_at: tl.tensor, b: tl.tensor, there: tl.tensor, B: tl.tensor, E: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The first value of largest magnitude, 1 where that is below 1e-15, and whether it is not."""
    magnitude = tl.zeros_like(b).to(tl.float32)
    peak = magnitude
    for e in range(E):
        x = tl.load(x_at + e * B + b, mask=there, other=0.0)
        larger = tl.abs(x) > magnitude
        magnitude = tl.where(larger, tl.abs(x), magnitude)
        peak = tl.where(larger, x, peak)
    live = magnitude >= 1e-15
    return tl.where(live, peak, 1.0), live


@jit
def _projected(  # noqa: PLR0913 a candidate, passed by value
    x_at: tl.tensor,
    w_at: tl.tensor,
    b: tl.tensor,
    there: tl.tensor,
    B: tl.tensor,
    inverse: tl.tensor,
    E: tl.tensor,
    NMAX: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """<x, l> and <l, l>, l being the codes -NMAX .. NMAX - 1 of x * inverse."""
    lx = tl.zeros_like(inverse)
    l2 = lx
    for e in range(E):
        x, w = _pair(x_at, w_at, e * B + b, there)
        code = _clamped(_nearest(x * inverse), -NMAX, NMAX - 1).to(tl.float32)
        lx += w * x * code
        l2 += w * code * code
    return lx, l2


def _launch(search: Any, x: Tensor, w: Tensor, *further: Tensor, **sizes: int) -> None:
    """Run the kernel `search` on all blocks of contiguous x, w [E, B]; `further`: its further tensors, in its order."""
    elements, count = x.shape
    search[(blocks(count, LANES),)](x, w, *further, count, E=elements, LANES=LANES, **sizes, **OPTIONS)


@kernel("B", "E", "COUNT", "NMAX")
def _symmetric_kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    x_at: tl.tensor,
    w_at: tl.tensor,
    numerators_at: tl.tensor,
    scale_at: tl.tensor,
    inverse_at: tl.tensor,
    weight_at: tl.tensor,
    B: tl.tensor,
    E: tl.tensor,
    COUNT: tl.tensor,
    NMAX: tl.tensor,
    LANES: tl.constexpr,
) -> None:
    b = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = b < B
    peak, live = _peak(x_at, b, there, B, E)
    zero = tl.zeros((LANES,), tl.float32)
    total, best, scale, best_inverse = zero, zero, zero, zero
    for e in range(E):
        total += tl.load(w_at + e * B + b, mask=there, other=0.0)
    for candidate in range(COUNT):
        inverse = tl.div_rn(tl.load(numerators_at + candidate) + zero, peak)
        lx, l2 = _projected(x_at, w_at, b, there, B, inverse, E, NMAX)
        ratio = tl.where(l2 == 0, 0.0, tl.div_rn(lx, l2))
        better = (lx * lx > best * l2) | (zero + candidate == 0)
        scale = tl.where(better, ratio, scale)
        best_inverse = tl.where(better, inverse, best_inverse)
        best = tl.where(better, ratio * lx, best)
    tl.store(scale_at + b, tl.where(live, scale, 0.0), mask=there)
    tl.store(inverse_at + b, tl.where(live, best_inverse, 0.0), mask=there)
    tl.store(weight_at + b, total, mask=there)


def symmetric(x: Tensor, w: Tensor, numerators: Tensor, nmax: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, inverse, sum of weights), float32 [B] each, for x, w float32 [E, B]; see `gguf_search.symmetric`."""
    x, w = x.contiguous(), w.contiguous()
    scale, inverse, weight = x.new_empty((3, x.shape[1]))
    further = numerators.to(x.device), scale, inverse, weight
    _launch(_symmetric_kernel, x, w, *further, COUNT=len(numerators), NMAX=nmax)
    return scale, inverse, weight


@jit
def _fitted(  # noqa: PLR0913 a candidate, passed by value
    x_at: tl.tensor,
    w_at: tl.tensor,
    b: tl.tensor,
    there: tl.tensor,
    B: tl.tensor,
    inverse: tl.tensor,
    low: tl.tensor,
    E: tl.tensor,
    NMAX: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Weighted sums of l, l^2 and l x, l being the codes 0 .. NMAX of (x - low) * inverse."""
    sum_l = tl.zeros_like(inverse)
    sum_ll, sum_lx = sum_l, sum_l
    for e in range(E):
        x, w = _pair(x_at, w_at, e * B + b, there)
        code = _clamped(_nearest((x - low) * inverse), 0, NMAX).to(tl.float32)
        sum_l += w * code
        sum_ll += w * code * code
        sum_lx += w * code * x
    return sum_l, sum_ll, sum_lx


@jit
def _error(  # noqa: PLR0913 a candidate and what it is compared with, passed by value
    x_at: tl.tensor,
    w_at: tl.tensor,
    b: tl.tensor,
    there: tl.tensor,
    B: tl.tensor,
    inverse: tl.tensor,
    low: tl.tensor,
    scale: tl.tensor,
    minimum: tl.tensor,
    E: tl.tensor,
    NMAX: tl.tensor,
    ABSOLUTE: tl.constexpr,
) -> tl.tensor:
    """Weighted error of scale * code + minimum, the codes being those of (x - low) * inverse."""
    total = tl.zeros_like(inverse)
    for e in range(E):
        x, w = _pair(x_at, w_at, e * B + b, there)
        code = _clamped(_nearest((x - low) * inverse), 0, NMAX).to(tl.float32)
        difference = (code * scale + minimum) - x
        if ABSOLUTE:
            total += tl.abs(difference) * w
        else:
            total += difference * difference * w
    return total


@kernel("B", "E", "COUNT", "NMAX")
def _affine_kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    x_at: tl.tensor,
    w_at: tl.tensor,
    numerators_at: tl.tensor,
    out_at: tl.tensor,
    B: tl.tensor,
    E: tl.tensor,
    COUNT: tl.tensor,
    NMAX: tl.tensor,
    ABSOLUTE: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    b = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = b < B
    zero = tl.zeros((LANES,), tl.float32)
    lowest = tl.load(x_at + b, mask=there, other=0.0)
    high, weight, sum_x = lowest, zero, zero
    for e in range(E):
        x, w = _pair(x_at, w_at, e * B + b, there)
        lowest = tl.where(x < lowest, x, lowest)
        high = tl.where(x > high, x, high)
        weight += w
        sum_x += w * x
    start = tl.where(lowest > 0, 0.0, lowest)
    dead = high <= start
    high = tl.where(dead, start + 1.0, high)
    low, base = start, start
    best_inverse = tl.div_rn(zero + NMAX, high - low)
    scale = tl.div_rn(zero + 1.0, best_inverse)
    best = _error(x_at, w_at, b, there, B, best_inverse, low, scale, low, E, NMAX, ABSOLUTE)
    for candidate in range(COUNT):
        inverse = tl.div_rn(tl.load(numerators_at + candidate) + zero, high - low)
        sum_l, sum_ll, sum_lx = _fitted(x_at, w_at, b, there, B, inverse, low, E, NMAX)
        determinant = weight * sum_ll - sum_l * sum_l
        trial = tl.div_rn(weight * sum_lx - sum_x * sum_l, determinant)
        minimum = tl.div_rn(sum_ll * sum_x - sum_l * sum_lx, determinant)
        above = minimum > 0
        trial = tl.where(above, tl.div_rn(sum_lx, sum_ll), trial)
        minimum = tl.where(above, 0.0, minimum)
        error = _error(x_at, w_at, b, there, B, inverse, low, trial, minimum, E, NMAX, ABSOLUTE)
        better = (error < best) & (determinant > 0)
        base = tl.where(better, low, base)
        best = tl.where(better, error, best)
        scale = tl.where(better, trial, scale)
        best_inverse = tl.where(better, inverse, best_inverse)
        low = tl.where(better, minimum, low)
    out = out_at + b
    tl.store(out, tl.where(dead, 0.0, scale), mask=there)
    tl.store(out + B, tl.where(dead, 0.0, best_inverse), mask=there)
    tl.store(out + 2 * B, weight, mask=there)
    tl.store(out + 3 * B, tl.where(dead, start, low), mask=there)
    tl.store(out + 4 * B, base, mask=there)


def affine(x: Tensor, w: Tensor, numerators: Tensor, nmax: int, absolute: bool) -> tuple[Tensor, ...]:
    """(scale, inverse, sum of weights, low, base), float32 [B] each, for x, w float32 [E, B]; see `gguf_search.affine`."""
    x, w = x.contiguous(), w.contiguous()
    out = x.new_empty((5, x.shape[1]))
    sizes = {"COUNT": len(numerators), "NMAX": nmax, "ABSOLUTE": absolute}
    _launch(_affine_kernel, x, w, numerators.to(x.device), out, **sizes)
    return out.unbind()


@jit
def _swept(  # noqa: PLR0913 the codes and sums of a block, passed by value
    x_at: tl.tensor,
    w_at: tl.tensor,
    codes_at: tl.tensor,
    b: tl.tensor,
    there: tl.tensor,
    B: tl.tensor,
    lx: tl.tensor,
    l2: tl.tensor,
    E: tl.tensor,
    NMAX: tl.tensor,
    SIGNED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Sums <x, l> and <l, l> after a sweep over the codes, which are in memory."""
    for e in range(E):
        at = e * B + b
        x, w = _pair(x_at, w_at, at, there)
        code = tl.load(codes_at + at, mask=there, other=0.0)
        weighted = w * x
        rest_lx = lx - weighted * code
        rest_l2 = l2 - w * code * code
        whole = tl.minimum(_nearest(tl.div_rn(x * rest_l2, rest_lx)), NMAX - 1 if SIGNED else NMAX)
        if SIGNED:
            whole = tl.maximum(whole, -NMAX)
        trial = whole.to(tl.float32)
        new_lx = weighted * trial + rest_lx
        new_l2 = w * trial * trial + rest_l2
        better = (trial != code) & (rest_lx > 0) & ((new_l2 if SIGNED else rest_l2) > 0)
        better = better & (new_lx * new_lx * l2 > lx * lx * new_l2)
        stored = trial if SIGNED else (whole & 0xFF).to(tl.float32)
        tl.store(codes_at + at, stored, mask=there & better)
        lx = tl.where(better, new_lx, lx)
        l2 = tl.where(better, new_l2, l2)
    return lx, l2


@kernel("B", "E", "NMAX")
def _descent_kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    x_at: tl.tensor,
    w_at: tl.tensor,
    codes_at: tl.tensor,
    scale_at: tl.tensor,
    B: tl.tensor,
    E: tl.tensor,
    NMAX: tl.tensor,
    LANES: tl.constexpr,
) -> None:
    b = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = b < B
    peak, live = _peak(x_at, b, there, B, E)
    lx = tl.zeros((LANES,), tl.float32)
    l2 = lx
    inverse = tl.div_rn(lx - NMAX, peak)
    for e in range(E):
        x, w = _pair(x_at, w_at, e * B + b, there)
        code = _clamped(_nearest(x * inverse), -NMAX, NMAX - 1).to(tl.float32)
        tl.store(codes_at + e * B + b, code, mask=there)
        lx += w * x * code
        l2 += w * code * code
    for _ in range(5):
        lx, l2 = _swept(x_at, w_at, codes_at, b, there, B, lx, l2, E, NMAX, True)
    tl.store(scale_at + b, tl.where(live & (l2 > 0), tl.div_rn(lx, l2), 0.0), mask=there)
    for e in range(E):
        at = codes_at + e * B + b
        code = tl.load(at, mask=there, other=0.0)
        tl.store(at, tl.where(live, code + NMAX, 0.0), mask=there)


def descent(x: Tensor, w: Tensor, nmax: int) -> tuple[Tensor, Tensor]:
    """(scale [B], codes counted from zero [E, B]), float32, for x, w float32 [E, B]; see `gguf_search.descent`."""
    x, w = x.contiguous(), w.contiguous()
    codes, scale = torch.empty_like(x), x.new_empty(x.shape[1])
    _launch(_descent_kernel, x, w, codes, scale, NMAX=nmax)
    return scale, codes


@jit
def _misfit(  # noqa: PLR0913 a candidate, passed by value
    x_at: tl.tensor,
    w_at: tl.tensor,
    b: tl.tensor,
    there: tl.tensor,
    B: tl.tensor,
    inverse: tl.tensor,
    first: tl.tensor,
    E: tl.tensor,
    NMAX: tl.tensor,
) -> tl.tensor:
    """Weighted error of the codes of x * inverse; those of the first candidate are bytes that wrap, later ones are clamped."""
    total = tl.zeros_like(inverse)
    scale = tl.div_rn(total + 1.0, inverse)
    for e in range(E):
        x, w = _pair(x_at, w_at, e * B + b, there)
        whole = _nearest(x * inverse)
        whole = tl.where(first, whole & 0xFF, tl.minimum(whole, NMAX))
        difference = x - whole.to(tl.float32) * scale
        total += w * difference * difference
    return total


@kernel("B", "E", "COUNT", "NMAX")
def _positive_kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    x_at: tl.tensor,
    w_at: tl.tensor,
    numerators_at: tl.tensor,
    codes_at: tl.tensor,
    scale_at: tl.tensor,
    B: tl.tensor,
    E: tl.tensor,
    COUNT: tl.tensor,
    NMAX: tl.tensor,
    LANES: tl.constexpr,
) -> None:
    b = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = b < B
    zero = tl.zeros((LANES,), tl.float32)
    top, best, best_inverse = zero, zero, zero
    for e in range(E):
        top = tl.maximum(top, tl.load(x_at + e * B + b, mask=there, other=0.0))
    live = top >= 1e-15
    top = tl.where(live, top, 1.0)
    for candidate in range(COUNT):
        inverse = tl.div_rn(tl.load(numerators_at + candidate) + zero, top)
        first = zero + candidate == 0
        error = _misfit(x_at, w_at, b, there, B, inverse, first, E, NMAX)
        better = (error < best) | first
        best = tl.where(better, error, best)
        best_inverse = tl.where(better, inverse, best_inverse)
    lx, l2 = zero, zero
    for e in range(E):
        x, w = _pair(x_at, w_at, e * B + b, there)
        whole = tl.minimum(_nearest(x * best_inverse), NMAX)
        code = whole.to(tl.float32)
        lx += w * x * code
        l2 += w * code * code
        tl.store(codes_at + e * B + b, (whole & 0xFF).to(tl.float32), mask=there)
    for _ in range(5):
        lx, l2 = _swept(x_at, w_at, codes_at, b, there, B, lx, l2, E, NMAX, False)
    tl.store(scale_at + b, tl.where(live & (l2 > 0), tl.div_rn(lx, l2), 0.0), mask=there)
    for e in range(E):
        at = codes_at + e * B + b
        tl.store(at, tl.where(live, tl.load(at, mask=there, other=0.0), 0.0), mask=there)


def positive(x: Tensor, w: Tensor, numerators: Tensor, nmax: int) -> tuple[Tensor, Tensor]:
    """(scale [B], codes [E, B]), float32, for x, w float32 [E, B]; see `gguf_search.positive`. The first numerator is nmax itself."""
    x, w = x.contiguous(), w.contiguous()
    codes, scale = torch.empty_like(x), x.new_empty(x.shape[1])
    _launch(_positive_kernel, x, w, numerators.to(x.device), codes, scale, COUNT=len(numerators), NMAX=nmax)
    return scale, codes


@kernel("E", "B")
def _sum_kernel(
    x_at: tl.tensor, out_at: tl.tensor, E: tl.tensor, B: tl.tensor, DEPTH: tl.constexpr, LANES: tl.constexpr
) -> None:
    b = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = b < B
    x_at += tl.program_id(1).to(tl.int64) * E * B
    zero = tl.zeros((LANES,), tl.int32)
    total = zero.to(tl.float32)
    for start in range(0, E, DEPTH):
        for ahead in tl.static_range(DEPTH):
            e = start + ahead
            total += tl.load(x_at + e * B + b, mask=there & (zero + e < E), other=0.0)
    tl.store(out_at + tl.program_id(1).to(tl.int64) * B + b, total, mask=there)


def sum_in_order(x: Tensor) -> Tensor:
    """Float32 sums over dimension -2 of `x` [..., E, B], from left to right; see `gguf_search.sum_in_order`."""
    x = x.contiguous()
    *batch, elements, count = x.shape
    out = x.new_empty((*batch, count))
    lanes = 32 if elements > 256 else LANES
    _sum_kernel[(blocks(count, lanes), max(1, out.numel() // max(count, 1)))](
        x, out, elements, count, DEPTH=16, LANES=lanes, num_warps=lanes // 32, enable_fp_fusion=False
    )
    return out
