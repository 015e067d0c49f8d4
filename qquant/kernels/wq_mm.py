"""`qquant::wq_mm`: activations times integer weights, for few rows (decode and small batches).

    y[m, n] = sum_k x[m, k] * (code[n, k] - zero[n, k // g]) * scale[n, k // g] + bias[n]          sums in float32

Few rows means that reading the weights is all the time there is, so the kernel must not run out of instructions first: an
H200 at 4.3 TB/s may spend 3.4 lane-instructions on a 4-bit weight, all included. What follows from that:
* the product is transposed, acc[BN, BM] += W[BN, k] X^T[k, BM]: the weights, unpacked in registers, are the operand that
  Hopper's matrix instruction takes from registers, and rows of x are padded to 16, 32 or 64 instead of having a kernel of their own;
* one tile of 64 bytes per row is a step of the loop; its codes become half floats two at a time (`qquant.kernels.unpack`)
  in exactly the order in which the matrix unit wants them, so no data moves between threads;
* the scale multiplies the float32 sum of a group, once a group; the zero point is taken off the codes, exactly;
* `splits` programs share the columns of one block of rows (ceil-sized parts, so that prime numbers of groups divide). Each
  leaves its float32 sums in memory and the last to arrive adds them in the order of the parts: results do not depend on
  who was last. Counters of arrivals are zero before and after every call.

No tuning at run time: `table.json` holds measured choices for its device, and a rule of thumb covers the rest.
For more rows than MAX_ROWS see `qquant.kernels.many_rows`, whose `quantized_linear` chooses.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qquant.errors import UsageError
from qquant.kernels import jit as launching
from qquant.kernels.dequant import dequant
from qquant.kernels.jit import AVAILABLE, INTERPRETED, blocks, gdc, jit, kernel, starts_early, tl
from qquant.kernels.tiles import dot, group, last_to_arrive, sum_of_parts, write
from qquant.kernels.unpack import WORDS, check_group, planes, scale_of, tile, zero_of

MAX_ROWS = 64
BUCKETS = (1, 4, 16, 64)  # rows for which the table has entries; others use the next larger


@torch.library.custom_op("qquant::wq_mm", mutates_args=())
def wq_mm(x: Tensor, qweight: Tensor, params: Tensor, bias: Tensor | None, bits: int, group_size: int) -> Tensor:
    """X fp16 or bf16 [M, K] times the weights of `qquant.kernels.unpack` -> [M, N] of x's dtype.

    Raises:
        InputError: a group size that the layout does not have.
        UsageError: more than MAX_ROWS rows, on CUDA.
    """
    y = x.float() @ dequant(qweight, params, bits, group_size, torch.float32).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


@wq_mm.register_fake
def _(x: Tensor, qweight: Tensor, params: Tensor, bias: Tensor | None, bits: int, group_size: int) -> Tensor:
    return x.new_empty((x.shape[0], qweight.shape[0]))


@dataclass(frozen=True)
class Config:
    """How a product is cut up: `rows` outputs a program, `splits` programs along K, warps and pipeline stages of each.

    Fewer than four warps use the older matrix instruction, where every warp runs for itself, and pad up to 8 rows of x to 8.
    `ahead`: a program asks for all its weights before it does anything else, so that they are in the L2 cache when it reads them.
    `unroll`: tiles of a step of the loop, which has one barrier.
    """

    rows: int
    splits: int
    warps: int
    stages: int
    ahead: int = 0
    unroll: int = 1


@jit
def _x_tile(
    x_row: tl.tensor, k: tl.tensor, span: tl.tensor, there: tl.tensor, K: tl.tensor, RAGGED: tl.constexpr
) -> tl.tensor:
    if RAGGED:
        inside = there & ((k + span) < K)[None, :]
    else:
        inside = there
    return tl.load(x_row + k, mask=inside, other=0.0)


@jit
def _ask_ahead(row_at: tl.tensor, count: tl.tensor, BULK: tl.constexpr) -> None:
    """Start fetching `count` tiles from each address [BN] into the L2 cache."""
    if BULK:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
            "=r,l,r",
            [row_at.to(tl.int64), (row_at.to(tl.int64) * 0).to(tl.int32) + count * 64],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        lines = tl.arange(0, 16)
        for start in range(0, count, 32):
            line = tl.minimum(start * 16 + lines * 32, count * 16 - 16)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
                "=r,l",
                [(row_at[:, None] + line[None, :]).to(tl.int64)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@jit
def _begin(row_at: tl.tensor, count: tl.tensor, AHEAD: tl.constexpr, EARLY: tl.constexpr) -> None:
    """Ask for this program's weights, then wait for the kernel before, which makes x."""
    if AHEAD:
        _ask_ahead(row_at, count, AHEAD == 1)
    if EARLY:
        gdc.gdc_wait()


