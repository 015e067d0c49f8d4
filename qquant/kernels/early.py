"""What only a process's first use of operators costs, paid by a thread while the process reads: a GPU would wait for it.

Operators of torch.library import torch's compiler when one is called first, a gradient that is handed to `backward` its symbolic shapes,
and Triton hashes its own libraries before it compiles a kernel, or finds it compiled. Kernels themselves are compiled where they are called,
since what they are specialised for is known there; Triton keeps them for the next process.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Event

import torch

from qquant import devices
from qquant.background import start_early
from qquant.kernels.jit import AVAILABLE, kernel

IMPORTED = ("torch.fx.experimental.symbolic_shapes", "torch._dynamo")  # by torch, at the first call


@kernel()
def _nothing() -> None:
    pass


@contextmanager
def first_uses(device: torch.device) -> Iterator[None]:
    """A thread, where it helps, that uses what operators on `device` will use; a `with` that ends earlier waits for what is begun.

    What fails in it fails again where it counts.
    """

    def work(stop: Event) -> None:
        for name in IMPORTED:
            if not stop.is_set():
                importlib.import_module(name)
        if AVAILABLE and device.type == "cuda" and not stop.is_set():
            with torch.cuda.device(device):
                _nothing.warmup(grid=(1,))

    with start_early(work, threaded=True) if devices.threads_help(device) else nullcontext():
        yield
