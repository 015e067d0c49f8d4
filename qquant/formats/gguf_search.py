"""The scale searches behind GGUF's block types, reproducing ggml's results to the last bit.

A search looks at blocks of 16 or 32 values `x` with weights `w` and chooses the real-valued scale (and minimum) whose
integer codes lose least, measured by the weighted squared error. ggml tries a fixed list of candidate scales per block:

    symmetric   x ~ scale * l,           l in -nmax .. nmax - 1    19 candidates, each refitted by least squares
    affine      x ~ scale * l + low,     l in 0 .. nmax, low <= 0  up to 38 candidates, each refitted; accepting one moves
                                                                   `low`, and the next candidate starts from there
    positive    x ~ scale * l,           l in 0 .. nmax            9 candidates, then coordinate descent over the codes
    descent     as symmetric             coordinate descent from one candidate
    codebook    x ~ scale * VALUES[l]    16 candidates, nearest of the 16 uneven values of IQ4

Bit-exactness rests on float32 arithmetic without fused multiply-add, as in ggml's stock x86-64 build:

* sums run from left to right over the elements of a block (`sum_in_order`), products associate as (w * x) * l;
* square roots and quotients are correctly rounded (`square_root`; never a product with a reciprocal);
* rounding is `nearest_int`, which wraps outside of +-2^22; the hot loops use round() and send the few blocks for which
  that could differ through the slow form once more;
* comparisons with NaN are false and decide as in C; weights are not negative.

Layout: a piece is `[E, J, S]`, element index first, so that every step over the elements is one vector operation over
all J * S blocks of the piece. Left out: FMA builds of ggml (ARM), whose results differ between compilers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qquant.resources import lazy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")
    np = lazy("numpy")

TINY = 1e-15  # a block whose largest value is below this is stored as zeros
VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # IQ4_NL and IQ4_XS
IMPORTANCE = (-0.9, 0.05, 37, False)  # schedule of `affine` with importance weights

_MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
_SAFE = 2.0**21  # below this nearest_int() is round() with room to spare
_SMALLEST_SPAN = 1e-36  # nmax / span stays finite above this
_REACH = 280  # 2 * 140; a candidate's |x / scale| stays below 140
_SLICE = 1 << 15  # values whose candidates are computed together, on a CPU
_BATCH = 10  # candidates computed together


@dataclass
class Found:
    """What a search chose for each block, float32 [J, S].

    The codes it settled on are `nearest_int(inverse * (x - base))`, clamped to the range of the search and counted from
    its lower end. Where `inverse` is zero the block is all zeros, and so are its codes.
    """

    scale: Tensor
    weight: Tensor  # sum of the weights
    inverse: Tensor
    low: Tensor | None = None  # affine: smallest value of the grid, <= 0
    base: Tensor | None = None  # affine; else 0
    settled: Tensor | None = None  # uint8 [E, J, S]: the codes, where no formula gives them

    def codes(self, x: Tensor, centre: int, top: int, at: Tensor | slice) -> Tensor:
        """Codes uint8 [b, E] in 0 .. top of the blocks `x` float32 [b, E]: those `at`, counted in order of S, then J."""
        if self.settled is not None:
            return self.settled.permute(2, 1, 0).reshape(-1, len(self.settled))[at]
        inverse = self.inverse.t().reshape(-1, 1)[at]
        scaled = x * inverse if self.base is None else (x - self.base.t().reshape(-1, 1)[at]).mul_(inverse)
        codes = nearest_code(scaled, centre, top)
        dead = (inverse == 0).squeeze(1).nonzero().squeeze(1)
        if dead.numel():
            codes[dead] = 0
        return codes


def nearest_int(x: Tensor) -> Tensor:
    """Int32: nearest integer, ties to even, for |x| < 2^22; outside, the wrapped value that ggml's bit trick gives."""
    return _mantissa(x + _MAGIC).sub_(0x400000)


def nearest_code(x: Tensor, centre: int, top: int) -> Tensor:
    """Uint8 codes: `nearest_int(x) + centre`, clamped to 0 .. top; destroys `x`."""
    return _mantissa(x.add_(_MAGIC)).sub_(0x400000 - centre).clamp_(0, top).to(torch.uint8)


def _mantissa(shifted: Tensor) -> Tensor:
    if shifted.device.type != "cpu":
        shifted.masked_fill_(shifted.isnan(), _MAGIC)  # x86's NaN has the mantissa of MAGIC, others' differ
    return shifted.view(torch.int32).bitwise_and_(0x7FFFFF)


