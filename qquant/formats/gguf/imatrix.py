"""Importance matrices of llama.cpp: for every linear, the sum of squares of each input channel over the calibration tokens.

GGUF (llama-quantize since 2025): general.type = "imatrix"; imatrix.datasets [str], imatrix.chunk_count, imatrix.chunk_size u32; per
weight two F32 tensors, sorted by name: `<weight>.in_sum2` [K] = sum of x^2, `<weight>.counts` [1] = number of tokens.

Legacy .dat (ik_llama.cpp): i32 entries; per entry i32 length, name, i32 calls, i32 K, K x f32 = (sum x^2 / tokens) * calls, with
calls = ceil(tokens / chunk_size); then i32 last chunk, i32 length, dataset name.

The importance of a channel is sum / count. What is odd has a defined meaning:

    zeros       a channel that was never active counts nothing. Where a whole group of 16 is zero, llama-quantize's searches divide zero
                by zero and store the weights of the group, or of its block, as zeros (q4_0, q5_0, all K-quants, IQ4): there every channel
                counts a millionth of the mean, so that the weights are rounded among themselves. `remarks` tells how many
    constant    a channel that is the same for every token counts its square, like any other; a matrix of one value ranks nothing
    count 0     nothing is known, and every channel counts the same
    NaN, infinity, negative values: refused when read; activations that are not finite end a build before they are summed
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qquant.errors import InputError
from qquant.formats.gguf.container import Field, header_bytes, padded, read_header
from qquant.resources import lazy
from qquant.source.safetensors_file import TensorInfo, read_tensor
from qquant.source.untrusted import require_regular

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

F32 = 0  # GGML type
FILE = "imatrix.gguf"  # what a build calls the one it measured
CHUNK = 512  # tokens of a chunk, as llama-imatrix counts them
GROUP = 16  # channels that the smallest groups of block types hold
FLOOR = 1e-6  # of the mean, for groups that are all zero
NAME_LIMIT = 512
ENTRY_LIMIT = 1 << 17
VALUES_LIMIT = 1 << 28  # bytes; 110B has 40 MB


@dataclass(frozen=True)
class Imatrix:
    """Sums of squares float32 [K] and token counts by GGUF weight name."""

    sums: Mapping[str, Tensor]
    counts: Mapping[str, int]
    dataset: str
    file: str = FILE  # its name
    stated_chunks: int | None = None  # by the file it was read from

    @property
    def chunks(self) -> int:
        """Chunks of 512 tokens, rounded up."""
        return -(-max(self.counts.values(), default=0) // CHUNK) if self.stated_chunks is None else self.stated_chunks

    def importance(self, name: str) -> Tensor | None:
        """Mean square of each input channel of weight `name` (GGUF name), float32 [K]; None if it has no entry."""
        if name not in self.sums:
            return None
        return mended(self.sums[name]) / self.counts[name] if self.counts[name] else torch.ones_like(self.sums[name])

    def remarks(self) -> list[str]:
        """What a reader should know about odd values, one line each; empty: there are none."""
        zeros = {name: int((sums == 0).sum()) for name, sums in self.sums.items() if self.counts[name]}
        groups = {name: int(_silent(self.sums[name]).sum()) for name in zeros}
        unknown = [name for name, count in self.counts.items() if not count]
        flat = [
            name for name in zeros if len(self.sums[name]) > 1 and bool((self.sums[name] == self.sums[name][0]).all())
        ]
        remarks = []
        if any(zeros.values()):
            remarks.append(
                f"{self.file}: {sum(zeros.values())} channels of {sum(map(bool, zeros.values()))} weights are zero; "
                f"{sum(groups.values())} whole groups of {GROUP} are, and count {FLOOR:g} of the mean"
            )
        if unknown:
            remarks.append(
                f"{self.file}: {len(unknown)} weights were never used, first {unknown[0]}: all channels count the same"
            )
        if flat:
            remarks.append(f"{self.file}: {len(flat)} weights have one value for all channels, first {flat[0]}")
        return remarks

    def gguf_bytes(self) -> bytes:
        """The file in the GGUF format."""
        fields = [
            Field("general.type", "str", "imatrix"),
            Field("imatrix.datasets", "[str]", [self.dataset]),
            Field("imatrix.chunk_count", "u32", self.chunks),
            Field("imatrix.chunk_size", "u32", CHUNK),
        ]
        tensors: dict[str, Tensor] = {}
        for name in sorted(self.sums):
            tensors[f"{name}.in_sum2"] = self.sums[name]
            tensors[f"{name}.counts"] = torch.tensor([float(self.counts[name])])
        head, _, _ = header_bytes(
            fields, [(name, (len(value),), F32, 4 * len(value)) for name, value in tensors.items()]
        )
        data = b"".join(_raw(value).ljust(padded(4 * len(value)), b"\0") for value in tensors.values())
        return head + data

    def dat_bytes(self) -> bytes:
        """The file in the legacy format."""
        parts = [struct.pack("<i", len(self.sums))]
        for name in sorted(self.sums):
            calls = max(1, -(-self.counts[name] // CHUNK))
            mean = self.importance(name)
            assert mean is not None
            text = name.encode()
            parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", calls, len(mean)), _raw(mean * calls)]
        text = self.dataset.encode()
        return b"".join([*parts, struct.pack("<ii", self.chunks, len(text)), text])


def _silent(sums: Tensor) -> Tensor:
    """Bool [groups]: which groups of channels are all zero; the last one may be short."""
    padding = -len(sums) % GROUP
    return torch.nn.functional.pad(sums, (0, padding)).view(-1, GROUP).eq(0).all(1)


def mended(sums: Tensor) -> Tensor:
    """`sums` float32 [K] with a millionth of their mean in groups that are all zero; ones if everything is."""
    silent = _silent(sums).repeat_interleave(GROUP)[: len(sums)]
    return torch.where(silent, sums.mean() * FLOOR, sums) if bool((sums > 0).any()) else torch.ones_like(sums)


def _raw(value: Tensor) -> bytes:
    return value.float().contiguous().numpy().astype("<f4").tobytes()


def read(path: Path) -> Imatrix:
    """An importance matrix in either format.

    Raises:
        InputError: neither format, truncated, or values that are not finite or negative.
    """
    with require_regular(path.resolve()).open("rb") as file:
        imatrix = _read_gguf(path) if file.read(4) == b"GGUF" else _read_dat(path)
    for name, sums in imatrix.sums.items():
        if not bool(torch.isfinite(sums).all()) or bool((sums < 0).any()):
            raise InputError(
                f"{path}: {name} holds NaN, infinity or a negative value. Compute the importance matrix again"
            )
    return imatrix


def _read_gguf(path: Path) -> Imatrix:
    header = read_header(path)
    if header.value("general.type") != "imatrix":
        raise InputError(f"{path}: general.type is {header.value('general.type')!r}, not an importance matrix")
    values = {}
    for tensor in header.tensors.values():
        if tensor.type_id != F32 or tensor.nbytes > VALUES_LIMIT:
            raise InputError(f"{path}: tensor {tensor.name} is not F32, or too large for an importance matrix")
        count = tensor.nbytes // 4
        values[tensor.name] = read_tensor(TensorInfo(tensor.name, "F32", (count,), path, tensor.offset, 4 * count))
    names = [name.removesuffix(".in_sum2") for name in values if name.endswith(".in_sum2")]
    missing = [name for name in names if f"{name}.counts" not in values]
    if missing or not names:
        raise InputError(
            f"{path}: no importance entries" if not names else f"{path}: {missing[0]} has sums but no counts"
        )
    datasets, chunks = header.value("imatrix.datasets", []), header.value("imatrix.chunk_count")
    return Imatrix(
        {name: values[f"{name}.in_sum2"] for name in names},
        {name: _count(path, name, values[f"{name}.counts"]) for name in names},
        str(datasets[0]) if isinstance(datasets, list) and datasets else "",
        path.name,
        chunks if isinstance(chunks, int) and 0 <= chunks < 1 << 31 else None,
    )


def _count(path: Path, name: str, stored: Tensor) -> int:
    value = float(stored[0])
    if not 0 <= value < 1 << 53:  # NaN too
        raise InputError(f"{path}: {name} was counted {value} times. Compute the importance matrix again")
    return int(value)


def _read_dat(path: Path) -> Imatrix:
    if path.stat().st_size > VALUES_LIMIT:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes; an importance matrix has at most {VALUES_LIMIT:,}")
    data = path.read_bytes()
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if count < 0 or position + count > len(data):
            raise InputError(f"{path}: byte {position:,}: truncated, or not an importance matrix")
        position += count
        return data[position - count : position]

    def number(limit: int) -> int:
        value = struct.unpack("<i", take(4))[0]
        if not 0 <= value <= limit:
            raise InputError(f"{path}: byte {position - 4:,}: a count of {value}; not an importance matrix")
        return int(value)

    sums, calls = {}, {}
    for _ in range(number(ENTRY_LIMIT)):
        name = take(number(NAME_LIMIT)).decode("utf-8", "replace")
        if name in sums:
            raise InputError(f"{path}: {name!r} appears twice; not an importance matrix")
        calls[name], length = number(1 << 30), number(1 << 24)
        if not length:
            raise InputError(f"{path}: {name[:80]!r} has no values; not an importance matrix")
        sums[name] = torch.frombuffer(bytearray(take(4 * length)), dtype=torch.float32).clone()
    dataset, chunks = "", None
    if position < len(data):
        chunks = number(1 << 30)
        dataset = take(number(1 << 16)).decode("utf-8", "replace")
    # A .dat holds means times calls: with counts of `calls` chunks the importance comes out the same.
    return Imatrix(
        {name: value * CHUNK for name, value in sums.items()},
        {name: calls[name] * CHUNK for name in sums},
        dataset,
        path.name,
        chunks,
    )
