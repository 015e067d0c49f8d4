"""The GGUF v3 container: a bounded reader of headers, and the bytes of a header to write.

    "GGUF" | u32 version = 3 | u64 tensors | u64 fields
    field  = string key | u32 kind | value          string = u64 length | UTF-8;  array = u32 kind | u64 count | values
    tensor = string name | u32 dimensions | u64 each, fastest first | u32 type | u64 offset from the start of the data
    data starts at, and every tensor is padded to, a multiple of `general.alignment` (32)

The reader trusts nothing: it checks every count against what is left of the file before it allocates, bounds the header's size and
the number of array values, and refuses nested arrays, repeated names, unknown kinds and types, more than four dimensions, empty
tensors, and data that is not aligned, overlaps, or ends beyond the file. Reference: the GGUF specification of the ggml project.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from qquant.errors import InputError
from qquant.source.untrusted import require_regular

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
ELEMENT_LIMIT = 2_000_000  # values of all arrays together; a vocabulary of 152,064 tokens takes half a million
HEADER_LIMIT = 128_000_000  # bytes before the data
BUFFER = 1 << 20  # bytes of strings that are read at a time
TYPE_SIZES = {  # ggml's number of a type -> (values, bytes) of a block
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84), 11: (256, 110),
    12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50),
    20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
    29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
TYPE_NAMES = [
    "f32",
    "f16",
    "q4_0",
    "q4_1",
    "q4_2",
    "q4_3",
    "q5_0",
    "q5_1",
    "q8_0",
    "q8_1",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "q8_k",
    "iq2_xxs",
    "iq2_xs",
    "iq3_xxs",
    "iq1_s",
    "iq4_nl",
    "iq3_s",
    "iq2_s",
    "iq4_xs",
    "i8",
    "i16",
    "i32",
    "i64",
    "f64",
    "iq1_m",
    "bf16",
    "q4_0_4_4",
    "q4_0_4_8",
    "q4_0_8_8",
    "tq1_0",
    "tq2_0",
    "iq4_nl_4_4",
    "iq4_nl_4_8",
    "iq4_nl_8_8",
    "mxfp4",
    "nvfp4",
]  # by ggml's number


def type_name(type_id: int) -> str:
    """Ggml's name of a type, for people."""
    return TYPE_NAMES[type_id] if 0 <= type_id < len(TYPE_NAMES) else f"of number {type_id}"


@dataclass(frozen=True)
class Field:
    """One metadata entry; kind is "u32", "str", ..., or "[str]", "[i32]" for arrays."""

    key: str
    kind: str
    value: Any

    @cached_property
    def encoded(self) -> bytes:
        """Its bytes in a header; a vocabulary of 152,000 tokens takes half a second, and stands in every file of a checkpoint."""
        key = _string(self.key)
        if not self.kind.startswith("["):
            return key + struct.pack("<I", KINDS[self.kind]) + _value(self.kind, self.value)
        kind = self.kind[1:-1]
        values = b"".join(_value(kind, value) for value in self.value)
        return key + struct.pack("<IIQ", ARRAY, KINDS[kind], len(self.value)) + values


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the GGUF file `path`; `shape` in the order of rows and columns (slowest first), `offset` absolute."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    path: Path

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        values, size = TYPE_SIZES[self.type_id]
        return math.prod(self.shape) // values * size


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


def _value(kind: str, value: Any) -> bytes:
    return _string(value) if kind == "str" else struct.pack(SCALARS[KINDS[kind]][1], value)


def header_bytes(
    fields: Sequence[Field], tensors: Sequence[tuple[str, tuple[int, ...], int, int]]
) -> tuple[bytes, dict[str, int], int]:
    """Header for (name, shape, type id, bytes) in this order: its bytes, each tensor's absolute offset, and the file's size."""
    parts = [MAGIC + struct.pack("<IQQ", 3, len(tensors), len(fields)), *(field.encoded for field in fields)]
    relative, end = {}, 0
    for name, shape, type_id, nbytes in tensors:
        relative[name] = end
        parts.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type_id, end))
        end += padded(nbytes)
    text = b"".join(parts)
    text += b"\0" * (padded(len(text)) - len(text))
    return text, {name: len(text) + offset for name, offset in relative.items()}, len(text) + end


