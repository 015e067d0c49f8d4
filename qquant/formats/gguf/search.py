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
all J * S blocks of the piece. On a GPU `qquant.kernels.ggml_search` does the same, a lane a block; what stands here is the
definition. Left out: FMA builds of ggml (ARM), whose results differ between compilers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qquant.formats.gguf.exact import (
    SAFE,
    Array,
    Space,
    divide,
    dot,
    indices,
    nearest_code,
    nearest_int,
    sum_in_order,
    summed,
)
from qquant.resources import lazy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from qquant.kernels import ggml_search as gpu
else:
    torch, gpu = lazy("torch"), lazy("qquant.kernels.ggml_search")
    np = lazy("numpy")


TINY = 1e-15  # a block whose largest value is below this is stored as zeros
VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # IQ4_NL and IQ4_XS
_SMALLEST_SPAN = 1e-36  # nmax / span stays finite above this
_REACH = 280  # 2 * 140; a candidate's |x / scale| stays below 140
_BATCH = 2  # candidates computed together: with them a piece still fits the cache


class Schedule(NamedTuple):
    """The scales that `affine` tries: candidate i has (first + step * i + nmax) / (highest x - low) for inverse scale."""

    first: float
    step: float
    candidates: int
    absolute: bool = False  # the absolute error counts instead of the squared one


IMPORTANCE = Schedule(-0.9, 0.05, 37)  # with importance weights


@dataclass
class SearchResult:
    """What a search chose for each block, float32 [J, S].

    The codes it settled on are `nearest_int(inverse * (x - base))`, clamped to the range of the search and counted from
    its lower end. Where `inverse` is zero the block is all zeros, and so are its codes.
    """

    scale: Tensor
    inverse: Tensor
    weight: Tensor | None = None  # sum of the weights, where it was asked for
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
        dead = indices((inverse == 0).squeeze(1))
        if dead.numel():
            codes[dead] = 0
        return codes


def _numerators(offsets: Iterable[int], step: float, first: float, nmax: int) -> Tensor:
    """Float32: first + step * offset + nmax, added from left to right."""
    steps = torch.tensor(list(offsets), dtype=torch.float32) * torch.tensor(step, dtype=torch.float32)
    return (steps + torch.tensor(first, dtype=torch.float32)) + float(nmax)


def signed_peak(x: Tensor) -> tuple[Tensor, Tensor]:
    """(value of largest magnitude, that magnitude) over dimension 0 of [E, B]; the first of equals, +0 for zeros."""
    space = Space(x)
    values, xp = space.array(x), space.xp
    high, low = xp.amax(values, 0), xp.amin(values, 0)
    magnitude = xp.maximum(high, -low)
    peak = xp.where(high == magnitude, high, low)
    tied = high == -low
    if bool(tied.any()):
        columns = x[:, space.tensor(tied)]
        first = columns.gather(0, columns.abs().argmax(0, keepdim=True)).squeeze(0)
        peak[tied] = xp.where(magnitude[tied] == 0, 0.0, space.array(first))
    return space.tensor(peak), space.tensor(magnitude)


def lowest(x: Tensor) -> Tensor:
    """Smallest value over dimension 0 of [E, B]; a zero has the sign of the first zero."""
    space = Space(x)
    values, xp = space.array(x), space.xp
    low = xp.amin(values, 0)
    zero = low == 0
    if bool(zero.any()):
        columns = x[:, space.tensor(zero)]
        low[zero] = space.array(columns.gather(0, columns.argmin(0, keepdim=True)).squeeze(0))
    return space.tensor(low)


Piece = tuple["Tensor", "Tensor"]  # x and w, both float32 [E, J, S]
Sums = Callable[["Tensor", "Tensor"], tuple[Array, Array]]


def symmetric(pieces: Iterable[Piece], nmax: int, weigh: bool = False) -> SearchResult:
    """Scales for codes -nmax .. nmax - 1; `weigh`: the sums of weights, too."""
    numerators = -_numerators((0, *range(-9, 0), *range(1, 10)), 0.1, 0.0, nmax)

    def inverses(peak: Tensor) -> Tensor:
        return numerators.to(peak.device).unsqueeze(1) / peak

    def prepare(x: Tensor, w: Tensor) -> Sums:
        wx = w * x

        def sums(inverse: Tensor, memory: Tensor) -> tuple[Array, Array]:
            codes = torch.mul(x, inverse, out=memory).round_().clamp_(-nmax, nmax - 1)
            return dot(wx, codes), dot(w, codes, codes)

        return sums

    fast = functools.partial(gpu.symmetric, numerators=numerators, nmax=nmax)
    return _search(pieces, inverses, prepare, weigh, fast)


