"""`qquant::dequant`: integer weights back to floats, for the vendor's matrix product when there are many rows.

    W[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g]

Computed in float32, where it is exact, and rounded once to the wanted type. The layout is `qquant.kernels.unpack`'s.
The Triton kernel reads one tile (64 bytes) of 64 rows a program and writes its 64 x 128 (4 bit) or 64 x 64 (8 bit) values;
it moves memory and does nothing else, so the goal is the bandwidth of a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qquant.kernels.jit import AVAILABLE, INTERPRETED, blocks, kernel, tl
from qquant.kernels.unpack import WORDS, check_group, planes, scale_of, tile, unpack_params, unpack_runtime, zero_of

ROWS = 64  # of a program
CHUNK = 64  # rows at a time on a CPU: they stay in its cache


@torch.library.custom_op("qquant::dequant", mutates_args=())
def dequant(qweight: Tensor, params: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Weights [N, K] of `dtype` from qweight int32 [N, 16 T] and params [N, K/g], fp16 or int32.

    Raises:
        InputError: a group size that the layout does not have.
    """
    rows, groups = params.shape
    columns = groups * group_size
    check_group(columns, group_size, bits)
    scales, zeros = unpack_params(params, bits)
    out = torch.empty((rows, columns), dtype=dtype, device=qweight.device)
    chunk = CHUNK if qweight.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, chunk):
        some = slice(start, start + chunk)
        weight = unpack_runtime(qweight[some], bits, columns).reshape(-1, groups, group_size).float()
        weight -= zeros[some].unsqueeze(-1)
        weight *= scales[some].unsqueeze(-1)
        out[some] = weight.view(-1, columns)
    return out


@dequant.register_fake
def _(qweight: Tensor, params: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    return qweight.new_empty((params.shape[0], params.shape[1] * group_size), dtype=dtype)


@kernel("tiles", "groups")
def _kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    words_at: tl.tensor,
    params_at: tl.tensor,
    out_at: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    group_size: tl.tensor,
    BN: tl.constexpr,
    BITS: tl.constexpr,
    RAGGED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    INLINE: tl.constexpr,
) -> None:
    PLANES: tl.constexpr = 16 // BITS
    t = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1)
    words = tl.load(words_at + row.to(tl.int64)[:, None] * (tiles * 16) + t * 16 + tl.arange(0, 16)[None, :])
    pair = tl.arange(0, 32)
    out_row = out_at + n.to(tl.int64)[:, None] * K + pair[None, :]
    for i in tl.static_range(PLANES):
        k = t * (32 * PLANES) + 32 * i
        group = row * groups + tl.minimum(k // group_size, groups - 1)
        param = tl.load(params_at + group)
        zero = zero_of(param, BITS, SYMMETRIC)
        value = planes(words, zero, i, 1, BITS, tl.float16, INLINE).to(tl.float32)
        value *= scale_of(param, SYMMETRIC)[:, None]
        inside = (n < N)[:, None]
        if RAGGED:
            inside &= ((k + pair) < K)[None, :]
        tl.store(out_row + k, value.to(out_at.dtype.element_ty), mask=inside)


def launch(qweight: Tensor, params: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Run the kernel; arguments as of `dequant`, contiguous."""
    rows, groups = params.shape
    columns = groups * group_size
    out = torch.empty((rows, columns), dtype=dtype, device=qweight.device)
    tiles = qweight.shape[1] // WORDS
    constexprs = constants(columns, bits, params.dtype == torch.float16)
    _kernel[grid(rows, tiles)](qweight, params, out, rows, columns, tiles, groups, group_size, **constexprs)
    return out


def grid(rows: int, tiles: int) -> tuple[int, int]:
    """Programs of a launch."""
    return tiles, blocks(rows, ROWS)


def constants(columns: int, bits: int, symmetric: bool) -> dict[str, int | bool]:
    """What the kernel is compiled for, besides the types and alignments of its arguments."""
    return {
        "BN": ROWS,
        "BITS": bits,
        "RAGGED": columns % tile(bits) != 0,
        "SYMMETRIC": symmetric,
        "INLINE": not INTERPRETED and torch.version.hip is None,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def _dequant_cuda(qweight: Tensor, params: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    check_group(params.shape[1] * group_size, group_size, bits)
    with torch.cuda.device_of(qweight):
        return launch(qweight.contiguous(), params.contiguous(), bits, group_size, dtype)


if AVAILABLE:
    dequant.register_kernel("cuda")(_dequant_cuda)
