"""Thousands of small launches as one: a function of tensors, recorded as a CUDA graph when it is called again.

The first call runs plainly (which compiles what has to be compiled), the second records, later ones copy their arguments into the
tensors of the recording and replay it. A function that is recorded must not wait for the GPU, and must do the same whatever the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Replay(Generic[Result]):
    """`function`; its results are overwritten by the next call, and so are arguments that it changes in place not changed."""

    def __init__(self, function: Callable[..., Result]) -> None:
        self.function = function
        self.shapes: list[torch.Size] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.result: Result

    def __call__(self, *given: Tensor) -> Result:
        """Of tensors on one device. Elsewhere than on a GPU, and for other shapes than at first, just the function."""
        shapes = [tensor.shape for tensor in given]
        if not given[0].is_cuda or shapes != self.shapes:
            self.shapes = self.shapes or shapes
            return self.function(*given)
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in given]
            self._record()
        for mine, other in zip(self.inputs, given, strict=True):
            mine.copy_(other)
        assert self.graph is not None
        self.graph.replay()
        return self.result

    def _record(self) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                self.result = self.function(*self.inputs)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = graph
