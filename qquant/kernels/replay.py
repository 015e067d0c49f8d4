"""Thousands of small launches as one: work recorded as a CUDA graph, and a function of tensors that is when it is called again.

`recorded` is the one place where a graph is captured: for `Replay`, for answers (`runtime.decoding`) and for what the speed check times.

The first call of a `Replay` with arguments of some shapes runs plainly (which compiles what has to be compiled), the second records, later ones copy
their arguments into the tensors of the recording and replay it. A function that is recorded must not wait for the GPU, must not change
its arguments, and must do the same whatever the values. A recording keeps the memory of all it computes, so only the last ones are kept.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

KEPT = 16  # recordings of a function
Result = TypeVar("Result")
Work = Callable[[], object]


def recorded(work: Work) -> Work:
    """`work`, which ran at least once before, as a CUDA graph: call the result to replay it.

    Raises:
        RuntimeError: it does what cannot be recorded.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # What other threads ask of the GPU meanwhile is theirs: the one that watches over NCCL queries events.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        finally:
            try:
                graph.capture_end()
            except RuntimeError:
                _draw_again()
                raise
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def _draw_again() -> None:
    """Give the generator of random numbers a state that no broken recording holds: torch leaves the one it had in the recording."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


class Replay(Generic[Result]):
    """`function` of tensors and of plain values; its results are overwritten by the next call."""

    def __init__(self, function: Callable[..., Result]) -> None:
        self.function = function
        self.recordings: OrderedDict[Hashable, _Recording[Result] | None] = OrderedDict()  # None: called once

    def __call__(self, *arguments: Tensor | int) -> Result:
        """The results for tensors on one device; elsewhere than on a GPU just those of the function."""
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        if not tensors[0].is_cuda:
            return self.function(*arguments)
        key = tuple((value.shape, value.dtype) if isinstance(value, Tensor) else value for value in arguments)
        if key not in self.recordings:
            self.recordings[key] = None
            if len(self.recordings) > KEPT:
                self.recordings.popitem(last=False)
            return self.function(*arguments)
        self.recordings.move_to_end(key)
        recording = self.recordings[key] or _Recording(self.function, arguments)
        self.recordings[key] = recording
        return recording(tensors)

    def forget(self) -> None:
        """Give the memory of all recordings back."""
        self.recordings.clear()


class _Recording(Generic[Result]):
    def __init__(self, function: Callable[..., Result], arguments: tuple[Tensor | int, ...]) -> None:
        mine = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
        self.inputs = [value for value in mine if isinstance(value, Tensor)]
        self.copied: list[tuple[weakref.ref[Tensor], int] | None] = [None] * len(self.inputs)
        self.results: list[Result] = []
        self.replay = recorded(lambda: self.results.append(function(*mine)))

    def __call__(self, tensors: list[Tensor]) -> Result:
        for index, (mine, other) in enumerate(zip(self.inputs, tensors, strict=True)):
            copied = self.copied[index]
            if copied is None or copied[0]() is not other or copied[1] != other._version:
                mine.copy_(other)
                self.copied[index] = weakref.ref(other), other._version
        self.replay()
        return self.results[0]
