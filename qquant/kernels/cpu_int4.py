"""Integer weights on the CPU: torch's own int4 product for few rows, and the same bytes back to floats for many.

    y = x @ W' + b,    W[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g]

`aten::_weight_int4pack_mm_for_cpu` computes (nibble - 8) * scale + shift with bfloat16 activations (float16 and float32 run on a
scalar path, some 80 times slower), its own packing, and scale and shift in bfloat16. A code of 4 bits is a nibble, with
shift = (8 - zero) * scale. A code of 8 bits is two, 16 * high + low, and takes two products:

    high: scale 16 s, shift 0                   low: scale s, shift (136 - zero) s

bfloat16 moves every scale by up to 2^-9 of itself, and a shift by up to 2^-6 of a step: small against the half step that rounding
the weights cost, but not exact. So this is for generating text; fidelity is measured on exact weights.

The packing puts blocks of B rows (B depends on the machine's instructions) behind one another, column after column of a block:

    byte [n / B, k, j], j < B / 2       low nibble: row j of the block, column k       high nibble: row B / 2 + j

so the bytes can be read back, and one copy of the weights serves both ways. Above MAX_ROWS rows of x, where multiplying takes longer than
reading weights, they become floats a piece at a time, exact, with the scales as stored, and the product is one of floats, by float32 where
this CPU has no instructions for the dtype of x. `quantized::embedding_bag_4bit_unpack` turns nibbles to floats six times as fast as
shifts and masks do: a row of it is a column of some blocks here, with the scale 1 and the offset -8 behind its bytes. What comes out is
W' with the rows of a block in the order of its bytes, 0, B / 2, 1, B / 2 + 1, ...; scales are kept in that order, and outputs
are put back into theirs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qquant.devices import multiplies
from qquant.errors import InputError

GROUP_SIZES = (32, 64, 128, 256)
MAX_ROWS = {4: 48, 8: 24}  # by bits, as measured: tests/bench/README.md
BLOCKS = (64, 32)  # rows behind one another, by instruction set
CHUNK = 256  # rows dequantized at a time
DEPTH = 1024  # columns of them that are unpacked at a time: they stay in the cache


@dataclass(frozen=True)
class Packed:
    """Weights of one matrix as the CPU product wants them."""

    nibbles: Tensor  # uint8 [1 or 2, N, K/2]: the codes; or their high and low halves
    affine: Tensor  # bf16 [1 or 2, K/g', N, 2]: scale and shift; g' = min(g, 128) where g is not a group size of the operator
    scales: Tensor  # fp16 [K/g, N]: as stored, rows in the order in which blocks are unpacked
    zeros: Tensor | None  # float32 [K/g, N]; None: 2^(bits-1)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 * len(self.nibbles)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weights take."""
        return sum(t.nbytes for t in (self.nibbles, self.affine, self.scales, self.zeros) if t is not None)


