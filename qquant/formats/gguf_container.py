"""The GGUF v3 container: a bounded reader of headers, and the bytes of a header to write.

    "GGUF" | u32 version = 3 | u64 tensors | u64 fields
    field  = string key | u32 kind | value          string = u64 length | UTF-8;  array = u32 kind | u64 count | values
    tensor = string name | u32 dimensions | u64 each, fastest first | u32 type | u64 offset from the start of the data
    data starts at, and every tensor is padded to, a multiple of `general.alignment` (32)

The reader checks counts against the file's size before it allocates, refuses nested arrays, repeated names, unknown kinds, more
than four dimensions, and offsets outside the file or overlapping. Reference: the GGUF specification of the ggml project.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qquant.errors import InputError

MAGIC = b"GGUF"
ALIGNMENT = 32
SCALARS = {
    0: ("u8", "<B"), 1: ("i8", "<b"), 2: ("u16", "<H"), 3: ("i16", "<h"), 4: ("u32", "<I"), 5: ("i32", "<i"), 6: ("f32", "<f"),
    7: ("bool", "<?"), 10: ("u64", "<Q"), 11: ("i64", "<q"), 12: ("f64", "<d"),
}  # fmt: skip
STRING, ARRAY = 8, 9
KINDS = {name: number for number, (name, _) in SCALARS.items()} | {"str": STRING}
TENSOR_LIMIT = 200_000
FIELD_LIMIT = 100_000
STRING_LIMIT = 1 << 24


@dataclass(frozen=True)
class Field:
    """One metadata entry; kind is "u32", "str", ..., or "[str]", "[i32]" for arrays."""

    key: str
    kind: str
    value: Any


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a GGUF file; `shape` in the order of rows and columns (slowest first), `offset` absolute."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Everything before the data."""

    fields: dict[str, Field]
    tensors: dict[str, StoredTensor]
    data: int  # where the data starts

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a field, or `default`."""
        return self.fields[key].value if key in self.fields else default


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encode(field: Field) -> bytes:
    key = _string(field.key)
    if not field.kind.startswith("["):
        return key + struct.pack("<I", KINDS[field.kind]) + _value(field.kind, field.value)
    kind = field.kind[1:-1]
    values = b"".join(_value(kind, value) for value in field.value)
    return key + struct.pack("<IIQ", ARRAY, KINDS[kind], len(field.value)) + values


def _value(kind: str, value: Any) -> bytes:
    return _string(value) if kind == "str" else struct.pack(SCALARS[KINDS[kind]][1], value)


def header_bytes(
    fields: Sequence[Field], tensors: Sequence[tuple[str, tuple[int, ...], int, int]]
) -> tuple[bytes, dict[str, int], int]:
    """Header for (name, shape, type id, bytes) in this order: its bytes, each tensor's absolute offset, and the file's size."""
    text = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(_encode(field) for field in fields)
    relative, end = {}, 0
    for name, shape, type_id, nbytes in tensors:
        relative[name] = end
        text += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type_id, end)
        end += padded(nbytes)
    text += b"\0" * (padded(len(text)) - len(text))
    return text, {name: len(text) + offset for name, offset in relative.items()}, len(text) + end


def padded(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, path.stat().st_size

    def fail(self, what: str) -> InputError:
        return InputError(f"{self.path}: byte {self.file.tell():,}: {what}: truncated or not a GGUF file")

    def read(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise self.fail(f"needs {count:,} bytes, the file ends")
        return data

    def unpack(self, layout: str) -> Any:
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]

    def string(self) -> str:
        length = self.unpack("<Q")
        if length > min(STRING_LIMIT, self.size - self.file.tell()):
            raise self.fail(f"string of {length:,} bytes")
        return self.read(length).decode("utf-8", "replace")

    def field(self) -> Field:
        key, kind = self.string(), self.unpack("<I")
        if kind != ARRAY:
            return Field(key, *self.scalar(kind))
        kind, count = self.unpack("<I"), self.unpack("<Q")
        smallest = 8 if kind == STRING else struct.calcsize(SCALARS[kind][1]) if kind in SCALARS else 0
        if not smallest or count * smallest > self.size - self.file.tell():
            raise self.fail(f"{key}: array of {count:,} values of kind {kind}")
        if kind == STRING:
            return Field(key, "[str]", [self.string() for _ in range(count)])
        name, layout = SCALARS[kind]
        return Field(key, f"[{name}]", list(struct.unpack(f"<{count}{layout[1]}", self.read(count * smallest))))

    def scalar(self, kind: int) -> tuple[str, Any]:
        if kind == STRING:
            return "str", self.string()
        if kind not in SCALARS:
            raise self.fail(f"unknown kind of value {kind}")
        name, layout = SCALARS[kind]
        return name, self.unpack(layout)

    def tensor(self) -> StoredTensor:
        name, dimensions = self.string(), self.unpack("<I")
        if not 1 <= dimensions <= 4:
            raise self.fail(f"tensor {name!r} with {dimensions} dimensions")
        shape = tuple(reversed([self.unpack("<Q") for _ in range(dimensions)]))
        if math.prod(shape) >= 1 << 62:
            raise self.fail(f"tensor {name!r} of shape {shape}")
        return StoredTensor(name, shape, self.unpack("<I"), self.unpack("<Q"))


def read_header(path: Path) -> Header:
    """Fields and tensors of `path`.

    Raises:
        InputError: malformed, truncated, or beyond the limits. Offsets are checked by the caller, who knows the types' sizes.
    """
    with path.open("rb") as file:
        reader = _Reader(path, file)
        if reader.read(4) != MAGIC:
            raise InputError(f"{path}: does not start with 'GGUF'")
        version = reader.unpack("<I")
        if version not in (2, 3):
            raise InputError(f"{path}: GGUF version {version}; qquant reads 2 and 3 (little-endian)")
        tensors, fields = reader.unpack("<Q"), reader.unpack("<Q")
        if tensors > min(TENSOR_LIMIT, reader.size // 24) or fields > min(FIELD_LIMIT, reader.size // 13):
            raise reader.fail(f"{tensors:,} tensors and {fields:,} fields")
        found = [reader.field() for _ in range(fields)]
        stored = [reader.tensor() for _ in range(tensors)]
        named, placed = {field.key: field for field in found}, {tensor.name: tensor for tensor in stored}
        if len(named) != fields or len(placed) != tensors:
            raise reader.fail("a field or tensor name appears twice")
        alignment = named["general.alignment"].value if "general.alignment" in named else ALIGNMENT
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise reader.fail(f"general.alignment {alignment!r}")
        data = -(-file.tell() // alignment) * alignment
    absolute = {
        name: StoredTensor(name, tensor.shape, tensor.type_id, data + tensor.offset) for name, tensor in placed.items()
    }
    bad = next((tensor for tensor in absolute.values() if (tensor.offset - data) % alignment), None)
    if bad:
        raise InputError(f"{path}: tensor {bad.name} is not aligned to {alignment} bytes")
    return Header(named, absolute, data)
