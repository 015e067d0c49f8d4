"""What strangers wrote and a library runs (chat templates, tokenizers and their regular expressions, pickles), in a process of its own.

    Confined("template", text).ask("render", ...)     one child for each job answers all requests; each text is sent to it once

A child has no network and no files (`confined_child` says how), and for each request

    processor time   SECONDS, and more for long texts        memory   2 GiB, and more for long texts
    idle time        IDLE seconds: neither at work, nor      answer   ANSWER bytes, and ANSWER_PER_BYTE for each of the request
                     waiting for a processor or a disk
    wall time        WALL times the processor time and PATIENCE more, which a busy machine may take from it

A child that goes beyond one of them, crashes or hangs is gone, `Refused` says in one line why, and the next request has a new child; but
what took a template too much time or memory once is not asked again, and nothing more of one that took it for a chat of SMALL bytes. A child ends with the process that started it. Nothing here is started before
something is asked.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qquant.errors import EnvironmentMissingError

SECONDS = 4  # of processor time
COMPILING = 1  # of it, for a template before it is rendered: what is constant in it is computed then
BYTES_A_SECOND = 500_000  # of a text to tokenize, or of a tokenizer
WALL, PATIENCE = 4, 30
IDLE, LOOK = 5.0, 0.25
BUSY = "RDIW"  # states of Linux in which a process works, or waits for something that is not its own doing
ANSWER, ANSWER_PER_BYTE = 32 << 20, 64
SMALL = 1 << 14  # of a request: what it asks for is not what takes long
TEXTS = {"template": 64, "tokenizer": 4}  # that one child holds; tokenizers are large
CHILD = Path(__file__).with_name("confined_child.py")


class Refused(Exception):
    """What the child says in one line; `line` is the place in a template that does not parse, `at` which of many failed.

    `beyond`: it took more time or memory than it may, and would again.
    """

    def __init__(self, text: str, line: int | None = None, at: int = 0, beyond: bool = False) -> None:
        super().__init__(text)
        self.line, self.at, self.beyond = line, at, beyond


def command(*arguments: str) -> list[str]:
    """The command line of a child."""
    return [sys.executable, "-I", str(CHILD), *arguments]


def environment() -> dict[str, str]:
    """The variables of a child."""
    threads = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {"PATH": os.defpath, "HF_HUB_OFFLINE": "1", "RUST_BACKTRACE": "0", **threads}


class _Child:
    """One process."""

    def __init__(self, job: str) -> None:
        self.job, self.owner = job, os.getpid()
        self.made: set[str] = set()
        self.process = subprocess.Popen(
            command(job),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            cwd="/",
            bufsize=0,
            start_new_session=True,  # a Ctrl-C is for us
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdin.fileno(), False)  # one that reads nothing is not written to for ever
        self.taking, self.giving = select.poll(), select.poll()
        self.taking.register(self.process.stdin, select.POLLOUT)
        self.giving.register(self.process.stdout, select.POLLIN)

    def ask(self, request: Mapping[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
        """The answer. Raises Refused; the process may have ended then."""
        text = json.dumps(request).encode()
        compiling = self.job == "template" and request["do"] == "make"
        seconds = (COMPILING if compiling else SECONDS) + (len(text) + len(content)) // BYTES_A_SECOND
        text = text[:-1] + f', "seconds": {seconds}}}'.encode()
        deadline = time.monotonic() + WALL * seconds + PATIENCE
        try:
            self._write(struct.pack("<II", len(text), len(content)) + text + content, deadline)
            head, tail = struct.unpack("<II", self._read(8, deadline))
            if head + tail > ANSWER + ANSWER_PER_BYTE * (len(text) + len(content)):
                raise Refused(f"it answers with {head + tail:,} bytes")
            answer, data = json.loads(self._read(head, deadline)), self._read(tail, deadline)
        except (BrokenPipeError, EOFError):
            self.end()
            raise self._cause(seconds) from None
        except BaseException:  # what was asked may still be answered, and would be taken for the next answer
            self.end()
            raise
        if answer.get("end"):
            self.end()
        if "error" in answer:
            raise Refused(answer["error"], answer.get("line"), answer.get("at", 0), bool(answer.get("end")))
        return answer, data

    def _write(self, data: bytes, deadline: float) -> None:
        assert self.process.stdin is not None
        rest = memoryview(data)
        while rest:
            self._await(self.taking, deadline)
            rest = rest[os.write(self.process.stdin.fileno(), rest) :]

    def _read(self, count: int, deadline: float) -> bytes:
        assert self.process.stdout is not None
        pieces, left, descriptor = [], count, self.process.stdout.fileno()
        while left:
            self._await(self.giving, deadline)
            piece = os.read(descriptor, min(left, 1 << 20))
            if not piece:
                raise EOFError
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _await(self, pipe: select.poll, deadline: float) -> None:
        """Return when the pipe is ready. Raises Refused where the child is idle meanwhile, or at `deadline`."""
        work, since = self._work(), time.monotonic()
        while not pipe.poll(1000 * LOOK):
            now, before = time.monotonic(), work
            work = self._work()
            if work != before or work is None:
                since = now
            if now - since > IDLE or now > deadline:
                raise Refused("it does not answer")

    def _work(self) -> str | None:
        """The processor time of the child so far, as text; None where it is at work, and where the system does not say."""
        try:
            state, *numbers = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            return None
        return None if state in BUSY else " ".join(numbers[10:12])

    def _cause(self, seconds: int) -> Refused:
        status = -self.process.returncode
        if status == signal.SIGPROF:
            return Refused(f"it takes more than {seconds} s of processor time", beyond=True)
        if status in (signal.SIGABRT, signal.SIGSEGV):
            return Refused(
                f"it crashes, or takes more than 2 GiB of memory ({signal.Signals(status).name})", beyond=True
            )
        return Refused(f"its process ended with status {self.process.returncode}")

    @property
    def alive(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def end(self) -> None:
        """Stop it, and wait for that."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)  # one that died says why
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


