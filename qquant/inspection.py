"""What a file or folder holds, from headers alone: for `qquant inspect`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qquant.formats import detect
from qquant.formats.gguf import types
from qquant.formats.gguf.container import Header, nbytes, read_header
from qquant.formats.gguf.shards import parts, read_model
from qquant.source.checkpoint import read_tensors
from qquant.source.untrusted import read_json

LONG = 8  # array values shown


def describe(path: Path) -> dict[str, Any]:
    """`facts` (name -> value) and `tensors` (name, shape, type, bytes) of a checkpoint, an artifact folder, or a GGUF file.

    Raises:
        InputError: not readable as any of them.
    """
    return _gguf(path) if detect(path) == "gguf" else _folder(path)


def _gguf(path: Path) -> dict[str, Any]:
    """The whole model, if all of its parts are there; else this file."""
    files = parts(path)
    whole = all(file.is_file() for file in files)
    header = read_model(path) if whole else read_header(path)
    if not whole:
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
    kinds = {kind.ggml_id: kind.name for kind in types.TYPES.values()}
    ordered = sorted((t for t in header.tensors.values() if t.path == file), key=lambda tensor: tensor.offset)
    return [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "type": kinds.get(tensor.type_id, f"type {tensor.type_id}"),
            "bytes": nbytes(tensor),
        }
        for tensor in ordered
    ]


def _folder(path: Path) -> dict[str, Any]:
    config = read_json(path / "config.json")
    tensors, _ = read_tensors(path)
    facts: dict[str, Any] = {"folder": str(path), "bytes": sum(info.nbytes for info in tensors.values())}
    facts |= {
        key: value
        for key, value in config.items()
        if not isinstance(value, dict | list) or key == "quantization_config"
    }
    rows = [{"name": i.name, "shape": list(i.shape), "type": i.dtype, "bytes": i.nbytes} for i in tensors.values()]
    return {"facts": facts, "tensors": rows}
