"""What a model consists of, and whether that is still so: its modules, where their tensors lie, and that nobody hooked one.

Every call of `generate` asks this before it launches anything, so it is one walk over a list: reading a model of 32 blocks by its names takes
a host longer than a prompt takes a GPU.
"""

from __future__ import annotations

from torch import nn


class Snapshot:
    """The modules below a model and their tensors; the model itself is not held, so that what holds a snapshot of itself is freed as ever."""

    def __init__(self, model: nn.Module) -> None:
        self._below = [module for module in model.modules() if module is not model]
        self._children = [tuple(module._modules.values()) for module in (*self._below, model)]
        self.pointers = self._pointers(model)

    def _pointers(self, model: nn.Module) -> list[int]:
        """Addresses of all parameters and buffers."""
        found = []
        for module in (*self._below, model):
            for tensors in (module._parameters, module._buffers):
                if tensors:
                    found += [0 if tensor is None else tensor.data_ptr() for tensor in tensors.values()]
        return found

    def holds(self, model: nn.Module) -> bool:
        """Whether the model is what it was, without a hook."""
        for module, children in zip((*self._below, model), self._children, strict=True):
            if module._forward_hooks or module._forward_pre_hooks or tuple(module._modules.values()) != children:
                return False
        return self._pointers(model) == self.pointers
