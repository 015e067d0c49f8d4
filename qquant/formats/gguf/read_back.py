"""A GGUF file, read back after it was written, with the `gguf` package.

On a GPU build, whose artifacts have billions of values, the package decodes the first piece of each tensor alone, which must be what our decoder
makes of it; ours decodes all of them on the GPU.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant import devices
from qquant.algorithms.checksum import Checksum, checksum_of
from qquant.errors import QQuantError
from qquant.formats.gguf import quantize
from qquant.formats.gguf.source import GgufSource, of_architecture
from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

DECODED = 1 << 19  # values at a time: threads seldom wait for the interpreter, and it stays in the caches
READ_BACK = 1 << 24  # values that a thread decodes on a GPU at a time, at least
ROOM = 1 << 10  # bytes of free memory there for each of them: so many threads decode, each by several copies
READERS = 4  # threads of a file that do so
DECODES = "{}: tensor {} decodes to other values than were solved for"


@dataclass
class GgufReadBack:
    """A file, with its further parts; see `qquant.formats.ReadBack`."""

    files: Sequence[Path]
    device: torch.device

    @cached_property
    def _readers(self) -> list[tuple[Path, Any]]:
        import gguf  # the independent reader; costs a quarter of a second

        return [(path, _reader(gguf, path)) for path in self.files]

    def tensors(self, written: Mapping[str, str], values: Mapping[str, str]) -> Iterator[Callable[[], None]]:
        """The bytes of each tensor of `written`, and what the package makes of those whose values are known."""
        import gguf

        path, first = self._readers[0]
        family = of_architecture(first.fields["general.architecture"].contents(), path)
        names, ours = {family.gguf_name(name): name for name in values}, devices.threads_help(self.device)
        for path, reader in self._readers:
            for tensor in reader.tensors:
                if tensor.name in written:
                    solved = values.get(names.get(tensor.name, ""))
                    yield partial(_compare, gguf, path, reader, tensor, (written[tensor.name], solved), ours)

    def values(self, values: Mapping[str, str]) -> Iterator[Callable[[], None]]:
        """All values by our decoder, where that is the GPU's work; else `tensors` had them decoded."""
        if devices.threads_help(self.device):
            source, listed = GgufSource.open(self.files[0]).on(self.device), list(values.items())
            step = max(READ_BACK, devices.free_memory(self.device) // ROOM)
            yield from (partial(_compare_values, source, listed[n::READERS], step) for n in range(READERS))


def _reader(library: Any, path: Path) -> Any:
    """The file's tensors; lists in the metadata are passed over.

    The library keeps two arrays of every word of a vocabulary: seconds and hundreds of megabytes for each file. The bytes of the head
    are compared with the plan's as a whole.
    """
    kinds, text = library.GGUFValueType, library.GGUFValueType.STRING

    class Reader(library.GGUFReader):  # type: ignore[misc]  # the library is loaded when it is needed
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            view = memoryview(self.data)
            kind, count = struct.unpack_from("<IQ", view, orig_offs)
            end = orig_offs + 12
            if kind == text:
                for _ in range(count):
                    end += 8 + struct.unpack_from("<Q", view, end)[0]
            else:
                end += count * self.gguf_scalar_to_np[kinds(kind)]().itemsize
            return end - orig_offs, [], [], [kinds.ARRAY, kinds(kind)]

    return Reader(path)


def _compare(library: Any, path: Path, reader: Any, tensor: Any, expected: tuple[str, str | None], ours: bool) -> None:
    """The sha256 of a tensor's bytes and the checksum of its values, if there is one, with those that are expected; `ours`: of a first piece, with our decoder's."""
    written, values = expected
    if hashlib.sha256(tensor.data.data).hexdigest() != written:
        raise QQuantError(f"{path}: tensor {tensor.name} read back differs from what was written")
    if values is not None and ours:
        piece = next(_pieces(library, tensor))
        decoded = quantize.dequantize(torch.from_numpy(piece.copy()), tensor.tensor_type.name.lower())
        if checksum_of([decoded]) != checksum_of([_decoded(library, tensor, piece)]):
            raise QQuantError(f"{path}: tensor {tensor.name} decodes to other values than the gguf package gives")
    elif values is not None and values != checksum_of(
        _decoded(library, tensor, piece) for piece in _pieces(library, tensor)
    ):
        raise QQuantError(DECODES.format(path, tensor.name))
    # The file is mapped, and what was read would stay in memory. Pages are whole; another thread that needs one reads it again.
    start = tensor.data_offset // mmap.PAGESIZE * mmap.PAGESIZE
    reader.data.base.madvise(mmap.MADV_DONTNEED, start, tensor.data_offset + tensor.n_bytes - start)


def _pieces(library: Any, tensor: Any) -> Iterator[Any]:
    """The tensor's bytes uint8 [1, n] in turn, some whole blocks at a time."""
    block, size = library.GGML_QUANT_SIZES[tensor.tensor_type]
    data = tensor.data.reshape(-1).view("uint8")
    step = max(1, DECODED // block) * size
    yield from (data[None, start : start + step] for start in range(0, len(data), step))


def _decoded(library: Any, tensor: Any, piece: Any) -> Tensor:
    values = library.quants.dequantize(piece, tensor.tensor_type)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _compare_values(source: GgufSource, values: Sequence[tuple[str, str]], at_a_time: int) -> None:
    """The checksums of all values, decoded where the source decodes."""
    for name, value in values:
        rows, columns = source.family.shapes(source.config)[name]
        step, found = max(1, at_a_time // columns), Checksum()
        for start in range(0, rows, step):
            found.add(source.rows(name, start, min(start + step, rows)))
        if found.hexdigest() != value:
            raise QQuantError(DECODES.format(source.path, source.family.gguf_name(name)))
