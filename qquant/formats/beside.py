"""What a model folder holds, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qquant.source.checkpoint import read_tensors
from qquant.source.untrusted import read_json


def describe(path: Path) -> dict[str, Any]:
    """`facts` (name -> value) and `tensors` (name, shape, type, bytes) of a model folder, from headers alone."""
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