def _search(
    pieces: Iterable[Piece],
    inverses: Callable[[Tensor], Tensor],
    prepare: Callable[[Tensor, Tensor], Sums],
    weigh: bool = False,
    fast: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None,
) -> SearchResult:
    """The best of the candidates `inverses` [C, b] of the signed peaks [b] of blocks.

    `prepare(x, w)`, both [E, b], gives a function from c inverses [c, 1, b] and working memory [c, E, b] to <x, l>, <l, l> [c, b].
    `fast` gives (scale, inverse, sum of weights) at once, on a GPU.
    """
    parts = []
    memory: Tensor | None = None
    for x, w in pieces:
        space = Space(x)
        x_flat, w_flat = x.flatten(1), w.flatten(1)
        if fast and gpu.runs(x):
            parts.append([value.view(x.shape[1:]) for value in fast(x_flat, w_flat)[: 2 + weigh]])
            continue
        peak, magnitude = signed_peak(x_flat)
        live = magnitude >= TINY
        candidates = inverses(torch.where(live, peak, 1.0))
        lx, l2 = (space.array(scratch) for scratch in x.new_empty((2, *candidates.shape)))
        sums = prepare(x_flat, w_flat)
        if memory is None:
            memory = x.new_empty((_BATCH, *x_flat.shape))
        for start in range(0, len(candidates), _BATCH):
            tried = candidates[start : start + _BATCH]
            scratch = memory[: len(tried), :, : x_flat.shape[1]]
            lx[start : start + _BATCH], l2[start : start + _BATCH] = sums(tried.unsqueeze(1), scratch)
        with np.errstate(all="ignore"):
            ratio, which = (space.tensor(array) for array in _best_projection(lx, l2, space))
        scale, inverse = (values.gather(0, which.unsqueeze(0)).squeeze(0) for values in (ratio, candidates))
        best = [torch.where(live, scale, 0.0), torch.where(live, inverse, 0.0)]
        if weigh:
            best.append(sum_in_order(w_flat))
        parts.append([value.view(x.shape[1:]) for value in best])
    return SearchResult(*(torch.cat(values, 1) for values in zip(*parts, strict=True)))


def _best_projection(lx: Array, l2: Array, space: Space) -> tuple[Array, Array]:
    """(scales [C, B], which of them explains most of x, int64 [B]) for candidates with sums <x, l> and <l, l> [C, B].

    Candidate 0 is taken unless its codes are all zero; a later one has to win strictly, compared without a division (never
    where its codes are all zero: then both sides are).
    """
    ratio = lx / l2
    ratio[0] = space.xp.where(l2[0] == 0, 0.0, ratio[0])
    gain = ratio * lx
    square = lx * lx
    best = gain[0]
    which = space.array(torch.zeros(best.shape, dtype=torch.int64, device=space.device))
    for index in range(1, len(lx)):
        better = space.indices(square[index] > best * l2[index])
        best[better] = gain[index][better]
        which[better] = index
    return ratio, which


def affine(pieces: Iterable[Piece], nmax: int, schedule: Schedule) -> SearchResult:
    """Scales and minima for codes 0 .. nmax, the best of those that `schedule` has."""
    first, step, count, absolute = schedule
    numerators = _numerators(range(count), step, first, nmax)
    parts = []
    for x, w in pieces:
        if gpu.runs(x):
            fast = gpu.affine(x.flatten(1), w.flatten(1), numerators, nmax, absolute)
            parts.append([value.view(x.shape[1:]) for value in fast])
            continue
        with np.errstate(all="ignore"):
            values = _affine(x.flatten(1), w.flatten(1), nmax, schedule, False)
        parts.append([value.view(x.shape[1:]) for value in values])
    return SearchResult(*(torch.cat(values, 1) for values in zip(*parts, strict=True)))


