"""What long work shows: one line a phase and minute in a pipe, one live line on a terminal, every step in a log."""

import io
import json
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from qquant.cli.display import Display, span
from qquant.cli.terminal import Stop
from qquant.errors import StoppedError


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("qquant.cli.display.time.monotonic", lambda: now[0])
    monkeypatch.setattr("qquant.cli.display.peak_memory", lambda: 1_500_000_000)
    return now


def work(display, clock, phase, steps, seconds):
    display.advance(phase, 0, steps)
    for step in range(steps):
        clock[0] += seconds
        display.advance(phase, step + 1, steps)


def test_a_pipe_gets_one_line_a_phase_and_minute(capsys, clock):
    with Display() as display:
        work(display, clock, "curvature", 800, 0.125)
        work(display, clock, "quantize", 24, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "curvature: 60%, 60 s, about 40 s left, 1.5 GB at most",
        "curvature: 100%, 2 min, 1.5 GB at most",
        "quantize: block 6 of 24, 60 s, 10.0 s a block, about 3 min left, 1.5 GB at most",
        "quantize: block 12 of 24, 2 min, 10.0 s a block, about 2 min left, 1.5 GB at most",
        "quantize: block 18 of 24, 3 min, 10.0 s a block, about 60 s left, 1.5 GB at most",
        "quantize: block 24 of 24, 4 min, 10.0 s a block, 1.5 GB at most",
    ]


def test_an_estimate_counts_from_the_start_of_its_phase(capsys, clock):
    """Reading took 1,000 s, and is not part of the phase that follows; a phase that runs again begins again."""
    with Display() as display:
        clock[0] += 1000
        display.advance("read", 0, 1)
        clock[0] += 1000
        display.advance("read", 1, 1)
        work(display, clock, "ask", 6, 5)
        for _ in range(16):
            work(display, clock, "ask", 6, 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "read: 100%, 17 min, 1.5 GB at most",
        "ask: model 6 of 6, 30 s, 5.0 s a model, 1.5 GB at most",
    ]
    assert len(lines) == 3, "sixteen checks of 6 s are one more line, not ninety-six"
    assert lines[2] == "ask: model 6 of 6, 6 s, 1.0 s a model, 1.5 GB at most"


