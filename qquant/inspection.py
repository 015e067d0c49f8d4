"""What a file or folder holds, from headers alone: for `qquant inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qquant.checkpoint import read_tensors
from qquant.formats import detect, gguf_types
from qquant.formats.gguf_container import nbytes, read_header
from qquant.untrusted import read_json

LONG = 8  # array values shown


def describe(path: Path) -> dict[str, Any]:
    """`facts` (name -> value) and `tensors` (name, shape, type, bytes) of a checkpoint, an artifact folder, or a GGUF file.

    Raises:
        InputError: not readable as any of them.
    """
    return _gguf(path) if detect(path) == "gguf" else _folder(path)


def _gguf(path: Path) -> dict[str, Any]:
    header = read_header(path)
    facts: dict[str, Any] = {"file": str(path), "bytes": path.stat().st_size}
    for field in header.fields.values():
        array = field.kind.startswith("[")
        facts[field.key] = f"{field.kind} of {len(field.value)}: {field.value[:LONG]}" if array else field.value
    kinds = {kind.ggml_id: kind for kind in gguf_types.TYPES.values()}
    ordered = sorted(header.tensors.values(), key=lambda tensor: tensor.offset)
    tensors = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "type": kinds[tensor.type_id].name if tensor.type_id in kinds else f"type {tensor.type_id}",
            "bytes": nbytes(tensor),
        }
        for tensor in ordered
    ]
    return {"facts": facts, "tensors": tensors}


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
