"""Safetensors files: a bounded reader of headers and a plan of bytes to write.

    file = u64 little-endian length of the header | JSON header, space padded | data
    header = {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}}   offsets count from the data

The reader trusts nothing: size, count, dtypes, shapes, offsets, overlaps, holes, duplicate names. Reference: the format
description of the safetensors project. Data is read with plain reads, never mapped, so that memory use is what was asked for.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qquant.errors import InputError
from qquant.resources import lazy
from qquant.source.untrusted import parse_json, require_regular

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

LFS = b"version "  # of https://git-lfs.github.com/spec/v1: what stands in a checkout without its large files
HEADER_LIMIT = 25_000_000  # bytes; the hub's own limit
TENSOR_LIMIT = 200_000
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's type, shape and place: `start` is the absolute offset in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name such as "BF16"."""
    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
        "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    }[name]  # fmt: skip


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors of `path` in file order, and its metadata.

    Raises:
        InputError: the file is truncated, malformed, or beyond the limits.
    """
    with require_regular(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        begin = file.read(8)
        if begin == LFS:
            raise InputError(f"{path}: is a pointer of Git LFS, not the file. Fetch it: git lfs pull")
        length = int.from_bytes(begin, "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise InputError(
                f"{path}: header of {length:,} bytes in a file of {size:,} (limit {HEADER_LIMIT:,}): truncated or not safetensors"
            )
        text = file.read(length)
    try:
        header = parse_json(text, 10 * TENSOR_LIMIT)
    except ValueError as error:
        raise InputError(f"{path}: header is not valid JSON: {error}") from None
    if not isinstance(header, dict) or len(header) > TENSOR_LIMIT or not text.startswith(b"{"):
        raise InputError(f"{path}: header must be a mapping of at most {TENSOR_LIMIT:,} tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ must map strings to strings")
    infos = sorted(
        (_info(path, name, entry, 8 + length) for name, entry in header.items()),
        key=lambda info: (info.start, info.nbytes),
    )
    end = 8 + length
    for info in infos:
        if info.start != end:
            raise InputError(
                f"{path}: tensor {info.name} starts at byte {info.start:,}, expected {end:,} (overlap or hole)"
            )
        end += info.nbytes
    if end != size:
        verb = "truncated" if end > size else "followed by unknown bytes"
        raise InputError(
            f"{path}: {verb}: its header describes {end:,} bytes, the file has {size:,}. Download it again"
        )
    return {info.name: info for info in infos}, metadata


def _info(path: Path, name: str, entry: object, data: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(
            f"{path}: tensor {name!r}: entry must have dtype, shape and data_offsets, got {str(entry)[:80]}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise InputError(f"{path}: tensor {name!r}: unknown dtype {str(dtype)[:80]!r}; known: {', '.join(SIZES)}")
    for numbers, what, count in ((shape, "shape", None), (offsets, "data_offsets", 2)):
        plain = isinstance(numbers, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
        if not plain or len(numbers) > 8 or (count and len(numbers) != count):
            raise InputError(f"{path}: tensor {name!r}: bad {what} {str(numbers)[:80]}")
    nbytes = math.prod(shape) * SIZES[dtype]
    if math.prod(max(1, length) for length in shape) >= 1 << 60:
        raise InputError(f"{path}: tensor {name!r}: shape {shape} overflows")
    if offsets[1] - offsets[0] != nbytes:
        raise InputError(
            f"{path}: tensor {name!r}: {dtype} {shape} takes {nbytes:,} bytes, data_offsets give {offsets[1] - offsets[0]:,}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data + offsets[0], nbytes)


def read_bytes(info: TensorInfo, start: int = 0, stop: int | None = None, into: Tensor | None = None) -> Tensor:
    """Bytes start:stop of the tensor's data, uint8 [stop - start], in memory of their own or `into` such memory.

    Raises:
        InputError: the file is shorter than its header said.
    """
    stop = info.nbytes if stop is None else stop
    buffer = (
        torch.empty(stop - start, dtype=torch.uint8) if into is None else into
    )  # which nothing fills with zeros first
    view = memoryview(buffer.numpy().data)
    descriptor = os.open(info.file, os.O_RDONLY)
    try:
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [view[done : done + (1 << 30)]], info.start + start + done)
            if count == 0:
                raise InputError(f"{info.file}: ended inside tensor {info.name}")
            done += count
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, info.start + start, done, os.POSIX_FADV_NOREUSE)
    finally:
        os.close(descriptor)
    return buffer


def read_tensor(info: TensorInfo, rows: slice | None = None, into: Tensor | None = None) -> Tensor:
    """The tensor, its bytes `into` uint8 [nbytes] if that is given, or rows start:stop of its first dimension."""
    shape = info.shape
    if rows is None:
        data = read_bytes(info, into=into)
    else:
        start, stop, _ = rows.indices(shape[0])
        row = info.nbytes // max(1, shape[0])
        data = read_bytes(info, start * row, stop * row)
        shape = (stop - start, *shape[1:])
    return data.view(torch_dtype(info.dtype)).view(shape)


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Header of a file holding (name, dtype, shape) in this order, and each tensor's absolute offset."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    relative: dict[str, int] = {}
    end = 0
    for name, dtype, shape in tensors:
        relative[name] = end
        begin, end = end, end + math.prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: base + offset for name, offset in relative.items()}
