"""Runs every Triton kernel in Triton's interpreter, on the CPU, against its definition in float64. Not a test file by itself.

`TRITON_INTERPRET=1 python -m tests.worlds.interpreter_cases` prints one JSON object, case -> {"error": x, "limit": y} or {"failed": text}.
The variable is read when kernels are defined, so this needs a process of its own; `test_kernels.py` starts it.

Inputs and outputs are exact-size slices between guards: reading outside turns results into NaN or nonsense, writing outside is
seen afterwards; outputs start poisoned, so what was not written is seen too.
"""

import json
import sys
import traceback
from functools import partial
from unittest.mock import patch

import numpy as np
import torch

from qquant.formats.gguf import exact, quantize, search
from qquant.kernels import (
    between,
    column_sums,
    dequant,
    elementwise,
    gptq_block,
    gram,
    group_products,
    group_search,
    many_rows,
    scaled_half,
    wq_mm,
)
from qquant.kernels import product as halves_of
from qquant.kernels.jit import blocks
from qquant.kernels.unpack import repack
from tests.worlds import GOLDEN

GUARD = 64
POISON = {
    torch.float32: float("nan"),
    torch.float16: float("nan"),
    torch.bfloat16: float("nan"),
    torch.int32: 0x7ABCDEF7,
    torch.uint8: 0xE7,
}
_plain_empty, _plain_new_empty = torch.empty, torch.Tensor.new_empty
_guarded: list[tuple[torch.Tensor, torch.Tensor]] = []


def _fenced(shape, dtype):
    """An exact-size poisoned tensor between guards; `broken_guards` looks at them later."""
    size = 1
    for side in shape:
        size *= side
    whole = _plain_empty(size + 2 * GUARD, dtype=dtype).fill_(POISON[dtype])
    _guarded.append((whole, whole.clone()))
    return whole[GUARD : GUARD + size].view(shape)


