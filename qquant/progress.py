"""How work says how far it is and what it is at, and learns that it should stop: three questions, so three methods.

`advance` and `at` only show. `check_stop` is asked between pieces of work that a later run can build on, and raises StoppedError where a signal
came; who does not ask cannot be stopped there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

Value = TypeVar("Value")


class Progress(Protocol):
    """What a build or a check reports to."""

    def advance(self, phase: str, done: int, of: int) -> None:
        """`done` of `of` equal steps of `phase` ("curvature", "quantize", "check", "answer", ...) are done.

        The first call says that it begins: with 0, or with the steps that were done before. A phase of one step may say its end alone.
        """
        ...

    def at(self, what: str) -> None:
        """Say that `what` is worked on now, such as an artifact and its linears, within the step at hand, which may take minutes."""
        ...

    def check_stop(self) -> None:
        """Raise StoppedError if somebody asked for an end."""
        ...


class Quiet:
    """Shows nothing, and never stops."""

    def advance(self, phase: str, done: int, of: int) -> None:
        """Show nothing."""

    def at(self, what: str) -> None:
        """Show nothing."""

    def check_stop(self) -> None:
        """Do nothing: nobody stops it."""


@dataclass(frozen=True)
class SharedProgress:
    """The progress of one of several equal parts, whose phases are phases of the whole."""

    shown: Progress
    part: int  # from 0
    parts: int

    def advance(self, phase: str, done: int, of: int) -> None:
        """The parts before this one count as done."""
        self.shown.advance(phase, self.part * of + done, self.parts * of)

    def at(self, what: str) -> None:
        """Show it as it is."""
        self.shown.at(what)

    def check_stop(self) -> None:
        """Raise StoppedError where the progress of the whole says so."""
        self.shown.check_stop()


class Timed:
    """Progress that keeps the seconds of each phase: those up to each of its steps."""

    def __init__(self, shown: Progress) -> None:
        self.shown, self.last = shown, time.monotonic()
        self.took: dict[str, float] = {}

    def advance(self, phase: str, done: int, of: int) -> None:
        """Count the time since the last step, and show this one."""
        now = time.monotonic()
        self.took[phase] = self.took.get(phase, 0.0) + now - self.last
        self.last = now
        self.shown.advance(phase, done, of)

    def at(self, what: str) -> None:
        """Show it as it is."""
        self.shown.at(what)

    def check_stop(self) -> None:
        """Raise StoppedError where the progress of the whole does."""
        self.shown.check_stop()


def waited_for(work: Callable[[], Value], shown: Progress, phase: str) -> Value:
    """The value of `work`, with a phase of one step that is seen meanwhile."""
    shown.advance(phase, 0, 1)
    value = work()
    shown.advance(phase, 1, 1)
    return value
