"""A model folder, read back after it was written: its bytes with the `safetensors` package, its values by our dequantizing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
TOGETHER = 1 << 24  # bytes of small tensors that are read while a file is open


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
        """The bytes of each tensor of `written`, large ones first; small ones some at a time."""
        import safetensors  # the independent reader

        for path, listed in self._listed:
            together: dict[str, str] = {}
            size = 0
            for name, nbytes in listed:
                if name in written:
                    together[name], size = written[name], size + nbytes
                    if size >= TOGETHER:
                        yield partial(_compare_bytes, safetensors, path, together)
                        together, size = {}, 0
            if together:
                yield partial(_compare_bytes, safetensors, path, together)

    @cached_property
    def _listed(self) -> list[tuple[Path, list[tuple[str, int]]]]:
        """The tensors of each file, and about their bytes, largest first."""
        import safetensors

        return [(path, _largest_first(safetensors, path)) for path in self.files]

    def values(self, values: Mapping[str, str]) -> Iterator[Callable[[], None]]:
        """All values, on a GPU a few at a time."""
        parts, listed = COMPARED if devices.threads_help(self.device) else 1, list(values.items())
        yield from (partial(_compare_values, self.weights, listed[n::parts]) for n in range(parts))


def _largest_first(library: ModuleType, path: Path) -> list[tuple[str, int]]:
    with library.safe_open(path, framework="pt") as file:
        sizes = [(name, 4 * torch.Size(file.get_slice(name).get_shape()).numel()) for name in file.keys()]  # noqa: SIM118  it is no mapping
    return sorted(sizes, key=lambda pair: -pair[1])


def _compare_bytes(library: ModuleType, path: Path, written: Mapping[str, str]) -> None:
    # Opened for a few: the library maps the file, and what was read stays in memory until it is closed.
    with library.safe_open(path, framework="pt") as file:
        for name, sha256 in written.items():
            found = file.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy()
            if hashlib.sha256(found).hexdigest() != sha256:
                raise QQuantError(f"{path}: tensor {name} read back differs from what was written")


def _compare_values(weights: Callable[[], Weights], values: Sequence[tuple[str, str]]) -> None:
    source = weights()
    for name, value in values:
        if checksum(source.tensor(name)) != value:
            raise QQuantError(f"{source.path}: {name} dequantizes to other values than were solved for")