def square_root(x: Tensor) -> Tensor:
    """Correctly rounded float32 square root, in place."""
    if x.device.type == "cpu":
        np.sqrt(x.numpy(), out=x.numpy())
        return x
    return x.copy_(x.double().sqrt_())


def sum_in_order(x: Tensor) -> Tensor:
    """Float32 sum over dimension -2 of `x` [..., E, B], strictly from left to right, starting at +0."""
    if x.device.type == "cpu" and x.shape[-1] > 1:
        # numpy adds row to row along a slow axis; its pairwise summation is for the fast axis only
        return torch.from_numpy(np.add.reduce(x.contiguous().numpy(), axis=-2, initial=0.0))
    total = torch.zeros_like(x[..., 0, :])
    for element in x.unbind(-2):
        total.add_(element)
    return total


def divide(numerator: float, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, correctly rounded (`float / tensor` multiplies with a reciprocal)."""
    return torch.div(torch.full((1,), numerator, dtype=torch.float32, device=denominator.device), denominator)


def _numerators(offsets: Iterable[int], step: float, first: float, nmax: int) -> Tensor:
    """Float32: first + step * offset + nmax, added from left to right."""
    steps = torch.tensor(list(offsets), dtype=torch.float32) * torch.tensor(step, dtype=torch.float32)
    return (steps + torch.tensor(first, dtype=torch.float32)) + float(nmax)


def signed_peak(x: Tensor) -> tuple[Tensor, Tensor]:
    """(value of largest magnitude, that magnitude) over dimension 0 of [E, B]; the first of equals, +0 for zeros."""
    high, low = x.amax(0), x.amin(0)
    magnitude = torch.maximum(high, -low)
    peak = torch.where(high == magnitude, high, low)
    tied = (high == -low).nonzero().squeeze(1)
    if tied.numel():
        columns = x[:, tied]
        peak[tied] = columns.gather(0, columns.abs().argmax(0, keepdim=True)).squeeze(0)
    return peak.masked_fill_(magnitude == 0, 0.0), magnitude


def lowest(x: Tensor) -> Tensor:
    """Smallest value over dimension 0 of [E, B]; a zero has the sign of the first zero."""
    low = x.amin(0)
    zero = (low == 0).nonzero().squeeze(1)
    if zero.numel():
        columns = x[:, zero]
        low[zero] = columns.gather(0, columns.argmin(0, keepdim=True)).squeeze(0)
    return low


Piece = tuple["Tensor", "Tensor"]  # x and w, both float32 [E, J, S]


def symmetric(pieces: Iterable[Piece], nmax: int) -> Found:
    """Scales for codes -nmax .. nmax - 1."""
    numerators = -_numerators((0, *range(-9, 0), *range(1, 10)), 0.1, 0.0, nmax)

    def sums(x: Tensor, w: Tensor, peak: Tensor, products: Tensor) -> Tensor:
        wx = w * x
        parts = []
        for some in numerators.to(x.device).split(_BATCH):
            lx, l2 = products[:, : len(some), :, : x.shape[1]]
            codes = torch.mul(x, some.view(-1, 1, 1) / peak, out=lx).round_().clamp_(-nmax, nmax - 1)
            torch.mul(w, codes, out=l2).mul_(codes)
            codes.mul_(wx)
            parts.append(sum_in_order(products[:, : len(some), :, : x.shape[1]]))
        return torch.cat(parts, 1)

    peaks, weights, lx, l2 = _candidates(pieces, sums)
    scale, which = _best_projection(lx, l2)
    live = peaks.abs() >= TINY
    inverse = numerators.to(which.device)[which] / torch.where(live, peaks, 1.0)
    return Found(torch.where(live, scale, 0.0), weights, torch.where(live, inverse, 0.0))


def _candidates(
    pieces: Iterable[Piece], sums: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For blocks [J, S]: peaks, sums of weights, and [C, J, S] of each candidate: <x, l>, <l, l>.

    `sums(x, w, peak, products)` computes the latter, [2, C, b], for b blocks, in working memory `products`.
    """
    peaks, weights, results = [], [], []
    products: Tensor | None = None
    for x, w in pieces:
        blocks = x.flatten(1), w.flatten(1)
        peak, magnitude = signed_peak(blocks[0])
        width = max(2, (_SLICE if x.device.type == "cpu" else x.numel()) // len(x))
        if products is None:
            products = x.new_empty((2, _BATCH, len(x), min(width, len(peak))))
        safe = torch.where(magnitude >= TINY, peak, 1.0)
        parts = zip(blocks[0].split(width, 1), blocks[1].split(width, 1), safe.split(width), strict=True)
        result = torch.cat([sums(*part, products) for part in parts], -1)
        results.append(result.view(*result.shape[:2], *x.shape[1:]))
        peaks.append(peak.view(x.shape[1:]))
        weights.append(sum_in_order(blocks[1]).view(x.shape[1:]))
    lx, l2 = torch.cat(results, -1)
    return torch.cat(peaks, -1), torch.cat(weights, -1), lx, l2


def _best_projection(lx: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
    """Of candidates with sums <x, l> and <l, l> [C, ...]: (scale, index) of the one that explains most of x.

    Candidate 0 is taken unless its codes are all zero; a later one has to win strictly, compared without a division.
    """
    ratio = lx / l2
    ratio[0].masked_fill_(l2[0] == 0, 0.0)
    gain = ratio * lx
    square = lx * lx
    best = gain[0]
    which = torch.zeros_like(best, dtype=torch.int64)
    for index in range(1, len(lx)):
        better = (square[index] > best * l2[index]).logical_and_(l2[index] > 0)
        best = torch.where(better, gain[index], best)
        which.masked_fill_(better, index)
    return ratio.gather(0, which.unsqueeze(0)).squeeze(0), which


def affine(pieces: Iterable[Piece], nmax: int, schedule: tuple[float, float, int, bool]) -> Found:
    """Scales and minima for codes 0 .. nmax.

    `schedule`: candidate i has (first + step * i + nmax) / (highest x - low) for inverse scale; (first, step, candidates,
    whether the absolute error counts instead of the squared one).
    """
    parts = []
    for x, w in pieces:
        parts.append([value.view(x.shape[1:]) for value in _affine(x.flatten(1), w.flatten(1), nmax, schedule, False)])
    return Found(*(torch.cat(values, 1) for values in zip(*parts, strict=True)))


def _affine(x: Tensor, w: Tensor, nmax: int, schedule: tuple[float, float, int, bool], exact: bool) -> list[Tensor]:
    """Scale, weight, inverse, low and base, each [B], for `x`, `w` [E, B]; `exact` rounds the slow way throughout."""
    first, step, count, absolute = schedule
    smallest, high = lowest(x), x.amax(0)
    start = torch.where(smallest > 0, 0.0, smallest)
    dead = high <= start
    high = torch.where(dead, start + 1.0, high)
    line = _Line(x, w, nmax, absolute, exact)

    low = base = highest = start
    chosen = inverse = divide(float(nmax), high - low)
    line.round(inverse, low)
    scale = divide(1.0, inverse)
    best = line.error(scale, low)
    for numerator in _numerators(range(count), step, first, nmax).to(x.device).unsqueeze(1):
        inverse = numerator / (high - low)
        line.round(inverse, low)
        trial_scale, trial_low, valid = line.refit()
        error = line.error(trial_scale, trial_low)
        better = (error < best).logical_and_(valid)
        best = torch.where(better, error, best)
        scale = torch.where(better, trial_scale, scale)
        chosen = torch.where(better, inverse, chosen)
        base = torch.where(better, low, base)
        low = torch.where(better, trial_low, low)
        highest = torch.maximum(highest, low)
    fields = [
        torch.where(dead, 0.0, scale),
        line.weight,
        chosen.masked_fill(dead, 0.0),
        torch.where(dead, start, low),
        base,
    ]
    if not exact:
        span = high - highest
        reach = (highest - smallest).abs_().mul_(nmax + 2.0)
        safe = (reach < _SAFE * span).logical_and_(span > _SMALLEST_SPAN).logical_or_(dead)
        where = safe.logical_not_().nonzero().squeeze(1)
        if where.numel():
            slow = _affine(x[:, where].contiguous(), w[:, where].contiguous(), nmax, schedule, True)
            for field, values in zip(fields, slow, strict=True):
                field[where] = values
    return fields


class _Line:
    """Working memory of an affine search: the codes of the current candidate and the lines through them."""

    def __init__(self, x: Tensor, w: Tensor, nmax: int, absolute: bool, exact: bool) -> None:
        self.x, self.w, self.nmax, self.absolute, self.exact = x, w, nmax, absolute, exact
        self.codes = x.new_empty(x.shape)
        self.products = x.new_empty((3, *x.shape))
        self.weight = sum_in_order(w)
        self.sum_x = sum_in_order(w * x)

    def round(self, inverse: Tensor, low: Tensor) -> None:
        codes = torch.sub(self.x, low, out=self.codes).mul_(inverse)
        if self.exact:
            codes.copy_(nearest_int(codes))
        else:
            codes.round_()
        codes.clamp_(0, self.nmax)

    def refit(self) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, minimum, whether the system is regular) of the weighted least-squares line through the codes."""
        wl, wll, wlx = self.products
        torch.mul(self.w, self.codes, out=wl)
        torch.mul(wl, self.codes, out=wll)
        torch.mul(wl, self.x, out=wlx)
        sum_l, sum_ll, sum_lx = sum_in_order(self.products)
        determinant = (self.weight * sum_ll).sub_(sum_l * sum_l)
        scale = (self.weight * sum_lx).sub_(self.sum_x * sum_l).div_(determinant)
        low = (sum_ll * self.sum_x).sub_(sum_l * sum_lx).div_(determinant)
        if not bool(low.amax() <= 0):  # rare
            above = low > 0
            scale = torch.where(above, sum_lx / sum_ll, scale)
            low = low.masked_fill_(above, 0.0)
        return scale, low, determinant > 0

    def error(self, scale: Tensor, low: Tensor) -> Tensor:
        difference = self.products[0]
        torch.mul(self.codes, scale, out=difference).add_(low).sub_(self.x)  # addcmul would round once
        difference = difference.abs_() if self.absolute else difference.mul_(difference)
        return sum_in_order(difference.mul_(self.w))


def positive(x: Tensor, w: Tensor, nmax: int) -> tuple[Tensor, Tensor]:
    """Scale float32 [B] and codes int32 [E, B] for values that should be >= 0; `x`, `w` float32 [E, B].

    Codes are bytes: a negative one wraps, as it does in ggml.
    """
    top = x.amax(0).clamp_(min=0)
    live = top >= TINY
    top = torch.where(live, top, 1.0)
    inverse = divide(float(nmax), top)
    best = _weighted_error(x, w, nearest_int(x * inverse).bitwise_and_(0xFF), divide(1.0, inverse))
    offsets = (-4, -3, -2, -1, 1, 2, 3, 4)
    for numerator in _numerators(offsets, 0.1, 0.0, nmax).to(x.device).unsqueeze(1):
        trial = numerator / top
        error = _weighted_error(x, w, nearest_int(x * trial).clamp_(max=nmax), divide(1.0, trial))
        better = error < best
        best = torch.where(better, error, best)
        inverse = torch.where(better, trial, inverse)
    signed = nearest_int(x * inverse).clamp_(max=nmax)
    lx, l2 = sum_in_order(torch.stack([w * x * signed, w * signed * signed]))
    codes = (signed & 0xFF).float()
    _descend(x, w, codes, (lx, l2), (None, nmax))
    scale = torch.where(l2 > 0, lx / l2, 0.0)
    return torch.where(live, scale, 0.0), torch.where(live, codes, 0.0).to(torch.int32)


def _weighted_error(x: Tensor, w: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    difference = x - scale * codes
    return sum_in_order((w * difference).mul_(difference))


def descent(pieces: Iterable[Piece], nmax: int) -> Found:
    """Scales for codes -nmax .. nmax - 1 by coordinate descent."""
    x, w = (torch.cat(parts, -1) for parts in zip(*pieces, strict=True))
    shape = x.shape
    x, w = x.flatten(1), w.flatten(1)
    peak, magnitude = signed_peak(x)
    live = magnitude >= TINY
    inverse = divide(float(-nmax), torch.where(live, peak, 1.0))
    codes = nearest_int(x * inverse).clamp_(-nmax, nmax - 1).float()
    lx, l2 = sum_in_order(torch.stack([w * x * codes, w * codes * codes]))
    _descend(x, w, codes, (lx, l2), (-nmax, nmax - 1))
    scale = torch.where(live.logical_and_(l2 > 0), lx / l2, 0.0).view(shape[1:])
    settled = torch.where(magnitude >= TINY, codes.add_(nmax), 0.0).to(torch.uint8).view(shape)
    zero = torch.zeros_like(scale)
    return Found(scale, zero, zero, settled=settled)


def _descend(x: Tensor, w: Tensor, codes: Tensor, sums: tuple[Tensor, Tensor], bounds: tuple[int | None, int]) -> None:
    """Up to five sweeps over the elements, each moved to the code that explains most of x; updates codes and sums.

    A block without a change in one sweep has none in the next, so only blocks that changed go on.
    """
    lx, l2 = sums
    active = _sweep(x, w, codes, sums, bounds).nonzero().squeeze(1)
    for _ in range(4):
        if not active.numel():
            break
        some_codes, some_lx, some_l2 = codes[:, active], lx[active], l2[active]
        changed = _sweep(x[:, active], w[:, active], some_codes, (some_lx, some_l2), bounds)
        codes[:, active], lx[active], l2[active] = some_codes, some_lx, some_l2
        active = active[changed]


def _sweep(x: Tensor, w: Tensor, codes: Tensor, sums: tuple[Tensor, Tensor], bounds: tuple[int | None, int]) -> Tensor:
    """One sweep, in place; bool [B]: which blocks changed. Without a lower bound codes are bytes."""
    lx, l2 = sums
    lower, upper = bounds
    changed = torch.zeros_like(lx, dtype=torch.bool)
    for value, weight, code in zip(x, w, codes, strict=True):
        weighted = weight * value
        rest_lx = lx - weighted * code
        rest_l2 = l2 - (weight * code).mul_(code)
        trial = nearest_int((value * rest_l2).div_(rest_lx)).clamp_(lower, upper).float()
        better = (trial != code).logical_and_(rest_lx > 0)
        new_lx = weighted.mul_(trial).add_(rest_lx)
        new_l2 = (weight * trial).mul_(trial).add_(rest_l2)
        better.logical_and_((rest_l2 if lower is None else new_l2) > 0)
        better.logical_and_((new_lx * new_lx).mul_(l2) > (lx * lx).mul_(new_l2))
        stored = trial if lower is not None else torch.remainder(trial, 256)
        for old, new in ((code, stored), (lx, new_lx), (l2, new_l2)):
            torch.where(better, new, old, out=old)
        changed.logical_or_(better)
    return changed


def nearest_value(x: Tensor) -> Tensor:
    """Uint8 index of the nearest of VALUES, the upper one when halfway; `x` float32 of any shape, destroyed.

    The midpoints are half-integers, so floor(2 x) decides: a table lookup. NaN has the last index.
    """
    position = torch.nan_to_num(x.mul_(2.0).floor_(), nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    position = position.clamp_(-_REACH, _REACH - 1).add_(_REACH).to(torch.int32)
    return _index_table(x.device).index_select(0, position.view(-1)).view(x.shape)


def _index_table(device: torch.device) -> Tensor:
    middles = torch.tensor([below + above for below, above in itertools.pairwise(VALUES)], dtype=torch.int32)
    steps = torch.arange(-_REACH, _REACH, dtype=torch.int32)
    return (steps.unsqueeze(1) >= middles).sum(1).to(device=device, dtype=torch.uint8)


def codebook(pieces: Iterable[Piece]) -> Found:
    """Scales for the 16 values of IQ4."""
    numerators = torch.arange(-7, 8, dtype=torch.float32) + float(VALUES[0])

    def sums(x: Tensor, w: Tensor, peak: Tensor, products: Tensor) -> Tensor:
        table = torch.tensor(VALUES, dtype=torch.float32, device=x.device)[_index_table(x.device).to(torch.int32)]
        start = divide(1.0, (-peak).div_(torch.full_like(peak, VALUES[0])))
        inverses = torch.cat([start.unsqueeze(0), numerators.to(x.device).unsqueeze(1) / peak]).mul_(2.0)
        parts = []
        for some in inverses.unsqueeze(1).split(_BATCH):
            qx, q2 = products[:, : len(some), :, : x.shape[1]]
            place = torch.mul(x, some, out=qx).floor_().add_(_REACH).to(torch.int32)
            values = table.index_select(0, place.view(-1)).view(place.shape)
            torch.mul(w, values, out=q2)
            torch.mul(q2, x, out=qx)
            q2.mul_(values)
            parts.append(sum_in_order(products[:, : len(some), :, : x.shape[1]]))
        return torch.cat(parts, 1)

    peaks, weights, qx, q2 = _candidates(pieces, sums)
    scale = torch.where(peaks.abs() >= TINY, _best_projection(qx, q2)[0], 0.0)
    return Found(scale, weights, torch.zeros_like(scale))
