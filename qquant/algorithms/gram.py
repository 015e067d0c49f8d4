"""What one stage of one block saw during calibration: the Gram matrix of its input.

    H = sum_t s_t x_t x_t'   [K, K] float32        importance_k = sum_t x_tk^2 / tokens

From this single pass come GPTQ (H), AWQ (H and mean |x|; scaling a channel by s turns H into S^-1 H S^-1), and the importance
matrix of GGUF. s_t is 1, or what an error at token t costs the prediction (`qquant.solve.curvature`); the importance matrix is never
weighted. Samples are added one by one in a fixed order, so results do not depend on a batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qquant.devices import policy
from qquant.kernels.column_sums import column_sums
from qquant.kernels.gram import add_lower, gram
from qquant.kernels.product import mirror, tensor_cores

PIECE = 1 << 22  # values that are put in another order at a time


class NotFiniteError(ArithmeticError):
    """An activation is NaN or infinite."""


class NotPositiveDefiniteError(ArithmeticError):
    """The Gram matrix could not be factorised at any damping of the ladder."""


@contextmanager
def with_damping(gram: Tensor, damping: float) -> Iterator[Tensor]:
    """H + damping * mean(diag H) * I, float32 [K, K], in the place of H, which has its own diagonal again afterwards.

    A wide matrix takes gigabytes: 9.7 GB for the 49,152 inputs of 110B's down projection.
    """
    diagonal = gram.diagonal()
    own = diagonal.clone()
    mean = float(diagonal.mean()) or 1.0
    diagonal.add_(damping * mean + (diagonal == 0) * mean)
    try:
        yield gram
    finally:
        diagonal.copy_(own)


def reordered(matrix: Tensor, order: Tensor, transposed: bool = False) -> Tensor:
    """The entries [order_i, order_j] of matrix [K, K], for order int64 [K], or `transposed`: a new matrix, contiguous.

    Rows are read as they lie and turned where they are written: choosing rows of a transposed matrix of 5,504 took a CPU 18 seconds.

    Indexed by both at once, a GPU would first write out the indices of every entry: four times the bytes of the matrix.
    """
    placed = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    step = max(1, PIECE // max(1, len(order)))
    for rows, into in zip(order.split(step), placed.split(step, int(transposed)), strict=True):
        chosen = matrix.index_select(0, rows)
        if transposed:
            into.copy_(chosen.index_select(1, order).mT)
        else:
            torch.index_select(chosen, 1, order, out=into)
    return placed


@dataclass
class Gram:
    """Second moments of a stage's input; `add` accumulates."""

    matrix: Tensor  # float32 [K, K]; [0, 0] where only the sums by channel are wanted
    absolute: Tensor  # float32 [K]: sum of |x|
    squares: Tensor  # float32 [K]: sum of x^2
    tokens: int = 0
    largest: float = 0.0  # largest |x|
    cholesky: dict[float, object] = field(default_factory=dict)  # solver factorisations by damping, shared by artifacts
    lower: bool = False  # whether the upper half of the matrix waits for `settle`
    unseen: list[Tensor] | None = None  # largest |x| of inputs that `settle` will look at; None: `add` looks at once

    @classmethod
    def zeros(cls, columns: int, device: torch.device | str = "cpu", matrix: bool = True) -> Gram:
        """An empty accumulator for inputs of `columns` channels; without the `matrix` it has sums by channel only."""
        empty, side = torch.zeros(columns, device=device), columns if matrix else 0
        return cls(torch.zeros(side, side, device=device), empty, empty.clone())

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add the rows of x [T, K] (any float dtype), with `weights` float32 [T] in the matrix; all of it, or nothing where it fails.

        Raises:
            NotFiniteError: `x` holds NaN or infinity.
        """
        sums = column_sums(x)
        self._see(sums[2])
        if self.matrix.numel():
            self.add_products(x, weights)
        self._count(sums, len(x))

    def add_products(self, x: Tensor, weights: Tensor | None = None) -> None:
        """`add` in the matrix alone; on a card in its lower half, while `settle` is still to come, and of 16 bits.

        A rounding of 2^-9 by value, at random, is 2^-9 / sqrt(T) of what is off the diagonal, and 2^-20 on it.
        """
        rows = x.contiguous() if weights is None else x * weights.sqrt().to(x.dtype).unsqueeze(1)
        if self.unseen is not None and policy(rows.device).apart:
            add_lower(self.matrix, rows.bfloat16() if rows.dtype == torch.float32 else rows)
            self.lower = True
        else:
            gram(self.matrix, rows)

    def add_sums(self, sums: tuple[Tensor, Tensor, Tensor], tokens: int) -> None:
        """`add` in everything but the matrix: the `column_sums` of the rows, and how many they were."""
        self._see(sums[2])
        self._count(sums, tokens)

    def _see(self, top: Tensor) -> None:
        if self.unseen is None:
            self._look(top)
        else:
            self.unseen.append(top)

    def _count(self, sums: tuple[Tensor, Tensor, Tensor], tokens: int) -> None:
        self.absolute += sums[0]
        self.squares += sums[1]
        self.tokens += tokens

    def _look(self, top: Tensor) -> None:
        largest = float(top)  # waits for the device
        if not math.isfinite(largest):
            raise NotFiniteError("the input of a stage is not finite")
        self.largest = max(self.largest, largest)

    def settle(self) -> None:
        """Look at everything that was added since `unseen` became a list, at once; from now on `add` looks again.

        Raises:
            NotFiniteError: something of it held NaN or infinity; the sums are worthless, see `clear`.
        """
        unseen, self.unseen = self.unseen, None
        if self.lower:
            mirror(self.matrix)
            self.lower = False
        if unseen:
            self._look(torch.stack(unseen).max())

    def clear(self) -> None:
        """Forget everything that was added, and look at what is added at once."""
        for sums in (self.matrix, self.absolute, self.squares):
            sums.zero_()
        self.tokens, self.largest, self.lower, self.unseen = 0, 0.0, False, None

    def move(self, device: torch.device | str) -> None:
        """Keep the matrix on `device` from now on."""
        self.matrix, self.absolute = self.matrix.to(device), self.absolute.to(device)
        self.squares = self.squares.to(device)

    @property
    def importance(self) -> Tensor:
        """Mean square of each channel, float32 [K]: the importance matrix of llama.cpp."""
        return self.squares / max(1, self.tokens)

    @property
    def mean_absolute(self) -> Tensor:
        """Mean |x| of each channel, float32 [K]."""
        return self.absolute / max(1, self.tokens)

    @property
    def dead(self) -> int:
        """Number of channels that were always zero."""
        return int((self.squares == 0).sum())

    def scaled(self, scale: Tensor) -> Gram:
        """The statistics of x / scale, for scale float32 [K] > 0."""
        matrix = (self.matrix / scale[:, None]).div_(scale)
        return Gram(matrix, self.absolute / scale, self.squares / scale.square(), self.tokens, self.largest)

    def energy(self, weight: Tensor) -> Tensor:
        """Per row of weight float32 [N, K]: the weighted sum over tokens of (w . x)^2 = w H w', float32 [N]."""
        with tensor_cores():
            return ((weight @ self.matrix) * weight).sum(1)
