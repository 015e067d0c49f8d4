"""What a process uses for the first time is used by a thread before, and only there where threads gain anything."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from qquant import devices
from qquant.kernels import early

CPU = torch.device("cpu")


@pytest.fixture
def imported(monkeypatch):
    """Names that were imported, each with its thread."""
    found = []
    monkeypatch.setattr(devices, "threads_help", lambda device: True)
    monkeypatch.setattr(
        early.importlib, "import_module", lambda name: found.append((name, threading.current_thread().name))
    )
    return found


def test_a_thread_imports_what_torch_imports_at_the_first_call(imported):
    with early.first_uses(CPU):
        late = time.monotonic() + 60
        while len(imported) < len(early.IMPORTED) and time.monotonic() < late:
            time.sleep(0.01)
    assert [name for name, _ in imported] == list(early.IMPORTED)
    assert all(thread.startswith("qquant") for _, thread in imported)


def test_nothing_is_imported_where_threads_gain_nothing(imported, monkeypatch):
    monkeypatch.setattr(devices, "threads_help", lambda device: False)
    with early.first_uses(CPU):
        pass
    assert imported == []


def test_a_build_that_ends_does_not_wait_for_the_rest(imported, monkeypatch):
    begun, ended = threading.Event(), threading.Event()

    def slow(name):
        imported.append(name)
        begun.set()
        ended.wait(5)

    monkeypatch.setattr(early.importlib, "import_module", slow)
    with early.first_uses(CPU):
        begun.wait(5)
        threading.Timer(0.1, ended.set).start()
    assert imported == [early.IMPORTED[0]]


def test_what_fails_there_fails_where_it_counts(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(devices, "threads_help", lambda device: True)
    monkeypatch.setattr(early.importlib, "import_module", missing)
    with early.first_uses(CPU):
        pass


def test_these_are_what_torch_imports_late():
    """A product of ours and a gradient that is handed over, in a new interpreter: torch has the names of the list after it, not before."""
    code = (
        "import sys, torch; from qquant.kernels.gram import gram; before = set(sys.modules)\n"
        "gram(torch.zeros(4, 4), torch.ones(2, 4)); x = torch.ones(2, requires_grad=True); (2 * x).backward(torch.ones(2))\n"
        f"assert not before & set({early.IMPORTED!r}), before & set({early.IMPORTED!r})\n"
        f"assert set({early.IMPORTED!r}) <= set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-500:]
