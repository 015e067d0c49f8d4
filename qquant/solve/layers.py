"""The decoder blocks of a checkpoint, for passes that each need all of them.

CPU     read again in every pass: memory of one layer
GPU     read by several threads while the block before is computed with, into memory that every other block is read into as well (new
memory is zeroed page by page, while the copy to the card waits for the same lock), and kept on the card for the next pass where it
can spare their bytes; a build reads a checkpoint three times otherwise, and waits for most of it. They come there while processes hash
the checkpoint, which takes longer (`hashed_and_read`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, repeat
from threading import Event
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qquant.background import prefetch, start_early
from qquant.devices import free_memory, policy, readers, staging, threads_help
from qquant.families.decoder import read_slices, slices
from qquant.source.padding import without_padding
from qquant.source.safetensors_file import SIZES

if TYPE_CHECKING:
    from qquant.source.checkpoint import Checkpoint

KEEP = 0.3  # of the memory that is free on a card


@dataclass
class Layers:
    """Blocks of `source` on `device`, by their number."""

    source: Checkpoint
    device: torch.device
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    keeps: bool = False
    head: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, source: Checkpoint, device: torch.device) -> Layers:
        """The blocks of `source`, kept on the device if it has room for all of them, and if that pays there."""
        matrices = source.family.matrices(source.config).values()
        blocks = SIZES[source.dtype] * sum(rows * columns for rows, columns in matrices)
        keeps = threads_help(device) and blocks <= KEEP * free_memory(device)
        return cls(source, device, keeps=keeps)

    def fill(self, until: Callable[[], bool], head: bool) -> None:
        """Bring the blocks to a device that keeps them, in their order, and then the `head`, `until` nobody has time for it any more."""
        if not self.keeps or until():
            return
        with self.walk(range(self.source.config.layers)) as blocks:
            for _ in blocks:
                if until():
                    return
        spans = slices(self.source.config.vocab) if head else []
        with read_slices(self.source, self.source.family.head, spans, self.device) as read:
            rows = [part.to(self.device) for part in read if not until()]
        self.head = rows if len(rows) == len(spans) else []

    def take_head(self) -> list[Tensor]:
        """The output head in `slices`, where it came to the device; it is the caller's from now on."""
        head, self.head = self.head, []
        return head

    @contextmanager
    def walk(self, order: Iterable[int]) -> Iterator[Iterator[dict[str, Tensor]]]:
        """The tensors of the blocks in this order, by their names inside the block; the next block is read meanwhile."""
        numbers = list(order)
        beside = threads_help(self.device)
        read = partial(self._read, threads=readers(self.device), rooms=self._rooms(numbers))
        with prefetch(read, numbers, beside) as blocks:
            yield (self._placed(layer, block) for layer, block in zip(numbers, blocks, strict=True))

    def _rooms(self, numbers: Iterable[int]) -> Iterator[Tensor | None]:
        """Memory for the blocks in turn: one is copied to the card while the next is read."""
        sizes = [self.source.block_bytes(layer) for layer in numbers if layer not in self.kept]
        if not sizes or not (policy(self.device).apart and threads_help(self.device)):
            return repeat(None)
        return cycle([staging(max(sizes), self.device) for _ in range(2)])

    def _read(self, layer: int, threads: int, rooms: Iterator[Tensor | None]) -> dict[str, Tensor]:
        return {} if layer in self.kept else self.source.block(layer, threads, next(rooms))

    def _placed(self, layer: int, block: dict[str, Tensor]) -> dict[str, Tensor]:
        """A dictionary of the caller's own; copies to the card are made here, in the main thread."""
        apart = policy(self.device).apart
        weights = self.kept.get(layer) or {name: value.to(self.device, copy=apart) for name, value in block.items()}
        if self.keeps:
            self.kept[layer] = weights
        return dict(weights)


@contextmanager
def hashed_and_read(
    checkpoint: Checkpoint, device: torch.device, head: bool
) -> Iterator[tuple[Layers, Callable[[], None]]]:
    """The blocks of a checkpoint without its padding, and a function that waits until the checkpoint was hashed.

    Beside a GPU threads do that, while others bring to the card what it will keep: the blocks, and the `head` of who will ask for it.
    """
    blocks, beside = Layers.of(without_padding(checkpoint), device), threads_help(device)

    def fill(stop: Event) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # a thread begins on the first card
            blocks.fill(lambda: stop.is_set() or checkpoint.is_hashed(), head)

    with checkpoint.hashed_beside(beside) as hashed, start_early(fill, beside) as filled:

        def wait() -> None:
            hashed()
            filled()

        yield blocks, wait