def guarded(tensor):
    """A copy of `tensor` between guards."""
    return _fenced(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def broken_guards():
    """How many guards were written over since the last call."""
    broken = 0
    for whole, before in _guarded:
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[whole.element_size()]
        for side in (slice(0, GUARD), slice(len(whole) - GUARD, len(whole))):
            broken += not torch.equal(whole[side].view(bits), before[side].view(bits))
    _guarded.clear()
    return broken


def _empty(*shape, dtype=torch.float32, device=None):
    return _fenced(tuple(shape[0]) if isinstance(shape[0], (tuple, list)) else shape, dtype)


def _new_empty(like, *shape, **more):
    return _plain_new_empty(like, *shape, **more) if more or like.dtype not in POISON else _empty(*shape, dtype=like.dtype)  # fmt: skip


def relative(value, truth):
    """Frobenius norm of the difference over that of the truth; infinite for NaN."""
    error = float((value.double() - truth.double()).norm() / truth.double().norm())
    return error if error == error else float("inf")


def weights(rows, groups, width, bits, symmetric):
    """(qweight, params, float64 weights [N, K]) with scales of both signs and zero points at both ends."""
    codes = torch.randint(0, 1 << bits, (rows, groups * width), dtype=torch.uint8)
    scales = (torch.rand(rows, groups) * 0.02 + 0.001).half() * (torch.randint(0, 2, (rows, groups)) * 2 - 1).half()
    zeros = None if symmetric else torch.randint(0, (1 << bits) + 1, (rows, groups))
    qweight, params = repack(codes, scales, zeros, bits)
    zero = 1 << (bits - 1) if zeros is None else zeros.double().repeat_interleave(width, 1)
    return guarded(qweight), guarded(params), (codes.double() - zero) * scales.double().repeat_interleave(width, 1)


def product(
    rows, outputs, groups, width, bits, symmetric, splits, height=64, dtype=torch.float16, bias=True, warps=4, unroll=1
):
    qweight, params, truth = weights(outputs, groups, width, bits, symmetric)
    x = guarded(torch.randn(rows, groups * width).to(dtype))
    b = guarded(torch.randn(outputs).to(dtype)) if bias else None
    counters = guarded(torch.zeros(blocks(outputs, height), dtype=torch.int32))
    config = wq_mm.Config(height, splits, warps, 3, 0, unroll)
    return judged(wq_mm.launch, (x, qweight, params, b, bits, width, config, counters), truth)


def product_of_many(
    rows, outputs, groups, width, bits, symmetric, splits, block=64, height=128, dtype=torch.float16, bias=True
):
    qweight, params, truth = weights(outputs, groups, width, bits, symmetric)
    x = guarded(torch.randn(rows, groups * width).to(dtype))
    b = guarded(torch.randn(outputs).to(dtype)) if bias else None
    config = many_rows.Config(block, height, splits)
    across, down, _ = many_rows.grid(rows, outputs, config)
    counters = guarded(torch.zeros(across * down, dtype=torch.int32))
    return judged(many_rows.launch, (x, qweight, params, b, bits, width, config, counters), truth)


def judged(launch, arguments, truth):
    """(error, limit) of a product, its counters looked at."""
    x, b, counters = arguments[0], arguments[3], arguments[-1]
    y, dtype = launch(*arguments), x.dtype
    assert int(counters.abs().max()) == 0, "counters are not zero after the call"
    expected = x.double() @ truth.T + (0 if b is None else b.double())
    if dtype == torch.bfloat16:  # the interpreter cuts where the device rounds
        return relative(y, expected), 8e-3
    return relative(y, expected.to(dtype)), 5e-5  # a few ties rounded the other way


def dequantized(rows, groups, width, bits, symmetric, dtype):
    qweight, params, truth = weights(rows, groups, width, bits, symmetric)
    out = dequant.launch(qweight, params, bits, width, dtype)
    if dtype == torch.bfloat16:  # the interpreter cuts where the device rounds
        return relative(out, truth), 8e-3
    return float((out.double() - truth.to(dtype).double()).abs().max()), 0.0


def gptq_problem(rows, columns, levels, per_column):
    w = torch.randn(rows, columns) * 0.05
    mixed = torch.randn(4 * columns, columns) @ (torch.eye(columns) + 0.2 * torch.randn(columns, columns))
    hessian = (mixed.T @ mixed).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float().contiguous()
    step = 2 * w.abs().amax(1, keepdim=True) / (levels - 1) * (0.8 + 0.4 * torch.rand(1, columns) if per_column else 1)
    step = step.expand(rows, columns).half().float().contiguous()
    offset = (step * (levels // 2)).contiguous()
    step[1], offset[1] = 0, 0.01  # a row that can store one value only
    return w, upper, step, offset


def gptq_definition(w, u, step, offset, levels):
    """The loop as the operator's head states it, in float64."""
    w, u, step, offset = (t.double().clone() for t in (w, u, step, offset))
    codes, errors = torch.empty(w.shape, dtype=torch.uint8), torch.empty_like(w)
    for j in range(w.shape[1]):
        safe = torch.where(step[:, j] == 0, 1.0, step[:, j])
        code = ((w[:, j] + offset[:, j]) / safe).round().clamp(0, levels - 1)
        code[step[:, j] == 0] = 0
        codes[:, j] = code.to(torch.uint8)
        errors[:, j] = (w[:, j] - (step[:, j] * code - offset[:, j])) / u[j, j]
        w[:, j + 1 :] -= errors[:, j, None] * u[j, j + 1 :]
    return codes, errors


def block_of_columns(rows, columns, levels, per_column, apart=0, crowd=gptq_block.CROWD):
    """`apart`: values between the end of a row and the next, of every argument another number; `crowd`: rows that count as many."""
    gptq_block.CROWD = crowd
    problem = gptq_problem(rows, columns, levels, per_column)
    if apart:
        wide = [torch.full((len(t), columns + apart * place), torch.nan) for place, t in enumerate(problem, start=1)]
        views = [x[:, :columns].copy_(t) for x, t in zip(wide, problem, strict=True)]
        codes, errors = gptq_block.in_strips(gptq_block.launch, *views, levels)
    else:
        codes, errors = gptq_block.launch(*(guarded(t) for t in problem), levels)
    true_codes, true_errors = gptq_definition(*problem, levels)
    different = float((codes != true_codes).float().mean())
    assert different <= 1e-3, f"{different:.2%} of the codes differ"
    same = (codes == true_codes).all(1)
    return relative(errors[same], true_errors[same]), 1e-4


def weighted_error(weight, scales, zeros, importance, width, levels):
    """Weighted squared error of every group [N, G] in float64."""
    grouped = weight.double().view(len(weight), -1, width)
    scale, zero = scales.double().unsqueeze(-1), zeros.double().unsqueeze(-1)
    code = (grouped / scale + zero).round().clamp(0, levels - 1)
    return ((grouped - scale * (code - zero)).square() * importance.double().view(-1, width)).sum(-1)


def searched(rows, groups, width, levels, symmetric):
    weight = torch.randn(rows, groups * width) * 0.02
    weight[0, :width], weight[1, :width] = 0, 0.01
    importance = torch.exp(torch.randn(groups * width))
    scales, zeros = group_search.launch(guarded(weight), guarded(importance), width, levels, symmetric)
    chosen = weighted_error(weight, scales, zeros, importance, width, levels)
    expected = weighted_error(
        weight, *group_search.reference(weight, importance, width, levels, symmetric), importance, width, levels
    )
    assert bool((scales != 0).all())
    assert float(scales[0, 0]) == 1, "a group of zeros has scale 1"
    return float(((chosen - expected).abs() / expected.clamp_min(1e-12)).max()), 1e-4


def accumulated(rows, columns, dtype):
    x = torch.randn(rows, columns).to(dtype)
    before = torch.randn(columns, columns)
    h = guarded(before + before.T)
    expected = h.double() + x.double().T @ x.double()
    lower = guarded(h.clone())
    gram.launch(h, guarded(x))
    gram.launch(lower, guarded(x), both=False)
    assert torch.equal(lower.tril(), h.tril())
    assert torch.equal(lower[:64, 64:], (before + before.T)[:64, 64:])  # above the tiles of the diagonal
    assert relative(h, h.T.double()) < 1e-6, "not symmetric"  # numpy's products are to the bit on some processors only
    return relative(h, expected), 1e-6


def summed(rows, columns, dtype):
    x = torch.randn(rows, columns).to(dtype)
    x[0, columns // 2] = -9
    absolute, squares, largest = column_sums.launch(guarded(x))
    assert float(largest) == 9
    wide = x.double()
    x[0, 0] = torch.nan
    assert bool(column_sums.launch(guarded(x))[2].isnan())
    return max(relative(absolute, wide.abs().sum(0)), relative(squares, wide.square().sum(0))), 1e-6


def group_products_problem(rows, groups, width, bases):
    """Bases, of which the first are codes less zero points and the second no integers, and a Gram matrix of features of all sizes.

    Sizes differ by many powers of ten within each group, not only between groups.
    """
    columns = groups * width
    x = torch.randn(3 * columns, columns) * 10 ** (torch.linspace(-6, -2, columns) + torch.rand(columns) / 2)
    first = torch.randint(-8, 8, (rows, columns)).float()
    return [first, torch.randn(rows, columns) * 63][:bases], x.T @ x


def group_products_definition(bases, h, width):
    """b_i,ng H_gh b_j,nh' in float64."""
    parts = torch.stack(bases, 1).double().unflatten(-1, (-1, width))
    tiles = h.double().view(-1, width, h.shape[0] // width, width)
    return torch.einsum("nigw,gwhv,njhv->nigjh", parts, tiles, parts)


def group_products_error(system, bases, h, width):
    """The largest error of an entry, in units of the root of what its two groups have on the diagonal."""
    expected = group_products_definition(bases, h, width)
    size = expected.flatten(1, 2).flatten(2, 3).diagonal(dim1=1, dim2=2).sqrt().view(*expected.shape[:3], 1, 1)
    return float(((system.double() - expected).abs() / (size * size.permute(0, 3, 4, 1, 2))).max())


def scales_of_groups(rows, groups, width, bases):
    several, h = group_products_problem(rows, groups, width, bases)
    system = _fenced((rows, bases, groups, bases, groups), torch.float32)
    group_products.launch(system, [guarded(basis) for basis in several], guarded(h), width)
    return group_products_error(system, several, h, width), 5e-6


def split(rows, columns, apart):
    """A matrix whose rows lie `apart` more values from each other; against the masks of torch."""
    x = torch.randn(rows, columns) * 10 ** (6 * torch.rand(rows, columns) - 3)
    wide = guarded(torch.cat([x, torch.full((rows, apart), torch.nan)], 1))
    into = halves_of.Halves(*(_fenced((rows, columns), kind) for kind in (FULL, BRAIN, BRAIN)))
    halves_of.launch(wide[:, :columns], into)
    upper = (x.view(torch.int32) & -(1 << 13)).view(torch.float32)
    assert torch.equal(into.upper, upper)
    wanted = upper, x - upper
    found = into.upper16.float(), into.lower16.float()  # the interpreter cuts where a card rounds
    return max(
        float(((y - z).abs() / z.abs().clamp(min=1e-30)).max()) for y, z in zip(found, wanted, strict=True)
    ), 2.0**-7


def differing(rows, columns, dtype):
    """Of parts of longer rows; the interpreter cuts to bfloat16 where a card rounds."""
    x, y = (guarded(torch.randn(rows, columns + 9).to(dtype))[:, 3 : columns + 3] for _ in range(2))
    found, truth = elementwise.launch_difference(x, y).double(), x.double() - y.double()
    return float(((found - truth).abs() / truth.abs().clamp(min=1e-6)).max()), 2.0**-7


def half_rowed(rows, columns):
    x = (
        torch.randn(rows, columns)
        * 10 ** (6 * torch.rand(rows, columns) - 3)
        * 10.0 ** torch.randint(-20, 20, (rows, 1))
    )
    x[0] = 0
    values, scale = _fenced((rows, columns), HALF), _fenced((rows, 1), FULL)
    scaled_half.launch_rows(guarded(x), values, scale)
    expected = scaled_half.half_rows(x)
    assert torch.equal(scale, expected.scale)
    return float((values.double() - expected.values.double()).abs().max()), 2.0**-10 * 2**scaled_half.TOP


def scaled(rows, columns, biased):
    y, row, column = torch.randn(rows, columns), torch.rand(rows, 1), torch.rand(columns, 1)
    bias = torch.randn(columns) if biased else None
    expected = y.double() * row * column.T + (bias if biased else 0)
    found = guarded(y)
    scaled_half.launch_scaled(found, guarded(row), guarded(column), guarded(bias) if biased else None)
    return relative(found, expected), 1e-6


def normed(rows, width, add):
    x, y, weight = torch.randn(rows, width).half(), torch.randn(rows, width).half(), torch.randn(width).half()
    total, norm = between.launch_add_norm(guarded(x), guarded(y) if add else None, guarded(weight), 1e-6)
    expected = (x + y if add else x).double()
    assert torch.equal(total, expected.half())
    truth = expected * (expected.square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    return relative(norm, truth), 5e-4


def normed_rows(rows, width):
    x, weight = torch.randn(rows, width).half(), torch.randn(width).half()
    truth = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    return relative(elementwise.launch_rms_norm(guarded(x), guarded(weight), 1e-6), truth), 6e-4


def rotated_in_place(sequences, heads, length, width):
    """Angles by complex numbers: the pair (i, i + d/2) is one; heads of a token lie side by side."""
    x, angle = torch.randn(sequences, length, heads, width).half(), torch.rand(length, width // 2) * 6
    table = torch.cat((angle, angle), 1)
    cosine, sine = guarded(table.cos().half()), guarded(table.sin().half())
    turn = torch.complex(cosine.double(), sine.double())[:, None, : width // 2]
    pairs = torch.complex(x.double()[..., : width // 2], x.double()[..., width // 2 :]) * turn
    found = elementwise.launch_rotate(guarded(x).transpose(1, 2), cosine, sine).transpose(1, 2)
    return relative(found, torch.cat((pairs.real, pairs.imag), -1)), 6e-4


def gated_pair(rows, width, sliced):
    """`sliced`: two halves of one matrix, else two matrices."""
    pair = guarded(torch.randn(rows, 2 * width).half()) if sliced else guarded(torch.randn(2, rows, width).half())
    g, u = pair.chunk(2, 1) if sliced else pair
    truth = g.double() / (1 + (-g.double()).exp()) * u.double()
    return relative(elementwise.launch_gate(g, u, g.stride(0)), truth), 1e-3


def rotated_pair(count, length, heads, kv, width, tables):
    """The share of values that are not what torch makes of the same heads, of slices of one product."""
    joined, angle = guarded(torch.randn(count, length, (heads + kv) * width).half()), torch.rand(tables, length, width)
    parts = joined.split([heads * width, kv * width], -1)
    query, key = (part.view(count, length, -1, width).transpose(1, 2) for part in parts)
    cosine, sine = guarded(angle.cos().half()), guarded(angle.sin().half())
    apart = tuple(elementwise._tokens_apart(x) for x in (query, key))
    found = elementwise.launch_rotated(query, key, cosine, sine, apart)
    wrong = 0.0
    for x, turned in zip((query, key), found, strict=True):
        first, second = x.chunk(2, -1)
        wanted = x * cosine[:, None] + torch.cat((-second, first), -1) * sine[:, None]
        wrong = max(wrong, float((turned != wanted).float().mean()))
    return wrong, 0.0


def roundings(launch, way, *shapes):
    """The share of values that differ from those of torch, which rounds after each operator: few, for sums are in another order."""
    given = [(3 * torch.randn(shape)).half() for shape in shapes]
    return float((launch(*map(guarded, given)) != way(*given)).float().mean()), 2e-3


def rotated(rows, heads, kv, width, position):
    """Angles by complex numbers: the pair (i, i + d/2) is one. Token i is the next but i of row 2, or of row 0 if it is odd."""
    qkv = torch.randn(rows, (heads + 2 * kv) * width).half()
    keys, values = (guarded(torch.zeros(3, kv, 20, width).half()) for _ in range(2))
    angle = torch.rand(20, width // 2)
    table = torch.cat((angle.cos(), angle.sin()), 1)
    row = torch.tensor([0 if i % 2 else 2 for i in range(rows)], dtype=torch.int32)
    place = torch.arange(position, position + rows, dtype=torch.int32)
    query = between.launch_rotate(guarded(qkv), guarded(table), guarded(row), guarded(place), keys, values)
    parts = qkv.double().view(rows, -1, width)
    pairs = torch.complex(parts[..., : width // 2], parts[..., width // 2 :])
    turned = pairs * torch.exp(1j * angle[place, None].double())
    truth = torch.cat((turned.real, turned.imag), -1)
    assert torch.equal(values[row, :, place], qkv.view(rows, -1, width)[:, heads + kv :])
    stored = keys[row, :, place].clone()
    for cache in (keys, values):
        cache[row, :, place] = 0
        assert not bool(cache.any()), "other places written"
    error = relative(query.view(rows, heads, width), truth[:, :heads])
    return max(error, relative(stored, truth[:, heads : heads + kv])), 5e-4


def attended(heads, kv, width, position, splits):
    """Two sequences, the second of four tokens."""
    last = [position, 3]
    query = torch.randn(2, heads * width).half()
    keys, values = torch.randn(2, kv, 80, width).half(), torch.randn(2, kv, 80, width).half()
    for row in range(2):
        keys[row, :, last[row] + 1 :] = values[row, :, last[row] + 1 :] = float("nan")
    counters = guarded(torch.zeros(2 * heads, dtype=torch.int32))
    between._counters = lambda _: counters
    place = guarded(torch.tensor(last, dtype=torch.int32))
    out = between.launch_attend(guarded(query), guarded(keys), guarded(values), place, splits)
    assert int(counters.abs().max()) == 0, "counters are not zero after the call"
    truths = []
    for row in range(2):
        k, v = (t[row, :, : last[row] + 1].double().repeat_interleave(heads // kv, 0) for t in (keys, values))
        scores = torch.einsum("hd,hcd->hc", query[row].double().view(heads, width), k) * width**-0.5
        truths.append(torch.einsum("hc,hcd->hd", scores.softmax(1), v))
    return relative(out.view(2, heads, width), torch.stack(truths)), 5e-4


def gated(rows, width):
    both = torch.randn(rows, 2 * width).half()
    g, u = both.double().chunk(2, 1)
    return relative(between.launch_gate(guarded(both)), g / (1 + (-g).exp()) * u), 1e-3


def ggmls(kind, mode):
    """Bytes of a golden array that differ, with the searches of a GPU; of five rows, whose blocks end within a program."""
    golden = np.load(GOLDEN / "ggml_blocks.npz")
    weight, expected = (torch.from_numpy(golden[name][:5]) for name in ("weight", f"{kind.upper()}.{mode}"))
    importance = torch.from_numpy(golden["importance"]) if mode == "importance" else None
    with (
        patch.object(exact, "on_cpu", return_value=False),
        patch.object(search.gpu, "runs", return_value=True) as asked,
    ):
        found = quantize.quantize(weight, kind, importance)
    assert asked.called, "no kernel was needed"
    return float((found != expected).sum()), 0.0


HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
CASES = {
    "wq_mm 4 bit, 1 row, 43 groups of 32, 4 splits": partial(product, 1, 16, 43, 32, 4, True, 4),
    "wq_mm 4 bit, 3 rows, 5 groups of 128, asymmetric, ragged rows": partial(product, 3, 70, 5, 128, 4, False, 2),
    "wq_mm 4 bit, 16 rows, 107 groups of 32, asymmetric, 5 splits": partial(product, 16, 16, 107, 32, 4, False, 5),
    "wq_mm 4 bit, 16 rows, groups of 64, one split": partial(product, 16, 64, 3, 64, 4, False, 1),
    "wq_mm 4 bit, 64 rows, 3 splits, blocks of 128": partial(product, 64, 130, 2, 128, 4, True, 3, 128, bias=False),
    "wq_mm 4 bit, 17 rows, groups of 256": partial(product, 17, 16, 3, 256, 4, False, 2),
    "wq_mm 4 bit, one group of 96": partial(product, 3, 16, 1, 96, 4, True, 1),
    "wq_mm 4 bit, 3 rows, narrow, 43 groups of 32": partial(product, 3, 40, 43, 32, 4, False, 3, 16, warps=1, unroll=2),
    "wq_mm 8 bit, 8 rows, narrow": partial(product, 8, 70, 3, 128, 8, True, 2, 32, warps=2),
    "wq_mm 4 bit, bfloat16": partial(product, 3, 70, 5, 128, 4, False, 2, dtype=BRAIN),
    "wq_mm 8 bit, 1 row, 107 groups of 32, 5 splits": partial(product, 1, 16, 107, 32, 8, True, 5),
    "wq_mm 8 bit, 3 rows, 43 groups of 64, asymmetric": partial(product, 3, 16, 43, 64, 8, False, 4),
    "wq_mm 8 bit, 64 rows, groups of 128": partial(product, 64, 20, 2, 128, 8, True, 1),
    "wq_mm 8 bit, one group of 352": partial(product, 16, 33, 1, 352, 8, True, 3),
    "many_rows 4 bit, 65 rows, 5 groups of 128": partial(product_of_many, 65, 70, 5, 128, 4, True, 1),
    "many_rows 4 bit, 130 rows, 43 groups of 32, asymmetric, 4 splits": partial(
        product_of_many, 130, 16, 43, 32, 4, False, 4
    ),
    "many_rows 4 bit, 128 rows, narrow, groups of 64": partial(
        product_of_many, 128, 130, 3, 64, 4, False, 2, 128, 64, bias=False
    ),
    "many_rows 4 bit, 70 rows, one group of 96": partial(product_of_many, 70, 16, 1, 96, 4, True, 1),
    "many_rows 4 bit, 65 rows, bfloat16": partial(product_of_many, 65, 70, 2, 256, 4, False, 2, dtype=BRAIN),
    "many_rows 8 bit, 65 rows, 107 groups of 32, 5 splits": partial(product_of_many, 65, 16, 107, 32, 8, True, 5),
    "many_rows 8 bit, 129 rows, asymmetric": partial(product_of_many, 129, 70, 3, 128, 8, False, 2, 64, 64),
    "wq_mm 8 bit, bfloat16": partial(product, 3, 70, 3, 128, 8, False, 2, dtype=BRAIN),
    "dequant 4 bit, groups of 128, asymmetric": partial(dequantized, 70, 5, 128, 4, False, HALF),
    "dequant 4 bit, 43 groups of 32, float32": partial(dequantized, 33, 43, 32, 4, True, FULL),
    "dequant 4 bit, one group of 96, bfloat16": partial(dequantized, 5, 1, 96, 4, True, BRAIN),
    "dequant 8 bit, 107 groups of 64, asymmetric": partial(dequantized, 20, 107, 64, 8, False, HALF),
    "gptq_block 128 columns": partial(block_of_columns, 20, 128, 16, False),
    "gptq_block 96 columns, a step per column": partial(block_of_columns, 17, 96, 16, True),
    "gptq_block 200 columns in strips, rows apart": partial(block_of_columns, 18, 200, 16, True, 3),
    "gptq_block 7 columns": partial(block_of_columns, 9, 7, 16, True),
    "gptq_block 12 columns, many rows": partial(block_of_columns, 20, 12, 16, True, crowd=20),
    "gptq_block 32 columns, 256 levels": partial(block_of_columns, 16, 32, 256, False),
    "group_search 16 levels, symmetric": partial(searched, 33, 2, 128, 16, True),
    "group_search 16 levels, asymmetric, groups of 32": partial(searched, 20, 3, 32, 16, False),
    "group_search 256 levels, symmetric, groups of 96": partial(searched, 20, 2, 96, 256, True),
    "gram 16 bit, ragged": partial(accumulated, 130, 200, HALF),
    "gram 16 bit, more than a strip of tiles, more rows than are summed at a time": partial(
        accumulated, 2120, 720, HALF
    ),
    "column_sums 16 bit, ragged": partial(summed, 300, 70, HALF),
    "column_sums bfloat16, one row": partial(summed, 1, 64, BRAIN),
    "column_sums float32": partial(summed, 33, 130, FULL),
    "halves": partial(split, 3, 70, 0),
    "halves, rows apart": partial(split, 5, 1100, 9),
    "difference": partial(differing, 5, 70, FULL),
    "difference of 16 bit, longer than a program": partial(differing, 3, 2100, HALF),
    "half rows": partial(half_rowed, 5, 70),
    "half rows, longer than is converted at a time": partial(half_rowed, 2, 5000),
    "scaled": partial(scaled, 3, 70, False),
    "scaled, with a bias": partial(scaled, 2, 1100, True),
    "group_products": partial(scales_of_groups, 5, 3, 32, 1),
    "group_products, two bases": partial(scales_of_groups, 3, 2, 16, 2),
    "add_norm": partial(normed, 3, 352, True),
    "add_norm, nothing to add": partial(normed, 2, 100, False),
    "rms_norm": partial(normed_rows, 5, 352),
    "rotate in place": partial(rotated_in_place, 2, 10, 3, 24),
    "rotated, two sequences of one table": partial(rotated_pair, 2, 3, 3, 1, 24, 1),
    "rotated, a table each": partial(rotated_pair, 2, 3, 2, 2, 32, 2),
    "rotated, one token": partial(rotated_pair, 1, 1, 2, 2, 16, 1),
    "gate of two": partial(gated_pair, 3, 700, False),
    "gate of two slices": partial(gated_pair, 3, 1100, True),
    "rms_norm, rounded as by torch": partial(
        roundings,
        lambda x, weight: elementwise.launch_rms_norm(x, weight, 1e-6),
        lambda x, weight: elementwise.rms_norm(x, weight, 1e-6),
        (20, 352),
        (352,),
    ),
    "gate of two, rounded as by torch": partial(
        roundings, lambda g, u: elementwise.launch_gate(g, u, 700), elementwise.gate, (20, 700), (20, 700)
    ),
    "rotate, 3 rows, grouped": partial(rotated, 3, 4, 2, 32, 5),
    "rotate, one row at the start": partial(rotated, 1, 2, 2, 64, 0),
    "attend, grouped, 8 splits": partial(attended, 4, 2, 32, 70, 8),
    "attend, fewer positions than splits": partial(attended, 2, 2, 64, 2, 8),
    "gate": partial(gated, 3, 300),
    "gram bfloat16, one row": partial(accumulated, 1, 64, BRAIN),
}


SEARCHED = ("q4_0 importance", "q2_k none", "q2_k importance", "q3_k none", "q3_k importance")
SEARCHED += ("q4_k none", "q4_k importance", "q6_k none", "q6_k importance")
CASES |= {f"ggml_search {case}": partial(ggmls, *case.split()) for case in SEARCHED}


def run(case):
    torch.manual_seed(0)
    torch.empty = _empty
    torch.Tensor.new_empty = _new_empty
    try:
        error, limit = case()
        guards = broken_guards()
        return {"failed": f"{guards} guards were written over"} if guards else {"error": error, "limit": limit}
    except Exception:  # noqa: BLE001 the other cases still run; the text is the test's message
        return {"failed": traceback.format_exc()}
    finally:
        torch.empty = _plain_empty
        torch.Tensor.new_empty = _plain_new_empty


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({name: run(case) for name, case in CASES.items()}, sys.stdout)
