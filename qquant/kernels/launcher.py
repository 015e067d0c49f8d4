"""A kernel launched again: what Triton's launcher finds out at every call, found out once.

Triton looks at every argument of every call to find the binary that it compiled, which takes a host 30 to 70 us; what stands between
the products of a decoder block runs for 2. It compiles for the types of tensors, for addresses that are multiples of 16, for constants, and
for what a number is: 1, a multiple of 16, anything else. So a binary is kept by device, types, constants and the numbers themselves:

    launch = Launcher(kernel, constants)        constants(*numbers, *choices) gives constexprs and options, as of a launch of Triton's
    launch(grid, tensors, numbers, choices)     the kernel's arguments are the tensors, the numbers and the constexprs, in this order

Grid, addresses and stream are those of the call. Triton's own launcher is asked for what is not known yet, for odd addresses, for a
device that is not the current one, and in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qquant.kernels import jit

ALIGNED = 16  # bytes; Triton compiles for addresses that are multiples of it
WITH_CUDA = torch.backends.cuda.is_built()
current_stream: Callable[[int], int] = torch._C._cuda_getCurrentRawStream if WITH_CUDA else lambda _: 0
current_device: Callable[[], int] = torch._C._cuda_getDevice if WITH_CUDA else lambda: -1
capturing: Callable[[], bool] = torch._C._cuda_isCurrentStreamCapturing if WITH_CUDA else lambda: False


def compiled(launched: Any) -> Any:
    """The compiled kernel of what a launch returned, once it is compiled."""
    return launched.result() if hasattr(launched, "result") else launched


def in_order(kernel: Any, constants: Mapping[str, Any]) -> tuple[Any, ...]:
    """The constexprs among `constants`, in the order in which the kernel takes them."""
    return tuple(constants[name] for name in kernel.arg_names if name in constants)


class Launcher:
    """One kernel of Triton's; see the head of this file. A constexpr EARLY is chosen here, as the device can."""

    def __init__(self, kernel: Any, constants: Callable[..., dict[str, Any]]) -> None:
        self.kernel, self._constants = kernel, constants
        self._known: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(
        self,
        grid: tuple[int, int],
        tensors: tuple[Tensor, ...],
        numbers: tuple[float, ...],
        choices: tuple[int, ...] = (),
    ) -> None:
        """Launch on the current stream of the tensors' device."""
        device = tensors[0].get_device()
        key = device, jit.early, numbers, choices, *[tensor.dtype for tensor in tensors]
        addresses = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        known = self._known.get(key)
        if known is None or bits % ALIGNED or current_device() != device:
            kept = self._ordinary(device, grid, tensors, numbers, choices)
            if kept is not None and not bits % ALIGNED:
                self._known[key] = kept
            return
        run, middle, last = known
        run(*grid, 1, current_stream(device), *middle, *addresses, *last)

    def _ordinary(
        self,
        device: int,
        grid: tuple[int, int],
        tensors: tuple[Tensor, ...],
        numbers: tuple[float, ...],
        choices: tuple[int, ...],
    ) -> tuple[Any, ...] | None:
        """Triton's own launch; what later ones need, None in the interpreter."""
        constants = self._constants(*numbers, *choices)
        if "EARLY" in self.kernel.arg_names:
            early = jit.starts_early(tensors[0].device)
            constants |= {"EARLY": early} | ({"launch_pdl": True} if early else {})
        with torch.cuda.device(device):
            launched = self.kernel[grid](*tensors, *numbers, **constants)
        if launched is None:
            return None
        found = compiled(launched)
        middle = found.function, found.packed_metadata, None, None, None
        return found.run, middle, (*numbers, *in_order(self.kernel, constants))