def padded(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size
        self.elements = 0  # of arrays, so far

    def fail(self, what: str) -> InputError:
        return InputError(f"{self.path}: byte {self.file.tell():,}: {what}: truncated or not a GGUF file")

    def left(self) -> int:
        return min(self.size, HEADER_LIMIT) - self.file.tell()

    def read(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise self.fail(f"needs {count:,} bytes, the file ends")
        return data

    def unpack(self, layout: str) -> Any:
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]

    def bytes(self) -> bytes:
        length = self.unpack("<Q")
        if length > self.left():
            raise self.fail(f"string of {length:,} bytes")
        return self.read(length)

    def strings(self, count: int) -> list[str]:
        """So many strings, from a buffer while they lie in it: a vocabulary has 300,000."""
        texts, buffer, at = [], b"", 0
        for _ in range(count):
            end = at + 8 + int.from_bytes(buffer[at : at + 8], "little")
            if at + 8 <= len(buffer) and end <= len(buffer):
                texts.append(buffer[at + 8 : end].decode("utf-8", "replace"))
                at = end
            else:  # it ends beyond, or nowhere
                self.file.seek(at - len(buffer), os.SEEK_CUR)
                texts.append(self.bytes().decode("utf-8", "replace"))
                buffer, at = self.file.read(max(0, min(BUFFER, self.left()))), 0
        self.file.seek(at - len(buffer), os.SEEK_CUR)
        return texts

    def name(self) -> str:
        try:
            return self.bytes().decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a name that is not UTF-8") from None

    def field(self) -> Field:
        key, kind = self.name(), self.unpack("<I")
        if kind != ARRAY:
            return Field(key, *self.scalar(kind))
        kind, count = self.unpack("<I"), self.unpack("<Q")
        smallest = 8 if kind == STRING else struct.calcsize(SCALARS[kind][1]) if kind in SCALARS else 0
        self.elements += count
        if not smallest or count * smallest > self.left() or self.elements > ELEMENT_LIMIT:
            raise self.fail(f"{key[:80]}: array of {count:,} values of kind {kind}")
        if kind == STRING:
            return Field(key, "[str]", self.strings(count))
        name, layout = SCALARS[kind]
        return Field(key, f"[{name}]", list(struct.unpack(f"<{count}{layout[1]}", self.read(count * smallest))))

    def scalar(self, kind: int) -> tuple[str, Any]:
        if kind == STRING:
            return "str", self.bytes().decode("utf-8", "replace")
        if kind not in SCALARS:
            raise self.fail(f"unknown kind of value {kind}")
        name, layout = SCALARS[kind]
        return name, self.unpack(layout)

    def tensor(self) -> StoredTensor:
        name, dimensions = self.name(), self.unpack("<I")
        if not 1 <= dimensions <= 4:
            raise self.fail(f"tensor {name[:80]!r} with {dimensions} dimensions")
        shape = tuple(reversed([self.unpack("<Q") for _ in range(dimensions)]))
        tensor = StoredTensor(name, shape, self.unpack("<I"), self.unpack("<Q"), self.path)
        if not 1 <= math.prod(shape) < 1 << 60:
            raise self.fail(f"tensor {name[:80]!r} of shape {shape}")
        if tensor.type_id not in TYPE_SIZES:
            known = ", ".join(map(type_name, TYPE_SIZES))
            raise InputError(
                f"{self.path}: tensor {name[:80]!r}: type {type_name(tensor.type_id)}: its blocks are not known; known: {known}"
            )
        if shape[-1] % TYPE_SIZES[tensor.type_id][0]:
            raise self.fail(f"tensor {name[:80]!r} of shape {shape} has type {type_name(tensor.type_id)}")
        return tensor


def read_header(path: Path) -> Header:
    """Fields and tensors of `path`, the tensors in the order of the file; every tensor lies inside it.

    Raises:
        InputError: malformed, truncated, or beyond the limits.
    """
    with require_regular(path).open("rb") as file:
        reader = _Reader(path, file)
        if reader.read(4) != MAGIC:
            raise InputError(f"{path}: does not start with 'GGUF'")
        version = reader.unpack("<I")
        if version not in (2, 3):
            raise InputError(f"{path}: GGUF version {version}; qquant reads 2 and 3 (little-endian)")
        tensors, fields = reader.unpack("<Q"), reader.unpack("<Q")
        if tensors > min(TENSOR_LIMIT, reader.size // 24) or fields > min(FIELD_LIMIT, reader.size // 13):
            raise reader.fail(f"{tensors:,} tensors and {fields:,} fields")
        entries = [reader.field() for _ in range(fields)]
        stored = [reader.tensor() for _ in range(tensors)]
        named, placed = {field.key: field for field in entries}, {tensor.name: tensor for tensor in stored}
        if len(named) != fields or len(placed) != tensors:
            raise reader.fail("a field or tensor name appears twice")
        alignment = _alignment(reader, named)
        data = -(-file.tell() // alignment) * alignment
    absolute = {
        name: StoredTensor(name, tensor.shape, tensor.type_id, data + tensor.offset, path)
        for name, tensor in placed.items()
    }
    _require_places(path, list(absolute.values()), data, alignment, reader.size)
    return Header(named, absolute, data)


def _alignment(reader: _Reader, fields: Mapping[str, Field]) -> int:
    alignment = fields.get("general.alignment", Field("", "u32", ALIGNMENT))
    if (
        alignment.kind != "u32"
        or alignment.value < 8
        or alignment.value & (alignment.value - 1)
        or alignment.value > 1 << 20
    ):
        raise reader.fail(f"general.alignment {alignment.value!r}")
    return int(alignment.value)


def _require_places(path: Path, tensors: Sequence[StoredTensor], data: int, alignment: int, size: int) -> None:
    """Raise InputError unless every tensor is aligned, inside the file, and alone in its place."""
    end = data
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if (tensor.offset - data) % alignment:
            raise InputError(f"{path}: tensor {tensor.name[:80]} is not aligned to {alignment} bytes")
        if tensor.offset < end:
            raise InputError(
                f"{path}: tensor {tensor.name[:80]} overlaps the one before it, which ends at byte {end:,}"
            )
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise InputError(
                f"{path}: truncated: tensor {tensor.name[:80]} ends at byte {end:,}, the file has {size:,}. Download it again"
            )