@functools.lru_cache
def block_rows() -> int | None:
    """Rows of a block of the operator's packing on this machine; None where it has no such operator, or packs otherwise."""
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return None
    codes = torch.arange(128 * 32, dtype=torch.int32).mul_(2654435761).bitwise_right_shift_(20).bitwise_and_(15)
    codes = codes.view(128, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return next((rows for rows in BLOCKS if torch.equal(_codes(packed, rows), codes.to(torch.uint8))), None)


def _codes(packed: Tensor, block: int) -> Tensor:
    rows, half = packed.shape
    bytes_ = packed.view(rows // block, 2 * half, block // 2).transpose(1, 2)
    return torch.cat([bytes_ & 15, bytes_ >> 4], dim=1).view(rows, 2 * half)


@functools.lru_cache
def unpacks() -> bool:
    """Whether this torch has the operator that turns nibbles to floats, and it does."""
    if not hasattr(torch.ops.quantized, "embedding_bag_4bit_unpack"):
        return False
    nibbles = torch.arange(256, dtype=torch.uint8).view(8, 32)
    wanted = torch.stack([nibbles & 15, nibbles >> 4], dim=-1).view(8, 64).float()
    rows = torch.cat([nibbles, _affine(1, -8).expand(8, -1)], dim=1)
    return torch.equal(torch.ops.quantized.embedding_bag_4bit_unpack(rows), wanted - 8)


def _affine(scale: float, offset: float) -> Tensor:
    """What stands behind the nibbles of a row that the operator unpacks, uint8 [4]."""
    return torch.tensor([scale, offset], dtype=torch.float16).view(torch.uint8)


def _unpacked_order(rows: int, block: int) -> Tensor:
    """The row [rows] that stands at each place as blocks are unpacked."""
    return torch.arange(rows).view(-1, 2, block // 2).transpose(1, 2).reshape(-1)


@functools.lru_cache
def _places(rows: int, block: int) -> Tensor:
    """The place [rows] at which each row stands as blocks are unpacked."""
    return _unpacked_order(rows, block).argsort()


def operator_group(columns: int, group_size: int) -> int | None:
    """The group size to call the operator with, None if it cannot take these weights."""
    if group_size in GROUP_SIZES:
        return group_size
    return 128 if group_size % 128 == 0 and columns % 128 == 0 else None


def available(outputs: int, columns: int, group_size: int) -> bool:
    """Whether the operator takes weights of this shape and group size here."""
    block = block_rows()
    return block is not None and outputs % block == 0 and operator_group(columns, group_size) is not None


def pack_cpu(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Packed:
    """Codes uint8 [N, K] of 4 or 8 bits, scales fp16 [N, K/g], zeros [N, K/g] or None, as any format unpacks them.

    The packing depends on the instruction set of this machine; it is for this process, not for a file.

    Raises:
        InputError: rows or a group size that the operator does not take.
    """
    (rows, columns), groups = codes.shape, scales.shape[1]
    if not available(rows, columns, columns // groups):
        raise InputError(
            f"int4 on the CPU takes groups of {GROUP_SIZES} (or multiples of 128) and rows in blocks of {block_rows()}, "
            f"not groups of {columns // groups} and {rows} rows"
        )
    middle = 1 << (bits - 1)
    if zeros is not None and bool((zeros == middle).all()):
        zeros = None
    step = scales.float()
    zero = torch.full_like(step, middle) if zeros is None else zeros.float()
    if bits == 4:
        parts = [(codes, step, (8 - zero) * step)]
    else:
        parts = [(codes >> 4, 16 * step, torch.zeros_like(step)), (codes & 15, step, (136 - zero) * step)]
    repeats = columns // groups // (operator_group(columns, columns // groups) or 1)
    nibbles, affine = [], []
    for nibble, scale, shift in parts:
        nibbles.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibble.to(torch.int32), 1))
        pair = torch.stack([scale, shift], dim=-1).repeat_interleave(repeats, dim=1)
        affine.append(pair.to(torch.bfloat16).transpose(0, 1).contiguous())
    order = _unpacked_order(rows, block_rows() or BLOCKS[0])
    ordered = None if zeros is None else zeros.float()[order].T.contiguous()
    return Packed(torch.stack(nibbles), torch.stack(affine), scales[order].T.contiguous(), ordered)


def unpack_cpu(packed: Packed) -> Tensor:
    """Codes uint8 [N, K]; inverse of `pack_cpu`."""
    block = block_rows() or BLOCKS[0]
    parts = [_codes(nibbles, block) for nibbles in packed.nibbles]
    return parts[0] if len(parts) == 1 else parts[0] << 4 | parts[1]


def dequantize_cpu(packed: Packed, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
    """Weights [n, K] of `dtype` of a slice of rows in whole blocks: exact in float32, rounded once."""
    some = Packed(
        packed.nibbles[:, rows],
        packed.affine,
        packed.scales[:, rows],
        None if packed.zeros is None else packed.zeros[:, rows],
    )
    codes, groups = unpack_cpu(some), len(some.scales)
    places = _places(len(codes), block_rows() or BLOCKS[0])
    weight = codes.view(len(codes), groups, -1).float()
    weight -= 1 << (packed.bits - 1) if some.zeros is None else some.zeros.T[places].unsqueeze(-1)
    weight *= some.scales.T[places].float().unsqueeze(-1)
    return weight.view(codes.shape).to(dtype)


def transposed_cpu(packed: Packed, dtype: torch.dtype, rows: slice) -> Tensor:
    """What `dequantize_cpu` makes of the rows, to the bit, as W' [K, n] with rows in the order in which blocks are unpacked."""
    if not unpacks():
        weight = dequantize_cpu(packed, dtype, rows)
        return weight[_unpacked_order(len(weight), block_rows() or BLOCKS[0])].T
    columns, groups = 2 * packed.nibbles.shape[2], len(packed.scales)
    scales = packed.scales[:, rows].float()
    zeros = None if packed.zeros is None else packed.zeros[:, rows] - (1 << (packed.bits - 1))
    group = columns // groups
    step = max(1, DEPTH // group)
    weight = torch.empty(groups, group, scales.shape[1], dtype=dtype)
    for start in range(0, groups, step):
        some = slice(start, start + step)
        codes = _floats(packed, rows, slice(group * start, group * (start + step))).view(-1, group, scales.shape[1])
        if zeros is not None:
            codes -= zeros[some].unsqueeze(1)
        torch.mul(codes, scales[some].unsqueeze(1), out=weight[some])
    return weight.view(columns, -1)


def _floats(packed: Packed, rows: slice, columns: slice) -> Tensor:
    """Codes less 2^(bits-1) as float32 [k, n], rows in the order in which blocks are unpacked."""
    block = block_rows() or BLOCKS[0]
    total: Tensor | None = None
    for nibbles, scale in zip(packed.nibbles, (16, 1) if packed.bits == 8 else (1,), strict=True):
        some = nibbles[rows].view(-1, 2 * nibbles.shape[1], block // 2)[:, columns].transpose(0, 1)
        room = torch.empty(len(some), some[0].numel() + 4, dtype=torch.uint8)
        room[:, :-4].view(some.shape).copy_(some)
        # of two nibbles 16 (high - 8) + low
        room[:, -4:] = _affine(scale, 0 if total is not None else -8 * scale)
        values = torch.ops.quantized.embedding_bag_4bit_unpack(room)
        total = values if total is None else total.add_(values)
    assert total is not None
    return total


def few_rows(x: Tensor, packed: Packed) -> Tensor:
    """X [M, K] times packed weights -> [M, N] of x's dtype; bfloat16 activations, float32 sums."""
    group = x.shape[1] // packed.affine.shape[1]
    as_bfloat16 = x.to(torch.bfloat16).contiguous()
    y: Tensor | None = None
    for nibbles, affine in zip(packed.nibbles, packed.affine, strict=True):
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(as_bfloat16, nibbles, group, affine)
        y = product if y is None else y.float() + product
    assert y is not None
    return y.to(x.dtype)


def many_rows(x: Tensor, packed: Packed) -> Tensor:
    """X [M, K] times exact weights, dequantized some rows at a time -> [M, N] of x's dtype."""
    outputs, block = packed.scales.shape[1], block_rows() or BLOCKS[0]
    dtype = x.dtype if multiplies(x.dtype) else torch.float32
    factor, y = x.to(dtype), torch.empty((len(x), outputs), dtype=x.dtype)
    for start in range(0, outputs, CHUNK):
        rows = slice(start, min(start + CHUNK, outputs))
        part = factor @ transposed_cpu(packed, dtype, rows)
        # in float32, whose index_select is seven times as fast as bfloat16's
        y[:, rows] = part.float().index_select(1, _places(part.shape[1], block))
    return y


def cpu_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """X [M, K] -> [M, N] by whichever of the two is faster for so many rows."""
    y = few_rows(x, packed) if len(x) <= MAX_ROWS[packed.bits] else many_rows(x, packed)
    return y if bias is None else y + bias
