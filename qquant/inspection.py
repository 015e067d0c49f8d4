"""What a file or folder holds, from headers alone: for `qquant inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qquant.errors import InputError
from qquant.formats import beside, format_of


def describe(path: Path) -> dict[str, Any]:
    """`facts` (name -> value) and `tensors` (name, shape, type, bytes) of a checkpoint, an artifact folder, or a GGUF file.

    Raises:
        InputError: not readable as any of them.
    """
    try:
        artifact_format = format_of(path)
    except InputError:
        if not (path / "config.json").exists():
            raise
        artifact_format = None  # a folder that is quantized otherwise, such as FP8, compressed-tensors or bitsandbytes, has headers too
    return beside.describe(path) if artifact_format is None else artifact_format.describe(path)
