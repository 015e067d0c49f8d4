"""What a decoder computes with: the weights of a model by the names of its family, wherever they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from qquant.families.config import ModelConfig
from qquant.families.family import Family

if TYPE_CHECKING:
    from torch import Tensor


class WeightSource(Protocol):
    """Anything that gives the weights of a model by their checkpoint names: a checkpoint or an artifact."""

    family: Family
    config: ModelConfig

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, as the model computes with it."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of a matrix."""
        ...
