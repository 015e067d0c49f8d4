"""Any artifact or checkpoint by its path."""

from __future__ import annotations

from pathlib import Path

import torch

from qquant.families.weights import WeightSource
from qquant.formats import FORMATS, detect
from qquant.source.checkpoint import Checkpoint


def open_weights(path: Path, device: torch.device | None = None) -> WeightSource:
    """The weights of any artifact or checkpoint that qquant reads; an artifact's are dequantized on `device`.

    Raises:
        InputError: unknown, or damaged.
    """
    name = detect(path)
    if name is None:
        return Checkpoint.open(path)
    source = FORMATS[name].read(path)
    return source if device is None else source.on(device)
