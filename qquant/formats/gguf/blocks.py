"""What the block types of GGUF share: batches of rows, importance weights, and the strategies by which scales are found.

A type (`types`) is a drawing of its bytes and one of these strategies; the searches themselves are in `search`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from qquant.algorithms.grid import Multipliers
from qquant.devices import policy
from qquant.errors import UsageError
from qquant.formats.gguf import exact, search
from qquant.formats.gguf.container import TYPE_NAMES, TYPE_SIZES
from qquant.formats.gguf.fields import Field, per_column, scaled
from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.formats.gguf.search import Piece, SearchResult
else:
    torch = lazy("torch")


RETAINED = (
    31 << 20
)  # bytes: having seen such a block freed, glibc keeps our working memory instead of returning every piece


def given(value: Tensor | None) -> Tensor:
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

    def step_and_offset(self) -> tuple[Tensor, Tensor]:
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
        return self.d.float() if self.scales is None else scaled(self.d, self.scales)

    def low(self) -> Tensor | None:
        """Float32 [N, G]: what is added to the product; None for symmetric types."""
        if self.dmin is None:
            return None
        return self.dmin.float() if self.mins is None else -scaled(self.dmin, self.mins)

    def linear_form(self, codes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Coefficient and basis of each term: d with sub-scale times code (less the code of zero), dmin with minus the sub-minimum; see `qquant.algorithms.grid.Params`."""
        columns = codes.shape[1]
        centred = codes.float() - (self.type.centre if self.dmin is None else 0)
        terms = [(self.d, centred if self.scales is None else centred * per_column(self.scales, columns))]
        if self.dmin is not None:
            basis = torch.ones_like(centred) if self.mins is None else -per_column(self.mins, columns)
            terms.append((self.dmin, basis))
        return terms

    def with_coefficients(self, coefficients: Sequence[Tensor]) -> BlockParams:
        """These parameters with other d and dmin."""
        return replace(self, d=coefficients[0], dmin=coefficients[1] if self.dmin is not None else None)

    def integers(self, codes: Tensor) -> list[Multipliers]:
        """The sub-scales and sub-minima of a K-quant."""
        columns = codes.shape[1]
        multipliers = []
        if self.scales is not None:
            lowest, highest = self.type.scale_range
            unit = (codes.float() - (self.type.centre if self.dmin is None else 0)) * per_column(self.d, columns)
            multipliers.append(Multipliers("scales", self.scales, unit, lowest, highest))
        if self.mins is not None and self.dmin is not None:
            lowest, highest = self.type.scale_range
            multipliers.append(Multipliers("mins", self.mins, -per_column(self.dmin, columns), lowest, highest))
        return multipliers

    def with_integers(self, name: str, values: Tensor) -> BlockParams:
        """These parameters with other sub-scales or sub-minima."""
        return replace(self, scales=values) if name == "scales" else replace(self, mins=values)

    def stored(self) -> dict[str, Tensor]:
        """What there is of d, dmin, sub-scales and sub-minima."""
        named = {"d": self.d, "dmin": self.dmin, "scales": self.scales, "mins": self.mins}
        return {name: value for name, value in named.items() if value is not None}

    def with_stored(self, stored: Mapping[str, Tensor]) -> BlockParams:
        """Others of the same type."""
        return BlockParams(self.type, **stored)

    def rows(self, rows: slice) -> BlockParams:
        """The parameters of some rows."""
        return self.with_stored({name: value[rows] for name, value in self.stored().items()})


@dataclass
class _Cut:
    """Some rows, cut into S blocks of J groups each, element index first."""

    blocks: Tensor  # float32 [block, S]
    x: Tensor  # float32 [width, J, S]
    importance: Tensor | None  # float32 [width, J, S]
    row_energy: Tensor | None  # float32 [S]: mean square of the row that the block is in

    def energy(self) -> Tensor:
        """Float32 [S]: mean square of each block."""
        return exact.squares_in_order(self.blocks).div_(len(self.blocks))

    def damped(self, energy: Tensor) -> Tensor:
        """Importance times sqrt(energy + x^2); `energy` float32 [S]."""
        return exact.square_root((self.x * self.x).add_(energy)).mul_(given(self.importance))


def _energetic(cut: _Cut) -> Tensor:
    square = cut.x * cut.x
    mean = exact.sum_in_order(square.flatten(1)).div_(len(square))
    return cut.x.abs().add_(exact.square_root(mean).view(square.shape[1:]))


