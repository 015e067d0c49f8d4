"""What a GGUF file holds, from headers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qquant.formats.gguf.container import Header, read_header, type_name
from qquant.formats.gguf.shards import read_model, shard_paths

LONG = 8  # array values shown


def describe(path: Path) -> dict[str, Any]:
    """`facts` (name -> value) and `tensors` (name, shape, type, bytes) of the whole model, if all of its parts are there; else of this file."""
    files = shard_paths(path)
    complete = all(file.is_file() for file in files)
    header = read_model(path) if complete else read_header(path)
    if not complete:
        files = (path,)
    facts: dict[str, Any] = {"file": str(files[0])} | ({"parts": len(files)} if len(files) > 1 else {})
    facts["bytes"] = sum(file.stat().st_size for file in files)
    for field in header.fields.values():
        array = field.kind.startswith("[")
        facts[field.key] = f"{field.kind} of {len(field.value)}: {field.value[:LONG]}" if array else field.value
    tensors = [row for file in files for row in _rows(file, header)]
    weights = sum(math.prod(row["shape"]) for row in tensors)
    if weights:
        facts["bits per weight"] = round(8 * sum(row["bytes"] for row in tensors) / weights, 3)
    return {"facts": facts, "tensors": tensors}


def _rows(file: Path, header: Header) -> list[dict[str, Any]]:
    """The tensors of `file` in the order of their data."""
    ordered = sorted((t for t in header.tensors.values() if t.path == file), key=lambda tensor: tensor.offset)
    return [
        {"name": tensor.name, "shape": list(tensor.shape), "type": type_name(tensor.type_id), "bytes": tensor.nbytes}
        for tensor in ordered
    ]
