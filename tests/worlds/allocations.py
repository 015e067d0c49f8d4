"""What tensors are alive while something is computed: their bytes at the peak, and how many matrices of one size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts storages that operators made and that are still alive, after every operator.

    Of what an operator takes inside only indices are seen, which a GPU writes out where there are several that are broadcast.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.at_peak: Counter[int] = Counter()  # storages by their bytes
        self.most: Counter[int] = Counter()  # of each size at most, at any time

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._see(leaf)
        self.alive = {key: known for key, known in self.alive.items() if not known[0].expired()}
        sizes = Counter(nbytes for _, nbytes in self.alive.values())
        self.most |= sizes
        if func is torch.ops.aten.index.Tensor:
            sizes += written_out(args[1])
            self.most |= sizes
        total = sum(nbytes * count for nbytes, count in sizes.items())
        if total > self.peak:
            self.peak, self.at_peak = total, sizes
        return result

    def _see(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self.alive or self.alive[key][0].expired():
            self.alive[key] = StorageWeakRef(storage), storage.nbytes()

    def squares(self, side: int) -> int:
        """Most float32 matrices [side, side] that were alive at a time."""
        return self.most[4 * side * side]


def written_out(indices: Sequence[Tensor | None]) -> Counter[int]:
    """Copies by their bytes that a GPU makes of the indices of a tensor before it reads an entry."""
    there = torch.broadcast_tensors(*(index for index in indices if index is not None))
    if len({index.stride() for index in there}) < 2:
        return Counter()
    return Counter(index.numel() * index.element_size() for index in there)
