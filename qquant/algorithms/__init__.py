"""Algorithms by the names that recipes use.

A rounder chooses codes on a fitted grid. A transform changes a block without changing its function. To add one: a file, and a
line here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qquant.algorithms.gptq import gptq
from qquant.algorithms.gram import Gram
from qquant.algorithms.grid import Grid
from qquant.algorithms.rtn import rtn

Rounder = Callable[[Tensor, Gram, tuple[Tensor, Tensor], Grid, float], Tensor]

ROUNDERS: dict[str, Rounder] = {"rtn": rtn, "gptq": gptq}