def test_a_terminal_has_one_live_line_and_keeps_what_ended(clock, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr("qquant.cli.display._live_console", lambda: console)
    with Display() as display:
        display.advance("quantize", 0, 2)
        assert display.now().plain == "quantize: block 0 of 2, 0 s, 1.5 GB at most", "a phase that begins is seen"
        clock[0] += 3
        display.advance("quantize", 1, 2)
        assert display.now().plain == "quantize: block 1 of 2, 3 s, 3.0 s a block, about 3 s left, 1.5 GB at most"
        clock[0] += 3
        display.advance("quantize", 2, 2)
        assert display.live is None
    assert "quantize: block 2 of 2, 6 s, 3.0 s a block, 1.5 GB at most\n" in screen.getvalue()


def test_the_live_line_moves_within_a_step(clock, monkeypatch):
    """A block of 7B takes minutes on a CPU: it is seen what they go into, and that they go by."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr("qquant.cli.display._live_console", lambda: console)
    with Display() as display:
        display.advance("quantize", 0, 3)
        clock[0] += 100
        display.at("awq qkv")
        assert display.now().plain == "quantize: block 0 of 3, 2 min, 1.5 GB at most, at awq qkv"
        display.advance("quantize", 1, 3)
        display.at("awq o")
        for waited, left in ((30, "3 min"), (60, "2 min"), (200, "2 min")):
            clock[0] = 100 + waited
            assert f", 100.0 s a block, about {left} left, 1.5 GB at most, at awq o" in display.now().plain
            assert f", {span(100 + waited)}, " in display.now().plain


def test_a_pipe_hears_of_a_long_step_every_minute(capsys, clock):
    with Display() as display:
        display.advance("quantize", 0, 2)
        for second in range(150):
            clock[0] = second
            display.at(f"awq {second // 50}")
    assert capsys.readouterr().err.splitlines() == [
        "quantize: block 0 of 2, 60 s, 1.5 GB at most, at awq 1",
        "quantize: block 0 of 2, 2 min, 1.5 GB at most, at awq 2",
    ]


def test_a_pipe_hears_of_a_step_that_tells_nothing(capsys, monkeypatch):
    """A release check on a starved machine said nothing for 13 minutes: within windows of 32,768 tokens, and within answers."""
    monkeypatch.setattr("qquant.cli.display.MINUTE", 0.2)
    monkeypatch.setattr("qquant.cli.display.LOOK", 0.02)
    with Display() as display:
        display.advance("long documents", 0, 6)
        time.sleep(0.7)
        display.advance("long documents", 6, 6)
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("long documents: 0%, ") for line in lines[:2])
    assert sum(line.startswith("long documents: 100%") for line in lines) == 1
    assert lines[-1].startswith("at work for "), "nor is it silent between two phases"


def test_the_rate_of_a_build_that_goes_on_is_that_of_its_own_steps(capsys, clock):
    """20 of 24 blocks were solved by the run that was killed: they told 0.5 s a block, and 2 s left of 40."""
    with Display() as display:
        work(display, clock, "resume", 20, 0.1)
        display.advance("quantize", 20, 24)
        clock[0] += 61
        display.at("awq qkv")
        display.advance("quantize", 21, 24)
        clock[0] += 60
        display.at("awq qkv")
    assert capsys.readouterr().err.splitlines() == [
        "resume: block 20 of 20, 2 s, 0.1 s a block, 1.5 GB at most",
        "quantize: block 20 of 24, 61 s, 1.5 GB at most, at awq qkv",
        "quantize: block 21 of 24, 2 min, 61.0 s a block, about 2 min left, 1.5 GB at most, at awq qkv",
    ]


def test_every_step_is_logged(tmp_path, clock, capsys):
    log = tmp_path / "steps.jsonl"
    for _ in range(2):  # the second run adds
        with Display(log=log) as display:
            work(display, clock, "quantize", 3, 1)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 8
    assert rows[2] == {"phase": "quantize", "done": 2, "of": 3, "seconds": 2.0, "peak_bytes": 1_500_000_000}
    assert [row["done"] for row in rows] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_signal_ends_at_the_next_step(capfd):
    with Stop() as stop, Display(stop) as display:
        display.check_stop()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StoppedError, match="stopped by SIGTERM"):
            display.check_stop()
    assert "SIGTERM: stopping after this block; once more to stop at once" in capfd.readouterr().err


def test_memory_is_that_of_this_process():
    from qquant.cli.display import peak_memory

    before = peak_memory()
    held = b"x" * 300_000_000
    assert peak_memory() >= max(before, len(held))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3600, "60 min"), (7500, "2 h 05 min")]
)
def test_spans(seconds, text):
    assert span(seconds) == text


class Output:
    """The output of a cell, as IPython's display gives it."""

    def __init__(self):
        self.texts = []

    def __call__(self, data, raw, display_id):
        self.texts.append(data["text/plain"])
        return self

    def update(self, data, raw):
        self.texts.append(data["text/plain"])


def test_a_notebook_shows_one_output_that_is_written_anew(monkeypatch):
    """Without ipywidgets, rich warned in every cell and drew nothing."""
    output = Output()
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=output))
    with Display() as display:
        for done in range(4):
            display.advance("quantize", done, 3)
        display.advance("check", 1, 2)
    assert output.texts[0] == ""
    assert len(output.texts) < 6, "steps that come at once are not all written"
    first, *rest = output.texts[-1].splitlines()
    assert first.startswith("quantize: block 3 of 3")
    assert rest == [] or rest[0].startswith("check: 0%")


def test_a_terminal_of_ipython_is_no_notebook(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=object))
    assert Display().cell is None