WEIGHTS: dict[str, Callable[[_Cut], Tensor]] = {
    "|x|": lambda cut: cut.x.abs(),
    "x^2": lambda cut: cut.x * cut.x,
    "rms + |x|": _energetic,
    "importance": lambda cut: given(cut.importance),
    "importance, block": lambda cut: cut.damped(cut.energy()),
    "importance, 2 block": lambda cut: cut.damped(cut.energy().mul_(2.0)),
    "importance, row": lambda cut: cut.damped(given(cut.row_energy)),
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
        for rows in self.batches(policy(self.x.device).coded):
            values = self.x[rows]
            blocks = _transposed(values.view(-1, kind.block))
            x = _groups(blocks, kind.width)
            energy = None
            if row_energy is not None:
                energy = row_energy[rows].repeat_interleave(values.shape[1] // kind.block)
            if self.importance is not None and (spread is None or spread.shape != x.shape):
                spread = _groups(self.importance.view(-1, kind.block).t().repeat(1, len(values)), kind.width)
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
    for some in rows.batches(policy(rows.x.device).energy):
        columns = _transposed(rows.x[some])
        total = exact.squares_in_order(columns)
        parts.append(total.div_(torch.full_like(total, len(columns))))
    return torch.cat(parts)


class BlockType:
    """A block type: constants that need no torch, and its arithmetic."""

    name: ClassVar[str]  # as llama.cpp prints it, in lower case
    ggml_id: ClassVar[int]  # GGMLQuantizationType; this and the next two are looked up by `name`
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

    def __init_subclass__(cls) -> None:
        """Look up number and size of a type that has a name."""
        if "name" in cls.__dict__:
            cls.ggml_id = TYPE_NAMES.index(cls.name)
            cls.block, cls.bytes = TYPE_SIZES[cls.ggml_id]

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor [..., columns] of this type."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])

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
        for batch in rows.batches(policy(rows.x.device).coded):
            yield batch, self.pack(codes(batch), params.rows(batch))

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


def per_row_half(values: Tensor, rows: Rows) -> Tensor:
    """Float16 [R, S] of float32 `values` of all blocks."""
    return values.to(torch.float16).view(len(rows.x), -1)


def per_row(integers: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """[R, G] of `integers` [J, S of all rows]."""
    return integers.t().to(dtype).contiguous().view(len(rows.x), -1)


def _groups_of(rows: slice, groups: int) -> slice:
    """The groups of a range of rows, `groups` per row."""
    return slice(rows.start * groups, rows.stop * groups)


def reciprocal(d: Tensor) -> Tensor:
    """1 / d; 0 where d is 0 or so small that 1 / d is infinite."""
    inverse = exact.divide(1.0, d)
    return inverse.masked_fill_(inverse.isinf(), 0.0)


class Legacy(BlockType):
    width = 32
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
        """What `choose` gives, found by a search with importance weights."""
        raise NotImplementedError


class Symmetric(Legacy):
    def plain(self, rows: Rows) -> tuple[BlockParams, Callable[[Tensor, slice], Tensor]]:
        d = search.signed_peak(rows.x.view(-1, self.width).t())[0].div_(-self.centre)
        inverse = reciprocal(d)
        lost = (inverse == 0) & (d != 0)

        def code(x: Tensor, blocks: slice) -> Tensor:
            codes = (x * inverse[blocks].unsqueeze(1)).add_(self.centre + 0.5).to(torch.int32)
            return codes.clamp_(max=self.levels - 1).to(torch.uint8).masked_fill_(lost[blocks].unsqueeze(1), 0)

        return BlockParams(self, per_row_half(d, rows)), code

    def searched(self, rows: Rows) -> tuple[BlockParams, Callable[[Tensor, slice], Tensor]]:
        result = search.symmetric(rows.pieces(self), self.centre)
        code = lambda x, blocks: result.codes(x, self.centre, self.levels - 1, blocks)
        return BlockParams(self, per_row_half(result.scale, rows)), code


class Affine(Legacy):
    def plain(self, rows: Rows) -> tuple[BlockParams, Callable[[Tensor, slice], Tensor]]:
        blocks = rows.x.view(-1, self.width)
        low = search.lowest(blocks.t())
        d = (blocks.amax(1) - low).add_(0.0).div_(torch.full_like(low, self.levels - 1))
        inverse = reciprocal(d)

        def code(x: Tensor, blocks: slice) -> Tensor:
            scaled = (x - low[blocks].unsqueeze(1)).mul_(inverse[blocks].unsqueeze(1))
            return scaled.add_(0.5).to(torch.int32).clamp_(max=self.levels - 1).to(torch.uint8)

        return BlockParams(self, per_row_half(d, rows), per_row_half(low, rows)), code

    def searched(self, rows: Rows) -> tuple[BlockParams, Callable[[Tensor, slice], Tensor]]:
        result = search.affine(rows.pieces(self), self.levels - 1, search.IMPORTANCE)
        code = lambda x, blocks: result.codes(x, 0, self.levels - 1, blocks)
        return BlockParams(self, per_row_half(result.scale, rows), per_row_half(given(result.low), rows)), code


class _KQuant(BlockType):
    def choose(self, rows: Rows) -> tuple[BlockParams, Callable[[slice], Tensor]]:
        params, result = self.fit(rows)
        step, low = params.step().view(-1, 1), params.low()
        groups = rows.x.shape[1] // self.width
        top = self.levels - 1

        def codes(some: slice) -> Tensor:
            at = _groups_of(some, groups)
            x = rows.x[some].view(-1, self.width)
            scaled = x / step[at] if low is None else (x - low.view(-1, 1)[at]).div_(step[at])
            codes = exact.nearest_code(scaled, self.centre, top)
            kept = exact.indices((step[at] == 0).squeeze(1))
            if kept.numel():
                codes[kept] = result.codes(x[kept], self.centre, top, kept + at.start)
            return codes.view(rows.x[some].shape)

        return params, codes

    def fit(self, rows: Rows) -> tuple[BlockParams, SearchResult]:
        """Params and the search behind them."""
        raise NotImplementedError


class KAffine(_KQuant):
    limit: ClassVar[int]  # largest scale
    weights = ("rms + |x|", "importance, 2 block")
    schedule: ClassVar[search.Schedule] = search.Schedule(-0.5, 0.1, 16)

    def fit(self, rows: Rows) -> tuple[BlockParams, SearchResult]:
        schedule = self.schedule if rows.importance is None else search.IMPORTANCE
        result = search.affine(rows.pieces(self), self.levels - 1, schedule)
        parts = []
        for values in (result.scale, -given(result.low)):
            if rows.importance is None:
                d, integers = _by_maximum(values, self.limit)
            else:
                d, integers = search.positive(values, given(result.weight), self.limit)
            parts.append((per_row_half(d, rows), per_row(integers, rows, torch.uint8)))
        (d, scales), (dmin, mins) = parts
        params = BlockParams(self, d, dmin, scales, mins)
        if bool((scales > self.limit).any() or (mins > self.limit).any()):  # ggml lets them spill over their bits
            empty = torch.zeros_like(rows.x, dtype=torch.uint8)
            params = self.unpack(self.pack(empty, params))[1]
        return params, result


def _by_maximum(values: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """(d float32 [S], integers [J, S]) with the largest of `values` [J, S] at `limit`; a negative one wraps to a byte."""
    top = values.amax(0).clamp_(min=0).add_(0.0)
    inverse = torch.where(top > 0, exact.divide(float(limit), top), 0.0)
    integers = exact.nearest_int(values * inverse).bitwise_and_(0xFF)
    if limit > 15:
        integers.clamp_(max=limit)
    return top.div_(torch.full_like(top, limit)), integers


class KSymmetric(_KQuant):
    def fit(self, rows: Rows) -> tuple[BlockParams, SearchResult]:
        result = self.search(rows)
        d, integers = self.rounded(result)
        return BlockParams(self, per_row_half(d, rows), scales=per_row(integers, rows, torch.int8)), result

    def search(self, rows: Rows) -> SearchResult:
        """The scale of each group."""
        return search.symmetric(rows.pieces(self), self.centre)

    def rounded(self, result: SearchResult) -> tuple[Tensor, Tensor]:
        """(d float32 [S], scales int32 [J, S])."""
        raise NotImplementedError


def by_peak(values: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """(d float32 [S], integers [J, S]): the largest magnitude of `values` [J, S] becomes -limit, the rest -limit .. limit - 1."""
    peak, magnitude = search.signed_peak(values)
    dead = magnitude == 0
    inverse = exact.divide(-float(limit), torch.where(dead, 1.0, peak))
    integers = exact.nearest_int(values * inverse).clamp_(-limit, limit - 1)
    return torch.where(dead, 0.0, exact.divide(1.0, inverse)), integers


class Codebook(BlockType):
    weights = ("x^2", "importance, 2 block")
    width = 32

    def values(self, codes: Tensor) -> Tensor:
        table = torch.tensor(search.VALUES, dtype=torch.float32, device=codes.device)
        return table[codes.to(torch.int32)]

    def choose(self, rows: Rows) -> tuple[BlockParams, Callable[[slice], Tensor]]:
        params, step = self.rounded(search.codebook(rows.pieces(self)).scale, rows)
        inverse = reciprocal(step).unsqueeze(1)
        groups = rows.x.shape[1] // self.width

        def codes(some: slice) -> Tensor:
            x = rows.x[some]
            return search.nearest_value(x.view(-1, self.width) * inverse[_groups_of(some, groups)]).view(x.shape)

        return params, codes

    def rounded(self, scale: Tensor, rows: Rows) -> tuple[BlockParams, Tensor]:
        """(params, float32 [groups]: the step before d was rounded) for `scale` float32 [J, S]."""
        raise NotImplementedError
