"""Small codes in 32-bit words: slot j of a word holds bits b*j .. b*j + b - 1, lowest slot in the lowest bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int32 [R, C * bits / 32] from codes [R, C] in 0 .. 2^bits - 1, packed along the last dimension."""
    slots = 32 // bits
    rows, columns = codes.shape
    grouped = codes.view(rows, columns // slots, slots)
    words = torch.zeros(rows, columns // slots, dtype=torch.int32, device=codes.device)
    for slot in range(slots):
        words |= grouped[..., slot].to(torch.int32) << (bits * slot)
    return words


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] from int32 [R, C * bits / 32]; inverse of `pack_words`."""
    mask = (1 << bits) - 1
    octets = words.contiguous().view(torch.uint8)
    codes = torch.empty(*octets.shape, 8 // bits, dtype=torch.uint8, device=words.device)
    for slot in range(8 // bits):
        torch.bitwise_and(octets >> (bits * slot), mask, out=codes[..., slot])
    return codes.view(len(words), words.shape[1] * 32 // bits)
