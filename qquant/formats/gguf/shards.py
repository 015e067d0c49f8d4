"""A GGUF model in several files, by the rules of llama.cpp's gguf-split.

    NAME-00001-of-00003.gguf    all metadata of the model, then split.no = 0, split.tensors.count, split.count = 3
    NAME-00002-of-00003.gguf    split.no = 1, split.tensors.count (of the whole model), split.count = 3; nothing else
    NAME-00003-of-00003.gguf    the same with split.no = 2

Tensors keep their order and are never cut: a file takes the next tensor while the padded sizes of its tensors stay within the
limit. The header does not count towards it. Readers find the other parts by the name of the first, so all of them load the model
when given that one; `cat`, which joins files cut at any byte, would not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qquant.errors import InputError, UsageError
from qquant.formats.gguf import ollama
from qquant.formats.gguf.container import Field, Header, StoredTensor, padded, read_header
from qquant.formats.planned import ModelFile

PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")
NAMED = re.compile(r"-(?P<type>[a-z0-9_]+?)(?:-(?P<part>\d{5})-of-(?P<parts>\d{5}))?\.gguf$")
SUFFIX = ".gguf"
NO, TENSORS, COUNT = "split.no", "split.tensors.count", "split.count"
Entry = tuple[str, tuple[int, ...], int, int]  # name, shape, type id, bytes


@dataclass(frozen=True)
class Shard:
    """One file: its name, fields and tensors."""

    name: str
    fields: Sequence[Field]
    entries: Sequence[Entry]


def shard_name(stem: str, number: int, count: int) -> str:
    """File name of part `number`, counted from 0."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def split(stem: str, fields: Sequence[Field], entries: Sequence[Entry], limit: int) -> list[Shard]:
    """The files of a model: `stem`.gguf, or parts of at most `limit` bytes of tensors.

    Raises:
        UsageError: a tensor alone is larger than `limit`.
    """
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        name, _, _, nbytes = entry
        if padded(nbytes) > limit:
            raise UsageError(
                f"gguf_split_size {limit:,}: tensor {name} of {stem} takes {padded(nbytes):,} bytes, and no tensor is cut. "
                "Raise the limit"
            )
        if filled + padded(nbytes) > limit:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += padded(nbytes)
    if len(groups) == 1:
        return [Shard(f"{stem}.gguf", fields, entries)]
    shards = []
    for number, group in enumerate(groups):
        own = [Field(NO, "u16", number), Field(TENSORS, "i32", len(entries)), Field(COUNT, "u16", len(groups))]
        shards.append(Shard(shard_name(stem, number, len(groups)), [*fields, *own] if number == 0 else own, group))
    return shards


def named(files: Sequence[str]) -> list[ModelFile]:
    """The models among the files of a repository, in that order, by the type in their names; of parts the first."""
    models = []
    for name in files:
        match = NAMED.search(name)
        if match and match["part"] in (None, "00001"):
            merged, modelfile = NAMED.sub(f"-{match['type']}{SUFFIX}", name), ollama.name(match["type"])
            for_ollama = modelfile if modelfile in files else None
            models.append(ModelFile(name, match["type"], int(match["parts"] or 1), merged, for_ollama))
    return models


def shard_paths(path: Path) -> tuple[Path, ...]:
    """Every file of the model that `path` is, or is a part of, by name; they need not exist."""
    match = PART.fullmatch(path.name)
    if not match:
        return (path,)
    count = int(match["count"])
    return tuple(path.with_name(shard_name(match["stem"], number, count)) for number in range(count))


def read_model(path: Path) -> Header:
    """Header of the whole model, given any of its files: the fields of the first, the tensors of all.

    Raises:
        InputError: malformed, or a part is missing or belongs to another model.
    """
    header = read_header(path)
    number, count = header.value(NO, 0), header.value(COUNT, 1)
    if not isinstance(count, int) or not isinstance(number, int):
        raise InputError(f"{path}: {NO} {str(number)[:20]!r} of {COUNT} {str(count)[:20]!r}; expected whole numbers")
    if count <= 1:
        return header
    paths = shard_paths(path)
    if len(paths) != count:
        raise InputError(
            f"{path}: is part {number + 1} of {count}, and the others are found by name: "
            f"it must be called NAME-{number + 1:05d}-of-{count:05d}.gguf"
        )
    absent = [other.name for other in paths if not other.is_file()]
    if absent:
        raise InputError(f"{path}: is one of {count} parts; {', '.join(absent[:3])} is not beside it. Fetch all parts")
    headers = [read_header(other) for other in paths]
    tensors: dict[str, StoredTensor] = {}
    for part, (other, shard) in enumerate(zip(paths, headers, strict=True)):
        if (shard.value(NO), shard.value(COUNT)) != (part, count):
            raise InputError(f"{other}: says it is part {shard.value(NO)} of {shard.value(COUNT)}, counted from 0")
        repeated = tensors.keys() & shard.tensors.keys()
        if repeated:
            raise InputError(f"{other}: tensor {min(repeated)} is in another part, too")
        tensors |= shard.tensors
    expected = headers[0].value(TENSORS)
    if expected is not None and expected != len(tensors):
        raise InputError(f"{path}: its {count} parts hold {len(tensors)} tensors, {TENSORS} is {expected}")
    return Header(headers[0].fields, tensors, headers[0].data)
