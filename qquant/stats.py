"""What one stage of one block saw during calibration: the Gram matrix of its input.

    H = sum_t x_t x_t'   [K, K] float32        importance_k = H_kk / tokens = mean of x_k^2

From this single pass come GPTQ (H), AWQ (H and mean |x|; scaling a channel by s turns H into S^-1 H S^-1), and the
importance matrix of GGUF (diag). Samples are added one by one in a fixed order, so results do not depend on a batch size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qquant.kernels.gram import gram


class NotFiniteError(ArithmeticError):
    """An activation is NaN or infinite."""


@dataclass
class Gram:
    """Second moments of a stage's input; `add` accumulates."""

    matrix: Tensor  # float32 [K, K]
    absolute: Tensor  # float32 [K]: sum of |x|
    tokens: int = 0
    largest: float = 0.0  # largest |x|
    factors: dict[float, object] = field(default_factory=dict)  # solver factorisations by damping, shared by artifacts

    @classmethod
    def zeros(cls, columns: int, device: torch.device | str = "cpu") -> Gram:
        """An empty accumulator for inputs of `columns` channels."""
        return cls(torch.zeros(columns, columns, device=device), torch.zeros(columns, device=device))

    def add(self, x: Tensor) -> None:
        """Add the rows of x [T, K] (any float dtype); all of it, or nothing where it fails.

        Raises:
            NotFiniteError: `x` holds NaN or infinity.
        """
        magnitude = x.float().abs()
        largest, absolute = float(magnitude.max()), magnitude.sum(0)
        if not math.isfinite(largest):
            raise NotFiniteError(f"the input of a stage is not finite in {x.dtype}")
        gram(self.matrix, x.contiguous())
        self.absolute += absolute
        self.largest = max(self.largest, largest)
        self.tokens += len(x)

    def move(self, device: torch.device | str) -> None:
        """Keep the matrix on `device` from now on."""
        self.matrix, self.absolute = self.matrix.to(device), self.absolute.to(device)

    @property
    def importance(self) -> Tensor:
        """Mean square of each channel, float32 [K]: the importance matrix of llama.cpp."""
        return self.matrix.diagonal() / max(1, self.tokens)

    @property
    def mean_absolute(self) -> Tensor:
        """Mean |x| of each channel, float32 [K]."""
        return self.absolute / max(1, self.tokens)

    @property
    def dead(self) -> int:
        """Number of channels that were always zero."""
        return int((self.matrix.diagonal() == 0).sum())

    def scaled(self, scale: Tensor) -> Gram:
        """The statistics of x / scale, for scale float32 [K] > 0."""
        return Gram(self.matrix / scale[:, None] / scale, self.absolute / scale, self.tokens, self.largest)

    def energy(self, weight: Tensor) -> Tensor:
        """Per row of weight float32 [N, K]: the sum over tokens of (w . x)^2 = w H w', float32 [N]."""
        return ((weight @ self.matrix) * weight).sum(1)
