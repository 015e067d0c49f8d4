"""The runtime layout of integer weights, and the device functions that read it.

    qweight  int32 [N, 16 T]     rows are output channels; a tile is 16 words (64 bytes) of a row
    params   fp16  [N, K / g]    symmetric: the scale of every group of g input columns; the zero point is 2^(bits-1)
             int32 [N, K / g]    otherwise: the scale's 16 bits below, the zero point (0 .. 2^bits) above

    W[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g]

Scale and zero point share a word because a word of four bytes can be copied asynchronously and two bytes cannot.

A tile holds 128 codes of 4 bits or 64 codes of 8 bits; T = ceil(K / tile), the last tile is filled with code 0. Within a tile
the codes are interleaved in planes of 32 consecutive columns (4 planes of 4 bits, 2 of 8 bits):

    word r, bits b*i      .. b*i+b-1      = code of column 32 i + 2 r        (plane i)
    word r, bits 16 + b*i .. 16+b*i+b-1   = code of column 32 i + 2 r + 1

so that one mask (`word >> b*i & 0x000F000F`) yields two neighbouring columns in the halves of a register, which is what the
tensor cores read; columns of a plane follow each other, and activations are read in their own order. Every group size of
32, 64, any multiple of the tile, or all of K, is made of whole planes. GPTQ's [K/8, N] and AWQ's [K, N/8] are repacked to this
once, at load; rows of matrices with one input (q, k, v; gate, up) concatenate.

Codes become floats without a conversion instruction: OR-ing a 4-bit code into 0x6400 is the half 1024 + code (0x4300: the
bfloat16 128 + code), 0x4B000000 | code the float 2^23 + code; one subtraction of the same magic plus the zero point follows,
which is exact. (The trick is common to fast int4 kernels since FasterTransformer; the layout and code are ours.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qquant.errors import InputError
from qquant.kernels.jit import jit, tl

WORDS = 16  # of a tile
PLANE = 32  # consecutive columns of a plane


def tile(bits: int) -> int:
    """Columns of a tile."""
    return WORDS * 32 // bits


def check_group(columns: int, group_size: int, bits: int) -> None:
    """Raise InputError unless groups of `group_size` columns are made of whole planes and divide `columns`."""
    fits = (
        group_size in (PLANE, 2 * PLANE) or group_size == columns or (group_size > 0 and group_size % tile(bits) == 0)
    )
    if bits not in (4, 8) or not fits or columns % group_size:
        raise InputError(
            f"no kernel layout for {bits} bit, {columns} columns in groups of {group_size}: bits must be 4 or 8 and the group "
            f"size 32, 64, a multiple of {tile(bits) if bits in (4, 8) else 128}, or all columns (one group per row)"
        )


def pack_params(scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Params of scales fp16 [N, K/g] and zeros (any dtype, whole numbers) [N, K/g], or None for the symmetric grid."""
    if zeros is None:
        return scales.contiguous()
    low = scales.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    return low | (zeros.to(torch.int32) << 16)


def unpack_params(params: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scales, zeros), both float32 [N, K/g], of `pack_params`'s result."""
    if params.dtype == torch.float16:
        scales = params.float()
        return scales, torch.full_like(scales, 1 << (bits - 1))
    return params.to(torch.int16).view(torch.float16).float(), (params >> 16).float()


