"""What a check works with: the device, and what a build has there already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qquant.checks.loading import Child


@dataclass(frozen=True)
class Means:
    """The device of a check, and what need not be fetched again."""

    device: torch.device
    blocks: Mapping[int, Mapping[str, Tensor]] = field(
        default_factory=dict
    )  # of the checkpoint, by layer and name within
    idle: list[Child] = field(default_factory=list)  # processes that wait for artifacts to load