@kernel("M", "tiles", "groups", "splits")
def _kernel(  # noqa: PLR0913 a kernel's arguments are its interface to the launcher
    x_at: tl.tensor,
    words_at: tl.tensor,
    params_at: tl.tensor,
    bias_at: tl.tensor,
    y_at: tl.tensor,
    partial_at: tl.tensor,
    counters_at: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
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
    RAGGED: tl.constexpr,  # the last tile is not full
    SYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    INLINE: tl.constexpr,
    WIDE: tl.constexpr,  # interpreter: multiply in float32
    AHEAD: tl.constexpr,
    UNROLL: tl.constexpr,
    EARLY: tl.constexpr,  # started before the kernel before it is done
) -> None:
    TILE: tl.constexpr = 512 // BITS
    SPAN: tl.constexpr = TILE // PARTS  # columns of one dot
    FLOAT: tl.constexpr = x_at.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1)  # rows past the end repeat the last one and are never stored
    m = tl.arange(0, BM)
    there = (m < M)[:, None]
    span = tl.arange(0, SPAN)
    words_row = words_at + row[:, None] * (tiles * 16) + tl.arange(0, 16)[None, :]
    x_row = x_at + m[:, None] * K + span[None, :]
    share = (tiles + splits - 1) // splits
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tiles)
    _begin(words_at + row * (tiles * 16) + first * 16, tl.maximum(last - first, 1), AHEAD, EARLY)
    acc = tl.zeros((BN, BM), tl.float32)
    param = tl.load(params_at + group(row, first, groups, TILES_PER_GROUP))
    for t in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=UNROLL):
        words = tl.load(words_row + t * 16)
        for part in tl.static_range(PARTS):
            if PARTS > 1:
                param = tl.load(params_at + row * groups + tl.minimum(t * PARTS + part, groups - 1))
            elif not SYMMETRIC:
                param = tl.load(params_at + group(row, t, groups, TILES_PER_GROUP))
            zero = zero_of(param, BITS, SYMMETRIC)
            weights = planes(words, zero, part * (SPAN // 32), SPAN // 32, BITS, FLOAT, INLINE)
            x = _x_tile(x_row, t * TILE + part * SPAN, span, there, K, RAGGED)
            product = dot(weights, x, WIDE)
            acc += product * scale_of(param, SYMMETRIC)[:, None]
        if PARTS == 1 and SYMMETRIC:  # fetched a step ahead: two bytes are too narrow for the asynchronous pipeline
            param = tl.load(params_at + group(row, t + 1, groups, TILES_PER_GROUP))
    if EARLY:  # not before: programs of the next kernel that wait take room, and more of it on some multiprocessors than on others
        gdc.gdc_launch_dependents()
    at = m[None, :] * N + n[:, None]
    inside = (m < M)[None, :] & (n < N)[:, None]
    if SPLIT:
        tl.store(partial_at + tl.program_id(1) * M * N + at, acc, mask=inside)
        if last_to_arrive(counters_at + tl.program_id(0), splits):
            acc = sum_of_parts(partial_at + at, inside, M * N, splits, acc)
            write(acc, bias_at, row, y_at, at, inside, BIAS)
    else:
        write(acc, bias_at, row, y_at, at, inside, BIAS)


def constants(  # noqa: PLR0913 a kernel has that many
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    config: Config,
    symmetric: bool,
    bias: bool,
    early: bool = False,
) -> dict[str, int | bool]:
    """What the kernel is compiled for, besides the types and alignments of its arguments."""
    size = tile(bits)
    one_group = group_size == columns
    least = 8 if config.warps < 4 else 16
    inline = not INTERPRETED and torch.version.hip is None
    return ({"launch_pdl": True} if early else {}) | {
        "BN": config.rows,
        "BM": next(height for height in (least, 16, 32, 64) if rows <= height),
        "SPLIT": config.splits > 1,
        "STAGES": config.stages,
        "BITS": bits,
        "PARTS": 1 if one_group else max(1, size // group_size),
        "TILES_PER_GROUP": 0 if one_group else max(1, group_size // size),
        "RAGGED": columns % size != 0,
        "SYMMETRIC": symmetric,
        "BIAS": bias,
        "INLINE": inline,
        "WIDE": INTERPRETED,
        "AHEAD": config.ahead if inline else 0,
        "UNROLL": config.unroll,
        "EARLY": early,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


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
    """Run the kernel as `config` says; `counters` int32, zero, one per block of rows. Arguments as of `wq_mm`, contiguous."""
    (rows, columns), outputs = x.shape, len(qweight)
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    sums = (
        y if config.splits == 1 else torch.empty((config.splits, rows, outputs), dtype=torch.float32, device=x.device)
    )
    _kernel[(blocks(outputs, config.rows), config.splits)](
        x,
        qweight,
        params,
        y if bias is None else bias,
        y,
        sums,
        counters,
        rows,
        outputs,
        columns,
        qweight.shape[1] // WORDS,
        params.shape[1],
        config.splits,
        **constants(
            rows,
            columns,
            bits,
            group_size,
            config,
            params.dtype == torch.float16,
            bias is not None,
            starts_early(x.device),
        ),
    )
    return y


class Counters:
    """Zeroed int32 counters of one device, so that no call needs to clear any.

    Calls on one stream follow each other and share a slice. Each call captured into a graph gets a slice of its own for
    good, because graphs may be replayed side by side; when the pool is used up, the graph clears fresh memory instead.
    """

    SIZE = 1 << 20

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Tensor | None = None
        self.used = 0
        self.of_stream: dict[int, Tensor] = {}

    def _take(self, count: int) -> Tensor | None:
        if self.pool is None or self.used + count > self.SIZE:
            return None
        start, self.used = self.used, self.used + count
        return self.pool[start : start + count]

    def get(self, count: int) -> Tensor:
        """`count` counters that no call running at the same time uses."""
        if torch.cuda.is_current_stream_capturing():
            taken = self._take(count)
            return torch.zeros(count, dtype=torch.int32, device=self.device) if taken is None else taken
        if self.pool is None:
            self.pool = torch.zeros(self.SIZE, dtype=torch.int32, device=self.device)
            torch.cuda.synchronize(self.device)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if stream not in self.of_stream or len(self.of_stream[stream]) < count:
            taken = self._take(max(count, 4096))
            fresh = torch.zeros(count, dtype=torch.int32, device=self.device) if taken is None else taken
            self.of_stream[stream] = fresh
        return self.of_stream[stream]


@functools.lru_cache
def counters_of(device: torch.device) -> Counters:
    """The counters of `device`."""
    return Counters(device)


@functools.lru_cache
def _table() -> dict[str, Any]:
    return json.loads(launching.TABLE.read_text())


def bucket(rows: int) -> int:
    """The number of rows under which the table files `rows`."""
    return next(size for size in BUCKETS if rows <= size)


@functools.lru_cache
def config_for(device: torch.device, bits: int, rows: int, columns: int, outputs: int) -> Config:
    """The table's choice for this shape if it was measured on this kind of device, else a rule of thumb."""
    table = _table()
    entry = table["entries"].get(f"wq_mm/{bits}/{bucket(rows)}/{columns}/{outputs}")
    if entry is not None and tuple(table["capability"]) == torch.cuda.get_device_capability(device):
        return Config(*entry)
    return rule_of_thumb(bits, rows, columns, outputs, torch.cuda.get_device_properties(device).multi_processor_count)


def rule_of_thumb(bits: int, rows: int, columns: int, outputs: int, processors: int) -> Config:
    """About four programs for each multiprocessor, and no program with fewer than four tiles to read."""
    height = 128 if rows > 16 or outputs >= 8192 else 64
    tiles = blocks(columns, tile(bits))
    wanted = blocks(4 * processors, blocks(outputs, height))
    splits = max(1, min(wanted, tiles // 4, 16))
    return Config(height, splits, 8 if rows > 16 else 4, 4)


def _wq_mm_cuda(x: Tensor, qweight: Tensor, params: Tensor, bias: Tensor | None, bits: int, group_size: int) -> Tensor:
    rows, columns = x.shape
    check_group(columns, group_size, bits)
    if rows > MAX_ROWS:
        raise UsageError(f"wq_mm is made for at most {MAX_ROWS} rows, not {rows}: call quantized_linear")
    with torch.cuda.device_of(x):
        config = config_for(x.device, bits, rows, columns, len(qweight))
        counters = counters_of(x.device).get(blocks(len(qweight), config.rows))
        return launch(
            x.contiguous(), qweight.contiguous(), params.contiguous(), bias, bits, group_size, config, counters
        )


if AVAILABLE:
    wq_mm.register_kernel("cuda")(_wq_mm_cuda)
