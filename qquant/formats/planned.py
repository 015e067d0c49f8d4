"""What will be on disk, to the byte, before any work: files, headers, tensors and their offsets.

Every format plans its artifact with these types; the writer fills the planned files in place, and `qquant plan` prints them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qquant.recipe import ArtifactSpec
from qquant.source.safetensors_file import SIZES, header_bytes

Losses = Mapping[str, float]  # of one tensor, by type: what it is expected to cost, in nats of KL divergence per token


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an output file."""

    name: str
    dtype: str  # of the file: "I32", "F16", "q4_k", ...
    shape: tuple[int, ...]  # as stored; for GGUF types the logical shape
    offset: int  # absolute, in its file
    nbytes: int


@dataclass(frozen=True)
class Stored:
    """How an artifact holds one tensor of the checkpoint."""

    type: str  # the format's own word: "packed", "q4_k"; of numbers their dtype, "BF16"
    label: str  # for people: "int4 g128", "q4_k", "bf16"
    numbers: bool  # as floating-point numbers, and not as codes that have to be found


@dataclass(frozen=True)
class PlannedFile:
    """One output file: a head (all of it, for small files), planned tensors, or a copy."""

    name: str
    size: int
    head: bytes = b""
    tensors: tuple[PlannedTensor, ...] = ()
    copy_of: Path | None = None


@dataclass(frozen=True)
class PlannedArtifact:
    """One artifact: a folder of files, or one GGUF file (with its shards)."""

    name: str  # as in the recipe
    spec: ArtifactSpec  # the recipe's entry
    folder: str  # below the output directory
    files: tuple[PlannedFile, ...]
    parameters: int
    stored: Mapping[str, Stored]  # by tensor of the checkpoint
    file_names: Mapping[str, str] = field(default_factory=dict)  # by tensor, in a format that has names of its own
    fallbacks: tuple[str, ...] = ()  # tensors that could not have the type the mix wanted

    @property
    def format(self) -> str:
        """Name of the format."""
        return self.spec.format

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per parameter of the model."""
        return 8 * sum(tensor.nbytes for file in self.files for tensor in file.tensors) / self.parameters


@dataclass(frozen=True)
class ModelFile:
    """One model of a repository that is a file of its own, or several that load as one."""

    first: str  # its name, or that of the first of its parts
    type: str
    parts: int
    merged: str  # what parts are joined to
    modelfile: str | None  # for Ollama, if there is one


def small_file(name: str, content: Mapping[str, Any]) -> PlannedFile:
    """A JSON file, two spaces of indent, as transformers writes them."""
    text = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return PlannedFile(name, len(text), text)


def copied_file(path: Path) -> PlannedFile:
    """A byte-for-byte copy of a source file."""
    return PlannedFile(path.name, path.stat().st_size, copy_of=path)


def safetensors_files(tensors: Sequence[tuple[str, str, tuple[int, ...]]], shard_size: int) -> list[PlannedFile]:
    """model.safetensors, or shards of at most `shard_size` bytes of data with their index, for (name, dtype, shape) in order."""
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for entry in tensors:
        nbytes = math.prod(entry[2]) * SIZES[entry[1]]
        if shards[-1] and filled + nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += nbytes
    count = len(shards)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    files = []
    for name, shard in zip(names, shards, strict=True):
        head, offsets = header_bytes(shard, {"format": "pt"})
        planned = tuple(
            PlannedTensor(tensor, dtype, shape, offsets[tensor], math.prod(shape) * SIZES[dtype])
            for tensor, dtype, shape in shard
        )
        files.append(PlannedFile(name, len(head) + sum(tensor.nbytes for tensor in planned), head, planned))
    if count > 1:
        total = sum(tensor.nbytes for file in files for tensor in file.tensors)
        where = {tensor.name: file.name for file in files for tensor in file.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        files.append(small_file("model.safetensors.index.json", index))
    return files
