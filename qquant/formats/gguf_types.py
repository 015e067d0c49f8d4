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
three stages: a search for each group's real-valued scale (`gguf_search`), rounding of the scales to what the file
stores, and codes for the stored scales. Where the stored step is zero the codes of the search stay, as in ggml.

Bit fields (`Bits`): a stretch of `run` bytes holds 8 / bits planes of `run` values each; byte b holds values b, b + run,
b + 2 run, ... from its low bits up. Left out: IQ1, IQ2, IQ3, TQ, MXFP4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

from qquant.algorithms.grid import Multipliers
from qquant.errors import InputError, NumericalError, UsageError
from qquant.formats import gguf_search as search
from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.formats.gguf_search import Found, Piece
else:
    torch = lazy("torch")

_PIECE = {"cpu": 1 << 18}  # values searched or coded at once: the working set stays in the cache
_BATCH = {"cpu": 1 << 22}  # values whose scales are rounded at once
_ACCELERATOR = 1 << 24  # both, elsewhere
_ENERGY = {"cpu": 1 << 20}  # values whose row sums are computed at once: long vectors across the rows
_RETAINED = (
    31 << 20
)  # bytes: having seen such a block freed, glibc keeps our working memory instead of returning every piece
_GATHER = sum(1 << (56 - 7 * i) for i in range(8))
Result = TypeVar("Result")


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