_children: dict[str, _Child] = {}
_beyond: dict[str, Refused] = {}  # by request, or by template
_lock = threading.Lock()


class Confined:
    """A template or a tokenizer of a stranger, as text, that only the child of `job` compiles and runs."""

    def __init__(self, job: str, text: str) -> None:
        """Note what to run; nothing is started yet."""
        self.job, self.source = job, text.encode("utf-8", "surrogatepass")
        self.key = hashlib.sha256(self.source).hexdigest()

    def ask(self, work: str, content: bytes = b"", **arguments: Any) -> tuple[dict[str, Any], bytes]:
        """Have the child do `work` (`confined_child` lists what) with it: (what it says, bytes).

        Raises:
            Refused: the text is malformed or fails at it, or the child went beyond its limits.
            EnvironmentMissingError: no process can be started.
        """
        with _lock:
            for known in (self.key, self._request(work, content, arguments)) if _beyond else ():
                if before := _beyond.get(known):
                    raise Refused(str(before), before.line, before.at)
            child = _children.get(self.job)
            if child is None or not child.alive or (self.key not in child.made and len(child.made) >= TEXTS[self.job]):
                if child is not None and child.owner == os.getpid():
                    child.end()
                child = _children[self.job] = _start(self.job)
            try:
                if self.key not in child.made:
                    child.ask({"do": "make", "with": self.key}, self.source)
                    child.made.add(self.key)
                return child.ask({"do": work, "with": self.key, **arguments}, content)
            except Refused as error:
                if error.beyond and self.job == "template":
                    small = len(json.dumps(arguments)) + len(content) < SMALL
                    _beyond[self.key if small else self._request(work, content, arguments)] = error
                raise

    def _request(self, work: str, content: bytes, arguments: Mapping[str, Any]) -> str:
        """A name of a request, the same for the same."""
        digest = hashlib.sha256(json.dumps([self.job, self.key, work, arguments], sort_keys=True).encode())
        digest.update(content)
        return digest.hexdigest()


def _start(job: str) -> _Child:
    try:
        return _Child(job)
    except OSError as error:
        raise EnvironmentMissingError(
            f"{sys.executable}: cannot be started to run what a checkpoint brings ({error})"
        ) from None


@atexit.register
def _end_all() -> None:
    for child in _children.values():
        if child.owner == os.getpid():
            child.end()
