"""GGUF's block types: how a row of weights becomes bytes, to ggml's last bit, and back.

A row is cut into blocks of 32 values, or super-blocks of 256 with 8 or 16 groups. Every block type but the IQ4 pair is a
grid in the sense of `qquant.tensor`: `value = step * code - offset` with one (step, offset) per `width` columns, where

    legacy, symmetric   q4_0 q5_0 q8_0     step = d,           offset = d * centre
    legacy, affine      q4_1 q5_1          step = d,           offset = -m
    K-quant, symmetric  q3_k q6_k          step = d * sc[j],   offset = d * sc[j] * centre
    K-quant, affine     q2_k q4_k q5_k     step = d * sc[j],   offset = dmin * m[j]

and d, dmin, m are float16, sc[j] and m[j] small integers. All products are exact in float32, so for finite d the grid
gives what ggml's decoders give (only the sign of a zero can differ). The IQ4 pair puts 16 uneven values on d * sc[j].

`quantize` is ggml_quantize_chunk of llama.cpp (x86-64 build), byte for byte, with and without importance weights. It has
three stages: a search for each group's real-valued scale (`search`), rounding of the scales to what the file
stores, and codes for the stored scales. Where the stored step is zero the codes of the search stay, as in ggml.

Bit fields (`Bits`): a stretch of `run` bytes holds 8 / bits planes of `run` values each; byte b holds values b, b + run,
b + 2 run, ... from its low bits up. Left out: IQ1, IQ2, IQ3, TQ, MXFP4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qquant.errors import UsageError
from qquant.formats.gguf import exact, search
from qquant.formats.gguf.blocks import (
    Affine,
    BlockParams,
    BlockType,
    Codebook,
    KAffine,
    KSymmetric,
    Legacy,
    Rows,
    Symmetric,
    by_peak,
    given,
    per_row,
    per_row_half,
    reciprocal,
)
from qquant.formats.gguf.fields import Bits, Half, Nibbles, SixBits
from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.formats.gguf.search import SearchResult
else:
    torch = lazy("torch")


class F32(BlockType):
    """float32, little-endian."""

    name = "f32"

    def encode(self, rows: Rows) -> Iterator[tuple[slice, Tensor]]:
        yield slice(None), rows.x.view(torch.uint8)

    def decode(self, data: Tensor) -> Tensor:
        return data.contiguous().view(torch.float32)


class F16(BlockType):
    """float16, little-endian, ties to even; infinite beyond 65504."""

    name = "f16"

    def encode(self, rows: Rows) -> Iterator[tuple[slice, Tensor]]:
        yield slice(None), rows.x.to(torch.float16).view(torch.uint8)

    def decode(self, data: Tensor) -> Tensor:
        return data.contiguous().view(torch.float16).float()


class BF16(BlockType):
    """The upper half of a float32, little-endian, ties to even."""

    name = "bf16"

    def encode(self, rows: Rows) -> Iterator[tuple[slice, Tensor]]:
        yield slice(None), rows.x.to(torch.bfloat16).view(torch.uint8)

    def decode(self, data: Tensor) -> Tensor:
        return data.contiguous().view(torch.bfloat16).float()


class Q4_0(Symmetric):
    """value = d * (q - 8).

    byte 0   2           18
         | d | q: 16 B    |    q[0-15] in bits 0-3, q[16-31] in bits 4-7
    """

    name = "q4_0"
    levels, centre = 16, 8
    fields = (Half("d"), Bits("codes", 32, 4, 16))


class Q4_1(Affine):
    """value = d * q + m.

    byte 0   2   4           20
         | d | m | q: 16 B    |    q as in q4_0
    """

    name = "q4_1"
    levels = 16
    fields = (Half("d"), Half("dmin"), Bits("codes", 32, 4, 16))


class Q5_0(Symmetric):
    """value = d * (q - 16).

    byte 0   2         6           22
         | d | qh: 4 B | ql: 16 B   |    ql: bits 0-3 of q as in q4_0; bit 4 of q[8 k + i] in bit i of qh[k]
    """

    name = "q5_0"
    levels, centre = 32, 16
    fields = (Half("d"), Bits("codes", 32, 1, 1, shift=4), Bits("codes", 32, 4, 16))


class Q5_1(Affine):
    """value = d * q + m.

    byte 0   2   4         8           24
         | d | m | qh: 4 B | ql: 16 B   |    q as in q5_0
    """

    name = "q5_1"
    levels = 32
    fields = (Half("d"), Half("dmin"), Bits("codes", 32, 1, 1, shift=4), Bits("codes", 32, 4, 16))


class Q8_0(Legacy):
    """value = d * q, q a signed byte (-127 .. 127); the code is q + 128. Importance makes no difference.

    byte 0   2           34
         | d | q: 32 B    |
    """

    name = "q8_0"
    levels, centre, code_flip = 256, 128, 0x80
    fields = (Half("d"), Bits("codes", 32, 8, 32))

    def plain(self, rows: Rows) -> tuple[BlockParams, Callable[[Tensor, slice], Tensor]]:
        blocks = rows.x.view(-1, self.width)
        top = torch.maximum(blocks.amax(1), -blocks.amin(1)).abs_()
        d = top.div_(torch.full_like(top, 127.0))
        inverse = reciprocal(d)
        below_half = torch.tensor(0.5 - 2.0**-25)  # adding it and cutting the fraction rounds halves away from zero

        def code(x: Tensor, blocks: slice) -> Tensor:
            scaled = x * inverse[blocks].unsqueeze(1)
            whole = scaled.add_(torch.copysign(below_half, scaled)).to(torch.int32)
            return whole.add_(self.centre).to(torch.uint8)

        return BlockParams(self, per_row_half(d, rows)), code

    searched = plain


class Q2_K(KAffine):
    """value = d * sc[j] * q - dmin * m[j], j = 0 .. 15.

    byte 0              16          80  82     84
         | sc, m: 16 B  | q: 64 B   | d | dmin |    each 32 B of q: 128 values, q[32 p + b] in bits 2 p of byte b
    """

    name = "q2_k"
    width, levels, limit = 16, 4, 15
    scale_range = (0, 15)
    fields = (Nibbles(), Bits("codes", 256, 2, 32), Half("d"), Half("dmin"))
    weights = ("|x|", "importance, block")
    schedule = search.Schedule(-0.5, 0.1, 16, absolute=True)


class Q3_K(KSymmetric):
    """value = d * sc[j] * (q - 4), j = 0 .. 15; sc is stored plus 32 in 6 bits.

    byte 0           32          96          108 110
         | qh: 32 B  | ql: 64 B  | sc: 12 B  | d |    ql: bits 0-1 of q as in q2_k; qh: bit 2 of q[32 p + b] in bit p of byte b
                                                      sc: bits 0-3 of sc[j], sc[j + 8] in byte j; bits 4-5 of sc[j + 4 p] in
                                                      bits 2 p of byte 8 + j
    """

    name = "q3_k"
    width, levels, centre, scale_bias = 16, 8, 4, 32
    scale_range = (-32, 31)
    fields = (
        Bits("codes", 256, 1, 32, shift=2),
        Bits("codes", 256, 2, 32),
        Bits("scales", 16, 4, 8),
        Bits("scales", 16, 2, 4, shift=4),
        Half("d"),
    )
    weights = ("x^2", "importance, 2 block")

    def search(self, rows: Rows) -> SearchResult:
        if rows.importance is None:
            return search.descent(rows.pieces(self), self.centre)
        return search.symmetric(rows.pieces(self), self.centre, weigh=True)

    def rounded(self, result: SearchResult) -> tuple[Tensor, Tensor]:
        if result.settled is not None:
            d, integers = by_peak(result.scale, 32)
        else:
            outer = search.symmetric([(result.scale.unsqueeze(1), given(result.weight).unsqueeze(1))], 32)
            d = outer.scale.squeeze(0)
            integers = exact.nearest_int(result.scale * outer.inverse).clamp_(-32, 31)
        return d, integers.masked_fill_(d == 0, -32)


class Q4_K(KAffine):
    """value = d * sc[j] * q - dmin * m[j], j = 0 .. 7.

    byte 0   2      4               16           144
         | d | dmin | sc, m: 12 B   | q: 128 B    |    each 32 B of q: 64 values, q[32 p + b] in bits 4 p of byte b
    """

    name = "q4_k"
    width, levels, limit = 32, 16, 63
    scale_range = (0, 63)
    fields = (Half("d"), Half("dmin"), SixBits(), Bits("codes", 256, 4, 32))
    schedule = search.Schedule(-1.0, 0.1, 21)


class Q5_K(KAffine):
    """value = d * sc[j] * q - dmin * m[j], j = 0 .. 7.

    byte 0   2      4               16          48            176
         | d | dmin | sc, m: 12 B   | qh: 32 B  | ql: 128 B    |    ql: bits 0-3 of q as in q4_k; qh: bit 4 as q3_k's bit 2
    """

    name = "q5_k"
    width, levels, limit = 32, 32, 63
    scale_range = (0, 63)
    fields = (Half("d"), Half("dmin"), SixBits(), Bits("codes", 256, 1, 32, shift=4), Bits("codes", 256, 4, 32))


class Q6_K(KSymmetric):
    """value = d * sc[j] * (q - 32), j = 0 .. 15; sc signed bytes.

    byte 0            128          192         208 210
         | ql: 128 B  | qh: 64 B   | sc: 16 B  | d |    each 64 B of ql: 128 values, bits 0-3 of q[64 p + b] in bits 4 p of byte b
                                                        each 32 B of qh: 128 values, bits 4-5 of q[32 p + b] in bits 2 p of byte b
    """

    name = "q6_k"
    width, levels, centre = 16, 64, 32
    scale_range = (-128, 127)
    fields = (Bits("codes", 256, 4, 64), Bits("codes", 256, 2, 32, shift=4), Bits("scales", 16, 8, 16), Half("d"))
    weights = ("x^2", "importance")

    def rounded(self, result: SearchResult) -> tuple[Tensor, Tensor]:
        dead = result.scale.abs().amax(0) < search.TINY
        result.inverse.masked_fill_(dead, 0.0)
        d, integers = by_peak(result.scale.masked_fill(dead, 0.0), 128)
        return d, integers.masked_fill_(dead, 0)


class IQ4_NL(Codebook):
    """value = d * VALUES[q].

    byte 0   2           18
         | d | q: 16 B    |    q as in q4_0
    """

    name = "iq4_nl"
    fields = (Half("d"), Bits("codes", 32, 4, 16))

    def rounded(self, scale: Tensor, rows: Rows) -> tuple[BlockParams, Tensor]:
        return BlockParams(self, per_row_half(scale, rows)), scale.view(-1)


class IQ4_XS(Codebook):
    """value = d * sc[j] * VALUES[q], j = 0 .. 7; sc is stored plus 32 in 6 bits.

    byte 0   2          4          8            136
         | d | sh: 2 B  | sl: 4 B  | q: 128 B    |    each 16 B of q: 32 values as in q4_0
                                                      sl: bits 0-3 of sc[2 k], sc[2 k + 1] in byte k; sh: bits 4-5 of
                                                      sc[4 k + p] in bits 2 p of byte k
    """

    name = "iq4_xs"
    scale_bias = 32
    fields = (Half("d"), Bits("scales", 8, 2, 1, shift=4), Bits("scales", 8, 4, 1), Bits("codes", 256, 4, 16))

    def rounded(self, scale: Tensor, rows: Rows) -> tuple[BlockParams, Tensor]:
        d = search.signed_peak(scale)[0].div_(-32.0)
        integers = exact.nearest_int(scale * reciprocal(d)).clamp_(-32, 31)
        params = BlockParams(self, per_row_half(d, rows), scales=per_row(integers, rows, torch.int8))
        return params, (integers * d).t().reshape(-1)


_CLASSES = (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS)
TYPES: dict[str, BlockType] = {kind.name: kind() for kind in _CLASSES}


def block_type(name: str) -> BlockType:
    """The block type of that lower-case llama.cpp name.

    Raises:
        UsageError: there is no such type, or it is not supported.
    """
    if name not in TYPES:
        raise UsageError(f"no GGUF block type {name!r}; known: {', '.join(TYPES)}")
    return TYPES[name]