def pack_runtime(codes: Tensor, bits: int) -> Tensor:
    """Int32 [N, 16 ceil(K / tile)] of codes uint8 [N, K]; see the head of the file."""
    rows, columns = codes.shape
    size = tile(bits)
    padded = torch.nn.functional.pad(codes, (0, -columns % size)) if columns % size else codes
    grouped = padded.reshape(rows, -1, size // PLANE, WORDS, 2)
    words = torch.zeros((rows, grouped.shape[1], WORDS), dtype=torch.int32, device=codes.device)
    for plane in range(size // PLANE):
        for half in range(2):
            words |= grouped[:, :, plane, :, half].to(torch.int32) << (bits * plane + 16 * half)
    return words.view(rows, -1)


def unpack_runtime(qweight: Tensor, bits: int, columns: int) -> Tensor:
    """Codes int16 [N, columns] of `pack_runtime`'s result, in one pass: the halves of a masked word are neighbours."""
    shifts = torch.arange(0, 16, bits, dtype=torch.int32, device=qweight.device).unsqueeze(-1)
    words = qweight.view(len(qweight), -1, 1, WORDS) >> shifts
    pairs = words.bitwise_and_(0x000F000F if bits == 4 else 0x00FF00FF)
    return pairs.view(torch.int16).view(len(qweight), -1)[:, :columns]


def repack(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """(qweight, params) of codes uint8 [N, K], scales fp16 [N, K/g] and zeros [N, K/g] or None, as any format unpacks them.

    Raises:
        InputError: a group size that the layout does not have, or a scale type other than fp16.
    """
    check_group(codes.shape[1], codes.shape[1] // scales.shape[1], bits)
    if scales.dtype != torch.float16:
        raise InputError(f"scales must be float16, not {scales.dtype}: round them where the file says so")
    if zeros is not None and bool((zeros == 1 << (bits - 1)).all()):
        zeros = None
    return pack_runtime(codes, bits), pack_params(scales, zeros)


@jit
def halves(pairs: tl.tensor, FLOAT: tl.constexpr) -> tl.tensor:
    """Int32 [BN, 16] holding two 16-bit floats each -> FLOAT [BN, 16, 2], low half first; no instruction is left of it."""
    low = (pairs & 0xFFFF).to(tl.int16).to(FLOAT, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(FLOAT, bitcast=True)
    return tl.join(low, high)


@jit
def plane_inline(
    words: tl.tensor, zero: tl.tensor, INDEX: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr
) -> tl.tensor:
    """`plane` in NVIDIA assembly: two columns an instruction."""
    if (
        BITS == 4 and FLOAT == tl.float16 and INDEX % 2 == 1
    ):  # the nibble stays where it is: (1024 + 16 code) / 16 - (64 + zero)
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b32 s; lop3.b32 $0, $1, 0x00f000f0, 0x64006400, 0xea; mov.b32 s, 0x2c002c00; fma.rn.f16x2 $0, $0, s, $2; }",
            "=r,r,r",
            [words >> (4 * INDEX - 4), (zero * 16 + 0xD400) * 0x00010001],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    elif BITS == 4 and FLOAT == tl.float16:  # 1024 + code, less 1024 + zero
        pairs = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $0, $0, $2;",
            "=r,r,r",
            [words >> (4 * INDEX), (zero + 0x6400) * 0x00010001],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    elif (
        BITS == 4
    ):  # 128 + code, less 128 + zero; multiplying by one because bfloat16 has no plain subtraction before sm_90
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b32 s; lop3.b32 $0, $1, 0x000f000f, 0x43004300, 0xea; mov.b32 s, 0x3f803f80; fma.rn.bf16x2 $0, $0, s, $2; }",
            "=r,r,r",
            [words >> (4 * INDEX), (zero + 0xC300) * 0x00010001],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    elif FLOAT == tl.float16:
        pairs = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x00ff00ff, 0x64006400, 0xea; sub.f16x2 $0, $0, $2;",
            "=r,r,r",
            [words >> (8 * INDEX), (zero + 0x6400) * 0x00010001],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:  # eight bits do not fit behind a bfloat16 magic: 2^23 + code in float, less 2^23 + zero, then two at once to bfloat16
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b32 l, h, m; mov.b32 m, 0x4b000000; prmt.b32 l, $1, m, 0x7440; prmt.b32 h, $1, m, 0x7442; "
            "sub.f32 l, l, $2; sub.f32 h, h, $2; cvt.rn.bf16x2.f32 $0, h, l; }",
            "=r,r,r",
            [words >> (8 * INDEX), zero + 0x4B000000],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return halves(pairs, FLOAT)


@jit
def plane_portable(
    words: tl.tensor, zero: tl.tensor, INDEX: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr
) -> tl.tensor:
    """`plane` in plain Triton, for the interpreter and for other makers' devices."""
    MASK: tl.constexpr = 0x000F000F if BITS == 4 else 0x00FF00FF
    if FLOAT == tl.float16:
        value = halves(((words >> (BITS * INDEX)) & MASK) | 0x64006400, FLOAT)
        return (value - (zero + 1024).to(tl.float16)[:, :, None]).to(FLOAT)
    codes = (words >> (BITS * INDEX)) & MASK
    low = ((codes & 0xFFFF) - zero).to(tl.float32)
    high = ((codes >> 16) - zero).to(tl.float32)
    return tl.join(low, high).to(FLOAT)


@jit
def plane(
    words: tl.tensor,
    zero: tl.tensor,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT: tl.constexpr,
    INLINE: tl.constexpr,
) -> tl.tensor:
    """Plane INDEX of `words` int32 [BN, 16] less `zero` int32 [BN, 1], exact, as FLOAT [BN, 16, 2]."""
    if INLINE:
        value = plane_inline(words, zero, INDEX, BITS, FLOAT)
    else:
        value = plane_portable(words, zero, INDEX, BITS, FLOAT)
    return value


@jit
def planes(
    words: tl.tensor,
    zero: tl.tensor,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT: tl.constexpr,
    INLINE: tl.constexpr,
) -> tl.tensor:
    """COUNT (1, 2 or 4) planes from FIRST on, as FLOAT [BN, 32 COUNT], columns in order; joining only renames registers."""
    value = plane(words, zero, FIRST, BITS, FLOAT, INLINE)
    if COUNT == 2:
        p1 = plane(words, zero, FIRST + 1, BITS, FLOAT, INLINE)
        planes = tl.permute(tl.join(value, p1), (0, 3, 1, 2))
    elif COUNT == 4:
        p1 = plane(words, zero, FIRST + 1, BITS, FLOAT, INLINE)
        p2 = plane(words, zero, FIRST + 2, BITS, FLOAT, INLINE)
        p3 = plane(words, zero, FIRST + 3, BITS, FLOAT, INLINE)
        planes = tl.permute(tl.join(tl.join(value, p2), tl.join(p1, p3)), (0, 3, 4, 1, 2))
    else:
        planes = value
    return tl.reshape(planes, (words.shape[0], 32 * COUNT))


@jit
def scale_of(param: tl.tensor, SYMMETRIC: tl.constexpr) -> tl.tensor:
    """Scales float32 [BN] of params [BN]."""
    if SYMMETRIC:
        scale = param.to(tl.float32)
    else:
        scale = (param & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale


@jit
def zero_of(param: tl.tensor, BITS: tl.constexpr, SYMMETRIC: tl.constexpr) -> tl.tensor:
    """Zero points int32 [BN, 1] of params [BN], or [1, 1] where they are all the same."""
    if SYMMETRIC:
        zero = tl.full((1, 1), 1 << (BITS - 1), tl.int32)
    else:
        zero = (param >> 16)[:, None]
    return zero
