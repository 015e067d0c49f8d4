"""Rows of weights to GGUF blocks and back: the public verbs, threads, validation, and the grid that a solver rounds onto."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from qquant.devices import policy
from qquant.errors import InputError, NumericalError, UsageError
from qquant.formats.gguf.blocks import RETAINED, BlockParams, BlockType, Rows, given
from qquant.formats.gguf.types import block_type
from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

else:
    torch = lazy("torch")


Result = TypeVar("Result")


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

    def encode(batch: slice) -> None:
        target = out[batch]
        for rows, data in kind.encode(_rows(weight, importance, batch)):
            target[rows] = data

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
    for batch in Rows(out, None).batches(policy(blocks.device).coded):
        out[batch] = kind.decode(blocks[batch])
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

        return BlockParams(self.type, given(joined("d")), joined("dmin"), joined("scales"), joined("mins"))


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
    device, sizes = weight.device.type, policy(weight.device)
    threads = torch.get_num_threads() if device == "cpu" else 1
    torch.empty(RETAINED if device == "cpu" else 0, dtype=torch.uint8)
    share = max(sizes.coded, -(-weight.numel() // threads))
    batches = list(Rows(weight, None).batches(min(sizes.rounded, share)))
    if threads == 1 or len(batches) == 1:
        return [work(batch) for batch in batches]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, batches))
    finally:
        torch.set_num_threads(threads)


def _rows(weight: Tensor, importance: Tensor | None, batch: slice) -> Rows:
    """Some rows in float32, checked to be finite."""
    x = weight[batch].detach().to(torch.float32).contiguous()
    low, high = x.aminmax() if x.numel() else (x.sum(), x.sum())
    if not bool((high - low).isfinite()):
        bad = (~x.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise NumericalError(
                f"weight [{batch.start + row}, {column}] is {float(x[row, column])}: no block can hold it"
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