@dataclass
class BlockParams:
    """What a file stores besides the codes; S blocks and G groups of `width` columns per row."""

    type: BlockType
    d: Tensor  # float16 [N, S]
    dmin: Tensor | None = None  # float16 [N, S]; the minimum m itself for q4_1 and q5_1
    scales: Tensor | None = None  # int8 (symmetric types, IQ4) or uint8 [N, G]
    mins: Tensor | None = None  # uint8 [N, G]

    def levels(self) -> tuple[Tensor, Tensor]:
        """(step, offset), both float32 [N, G]: `value = step * code - offset`.

        Raises:
            UsageError: the type's values are not evenly spaced (IQ4).
        """
        if not self.type.levels:
            raise UsageError(f"{self.type.name} has no step: its 16 values are not evenly spaced")
        step, low = self.step(), self.low()
        return step, step * self.type.centre if low is None else -low

    def step(self) -> Tensor:
        """Float32 [N, G]: what a code is multiplied with."""
        return self.d.float() if self.scales is None else _spread(self.d, self.scales)

    def low(self) -> Tensor | None:
        """Float32 [N, G]: what is added to the product; None for symmetric types."""
        if self.dmin is None:
            return None
        return self.dmin.float() if self.mins is None else -_spread(self.dmin, self.mins)

    def factors(self, codes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """With d sub-scale times code (less the code of zero), with dmin minus the sub-minimum; see `qquant.algorithms.grid.Params`."""
        columns = codes.shape[1]
        centred = codes.float() - (self.type.centre if self.dmin is None else 0)
        found = [(self.d, centred if self.scales is None else centred * _wide(self.scales, columns))]
        if self.dmin is not None:
            basis = torch.ones_like(centred) if self.mins is None else -_wide(self.mins, columns)
            found.append((self.dmin, basis))
        return found

    def with_factors(self, coefficients: Sequence[Tensor]) -> BlockParams:
        """Other d and dmin."""
        return replace(self, d=coefficients[0], dmin=coefficients[1] if self.dmin is not None else None)

    def integers(self, codes: Tensor) -> list[Multipliers]:
        """The sub-scales and sub-minima of a K-quant."""
        columns = codes.shape[1]
        found = []
        if self.scales is not None:
            lowest, highest = self.type.scale_range
            unit = (codes.float() - (self.type.centre if self.dmin is None else 0)) * _wide(self.d, columns)
            found.append(Multipliers("scales", self.scales, unit, lowest, highest))
        if self.mins is not None and self.dmin is not None:
            lowest, highest = self.type.scale_range
            found.append(Multipliers("mins", self.mins, -_wide(self.dmin, columns), lowest, highest))
        return found

    def with_integers(self, name: str, values: Tensor) -> BlockParams:
        """Other sub-scales or sub-minima."""
        return replace(self, scales=values) if name == "scales" else replace(self, mins=values)

    def rows(self, rows: slice) -> BlockParams:
        """The parameters of some rows."""
        return BlockParams(
            self.type, self.d[rows], *(None if a is None else a[rows] for a in (self.dmin, self.scales, self.mins))
        )


def _wide(value: Tensor, columns: int) -> Tensor:
    """Float32 [N, columns] of a value [N, S] per block or group."""
    return value.float().repeat_interleave(columns // value.shape[1], dim=1)


def _spread(half: Tensor, integers: Tensor) -> Tensor:
    """Float32 [N, G]: float16 `half` [N, S] of each block times the `integers` [N, G] of its groups."""
    rows, blocks = half.shape
    groups = integers.shape[1] // max(blocks, 1)
    return (half.float().unsqueeze(-1) * integers.view(rows, blocks, groups)).view(rows, blocks * groups)


@dataclass(frozen=True)
class Half:
    """A float16, little-endian."""

    name: str  # of the array in BlockParams
    bytes: int = 2

    def write(self, arrays: dict[str, Tensor]) -> Tensor:
        """Uint8 [blocks, bytes]."""
        return arrays[self.name].view(torch.uint8)

    def read(self, data: Tensor, arrays: dict[str, Tensor]) -> None:
        """The inverse of `write`, from `data` uint8 [blocks, bytes]."""
        arrays[self.name] = data.contiguous().view(torch.float16)


@dataclass(frozen=True)
class Bits:
    """Bits `shift` .. `shift + bits - 1` of `count` small integers."""

    name: str  # "codes", or of the array in BlockParams
    count: int
    bits: int
    run: int
    shift: int = 0

    @property
    def bytes(self) -> int:
        """Per block."""
        return self.count * self.bits // 8

    @property
    def planes(self) -> int:
        """Values that share a byte."""
        return 8 // self.bits

    def write(self, arrays: dict[str, Tensor]) -> Tensor:
        """Uint8 [blocks, bytes]."""
        values = arrays[self.name]
        if self.bits == 8:
            return values
        values = (values >> self.shift if self.shift else values) & ((1 << self.bits) - 1)
        if self.bits == self.run == 1:
            return _bits_of_bytes(values)
        values = values.view(len(values), self.bytes // self.run, self.planes, self.run)
        data = values[:, :, 0].clone(memory_format=torch.contiguous_format)
        for plane in range(1, self.planes):
            data.add_(values[:, :, plane], alpha=1 << (plane * self.bits))
        return data.view(len(values), self.bytes)

    def read(self, data: Tensor, arrays: dict[str, Tensor]) -> None:
        """The inverse of `write`, from `data` uint8 [blocks, bytes]; adds to what is there."""
        runs = data.reshape(len(data), self.bytes // self.run, self.run)
        values = data.new_empty((len(data), self.bytes // self.run, self.planes, self.run))
        mask = (1 << self.bits) - 1
        for plane in range(self.planes):
            values[:, :, plane] = ((runs >> (plane * self.bits)) & mask) << self.shift
        values = values.view(len(data), self.count)
        arrays[self.name] = arrays[self.name] | values if self.name in arrays else values


def _bits_of_bytes(values: Tensor) -> Tensor:
    """Uint8 [b, n / 8]: bit i of each byte is value i of eight, from `values` 0 or 1, uint8 [b, n], n a multiple of 8.

    Eight values are one little-endian integer; the product moves value i to bit 56 + i, and no other term reaches the top byte.
    """
    return (values.contiguous().view(torch.int64) * _GATHER >> 56).to(torch.uint8)


@dataclass(frozen=True)
class Nibbles:
    """Sixteen 4-bit scales and minima: byte j holds sc[j] in bits 0-3 and m[j] in bits 4-7."""

    bytes: int = 16

    def write(self, arrays: dict[str, Tensor]) -> Tensor:
        """Uint8 [blocks, bytes]. Unmasked, as in ggml: a scale above 15 spills into the minimum."""
        return arrays["scales"] | arrays["mins"] << 4

    def read(self, data: Tensor, arrays: dict[str, Tensor]) -> None:
        """The inverse of `write`, from `data` uint8 [blocks, bytes]."""
        arrays["scales"], arrays["mins"] = data & 15, data >> 4


@dataclass(frozen=True)
class SixBits:
    """Eight 6-bit scales sc and minima m.

    byte 0-3    sc[0-3]              bits 6-7: bits 4-5 of sc[4-7]
    byte 4-7    m[0-3]               bits 6-7: bits 4-5 of m[4-7]
    byte 8-11   bits 0-3 of sc[4-7]  bits 4-7: bits 0-3 of m[4-7]
    """

    bytes: int = 12

    def write(self, arrays: dict[str, Tensor]) -> Tensor:
        """Uint8 [blocks, bytes]. Unmasked, as in ggml: a value above 63 spills."""
        scales, mins = arrays["scales"], arrays["mins"]
        first = torch.cat([scales[:, :4], mins[:, :4]], 1)
        second = torch.cat([scales[:, 4:], mins[:, 4:]], 1)
        return torch.cat([first | second >> 4 << 6, scales[:, 4:] & 15 | mins[:, 4:] << 4], 1)

    def read(self, data: Tensor, arrays: dict[str, Tensor]) -> None:
        """The inverse of `write`, from `data` uint8 [blocks, bytes]."""
        first, low = data[:, :8], data[:, 8:]
        top = first >> 6 << 4
        arrays["scales"] = torch.cat([first[:, :4] & 63, low & 15 | top[:, :4]], 1)
        arrays["mins"] = torch.cat([first[:, 4:] & 63, low >> 4 | top[:, 4:]], 1)


Field = Half | Bits | Nibbles | SixBits


@dataclass
class _Cut:
    """Some rows, cut into S blocks of J groups each, element index first."""

    blocks: Tensor  # float32 [block, S]
    x: Tensor  # float32 [width, J, S]
    importance: Tensor | None  # float32 [width, J, S]
    row_energy: Tensor | None  # float32 [S]: mean square of the row that the block is in

    def energy(self) -> Tensor:
        """Float32 [S]: mean square of each block."""
        return search.squares_in_order(self.blocks).div_(len(self.blocks))

    def damped(self, energy: Tensor) -> Tensor:
        """Importance times sqrt(energy + x^2); `energy` float32 [S]."""
        return search.square_root((self.x * self.x).add_(energy)).mul_(_given(self.importance))


def _energetic(cut: _Cut) -> Tensor:
    square = cut.x * cut.x
    mean = search.sum_in_order(square.flatten(1)).div_(len(square))
    return cut.x.abs().add_(search.square_root(mean).view(square.shape[1:]))


WEIGHTS: dict[str, Callable[[_Cut], Tensor]] = {
    "|x|": lambda cut: cut.x.abs(),
    "x^2": lambda cut: cut.x * cut.x,
    "rms + |x|": _energetic,
    "importance": lambda cut: _given(cut.importance),
    "importance, block": lambda cut: cut.damped(cut.energy()),
    "importance, 2 block": lambda cut: cut.damped(cut.energy().mul_(2.0)),
    "importance, row": lambda cut: cut.damped(_given(cut.row_energy)),
}
"""Weights of the squared errors: what ggml multiplies the importance with, or takes instead of it."""


@dataclass
class Rows:
    """Rows to quantize."""

    x: Tensor  # float32 [R, K]
    importance: Tensor | None  # float32 [K]

    def batches(self, elements: int) -> Iterator[slice]:
        """Row ranges of about that many values."""
        count, columns = self.x.shape
        step = max(1, elements // max(columns, 1))
        return (slice(first, min(first + step, count)) for first in range(0, count, step))

    def pieces(self, kind: BlockType) -> Iterator[Piece]:
        """(x, weights), both float32 [width, J, S], for the searches."""
        rule = kind.weights[self.importance is not None]
        row_energy = _row_energy(self) if rule.endswith("row") else None
        spread: Tensor | None = None
        for rows in self.batches(_PIECE.get(self.x.device.type, _ACCELERATOR)):
            part = self.x[rows]
            blocks = _transposed(part.view(-1, kind.block))
            x = _groups(blocks, kind.width)
            energy = None
            if row_energy is not None:
                energy = row_energy[rows].repeat_interleave(part.shape[1] // kind.block)
            if self.importance is not None and (spread is None or spread.shape != x.shape):
                spread = _groups(self.importance.view(-1, kind.block).t().repeat(1, len(part)), kind.width)
            yield x, WEIGHTS[rule](_Cut(blocks, x, spread, energy))


def _transposed(matrix: Tensor) -> Tensor:
    """A contiguous transposed copy, even of a single row."""
    return matrix.t().clone(memory_format=torch.contiguous_format)


def _groups(blocks: Tensor, width: int) -> Tensor:
    """[width, J, S] of [J * width, S]."""
    groups = blocks.view(-1, width, blocks.shape[1]).transpose(0, 1)
    return groups if len(blocks) == width else groups.clone(memory_format=torch.contiguous_format)


def _row_energy(rows: Rows) -> Tensor:
    """Float32 [R]: mean square of each row, summed from left to right."""
    parts = []
    for some in rows.batches(_ENERGY.get(rows.x.device.type, _ACCELERATOR)):
        columns = _transposed(rows.x[some])
        total = search.squares_in_order(columns)
        parts.append(total.div_(torch.full_like(total, len(columns))))
    return torch.cat(parts)


class BlockType:
    """A block type: constants that need no torch, and its arithmetic."""

    name: ClassVar[str]  # as llama.cpp prints it, in lower case
    ggml_id: ClassVar[int]  # GGMLQuantizationType
    block: ClassVar[int]  # values
    bytes: ClassVar[int]  # per block
    width: ClassVar[int] = 0  # columns per (step, offset)
    levels: ClassVar[int] = 0  # number of codes; 0: not a grid
    centre: ClassVar[int] = 0  # code of the value zero
    fields: ClassVar[tuple[Field, ...]] = ()
    scale_bias: ClassVar[int] = 0  # stored scale = scale + bias
    scale_range: ClassVar[tuple[int, int]] = (0, 0)  # of sub-scales and sub-minima, both ends included
    code_flip: ClassVar[int] = 0  # stored code = code xor flip
    weights: ClassVar[tuple[str, str]] = ("", "")  # keys of WEIGHTS: without and with importance

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` values.

        Raises:
            UsageError: `columns` is not a multiple of the block.
        """
        if columns % self.block:
            raise UsageError(
                f"{self.name} stores blocks of {self.block} values and {columns} is no multiple: take another type"
            )
        return columns // self.block * self.bytes

    def choose(self, rows: Rows) -> tuple[BlockParams, Callable[[slice], Tensor]]:
        """Params, and a function that gives the codes uint8 [r, K] of some of the rows."""
        raise NotImplementedError

    def encode(self, rows: Rows) -> Iterator[tuple[slice, Tensor]]:
        """(range of rows, their bytes uint8 [r, row_bytes])."""
        params, codes = self.choose(rows)
        for part in rows.batches(_PIECE.get(rows.x.device.type, _ACCELERATOR)):
            yield part, self.pack(codes(part), params.rows(part))

    def decode(self, data: Tensor) -> Tensor:
        """Float32 [R, K] of `data` uint8 [R, row_bytes]."""
        codes, params = self.unpack(data)
        values = self.values(codes.view(len(data), -1, self.width)).mul_(params.step().unsqueeze(-1))
        low = params.low()
        if low is not None:
            values.add_(low.unsqueeze(-1))
        return values.view(codes.shape)

    def values(self, codes: Tensor) -> Tensor:
        """Float32: what is multiplied with the step."""
        return codes.float().sub_(self.centre) if self.centre else codes.float()

    def pack(self, codes: Tensor, params: BlockParams) -> Tensor:
        """Bytes uint8 [R, row_bytes] of `codes` uint8 [R, K]."""
        arrays = {"codes": codes ^ self.code_flip if self.code_flip else codes, "d": params.d}
        if params.dmin is not None:
            arrays["dmin"] = params.dmin
        if params.scales is not None:
            arrays["scales"] = params.scales.to(torch.int16).add_(self.scale_bias).to(torch.uint8)
        if params.mins is not None:
            arrays["mins"] = params.mins
        blocks = params.d.numel()
        arrays = {name: array.reshape(blocks, -1) for name, array in arrays.items()}
        return torch.cat([field.write(arrays) for field in self.fields], 1).view(len(codes), -1)

    def unpack(self, data: Tensor) -> tuple[Tensor, BlockParams]:
        """(codes uint8 [R, K], params) of `data` uint8 [R, row_bytes]; the inverse of `pack`."""
        blocks = data.reshape(-1, self.bytes)
        arrays: dict[str, Tensor] = {}
        start = 0
        for field in self.fields:
            field.read(blocks[:, start : start + field.bytes], arrays)
            start += field.bytes
        arrays = {name: array.reshape(len(data), -1) for name, array in arrays.items()}
        codes = arrays.pop("codes")
        if "scales" in arrays and "mins" not in arrays:
            arrays["scales"] = arrays["scales"].to(torch.int16).sub_(self.scale_bias).to(torch.int8)
        return codes ^ self.code_flip if self.code_flip else codes, BlockParams(self, **arrays)


class F32(BlockType):
    """float32, little-endian."""

    name, ggml_id, block, bytes = "f32", 0, 1, 4

    def encode(self, rows: Rows) -> Iterator[tuple[slice, Tensor]]:
        yield slice(None), rows.x.view(torch.uint8)

    def decode(self, data: Tensor) -> Tensor:
        return data.contiguous().view(torch.float32)


class F16(BlockType):
    """float16, little-endian, ties to even; infinite beyond 65504."""

    name, ggml_id, block, bytes = "f16", 1, 1, 2

    def encode(self, rows: Rows) -> Iterator[tuple[slice, Tensor]]:
        yield slice(None), rows.x.to(torch.float16).view(torch.uint8)

    def decode(self, data: Tensor) -> Tensor:
        return data.contiguous().view(torch.float16).float()


class BF16(BlockType):
    """The upper half of a float32, little-endian, ties to even."""

    name, ggml_id, block, bytes = "bf16", 30, 1, 2

    def encode(self, rows: Rows) -> Iterator[tuple[slice, Tensor]]:
        yield slice(None), rows.x.to(torch.bfloat16).view(torch.uint8)

    def decode(self, data: Tensor) -> Tensor:
        return data.contiguous().view(torch.bfloat16).float()


def _halves(values: Tensor, rows: Rows) -> Tensor:
    """Float16 [R, S] of float32 `values` of all blocks."""
    return values.to(torch.float16).view(len(rows.x), -1)


def _per_row(integers: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """[R, G] of `integers` [J, S of all rows]."""
    return integers.t().to(dtype).contiguous().view(len(rows.x), -1)


def _groups_of(rows: slice, groups: int) -> slice:
    """The groups of a range of rows, `groups` per row."""
    return slice(rows.start * groups, rows.stop * groups)


def _reciprocal(d: Tensor) -> Tensor:
    """1 / d; 0 where d is 0 or so small that 1 / d is infinite."""
    inverse = search.divide(1.0, d)
    return inverse.masked_fill_(inverse.isinf(), 0.0)


class _Legacy(BlockType):
    block, width = 32, 32
    weights = ("", "importance, row")

    def choose(self, rows: Rows) -> tuple[BlockParams, Callable[[slice], Tensor]]:
        groups = rows.x.shape[1] // self.width
        params, code = self.plain(rows) if rows.importance is None else self.searched(rows)

        def codes(some: slice) -> Tensor:
            x = rows.x[some]
            return code(x.view(-1, self.width), _groups_of(some, groups)).view(x.shape)

        return params, codes

    def plain(self, rows: Rows) -> tuple[BlockParams, Callable[[Tensor, slice], Tensor]]:
        """Params from the extremes of each block, and a function from (x [b, 32], range of blocks) to codes."""
        raise NotImplementedError

    def searched(self, rows: Rows) -> tuple[BlockParams, Callable[[Tensor, slice], Tensor]]:
        """The same, by a search with importance weights."""
        raise NotImplementedError


class _Symmetric(_Legacy):
    def plain(self, rows: Rows) -> tuple[BlockParams, Callable[[Tensor, slice], Tensor]]:
        d = search.signed_peak(rows.x.view(-1, self.width).t())[0].div_(-self.centre)
        inverse = _reciprocal(d)
        lost = (inverse == 0) & (d != 0)

        def code(x: Tensor, blocks: slice) -> Tensor:
            codes = (x * inverse[blocks].unsqueeze(1)).add_(self.centre + 0.5).to(torch.int32)
            return codes.clamp_(max=self.levels - 1).to(torch.uint8).masked_fill_(lost[blocks].unsqueeze(1), 0)

        return BlockParams(self, _halves(d, rows)), code

    def searched(self, rows: Rows) -> tuple[BlockParams, Callable[[Tensor, slice], Tensor]]:
        found = search.symmetric(rows.pieces(self), self.centre)
        code = lambda x, blocks: found.codes(x, self.centre, self.levels - 1, blocks)
        return BlockParams(self, _halves(found.scale, rows)), code


class _Affine(_Legacy):
    def plain(self, rows: Rows) -> tuple[BlockParams, Callable[[Tensor, slice], Tensor]]:
        blocks = rows.x.view(-1, self.width)
        low = search.lowest(blocks.t())
        d = (blocks.amax(1) - low).add_(0.0).div_(torch.full_like(low, self.levels - 1))
        inverse = _reciprocal(d)

        def code(x: Tensor, blocks: slice) -> Tensor:
            scaled = (x - low[blocks].unsqueeze(1)).mul_(inverse[blocks].unsqueeze(1))
            return scaled.add_(0.5).to(torch.int32).clamp_(max=self.levels - 1).to(torch.uint8)

        return BlockParams(self, _halves(d, rows), _halves(low, rows)), code

    def searched(self, rows: Rows) -> tuple[BlockParams, Callable[[Tensor, slice], Tensor]]:
        found = search.affine(rows.pieces(self), self.levels - 1, search.IMPORTANCE)
        code = lambda x, blocks: found.codes(x, 0, self.levels - 1, blocks)
        return BlockParams(self, _halves(found.scale, rows), _halves(_given(found.low), rows)), code


class _KQuant(BlockType):
    block = 256

    def choose(self, rows: Rows) -> tuple[BlockParams, Callable[[slice], Tensor]]:
        params, found = self.fit(rows)
        step, low = params.step().view(-1, 1), params.low()
        groups = rows.x.shape[1] // self.width
        top = self.levels - 1

        def codes(some: slice) -> Tensor:
            at = _groups_of(some, groups)
            x = rows.x[some].view(-1, self.width)
            scaled = x / step[at] if low is None else (x - low.view(-1, 1)[at]).div_(step[at])
            codes = search.nearest_code(scaled, self.centre, top)
            kept = search.indices((step[at] == 0).squeeze(1))
            if kept.numel():
                codes[kept] = found.codes(x[kept], self.centre, top, kept + at.start)
            return codes.view(rows.x[some].shape)

        return params, codes

    def fit(self, rows: Rows) -> tuple[BlockParams, Found]:
        """Params and the search behind them."""
        raise NotImplementedError


class _KAffine(_KQuant):
    limit: ClassVar[int]  # largest scale
    weights = ("rms + |x|", "importance, 2 block")
    schedule: ClassVar[tuple[float, float, int, bool]] = (-0.5, 0.1, 16, False)

    def fit(self, rows: Rows) -> tuple[BlockParams, Found]:
        schedule = self.schedule if rows.importance is None else search.IMPORTANCE
        found = search.affine(rows.pieces(self), self.levels - 1, schedule)
        parts = []
        for values in (found.scale, -_given(found.low)):
            if rows.importance is None:
                d, integers = _by_maximum(values, self.limit)
            else:
                d, integers = search.positive(values, _given(found.weight), self.limit)
            parts.append((_halves(d, rows), _per_row(integers, rows, torch.uint8)))
        (d, scales), (dmin, mins) = parts
        params = BlockParams(self, d, dmin, scales, mins)
        if bool((scales > self.limit).any() or (mins > self.limit).any()):  # ggml lets them spill over their bits
            empty = torch.zeros_like(rows.x, dtype=torch.uint8)
            params = self.unpack(self.pack(empty, params))[1]
        return params, found


def _by_maximum(values: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """(d float32 [S], integers [J, S]) with the largest of `values` [J, S] at `limit`; a negative one wraps to a byte."""
    top = values.amax(0).clamp_(min=0).add_(0.0)
    inverse = torch.where(top > 0, search.divide(float(limit), top), 0.0)
    integers = search.nearest_int(values * inverse).bitwise_and_(0xFF)
    if limit > 15:
        integers.clamp_(max=limit)
    return top.div_(torch.full_like(top, limit)), integers


class _KSymmetric(_KQuant):
    def fit(self, rows: Rows) -> tuple[BlockParams, Found]:
        found = self.search(rows)
        d, integers = self.rounded(found)
        return BlockParams(self, _halves(d, rows), scales=_per_row(integers, rows, torch.int8)), found

    def search(self, rows: Rows) -> Found:
        """The scale of each group."""
        return search.symmetric(rows.pieces(self), self.centre)

    def rounded(self, found: Found) -> tuple[Tensor, Tensor]:
        """(d float32 [S], scales int32 [J, S])."""
        raise NotImplementedError


def _by_peak(values: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """(d float32 [S], integers [J, S]): the largest magnitude of `values` [J, S] becomes -limit, the rest -limit .. limit - 1."""
    peak, magnitude = search.signed_peak(values)
    dead = magnitude == 0
    inverse = search.divide(-float(limit), torch.where(dead, 1.0, peak))
    integers = search.nearest_int(values * inverse).clamp_(-limit, limit - 1)
    return torch.where(dead, 0.0, search.divide(1.0, inverse)), integers


class Q4_0(_Symmetric):
    """value = d * (q - 8).

    byte 0   2           18
         | d | q: 16 B    |    q[0-15] in bits 0-3, q[16-31] in bits 4-7
    """

    name, ggml_id, bytes = "q4_0", 2, 18
    levels, centre = 16, 8
    fields = (Half("d"), Bits("codes", 32, 4, 16))


class Q4_1(_Affine):
    """value = d * q + m.

    byte 0   2   4           20
         | d | m | q: 16 B    |    q as in q4_0
    """

    name, ggml_id, bytes = "q4_1", 3, 20
    levels = 16
    fields = (Half("d"), Half("dmin"), Bits("codes", 32, 4, 16))


class Q5_0(_Symmetric):
    """value = d * (q - 16).

    byte 0   2         6           22
         | d | qh: 4 B | ql: 16 B   |    ql: bits 0-3 of q as in q4_0; bit 4 of q[8 k + i] in bit i of qh[k]
    """

    name, ggml_id, bytes = "q5_0", 6, 22
    levels, centre = 32, 16
    fields = (Half("d"), Bits("codes", 32, 1, 1, shift=4), Bits("codes", 32, 4, 16))


class Q5_1(_Affine):
    """value = d * q + m.

    byte 0   2   4         8           24
         | d | m | qh: 4 B | ql: 16 B   |    q as in q5_0
    """

    name, ggml_id, bytes = "q5_1", 7, 24
    levels = 32
    fields = (Half("d"), Half("dmin"), Bits("codes", 32, 1, 1, shift=4), Bits("codes", 32, 4, 16))


class Q8_0(_Legacy):
    """value = d * q, q a signed byte (-127 .. 127); the code is q + 128. Importance makes no difference.

    byte 0   2           34
         | d | q: 32 B    |
    """

    name, ggml_id, bytes = "q8_0", 8, 34
    levels, centre, code_flip = 256, 128, 0x80
    fields = (Half("d"), Bits("codes", 32, 8, 32))

    def plain(self, rows: Rows) -> tuple[BlockParams, Callable[[Tensor, slice], Tensor]]:
        blocks = rows.x.view(-1, self.width)
        top = torch.maximum(blocks.amax(1), -blocks.amin(1)).abs_()
        d = top.div_(torch.full_like(top, 127.0))
        inverse = _reciprocal(d)
        below_half = torch.tensor(0.5 - 2.0**-25)  # adding it and cutting the fraction rounds halves away from zero

        def code(x: Tensor, blocks: slice) -> Tensor:
            scaled = x * inverse[blocks].unsqueeze(1)
            whole = scaled.add_(torch.copysign(below_half, scaled)).to(torch.int32)
            return whole.add_(self.centre).to(torch.uint8)

        return BlockParams(self, _halves(d, rows)), code

    searched = plain


class Q2_K(_KAffine):
    """value = d * sc[j] * q - dmin * m[j], j = 0 .. 15.

    byte 0              16          80  82     84
         | sc, m: 16 B  | q: 64 B   | d | dmin |    each 32 B of q: 128 values, q[32 p + b] in bits 2 p of byte b
    """

    name, ggml_id, bytes = "q2_k", 10, 84
    width, levels, limit = 16, 4, 15
    scale_range = (0, 15)
    fields = (Nibbles(), Bits("codes", 256, 2, 32), Half("d"), Half("dmin"))
    weights = ("|x|", "importance, block")
    schedule = (-0.5, 0.1, 16, True)


class Q3_K(_KSymmetric):
    """value = d * sc[j] * (q - 4), j = 0 .. 15; sc is stored plus 32 in 6 bits.

    byte 0           32          96          108 110
         | qh: 32 B  | ql: 64 B  | sc: 12 B  | d |    ql: bits 0-1 of q as in q2_k; qh: bit 2 of q[32 p + b] in bit p of byte b
                                                      sc: bits 0-3 of sc[j], sc[j + 8] in byte j; bits 4-5 of sc[j + 4 p] in
                                                      bits 2 p of byte 8 + j
    """

    name, ggml_id, bytes = "q3_k", 11, 110
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

    def search(self, rows: Rows) -> Found:
        if rows.importance is None:
            return search.descent(rows.pieces(self), self.centre)
        return search.symmetric(rows.pieces(self), self.centre, weigh=True)

    def rounded(self, found: Found) -> tuple[Tensor, Tensor]:
        if found.settled is not None:
            d, integers = _by_peak(found.scale, 32)
        else:
            outer = search.symmetric([(found.scale.unsqueeze(1), _given(found.weight).unsqueeze(1))], 32)
            d = outer.scale.squeeze(0)
            integers = search.nearest_int(found.scale * outer.inverse).clamp_(-32, 31)
        return d, integers.masked_fill_(d == 0, -32)


class Q4_K(_KAffine):
    """value = d * sc[j] * q - dmin * m[j], j = 0 .. 7.

    byte 0   2      4               16           144
         | d | dmin | sc, m: 12 B   | q: 128 B    |    each 32 B of q: 64 values, q[32 p + b] in bits 4 p of byte b
    """

    name, ggml_id, bytes = "q4_k", 12, 144
    width, levels, limit = 32, 16, 63
    scale_range = (0, 63)
    fields = (Half("d"), Half("dmin"), SixBits(), Bits("codes", 256, 4, 32))
    schedule = (-1.0, 0.1, 21, False)


class Q5_K(_KAffine):
    """value = d * sc[j] * q - dmin * m[j], j = 0 .. 7.

    byte 0   2      4               16          48            176
         | d | dmin | sc, m: 12 B   | qh: 32 B  | ql: 128 B    |    ql: bits 0-3 of q as in q4_k; qh: bit 4 as q3_k's bit 2
    """

    name, ggml_id, bytes = "q5_k", 13, 176
    width, levels, limit = 32, 32, 63
    scale_range = (0, 63)
    fields = (Half("d"), Half("dmin"), SixBits(), Bits("codes", 256, 1, 32, shift=4), Bits("codes", 256, 4, 32))


class Q6_K(_KSymmetric):
    """value = d * sc[j] * (q - 32), j = 0 .. 15; sc signed bytes.

    byte 0            128          192         208 210
         | ql: 128 B  | qh: 64 B   | sc: 16 B  | d |    each 64 B of ql: 128 values, bits 0-3 of q[64 p + b] in bits 4 p of byte b
                                                        each 32 B of qh: 128 values, bits 4-5 of q[32 p + b] in bits 2 p of byte b
    """

    name, ggml_id, bytes = "q6_k", 14, 210
    width, levels, centre = 16, 64, 32
    scale_range = (-128, 127)
    fields = (Bits("codes", 256, 4, 64), Bits("codes", 256, 2, 32, shift=4), Bits("scales", 16, 8, 16), Half("d"))
    weights = ("x^2", "importance")

    def rounded(self, found: Found) -> tuple[Tensor, Tensor]:
        dead = found.scale.abs().amax(0) < search.TINY
        found.inverse.masked_fill_(dead, 0.0)
        d, integers = _by_peak(found.scale.masked_fill(dead, 0.0), 128)
        return d, integers.masked_fill_(dead, 0)


class _Codebook(BlockType):
    weights = ("x^2", "importance, 2 block")
    width = 32

    def values(self, codes: Tensor) -> Tensor:
        table = torch.tensor(search.VALUES, dtype=torch.float32, device=codes.device)
        return table[codes.to(torch.int32)]

    def choose(self, rows: Rows) -> tuple[BlockParams, Callable[[slice], Tensor]]:
        params, step = self.rounded(search.codebook(rows.pieces(self)).scale, rows)
        inverse = _reciprocal(step).unsqueeze(1)
        groups = rows.x.shape[1] // self.width

        def codes(some: slice) -> Tensor:
            x = rows.x[some]
            return search.nearest_value(x.view(-1, self.width) * inverse[_groups_of(some, groups)]).view(x.shape)

        return params, codes

    def rounded(self, scale: Tensor, rows: Rows) -> tuple[BlockParams, Tensor]:
        """(params, float32 [groups]: the step before d was rounded) for `scale` float32 [J, S]."""
        raise NotImplementedError


class IQ4_NL(_Codebook):
    """value = d * VALUES[q].

    byte 0   2           18
         | d | q: 16 B    |    q as in q4_0
    """

    name, ggml_id, block, bytes = "iq4_nl", 20, 32, 18
    fields = (Half("d"), Bits("codes", 32, 4, 16))

    def rounded(self, scale: Tensor, rows: Rows) -> tuple[BlockParams, Tensor]:
        return BlockParams(self, _halves(scale, rows)), scale.view(-1)


class IQ4_XS(_Codebook):
    """value = d * sc[j] * VALUES[q], j = 0 .. 7; sc is stored plus 32 in 6 bits.

    byte 0   2          4          8            136
         | d | sh: 2 B  | sl: 4 B  | q: 128 B    |    each 16 B of q: 32 values as in q4_0
                                                      sl: bits 0-3 of sc[2 k], sc[2 k + 1] in byte k; sh: bits 4-5 of
                                                      sc[4 k + p] in bits 2 p of byte k
    """

    name, ggml_id, block, bytes = "iq4_xs", 23, 256, 136
    scale_bias = 32
    fields = (Half("d"), Bits("scales", 8, 2, 1, shift=4), Bits("scales", 8, 4, 1), Bits("codes", 256, 4, 16))

    def rounded(self, scale: Tensor, rows: Rows) -> tuple[BlockParams, Tensor]:
        d = search.signed_peak(scale)[0].div_(-32.0)
        integers = search.nearest_int(scale * _reciprocal(d)).clamp_(-32, 31)
        params = BlockParams(self, _halves(d, rows), scales=_per_row(integers, rows, torch.int8))
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


def quantize(weight: Tensor, type_name: str, importance: Tensor | None = None) -> Tensor:
    """Blocks uint8 [N, bytes per row] of `weight` [N, K] (float32, or upcast to it), byte-identical to ggml_quantize_chunk.

    `importance` float32 [K], >= 0: mean square of each input channel. Rows are processed in bounded pieces; a row's bytes
    do not depend on its neighbours.

    Raises:
        UsageError: unknown type, or K is not a multiple of its block.
        InputError: shapes disagree.
        NumericalError: NaN or infinity in either, or a negative importance.
    """
    kind = block_type(type_name)
    importance = _checked(kind, weight, importance)
    out = torch.empty((len(weight), kind.row_bytes(weight.shape[1])), dtype=torch.uint8, device=weight.device)

    def encode(place: slice) -> None:
        target = out[place]
        for part, data in kind.encode(_rows(weight, importance, place)):
            target[part] = data

    _over_threads(weight, encode)
    return out


def dequantize(blocks: Tensor, type_name: str) -> Tensor:
    """Float32 [N, K] of `blocks` uint8 [N, bytes per row], bit-equal to ggml's decoders.

    Raises:
        UsageError: unknown type.
        InputError: a row is not a whole number of blocks.
    """
    kind = block_type(type_name)
    columns = _blocks_per_row(kind, blocks) * kind.block
    out = torch.empty((len(blocks), columns), dtype=torch.float32, device=blocks.device)
    for part in Rows(out, None).batches(_PIECE.get(blocks.device.type, _ACCELERATOR)):
        out[part] = kind.decode(blocks[part])
    return out


@dataclass(frozen=True)
class BlockGrid:
    """A block type as a `qquant.algorithms.grid.Grid`: any algorithm can put its codes on it."""

    type: BlockType

    @property
    def width(self) -> int:
        """Columns that share one (step, offset)."""
        return self.type.width

    @property
    def levels(self) -> int:
        """Number of codes."""
        return self.type.levels

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> BlockParams:
        """What `quantize` stores besides the codes, for `weight` float32 [N, K] and `importance` float32 [K].

        Raises:
            UsageError, InputError, NumericalError: as `quantize`.
        """
        if not len(weight):
            return unpack(quantize(weight, self.type.name, importance), self.type.name)[1]
        importance = _checked(self.type, weight, importance)
        self.type.row_bytes(weight.shape[1])
        parts = _over_threads(weight, lambda place: self.type.choose(_rows(weight, importance, place))[0])

        def joined(name: str) -> Tensor | None:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else torch.cat(arrays)

        return BlockParams(self.type, _given(joined("d")), joined("dmin"), joined("scales"), joined("mins"))

    def pack(self, codes: Tensor, params: BlockParams) -> Tensor:
        """Blocks uint8 [N, bytes per row] of `codes` uint8 [N, K]; see `pack`."""
        return pack(codes, params)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, BlockParams]:
        """(codes uint8 [N, K], params) of `blocks` uint8 [N, bytes per row]; see `unpack`."""
        return unpack(blocks, self.type.name)


def grid(type_name: str) -> BlockGrid:
    """The grid of a block type.

    Raises:
        UsageError: unknown type, a plain number format, or an uneven codebook (IQ4).
    """
    kind = block_type(type_name)
    if not kind.levels:
        raise UsageError(f"{type_name} is not an evenly spaced grid; only `quantize` can choose its codes")
    return BlockGrid(kind)


def pack(codes: Tensor, params: BlockParams) -> Tensor:
    """Blocks uint8 [N, bytes per row] of `codes` uint8 [N, K], each below the type's number of codes.

    Raises:
        UsageError: K is not a multiple of the block.
        InputError: codes and params disagree in shape.
    """
    kind = params.type
    row_bytes = kind.row_bytes(codes.shape[1])
    expected = (len(codes), row_bytes // kind.bytes)
    if tuple(params.d.shape) != expected:
        raise InputError(
            f"{kind.name}: codes {tuple(codes.shape)} need d of shape {expected}, not {tuple(params.d.shape)}"
        )
    return kind.pack(codes, params) if len(codes) else codes.new_empty((0, row_bytes))


def unpack(blocks: Tensor, type_name: str) -> tuple[Tensor, BlockParams]:
    """(codes uint8 [N, K], params) of `blocks` uint8 [N, bytes per row]; the inverse of `pack`.

    Raises:
        UsageError: unknown type or a plain number format.
        InputError: a row is not a whole number of blocks.
    """
    kind = block_type(type_name)
    if not kind.fields:
        raise UsageError(f"{type_name} is a plain number format: it has no codes")
    _blocks_per_row(kind, blocks)
    if len(blocks):
        return kind.unpack(blocks)
    codes, params = kind.unpack(blocks.new_zeros((1, blocks.shape[1])))
    return codes[:0], params.rows(slice(0))


def _blocks_per_row(kind: BlockType, blocks: Tensor) -> int:
    if blocks.dim() != 2 or blocks.shape[1] % kind.bytes:
        raise InputError(
            f"{kind.name} blocks have {kind.bytes} bytes: shape {tuple(blocks.shape)} is not rows of whole blocks"
        )
    return blocks.shape[1] // kind.bytes


def _over_threads(weight: Tensor, work: Callable[[slice], Result]) -> list[Result]:
    """`work` for row ranges of bounded size, on a CPU by as many threads as torch may use.

    Most of the time goes into numpy and torch calls too short to be split by themselves; both release the interpreter lock.
    """
    device = weight.device.type
    threads = torch.get_num_threads() if device == "cpu" else 1
    torch.empty(_RETAINED if device == "cpu" else 0, dtype=torch.uint8)
    share = max(_PIECE.get(device, _ACCELERATOR), -(-weight.numel() // threads))
    places = list(Rows(weight, None).batches(min(_BATCH.get(device, _ACCELERATOR), share)))
    if threads == 1 or len(places) == 1:
        return [work(place) for place in places]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, places))
    finally:
        torch.set_num_threads(threads)


def _rows(weight: Tensor, importance: Tensor | None, place: slice) -> Rows:
    """Some rows in float32, checked to be finite."""
    x = weight[place].detach().to(torch.float32).contiguous()
    low, high = x.aminmax() if x.numel() else (x.sum(), x.sum())
    if not bool((high - low).isfinite()):
        bad = (~x.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise NumericalError(
                f"weight [{place.start + row}, {column}] is {float(x[row, column])}: no block can hold it"
            )
    return Rows(x, importance)


def _checked(kind: BlockType, weight: Tensor, importance: Tensor | None) -> Tensor | None:
    """`importance` as float32 on the weight's device, validated."""
    if weight.dim() != 2:
        raise InputError(f"{kind.name}: a weight matrix has two dimensions, not shape {tuple(weight.shape)}")
    if importance is None:
        return None
    if tuple(importance.shape) != (weight.shape[1],):
        raise InputError(f"importance has shape {tuple(importance.shape)}, the weight {weight.shape[1]} columns")
    importance = importance.detach().to(device=weight.device, dtype=torch.float32).contiguous()
    bad = ~(importance.isfinite() & (importance >= 0))
    if bool(bad.any()):
        column = int(bad.nonzero()[0])
        raise NumericalError(
            f"importance [{column}] is {float(importance[column])}: it must be finite and not negative"
        )
    return importance
