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
    slots = 32 // bits
    mask = (1 << bits) - 1
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return (
        ((words.unsqueeze(-1) >> shifts) & mask)
        .to(torch.uint8)
        .view(len(words), -1 if len(words) else words.shape[1] * slots)
    )