def _affine(x: Tensor, w: Tensor, nmax: int, schedule: Schedule, exact: bool) -> list[Tensor]:
    """Scale, inverse, weight, low and base, each [B], for `x`, `w` [E, B]; `exact` rounds the slow way throughout."""
    first, step, count, absolute = schedule
    line = _Line(x, w, nmax, absolute, exact)
    space, xp = line.space, line.space.xp
    smallest, high = space.array(lowest(x)), space.array(x.amax(0))
    start = xp.where(smallest > 0, 0.0, smallest)
    dead = high <= start
    high = xp.where(dead, start + 1.0, high)

    low, base, highest = start * 1.0, start * 1.0, start
    inverse = space.array(torch.full((1,), float(nmax), device=x.device)) / (high - low)
    line.round(inverse, low)
    scale = space.array(torch.ones(1, device=x.device)) / inverse
    best = line.error(scale, low)
    best_inverse = inverse
    for numerator in space.array(_numerators(range(count), step, first, nmax).to(x.device).unsqueeze(1)):
        inverse = numerator / (high - low)
        line.round(inverse, low)
        trial_scale, trial_low, valid = line.refit()
        error = line.error(trial_scale, trial_low)
        better = space.indices((error < best) & valid)
        base[better] = low[better]
        for old, new in ((best, error), (scale, trial_scale), (best_inverse, inverse), (low, trial_low)):
            old[better] = new[better]
        highest = xp.maximum(highest, low)
    scale, best_inverse = (xp.where(dead, 0.0, values) for values in (scale, best_inverse))
    fields = [space.tensor(values) for values in (scale, best_inverse, line.weight, xp.where(dead, start, low), base)]
    if not exact:
        span = high - highest
        safe = (abs(highest - smallest) * (nmax + 2.0) < SAFE * span) & (span > _SMALLEST_SPAN) | dead
        where = indices(space.tensor(~safe))
        if where.numel():
            slow = _affine(x[:, where].contiguous(), w[:, where].contiguous(), nmax, schedule, True)
            for field, values in zip(fields, slow, strict=True):
                field[where] = values
    return fields


class _Line:
    """Working memory of an affine search: the codes of the current candidate and the lines through them."""

    def __init__(self, x: Tensor, w: Tensor, nmax: int, absolute: bool, exact: bool) -> None:
        self.x, self.w, self.nmax, self.absolute, self.exact = x, w, nmax, absolute, exact
        self.space = Space(x)
        self.codes, self.difference = x.new_empty((2, *x.shape))
        self.weight, self.sum_x = summed(w), dot(w, x)

    def round(self, inverse: Array, low: Array) -> None:
        tensor = self.space.tensor
        codes = torch.sub(self.x, tensor(low), out=self.codes).mul_(tensor(inverse))
        if self.exact:
            codes.copy_(nearest_int(codes))
        else:
            codes.round_()
        codes.clamp_(0, self.nmax)

    def refit(self) -> tuple[Array, Array, Array]:
        """(scale, minimum, whether the system is regular) of the weighted least-squares line through the codes."""
        sum_l, sum_ll, sum_lx = (dot(self.w, self.codes, *factor) for factor in ((), (self.codes,), (self.x,)))
        determinant = self.weight * sum_ll - sum_l * sum_l
        scale = (self.weight * sum_lx - self.sum_x * sum_l) / determinant
        low = (sum_ll * self.sum_x - sum_l * sum_lx) / determinant
        if not bool(low.max() <= 0):  # rare
            above = low > 0
            scale = self.space.xp.where(above, sum_lx / sum_ll, scale)
            low = self.space.xp.where(above, 0.0, low)
        return scale, low, determinant > 0

    def error(self, scale: Array, low: Array) -> Array:
        tensor = self.space.tensor
        difference = torch.mul(self.codes, tensor(scale), out=self.difference)
        difference.add_(tensor(low)).sub_(self.x)  # addcmul would round once
        return dot(difference.abs_(), self.w) if self.absolute else dot(difference, difference, self.w)


def positive(x: Tensor, w: Tensor, nmax: int) -> tuple[Tensor, Tensor]:
    """Scale float32 [B] and codes int32 [E, B] for values that should be >= 0; `x`, `w` float32 [E, B].

    Codes are bytes: a negative one wraps, as it does in ggml.
    """
    offsets = (-4, -3, -2, -1, 1, 2, 3, 4)
    if gpu.runs(x):
        scale, codes = gpu.positive(x, w, _numerators((0, *offsets), 0.1, 0.0, nmax), nmax)
        return scale, codes.to(torch.int32)
    top = x.amax(0).clamp_(min=0)
    live = top >= TINY
    top = torch.where(live, top, 1.0)
    inverse = divide(float(nmax), top)
    best = _weighted_error(x, w, nearest_int(x * inverse).bitwise_and_(0xFF).float(), divide(1.0, inverse))
    for numerator in _numerators(offsets, 0.1, 0.0, nmax).to(x.device).unsqueeze(1):
        trial = numerator / top
        error = _weighted_error(x, w, nearest_int(x * trial).clamp_(max=nmax).float(), divide(1.0, trial))
        better = error < best
        best = torch.where(better, error, best)
        inverse = torch.where(better, trial, inverse)
    integers = nearest_int(x * inverse).clamp_(max=nmax)
    signed = integers.float()
    lx, l2 = sum_in_order(torch.stack([w * x * signed, w * signed * signed]))
    codes = integers.bitwise_and_(0xFF).float()
    _descend(x, w, codes, (lx, l2), (None, nmax))
    scale = torch.where(l2 > 0, lx / l2, 0.0)
    return torch.where(live, scale, 0.0), torch.where(live, codes, 0.0).to(torch.int32)


