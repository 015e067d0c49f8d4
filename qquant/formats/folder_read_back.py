"""A model folder, read back after it was written: its bytes with the `safetensors` package, its values by our dequantizing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from qquant import devices
from qquant.algorithms.checksum import checksum
from qquant.errors import QQuantError
from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

COMPARED = 4  # tensors that are dequantized on a GPU at a time


class Weights(Protocol):
    """What is asked of the folder's weights."""

    path: Path

    def tensor(self, name: str) -> Tensor:
        """Weight `name`, float32."""
        ...


@dataclass
class FolderReadBack:
    """The files of a folder; see `qquant.formats.ReadBack`."""

    files: Sequence[Path]
    weights: Callable[[], Weights]  # dequantized where the build computes
    device: torch.device

    def tensors(self, written: Mapping[str, str], values: Mapping[str, str]) -> Iterator[Callable[[], None]]:
        """The bytes of each tensor of `written`, large ones first."""
        import safetensors  # the independent reader

        for path in self.files:
            for name in _largest_first(safetensors, path):
                if name in written:
                    yield partial(_compare_bytes, safetensors, path, name, written[name])

    def values(self, values: Mapping[str, str]) -> Iterator[Callable[[], None]]:
        """All values, on a GPU a few at a time."""
        parts, listed = COMPARED if devices.threads_help(self.device) else 1, list(values.items())
        yield from (partial(_compare_values, self.weights, listed[n::parts]) for n in range(parts))


def _largest_first(library: ModuleType, path: Path) -> list[str]:
    with library.safe_open(path, framework="pt") as file:
        return sorted(file.keys(), key=lambda name: -torch.Size(file.get_slice(name).get_shape()).numel())


def _compare_bytes(library: ModuleType, path: Path, name: str, written: str) -> None:
    # Opened for each tensor: the library maps the file, and what was read stays in memory until it is closed.
    with library.safe_open(path, framework="pt") as file:
        if hashlib.sha256(file.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy()).hexdigest() != written:
            raise QQuantError(f"{path}: tensor {name} read back differs from what was written")


def _compare_values(weights: Callable[[], Weights], values: Sequence[tuple[str, str]]) -> None:
    source = weights()
    for name, value in values:
        if checksum(source.tensor(name)) != value:
            raise QQuantError(f"{source.path}: {name} dequantizes to other values than were solved for")
