"""Where a GGUF block keeps what: bit fields of its bytes, read and written. Each is one of the drawings in `types`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

else:
    torch = lazy("torch")


_GATHER = sum(1 << (56 - 7 * i) for i in range(8))


def per_column(value: Tensor, columns: int) -> Tensor:
    """Float32 [N, columns] of a value [N, S] per block or group."""
    return value.float().repeat_interleave(columns // value.shape[1], dim=1)


def scaled(half: Tensor, integers: Tensor) -> Tensor:
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
        """Bytes of the field in a block."""
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