def _weighted_error(x: Tensor, w: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    difference = x - codes.mul_(scale)
    return sum_in_order((w * difference).mul_(difference))


def descent(pieces: Iterable[Piece], nmax: int) -> SearchResult:
    """Scales for codes -nmax .. nmax - 1 by coordinate descent."""
    x, w = (torch.cat(parts, -1) for parts in zip(*pieces, strict=True))
    shape = x.shape
    x, w = x.flatten(1), w.flatten(1)
    if gpu.runs(x):
        scale, settled = gpu.descent(x, w, nmax)
        scale = scale.view(shape[1:])
        return SearchResult(scale, torch.zeros_like(scale), settled=settled.to(torch.uint8).view(shape))
    peak, magnitude = signed_peak(x)
    live = magnitude >= TINY
    inverse = divide(float(-nmax), torch.where(live, peak, 1.0))
    codes = nearest_int(x * inverse).clamp_(-nmax, nmax - 1).float()
    lx, l2 = sum_in_order(torch.stack([w * x * codes, w * codes * codes]))
    _descend(x, w, codes, (lx, l2), (-nmax, nmax - 1))
    scale = torch.where(live.logical_and_(l2 > 0), lx / l2, 0.0).view(shape[1:])
    settled = torch.where(magnitude >= TINY, codes.add_(nmax), 0.0).to(torch.uint8).view(shape)
    zero = torch.zeros_like(scale)
    return SearchResult(scale, zero, settled=settled)


def _descend(x: Tensor, w: Tensor, codes: Tensor, sums: tuple[Tensor, Tensor], bounds: tuple[int | None, int]) -> None:
    """Up to five sweeps over the elements, each moved to the code that explains most of x; updates codes and sums.

    A block without a change in one sweep has none in the next, so only blocks that changed go on.
    """
    lx, l2 = sums
    active = indices(_sweep(x, w, codes, sums, bounds))
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
        moved = indices(better)
        for old, new in ((code, trial if lower is not None else trial.remainder_(256)), (lx, new_lx), (l2, new_l2)):
            old[moved] = new[moved]
        changed.logical_or_(better)
    return changed


def nearest_value(x: Tensor) -> Tensor:
    """Uint8 index of the nearest of VALUES, the upper one when halfway; `x` float32 of any shape, destroyed.

    The midpoints are half-integers, so floor(2 x) decides: a table lookup. NaN has the last index.
    """
    position = torch.nan_to_num(x.mul_(2.0).floor_(), nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    position = position.clamp_(-_REACH, _REACH - 1).add_(_REACH).to(torch.int32)
    return _index_table(x.device).index_select(0, position.view(-1)).view(x.shape)


@functools.cache
def _index_table(device: torch.device) -> Tensor:
    middles = torch.tensor([below + above for below, above in itertools.pairwise(VALUES)], dtype=torch.int32)
    steps = torch.arange(-_REACH, _REACH, dtype=torch.int32)
    return (steps.unsqueeze(1) >= middles).sum(1).to(device=device, dtype=torch.uint8)


def codebook(pieces: Iterable[Piece]) -> SearchResult:
    """Scales for the 16 values of IQ4."""
    numerators = torch.arange(-7, 8, dtype=torch.float32) + float(VALUES[0])

    def inverses(peak: Tensor) -> Tensor:
        start = divide(1.0, (-peak).div_(torch.full_like(peak, VALUES[0])))
        return torch.cat([start.unsqueeze(0), numerators.to(peak.device).unsqueeze(1) / peak])

    def prepare(x: Tensor, w: Tensor) -> Sums:
        table = _value_table(x.device)

        def sums(inverse: Tensor, memory: Tensor) -> tuple[Array, Array]:
            cell = torch.mul(x, inverse * 2.0, out=memory).floor_().add_(_REACH).to(torch.int32)
            values = torch.index_select(table, 0, cell.view(-1)).view(cell.shape)
            return dot(w, values, x), dot(w, values, values)

        return sums

    return _search(pieces, inverses, prepare)


@functools.cache
def _value_table(device: torch.device) -> Tensor:
    return torch.tensor(VALUES, dtype=torch.float32, device=device)[_index_table(device).to(torch.int32)]
