"""`qquant::group_search`: the scale (and zero point) of every group with the least weighted squared error.

For each row and group of g columns, over steps s as float16 stores them and integer zero points z,

    minimise e' M e,    e_k = w_k - s * (code_k - z),    code_k = clamp(round(w_k / s + z), 0, levels - 1)

M is the diagonal of importance weights, or the group's block of the Gram matrix, whose e' M e is the squared error of the
group's output over all calibration tokens. Rounding is not convex in s, so:
1. s0, the step that spans the group's range (min-max); then a coarse scan, s = f * s0 for six factors f.
   Symmetric grids (z = levels / 2): both signs, since there is one level more below zero than above.
   Others: zero points z0 - 1, z0, z0 + 1 around the one of min-max;
2. a fine scan of FINE steps around the best one;
3. the least-squares step for the codes of the best one, s = q' M w / q' M q.
Every candidate is evaluated as it would be stored, and replaces the best one only if its error is smaller. Against a scan of
several hundred steps (and seven zero points) this loses about 0.5 % on normal and heavy-tailed weights at 4 bits; min-max
loses 20 to 90 %. The idea of a weighted scan is llama.cpp's `make_qx_quants`; this scan and its order are ours.

The Triton kernel keeps 32 rows of a group in registers through all candidates. The Gram form, and groups of more than 256
columns, run the torch code on every device.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qquant.devices import policy
from qquant.errors import InputError
from qquant.kernels.jit import AVAILABLE, blocks, jit, kernel, tl

FEW_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # coarse factors for up to 16 levels, where clipping pays
MANY_LEVELS = (0.97, 1.0, 1.03, 1.06, 1.09, 1.12)  # and for more, where it hardly does
FINE = (-5 / 7, -3 / 7, -1 / 7, 1 / 7, 3 / 7, 5 / 7)  # of the distance between coarse factors
TINY = 2.0**-24  # smallest float16 above 0
FLOAT16_MAX = torch.finfo(torch.float16).max
ROWS = 32
MAX_GROUP = 256  # columns that the Triton kernel holds


@functools.lru_cache
def _plan(levels: int, symmetric: bool) -> tuple[list[tuple[float, float, float]], list[tuple[float, float, float]]]:
    """Coarse and fine candidates (a, b, c): scale = a * towards + b * anchor, zero point = anchor's + c.

    The anchor is min-max during the coarse scan and the best of it after; `towards` is min-max with the sign that puts a
    symmetric group's largest element on the lowest level.
    """
    factors = FEW_LEVELS if levels <= 16 else MANY_LEVELS
    if symmetric:
        coarse = [(factor * sign, 0.0, 0.0) for sign in (1, -1) for factor in factors]
    else:
        coarse = [(factor, 0.0, shift) for shift in (0.0, -1.0, 1.0) for factor in factors]
    distance = factors[1] - factors[0]
    return [(0.0, 1.0, 0.0), *coarse], [(share * distance, 1.0, 0.0) for share in FINE]


@torch.library.custom_op("qquant::group_search", mutates_args=())
def group_search(
    weight: Tensor, importance: Tensor, group_size: int, levels: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """(scales fp16, zeros float32 of whole numbers), both [N, K / group_size], for weight float32 [N, K].

    importance: float32 [K], or the diagonal blocks of a Gram matrix, float32 [K / group_size, group_size, group_size].

    Raises:
        InputError: groups that do not divide the columns, or an importance of another shape.
    """
    _check(weight, importance, group_size)
    return reference(weight, importance, group_size, levels, symmetric)


@group_search.register_fake
def _(weight: Tensor, importance: Tensor, group_size: int, levels: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    shape = (weight.shape[0], weight.shape[1] // group_size)
    return weight.new_empty(shape, dtype=torch.float16), weight.new_empty(shape)


def _check(weight: Tensor, importance: Tensor, group_size: int) -> None:
    columns = weight.shape[1]
    if group_size < 1 or columns % group_size:
        raise InputError(f"groups of {group_size} do not divide {columns} columns")
    groups = columns // group_size
    if importance.shape not in ((columns,), (groups, group_size, group_size)):
        raise InputError(
            f"importance of shape {list(importance.shape)}: wants [{columns}] or [{groups}, {group_size}, {group_size}]"
        )


def as_stored(scale: Tensor) -> Tensor:
    """Float32 scales rounded to float16 values, finite and not zero."""
    return scale.abs().clamp_(TINY, FLOAT16_MAX).copysign_(scale).half().float()


class _Search:
    """The best candidate so far for weights [G, n, g], metric [G, g] or [G, g, g]; see the head of the file."""

    def __init__(self, weight: Tensor, metric: Tensor, levels: int, symmetric: bool) -> None:
        self.weight = weight
        self.metric = metric
        self.position, self.code = torch.empty_like(weight), torch.empty_like(weight)
        self.symmetric = symmetric
        self.top = levels - 1
        self.first = -(levels // 2) if symmetric else 0  # what is rounded is w / s + z, or w / s on a symmetric grid
        if symmetric:
            largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True)).squeeze(-1)
            self.span = largest.abs() * (2 / self.top)
            self.towards = torch.where(largest > 0, -self.span, self.span)
            self.zero = torch.full_like(self.span, levels // 2)
        else:
            low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
            self.span = self.towards = (high - low) / self.top
            self.zero = (-low / as_stored(self.span)).round_().clamp_(0, self.top)
        self.error = torch.full_like(self.span, torch.inf)
        self.best_scale = self.span
        self.best_zero = self.zero

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        if self.metric.dim() == 2:
            return torch.bmm(self.metric.unsqueeze(1), (a * b).transpose(1, 2)).squeeze(1)
        return (torch.bmm(a, self.metric) * b).sum(-1)

    def _round(self, scale: Tensor, zero: Tensor) -> None:
        torch.mul(self.weight, scale.reciprocal().unsqueeze(-1), out=self.position)
        if not self.symmetric:
            self.position += zero.unsqueeze(-1)
        torch.round(self.position, out=self.code).clamp_(self.first, self.first + self.top)

    def consider(self, scale: Tensor, zero: Tensor) -> None:
        """Keep scale and zero point where the error is smaller than the best so far."""
        scale = as_stored(scale)
        self._round(scale, zero)
        e = torch.sub(self.position, self.code, out=self.code)
        error = self._dot(e, e) * scale.square()
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.best_scale = torch.where(better, scale, self.best_scale)
        if not self.symmetric:
            self.best_zero = torch.where(better, zero, self.best_zero)

    def refit(self) -> None:
        """Consider the least-squares scale of the best codes."""
        self._round(self.best_scale, self.best_zero)
        q = self.code if self.symmetric else self.code.sub_(self.best_zero.unsqueeze(-1))
        size = self._dot(q, q)
        fitted = self._dot(q, self.weight) / torch.where(size > 0, size, torch.ones_like(size))
        self.consider(torch.where(size > 0, fitted, self.best_scale), self.best_zero)


def reference(
    weight: Tensor, importance: Tensor, group_size: int, levels: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """`group_search` in torch, a few rows at a time."""
    rows, columns = weight.shape
    groups = columns // group_size
    metric = importance.view(groups, group_size) if importance.dim() == 1 else importance
    scales = torch.empty((groups, rows), dtype=torch.float16, device=weight.device)
    zeros = torch.empty((groups, rows), dtype=torch.float32, device=weight.device)
    chunk = max(1, policy(weight.device).searched // columns)
    for start in range(0, rows, chunk):
        part = weight[start : start + chunk]
        search = _Search(
            part.view(len(part), groups, group_size).transpose(0, 1).contiguous(), metric, levels, symmetric
        )
        for scan in _plan(levels, symmetric):
            anchor, zero = search.best_scale, search.best_zero
            for a, b, shift in scan:
                search.consider(search.towards * a + anchor * b, (zero + shift).clamp_(0, levels - 1))
        search.refit()
        scales[:, start : start + chunk] = torch.where(search.span == 0, 1.0, search.best_scale)
        zeros[:, start : start + chunk] = search.best_zero
    return scales.t().contiguous(), zeros.t().contiguous()


@jit
def _as_stored(scale: tl.tensor) -> tl.tensor:
    size = tl.minimum(tl.maximum(tl.abs(scale), 5.9604645e-08), 65504.0)
    return tl.where(scale < 0, -size, size).to(tl.float16).to(tl.float32)


@jit
def _code(
    w: tl.tensor, scale: tl.tensor, zero: tl.tensor, FIRST: tl.constexpr, TOP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Position between the levels, and the nearest level, [BR, WIDTH]."""
    position = w * (1.0 / scale)[:, None] + zero[:, None]
    level = tl.minimum(tl.maximum(position, FIRST), FIRST + TOP)
    return position, (level + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum keeps no fraction; ties to even


@jit
def _consider(  # noqa: PLR0913 the state of the search, passed by value
    w: tl.tensor,
    importance: tl.tensor,
    trial: tl.tensor,
    trial_zero: tl.tensor,
    error: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    FIRST: tl.constexpr,
    TOP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(error, scale, zero) of the best candidate after one more."""
    position, level = _code(w, trial, trial_zero, FIRST, TOP)
    e = position - level
    size = tl.sum(e * e * importance[None, :], 1) * trial * trial
    better = size < error
    return tl.where(better, size, error), tl.where(better, trial, scale), tl.where(better, trial_zero, zero)


@kernel("N", "groups")
def _kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    weight_at: tl.tensor,
    importance_at: tl.tensor,
    plan_at: tl.tensor,
    scales_at: tl.tensor,
    zeros_at: tl.tensor,
    N: tl.tensor,
    groups: tl.tensor,
    COARSE: tl.constexpr,
    FINE_STEPS: tl.constexpr,
    G: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BR: tl.constexpr,
) -> None:
    g = tl.program_id(0)
    n = tl.program_id(1) * BR + tl.arange(0, BR)
    c = tl.arange(0, WIDTH)
    row = tl.minimum(n, N - 1).to(tl.int64)
    w = tl.load(weight_at + row[:, None] * (groups * G) + g * G + c[None, :], mask=(c < G)[None, :], other=0.0)
    importance = tl.load(importance_at + g * G + c, mask=c < G, other=0.0)
    low = tl.min(w, 1)
    high = tl.max(w, 1)
    FIRST: tl.constexpr = -((TOP + 1) // 2) if SYMMETRIC else 0  # the lowest value of w / s, or of w / s + z
    if SYMMETRIC:
        span = tl.maximum(-low, high) * (2.0 / TOP)
        towards = tl.where(high > -low, -span, span)
        middle = tl.zeros((BR,), tl.float32)
    else:
        low = tl.minimum(low, 0.0)
        span = (tl.maximum(high, 0.0) - low) / TOP
        towards = span
        middle = -low / _as_stored(span)
        middle = tl.minimum((middle + 12582912.0) - 12582912.0, TOP)
    error = tl.full((BR,), float("inf"), tl.float32)
    scale, zero = span, middle
    anchor, anchor_zero = span, middle
    for i in range(COARSE + FINE_STEPS):
        step = plan_at + 3 * i
        trial = _as_stored(towards * tl.load(step) + anchor * tl.load(step + 1))
        trial_zero = tl.minimum(tl.maximum(anchor_zero + tl.load(step + 2), FIRST), FIRST + TOP)
        error, scale, zero = _consider(w, importance, trial, trial_zero, error, scale, zero, FIRST, TOP)
        if i == COARSE - 1:
            anchor, anchor_zero = scale, zero
    _, level = _code(w, scale, zero, FIRST, TOP)
    q = level - zero[:, None]
    weighted = q * importance[None, :]
    size = tl.sum(weighted * q, 1)
    along = tl.sum(weighted * w, 1)
    fitted = _as_stored(tl.where(size > 0, along / tl.where(size > 0, size, 1.0), scale))
    error, scale, zero = _consider(w, importance, fitted, zero, error, scale, zero, FIRST, TOP)
    at = n * groups + g
    tl.store(scales_at + at, tl.where(span == 0, 1.0, scale).to(tl.float16), mask=n < N)
    tl.store(zeros_at + at, zero - FIRST if SYMMETRIC else zero, mask=n < N)


@functools.lru_cache
def _plan_on(device: torch.device, levels: int, symmetric: bool) -> Tensor:
    coarse, fine = _plan(levels, symmetric)
    return torch.tensor(coarse + fine, device=device)


def launch(weight: Tensor, importance: Tensor, group_size: int, levels: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Run the kernel; importance [K], groups of at most MAX_GROUP columns, all contiguous."""
    rows, columns = weight.shape
    groups = columns // group_size
    coarse, fine = _plan(levels, symmetric)
    scales = torch.empty((rows, groups), dtype=torch.float16, device=weight.device)
    zeros = torch.empty((rows, groups), dtype=torch.float32, device=weight.device)
    _kernel[(groups, blocks(rows, ROWS))](
        weight,
        importance,
        _plan_on(weight.device, levels, symmetric),
        scales,
        zeros,
        rows,
        groups,
        COARSE=len(coarse),
        FINE_STEPS=len(fine),
        G=group_size,
        WIDTH=max(16, 1 << (group_size - 1).bit_length()),
        TOP=levels - 1,
        SYMMETRIC=symmetric,
        BR=ROWS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return scales, zeros


def _group_search_cuda(
    weight: Tensor, importance: Tensor, group_size: int, levels: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    _check(weight, importance, group_size)
    if group_size > MAX_GROUP or importance.dim() == 3:
        return reference(weight, importance, group_size, levels, symmetric)
    with torch.cuda.device_of(weight):
        return launch(weight.contiguous(), importance.contiguous(), group_size, levels, symmetric)


if AVAILABLE:
    group_search.register_kernel("cuda")(_group_search_cuda)
