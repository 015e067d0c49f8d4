"""How long work shows that it is alive: on stderr, quietly.

    a terminal               one live line for the phase at hand: done, rate, time left, peak memory, what is worked on; it moves also
                             within a step that takes minutes. A finished phase leaves one line
    a notebook               the same lines in one output of the cell, which is written anew
    a pipe                   one line when a phase ends, and one a minute while it runs, also within a step
    --log FILE               every step as a line of JSON: phase, done, of, seconds since the start, peak memory in bytes

The rate is that of the phase; where steps differ in kind (curvature, check), `done` of `of` is a share of the work and no rate is told. A phase
that runs again (one check after another) begins again; one that begins with steps done, as an interrupted build has them, tells the rate of
the others.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from qquant.cli.terminal import echo

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from qquant.cli.terminal import Stop

MINUTE = 60.0  # seconds between two lines of a phase in a pipe
LOOK = 2.0  # seconds between two looks at whether a line is due
UNITS = {
    "resume": "block",
    "quantize": "block",
    "behaviour": "question",
    "speed": "artifact",
    "ask": "model",
    "suite": "benchmark",
    "answer": "prompt",
    "load": "part",
    "dequantize": "tensor",
    "logits": "window",
}


@dataclass
class _Phase:
    """The phase at hand."""

    name: str
    began: float
    said: float  # when a line of it was last printed
    stepped: float  # when the last step ended
    first: int = 0  # steps that were done when it began
    done: int = 0
    of: int = 1
    at: str = ""  # what is worked on within the next step

    def line(self, now: float) -> str:
        """What a person reads of it."""
        took = now - self.began
        unit = UNITS.get(self.name)
        done = f"{unit} {self.done} of {self.of}" if unit else f"{self.done / self.of:.0%}"
        over = self.done == self.of
        some = self.done > self.first
        rate = f", {self._step:.1f} s a {unit}" if unit and some and self.of > 1 and self._step >= 0.05 else ""
        about = f", about {span(self._left(now))} left" if some and not over else ""
        at = f", at {self.at}" if self.at and not over else ""
        return f"{self.name}: {done}, {span(took)}{rate}{about}, {peak_memory() / 1e9:.1f} GB at most{at}"

    @property
    def _step(self) -> float:
        """Seconds of a step that was done in this phase."""
        return (self.stepped - self.began) / (self.done - self.first)

    def _left(self, now: float) -> float:
        """Seconds to the end, where the step at hand takes as long as those before; what it takes longer is no gain."""
        return self._step * (self.of - self.done) - min(now - self.stepped, self._step)


class Display:
    """A `qquant.progress.Progress` that people see. Use it in a `with`."""

    def __init__(self, stop: Stop | None = None, log: Path | None = None) -> None:
        self.stop = stop
        self.started = self.last = time.monotonic()
        self.phase: _Phase | None = None
        self.ended: dict[str, float] = {}  # when a line was last printed of a phase that ended
        self.said = self.started  # when a line was last printed
        self.log: IO[str] | None = None if log is None else log.open("a", encoding="utf-8")
        self.console = _live_console()
        self.cell = _Cell.here()
        self.live: Live | None = None
        self.over, self.turn = threading.Event(), threading.RLock()
        self.watch: threading.Thread | None = None

    def check_stop(self) -> None:
        """Raise StoppedError if a signal came."""
        if self.stop is not None:
            self.stop.check()

    def advance(self, phase: str, done: int, of: int) -> None:
        """`done` of `of` of `phase` are done; it begins with 0, or with what was done before."""
        with self.turn:
            self._advance(phase, done, of)

    def _advance(self, phase: str, done: int, of: int) -> None:
        now = time.monotonic()
        current = self.phase
        if current is None or current.name != phase or done < current.done or done == 0:
            self._close()
            began = self.last if done >= of else now
            current = self.phase = _Phase(phase, began, self.ended.get(phase, began), began, 0 if done >= of else done)
        current.done, current.of, current.at = done, max(of, 1), ""
        self.last = current.stepped = now
        self._write(current, now)
        self._show(current, now)
        if done >= of:
            self._close()

    def at(self, what: str) -> None:
        """Say that `what` is worked on within the step at hand."""
        with self.turn:
            if self.phase is not None:
                self.phase.at = what
                self._show(self.phase, time.monotonic())

    def look(self) -> None:
        """Say in a pipe that work goes on, where a line is due: a step may take longer than a minute, and tell nothing meanwhile."""
        with self.turn:
            now = time.monotonic()
            if self.phase is not None:
                self._show(self.phase, now)
            elif self.cell is None and now - max(self.said, self.last) >= MINUTE:
                echo(f"at work for {span(now - self.started)}, {peak_memory() / 1e9:.1f} GB at most", err=True)
                self.said = now

    def _watch(self) -> None:
        while not self.over.wait(LOOK):
            self.look()

    def _show(self, phase: _Phase, now: float) -> None:
        if self.cell is not None:
            self.cell.tell(phase, now)
        elif self.console is not None:
            self._draw(self.console, phase, now)
        elif phase.done >= phase.of or now - phase.said >= MINUTE:
            self._say(phase, now)

    def _say(self, phase: _Phase, now: float) -> None:
        """A line in a pipe; of a phase that runs again and again, one a minute."""
        again = phase.name in self.ended
        if not again or now - phase.said >= MINUTE:
            echo(phase.line(now), err=True)
            phase.said = self.ended[phase.name] = self.said = now
        if phase.done < phase.of:
            self.ended.pop(phase.name, None)

    def _draw(self, console: Console, phase: _Phase, now: float) -> None:
        from rich.live import Live

        if phase.done >= phase.of:
            self._undraw()
            console.print(phase.line(now), highlight=False, markup=False)
        elif self.live is None:
            self.live = Live(get_renderable=self.now, console=console, transient=True, refresh_per_second=2)
            self.live.start()

    def now(self) -> Text:
        """The live line of this moment; its end is left out where the terminal is too narrow."""
        from rich.text import Text

        line = self.phase.line(time.monotonic()) if self.phase else ""
        return Text(line, no_wrap=True, overflow="ellipsis")

    def _undraw(self) -> None:
        if self.live is not None:
            self.live.stop()
        self.live = None

    def _close(self) -> None:
        self._undraw()
        self.phase = None

    def _write(self, phase: _Phase, now: float) -> None:
        if self.log is not None:
            facts = {"phase": phase.name, "done": phase.done, "of": phase.of, "seconds": round(now - self.started, 3)}
            self.log.write(json.dumps(facts | {"peak_bytes": peak_memory()}) + "\n")
            self.log.flush()

    def __enter__(self) -> Self:
        if self.console is None:  # a live line is drawn anew by itself
            self.watch = threading.Thread(target=self._watch, name="qquant-display", daemon=True)
            self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.watch is not None:
            self.watch.join()
        self._close()
        if self.log is not None:
            self.log.close()


class _Cell:
    """The output of a notebook's cell: a line for every phase that ended, and one for the phase at hand.

    Its display is updated by the kernel's own protocol; rich needs ipywidgets for it, and warns where there is none.
    """

    def __init__(self, show: Any) -> None:
        self.ended: list[str] = []
        self.shown = 0.0  # when it was last written
        self.output = show({"text/plain": ""}, raw=True, display_id=True)

    @classmethod
    def here(cls) -> _Cell | None:
        """The display of the cell which runs; None outside of notebooks."""
        console = sys.modules.get("IPython")
        shell = console.get_ipython() if console is not None else None
        if shell is None or not hasattr(shell, "kernel"):
            return None
        return cls(importlib.import_module("IPython.display").display)

    def tell(self, phase: _Phase, now: float) -> None:
        """Write the line of a phase; at most twice a second while it runs."""
        line, over = phase.line(now), phase.done >= phase.of
        if over:
            self.ended.append(line)
        elif now - self.shown < 0.5:
            return
        self.shown = now
        text = "\n".join(self.ended if over else [*self.ended, line])
        self.output.update({"text/plain": text}, raw=True)


def span(seconds: float) -> str:
    """Seconds for people: 42 s, 7 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def peak_memory() -> int:
    """Bytes that this process held at most: on a GPU if it used one, else on the host."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _live_console() -> Console | None:
    """stderr, where something can be drawn over; None where lines stay, and in notebooks."""
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal and not console.is_jupyter else None
