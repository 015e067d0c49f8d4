"""A checksum of values that any order of pieces, any device and any stride gives the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qquant.devices import policy
from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

else:
    torch = lazy("torch")


SPREAD = 0x1E3779B97F4A7C15  # of checksums
_WIDTH = 1024  # columns of the matrix that a piece is taken for; even


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes as the file stores them (little-endian, contiguous)."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def checksum(value: Tensor) -> str:
    """16 hex digits over the float32 bits of `value` and their order; -0 counts as 0. Fast, not cryptographic.

    The sum of bits times (SPREAD place | 1), mod 2^64. SPREAD is odd, so that this is SPREAD times the sum of bits times place, and
    the bits at even places once more: sums over the rows and columns of a matrix, none of whose elements is widened by itself.
    """
    return checksum_of([value])


def checksum_of(pieces: Iterable[Tensor]) -> str:
    """`checksum` of one value that comes in pieces, in their order."""
    total = Checksum()
    for piece in pieces:
        total.add(piece)
    return total.hexdigest()


@dataclass
class Checksum:
    """`checksum` of one value that comes in pieces, in their order."""

    total: int = 0
    values: int = 0  # so far

    def add(self, piece: Tensor) -> None:
        """Add the next piece of the value, in order."""
        for values in piece.contiguous().view(-1).split(policy(piece.device).checksummed):
            self.total += _weighted(values, self.values)
            self.values += len(values)

    def hexdigest(self) -> str:
        """The checksum of what was added so far, 16 hex digits."""
        return f"{self.total & (1 << 64) - 1:016x}"


def _weighted(values: Tensor, start: int) -> int:
    """What values [n] from place `start` on add to a checksum."""
    bits = (values.float() + 0.0).view(torch.int32)
    bits = bits.view(-1, _WIDTH if len(bits) % _WIDTH == 0 else max(1, len(bits)))
    rows, columns = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    first = start + bits.shape[1] * torch.arange(len(rows), device=bits.device)
    places = (rows * first).sum() + (columns * torch.arange(len(columns), device=bits.device)).sum()
    return int(SPREAD * places + columns[start % 2 :: 2].sum())
