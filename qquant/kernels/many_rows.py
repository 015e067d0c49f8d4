"""`qquant::many_rows`: activations times integer weights for as many rows as a prompt has, without the weights in 16 bits.

    y[m, n] = sum_k x[m, k] * (code[n, k] - zero[n, k // g]) * scale[n, k // g] + bias[n]          sums in float32

Dequantizing first writes and reads four times the bytes of the codes, which takes longer than multiplying 128 rows by them. Here
the codes become floats in registers, as in `qquant.kernels.wq_mm`, whose layout and order of operands this is:
* a program makes 64 outputs of 128 rows; x comes by Hopper's tensor memory accelerator (the copy of a whole tile is one
  instruction, so that threads are left to unpack), two programs share a multiprocessor, and one unpacks while the other multiplies;
* the scale multiplies the float32 sum of a group, which is exact, and cheaper than scaled weights: these would be rounded to 16 bits;
* programs of one block of outputs follow each other, so that its codes come from memory once; `splits` and sums as of `wq_mm`.

Every program reads all of its rows of x again, and unpacks the codes again for every 128 rows: from MOST_ROWS on, dequantizing once and the
vendor's product are quicker. Where it is not Hopper, they are taken from `wq_mm.MAX_ROWS` on. `quantized_linear` chooses.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qquant.errors import UsageError
from qquant.kernels.dequant import dequant
from qquant.kernels.jit import (
    AVAILABLE,
    INTERPRETED,
    TensorDescriptor,
    blocks,
    capability,
    gdc,
    kernel,
    starts_early,
    tl,
)
from qquant.kernels.tiles import dot, group, last_to_arrive, sum_of_parts, write
from qquant.kernels.unpack import WORDS, check_group, planes, scale_of, tile, zero_of
from qquant.kernels.wq_mm import MAX_ROWS, counters_of, wq_mm

MOST_ROWS = {4: 512, 8: 256}  # by bits, as measured: tests/bench/README.md
MANY_OUTPUTS = 8192
HOPPER = 9
ALIGNED = 16  # bytes: where x and its rows begin


@torch.library.custom_op("qquant::many_rows", mutates_args=())
def many_rows(x: Tensor, qweight: Tensor, params: Tensor, bias: Tensor | None, bits: int, group_size: int) -> Tensor:
    """X fp16 or bf16 [M, K] times the weights of `qquant.kernels.unpack` -> [M, N] of x's dtype.

    Raises:
        InputError: a group size that the layout does not have.
        UsageError: on CUDA, more than `most_rows` rows.
    """
    y = x.float() @ dequant(qweight, params, bits, group_size, torch.float32).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


@many_rows.register_fake
def _(x: Tensor, qweight: Tensor, params: Tensor, bias: Tensor | None, bits: int, group_size: int) -> Tensor:
    return x.new_empty((x.shape[0], qweight.shape[0]))


@functools.lru_cache
def most_rows(device: torch.device, bits: int, columns: int) -> int:
    """Rows of x up to which weights of `bits` bits and `columns` inputs are multiplied packed on `device`."""
    fits = columns * 2 % ALIGNED == 0
    there = AVAILABLE and device.type == "cuda" and torch.version.hip is None and capability(device)[0] == HOPPER
    return MOST_ROWS[bits] if there and fits else MAX_ROWS


def quantized_linear(
    x: Tensor, qweight: Tensor, params: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """X [..., K] -> [..., N]: `wq_mm`, `many_rows`, or weights dequantized to x's dtype and the vendor's product, by the number of rows."""
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) <= MAX_ROWS:
        y = wq_mm(flat, qweight, params, bias, bits, group_size)
    elif len(flat) <= most_rows(x.device, bits, x.shape[-1]):
        y = many_rows(flat, qweight, params, bias, bits, group_size)
    else:
        weight = dequant(qweight, params, bits, group_size, x.dtype)
        y = torch.nn.functional.linear(flat, weight, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Config:
    """How a product is cut up: `outputs` and `rows` a program, `splits` programs along K, warps and pipeline stages of each."""

    outputs: int = 64
    rows: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 3


@kernel("M", "tiles", "groups", "splits")
def _kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    x_tiles: tl.tensor,  # a descriptor of tiles [BM, SPAN]
    words_at: tl.tensor,
    params_at: tl.tensor,
    bias_at: tl.tensor,
    y_at: tl.tensor,
    partial_at: tl.tensor,
    counters_at: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    splits: tl.tensor,
    BN: tl.constexpr,
    BM: tl.constexpr,
    SPLIT: tl.constexpr,  # more than one program along K
    STAGES: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,  # groups in a tile, at least 1
    TILES_PER_GROUP: tl.constexpr,  # at least 1; 0: one group per row
    SYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    INLINE: tl.constexpr,
    WIDE: tl.constexpr,  # interpreter: multiply in float32
    EARLY: tl.constexpr,  # started before the kernel before it is done
) -> None:
    TILE: tl.constexpr = 512 // BITS
    SPAN: tl.constexpr = TILE // PARTS  # columns of one dot
    FLOAT: tl.constexpr = y_at.dtype.element_ty
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1)  # rows past the end repeat the last one and are never stored
    start = tl.program_id(0) * BM
    words_row = words_at + row[:, None] * (tiles * 16) + tl.arange(0, 16)[None, :]
    share = (tiles + splits - 1) // splits
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, tiles)
    if EARLY:
        gdc.gdc_wait()
    acc = tl.zeros((BN, BM), tl.float32)
    param = tl.load(params_at + group(row, first, groups, TILES_PER_GROUP))
    for t in tl.range(first, last, num_stages=STAGES):
        words = tl.load(words_row + t * 16)
        for part in tl.static_range(PARTS):
            if PARTS > 1:
                param = tl.load(params_at + row * groups + tl.minimum(t * PARTS + part, groups - 1))
            elif not SYMMETRIC:
                param = tl.load(params_at + group(row, t, groups, TILES_PER_GROUP))
            zero = zero_of(param, BITS, SYMMETRIC)
            weights = planes(words, zero, part * (SPAN // 32), SPAN // 32, BITS, FLOAT, INLINE)
            x = x_tiles.load([start, t * TILE + part * SPAN])  # zero past the last column
            acc += dot(weights, x, WIDE) * scale_of(param, SYMMETRIC)[:, None]
        if PARTS == 1 and SYMMETRIC:  # fetched a step ahead: two bytes are too narrow for the asynchronous pipeline
            param = tl.load(params_at + group(row, t + 1, groups, TILES_PER_GROUP))
    if EARLY:
        gdc.gdc_launch_dependents()
    m = start + tl.arange(0, BM)
    at = m[None, :] * N + n[:, None]
    inside = (m < M)[None, :] & (n < N)[:, None]
    if SPLIT:
        tl.store(partial_at + tl.program_id(2) * M * N + at, acc, mask=inside)
        if last_to_arrive(counters_at + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), splits):
            acc = sum_of_parts(partial_at + at, inside, M * N, splits, acc)
            write(acc, bias_at, row, y_at, at, inside, BIAS)
    else:
        write(acc, bias_at, row, y_at, at, inside, BIAS)


def constants(
    columns: int, bits: int, group_size: int, config: Config, symmetric: bool, bias: bool, early: bool = False
) -> dict[str, int | bool]:
    """What the kernel is compiled for, besides the types and alignments of its arguments."""
    size = tile(bits)
    one_group = group_size == columns
    return ({"launch_pdl": True} if early else {}) | {
        "BN": config.outputs,
        "BM": config.rows,
        "SPLIT": config.splits > 1,
        "STAGES": config.stages,
        "BITS": bits,
        "PARTS": 1 if one_group else max(1, size // group_size),
        "TILES_PER_GROUP": 0 if one_group else max(1, group_size // size),
        "SYMMETRIC": symmetric,
        "BIAS": bias,
        "INLINE": not INTERPRETED,
        "WIDE": INTERPRETED,
        "EARLY": early,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


def grid(rows: int, outputs: int, config: Config) -> tuple[int, int, int]:
    """Programs of a launch."""
    return blocks(rows, config.rows), blocks(outputs, config.outputs), config.splits


def tiles_of(x: Tensor, config: Config, constexprs: dict[str, int | bool]) -> Any:
    """The descriptor by which the kernel reads x [M, K]."""
    columns = x.shape[-1]
    span = tile(constexprs["BITS"]) // constexprs["PARTS"]
    return TensorDescriptor(x, [x.numel() // columns, columns], [columns, 1], [config.rows, span])


def launch(  # noqa: PLR0913 the operator's arguments and two more
    x: Tensor,
    qweight: Tensor,
    params: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    config: Config,
    counters: Tensor,
) -> Tensor:
    """Run the kernel as `config` says; `counters` int32, zero, one per block of rows and outputs. Arguments as of `many_rows`, contiguous."""
    (rows, columns), outputs = x.shape, len(qweight)
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    sums = (
        y if config.splits == 1 else torch.empty((config.splits, rows, outputs), dtype=torch.float32, device=x.device)
    )
    symmetric, early = params.dtype == torch.float16, starts_early(x.device)
    constexprs = constants(columns, bits, group_size, config, symmetric, bias is not None, early)
    sizes = (rows, outputs, qweight.shape[1] // WORDS, params.shape[1], config.splits)
    _kernel[grid(rows, outputs, config)](
        tiles_of(x, config, constexprs), qweight, params, y if bias is None else bias, y, sums, counters, *sizes, **constexprs
    )  # fmt: skip
    return y


@functools.lru_cache
def config_for(device: torch.device, bits: int, rows: int, columns: int, outputs: int) -> Config:
    """A rule of thumb for an H200: rows of x that are padded little, programs enough for its multiprocessors, and no short ones."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wide = Config()
    if (
        -rows % wide.rows < wide.rows // 4
        and 3 * blocks(rows, wide.rows) * blocks(outputs, wide.outputs) >= 4 * processors
    ):
        return wide
    if outputs >= MANY_OUTPUTS:
        return Config(outputs=128, rows=64)
    programs = blocks(rows, 64) * blocks(outputs, 64)
    splits = max(1, min(3 * processors // programs, blocks(columns, tile(bits)) // 11, 8))
    return Config(rows=64, stages=4, splits=1 << splits.bit_length() - 1)


def _many_rows_cuda(
    x: Tensor, qweight: Tensor, params: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    rows, columns = x.shape
    check_group(columns, group_size, bits)
    if rows > most_rows(x.device, bits, columns):
        raise UsageError(
            f"many_rows takes at most {most_rows(x.device, bits, columns)} rows here, not {rows}: call quantized_linear"
        )
    with torch.cuda.device_of(x):
        config = config_for(x.device, bits, rows, columns, len(qweight))
        programs = grid(rows, len(qweight), config)
        counters = counters_of(x.device).get(programs[0] * programs[1])
        x = x.contiguous() if x.data_ptr() % ALIGNED == 0 else x.clone(memory_format=torch.contiguous_format)
        return launch(x, qweight.contiguous(), params.contiguous(), bias, bits, group_size, config, counters)


if AVAILABLE:
    many_rows.register_kernel("cuda")(_many_rows_cuda)
