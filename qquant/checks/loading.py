"""Whether an artifact loads in a clean process, as a user's program would: another interpreter, nothing of ours imported before.

    metadata   transformers: config, generation config and tokenizer of the folder, or of the GGUF file, without network and without
               remote code. Of GGUF files that differ in nothing but their type it reads one: it parses a vocabulary of 152,000
               tokens three times, which takes longer than the weights.
    weights    qquant.load: the model on its packed weights, one forward pass, finite logits over the whole vocabulary; on the
               check's GPU, if that has room for it beside the check, else on the CPU; where the model does not fit in memory, the
               first block and some rows of the head instead
    tokens     the ids that transformers gives to texts, once: for some checkpoints it takes another pre-tokenizer than their file's

A child process (`loading_child`) takes its parts in turn and says one line after each. One that is missing failed: by an error (its last line is the
finding), a signal, or the limit of time. The rest go on in a new child. Several children share out the parts, the cores and the
memory of a machine that has nothing better to do; one has all of them. No child outlives the call. A build that will ask has some
started before (`waiting`), which import meanwhile what takes longest; they touch no GPU before they are asked. Left out: vLLM and llama.cpp, which `make test-oracles` asks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, NamedTuple

from qquant import devices
from qquant.errors import InputError
from qquant.formats.gguf.container import read_header
from qquant.progress import Progress, Quiet

if TYPE_CHECKING:
    import torch

SECONDS = 60  # that a child may take to start, and for each part besides
LOOK = 0.2  # seconds between looks at whether a child is still wanted
BYTES_A_SECOND = 20_000_000  # read, repacked and multiplied once, on the slowest machine
METADATA = 300_000_000  # bytes of weights that take as long as reading metadata, at most
CARD = (
    1_500_000_000  # bytes of weights that are loaded a second where children share the parts out, which is beside a GPU
)
WORDS = 10.0  # seconds that transformers takes there for the vocabulary of a GGUF file
COPIES = 3  # of an artifact's bytes that loading it takes, at most; what is dequantized at load may take more
BESIDE = 1 / 2  # of what a card has free that loading may take: the check computes on it meanwhile
HOME = str(Path(__file__).parents[2])  # where the child finds qquant
CORES = 2  # of a machine with a GPU, to each child that loads beside a check
Child = subprocess.Popen[bytes]


class Texts(NamedTuple):
    """What the tokenizer in a folder is asked to encode."""

    folder: Path
    texts: tuple[str, ...]


class Loaded(NamedTuple):
    """What children found."""

    faults: dict[Path, str]  # what keeps an artifact from loading; those that load are missing
    ids: tuple[tuple[int, ...], ...] | None = None  # of every text; None: transformers did not say


class LoadTask(NamedTuple):
    """What a child loads at a time: `what` is "metadata", "weights" or "tokens"."""

    what: str
    path: Path

    def bytes(self) -> int:
        """The size of it, for how long it may take."""
        return size_of(self.path) if self.what == "weights" else METADATA

    def seconds(self) -> float:
        """About how long it takes beside a check on a GPU, for who takes it."""
        if self.what == "weights":
            return size_of(self.path) / CARD
        return WORDS if self.what == "metadata" and self.path.is_file() else 1.0


class Nursery(NamedTuple):
    """How children are had."""

    children: int  # at a time
    seconds: float  # that one may take to start, and for each part besides
    stop: Event
    idle: list[Child]  # that wait already
    device: str = "cpu"  # on which they load weights
    progress: Progress = Quiet()  # of the thread that calls; several children tell nothing

    def tell(self, done: int, of: int) -> None:
        """Tell of parts that are loaded; the end is told when the child has gone."""
        if done < of:
            self.progress.advance("load", done, of)


Said = tuple[dict[LoadTask, str], dict[LoadTask, bytes]]
"""What went wrong, and the line that was said, by part."""


def examine(  # noqa: PLR0913  each is of another thing
    paths: Sequence[Path],
    texts: Texts | None,
    stop: Event | None = None,
    children: int = 1,
    idle: list[Child] | None = None,
    device: torch.device | None = None,
    seconds: float = SECONDS,
    progress: Progress | None = None,
) -> Loaded:
    """What keeps each of `paths` from loading, and the ids that transformers gives to `texts`.

    `stop`: once it is set the children are ended and the rest is not tried; the answer means nothing then. `children`: at a time, of
    which the first are taken from `idle`. `device`: of the check; see `card_or_cpu`. `progress`: told of "load", part by part of one child.
    """
    where = card_or_cpu(paths, device, children) if device else "cpu"
    nursery = Nursery(children, seconds, stop or Event(), [] if idle is None else idle, where, progress or Quiet())
    if texts is None:
        return _examine(paths, [], nursery)
    with tempfile.TemporaryDirectory(prefix="qquant-") as place:
        asked = Path(place, "texts.json")
        asked.write_text(json.dumps({"folder": str(texts.folder.absolute()), "texts": texts.texts}), "utf-8")
        return _examine(paths, [LoadTask("tokens", asked)], nursery)


def card_or_cpu(paths: Sequence[Path], device: torch.device, children: int) -> str:
    """Where so many children load `paths` beside a check on `device`: there, or on the CPU where it has no room for them too.

    What torch keeps in reserve on a GPU is given back, since other processes cannot have it.
    """
    if device.type != "cuda":
        return "cpu"
    import torch

    torch.cuda.empty_cache()
    at_a_time = sorted(map(size_of, paths), reverse=True)[:children]
    if COPIES * sum(at_a_time) > BESIDE * devices.free_memory(device):
        return "cpu"
    return str(device)


def children(artifacts: int) -> int:
    """Children that load so many artifacts beside a check on a GPU: at most one for each part, metadata and weights of each and the tokens."""
    return max(1, min(devices.cores() // CORES, 2 * artifacts + 1))


def early(artifacts: int, device: torch.device) -> int:
    """Children that a build of so many artifacts starts before it asks: those that will load them beside its check, none on a CPU."""
    return children(artifacts) if devices.threads_help(device) else 0


@contextmanager
def waiting(count: int, gpu: bool = False) -> Iterator[list[Child]]:
    """So many children that import what they will need, for `examine` to take; those that nobody took are ended.

    `gpu`: they may be asked to load on one.
    """
    idle: list[Child] = []
    try:
        for _ in range(count):
            idle.append(_started(["-"], None, gpu))
        yield idle
    finally:
        for child in idle:
            child.kill()
            child.communicate()


def _examine(paths: Sequence[Path], more: Sequence[LoadTask], nursery: Nursery) -> Loaded:
    alike: dict[object, Path] = {}
    speaks = {path: alike.setdefault(_metadata(path), path) for path in paths}
    tasks = [
        LoadTask(what, path)
        for path in paths
        for what in ("metadata", "weights")
        if what == "weights" or speaks[path] == path
    ]
    asked = [*tasks, *more]
    nursery.progress.advance("load", 0, max(1, len(asked)))
    by_task, said = _shared(asked, nursery)
    nursery.progress.advance("load", max(1, len(asked)), max(1, len(asked)))
    problems = {
        path: by_task.get(LoadTask("metadata", speaks[path])) or by_task.get(LoadTask("weights", path))
        for path in paths
    }
    ids = next((json.loads(said[task]).get("ids") for task in more if task in said), None)
    return Loaded({path: problem for path, problem in problems.items() if problem}, ids and tuple(map(tuple, ids)))


def _metadata(path: Path) -> object:
    """A key that artifacts share of which transformers reads the same: GGUF files whose fields differ in their type alone."""
    if path.is_file():
        with contextlib.suppress(InputError):  # the child says what is wrong with it
            fields = read_header(path).fields
            said = [fields[key] for key in sorted(fields) if key != "general.file_type"]
            return hashlib.sha256(json.dumps(said, default=asdict).encode()).digest()
    return path


def _shared(tasks: Sequence[LoadTask], nursery: Nursery) -> Said:
    shares = _dealt(tasks, nursery.children)
    nursery = nursery._replace(children=max(1, len(shares)))
    if len(shares) <= 1:
        return _in_turn(tasks, nursery)
    nursery = nursery._replace(progress=Quiet())
    with ThreadPoolExecutor(len(shares), "qquant-loading") as pool:
        doing = [pool.submit(_in_turn, share, nursery) for share in shares]
        try:
            problems, said = dict[LoadTask, str](), dict[LoadTask, bytes]()
            for done in as_completed(doing):
                problems |= done.result()[0]
                said |= done.result()[1]
            return problems, said
        except BaseException:
            nursery.stop.set()
            raise


def _dealt(tasks: Sequence[LoadTask], hands: int) -> list[list[LoadTask]]:
    """`tasks` in at most so many shares that take about as long."""
    shares: list[list[LoadTask]] = [[] for _ in range(min(hands, len(tasks)))]
    for task in sorted(tasks, key=LoadTask.seconds, reverse=True):
        min(shares, key=lambda share: (sum(map(LoadTask.seconds, share)), len(share))).append(task)
    return shares


def _in_turn(tasks: Sequence[LoadTask], nursery: Nursery) -> Said:
    left, problems, said = list(tasks), dict[LoadTask, str](), dict[LoadTask, bytes]()
    while left and not nursery.stop.is_set():
        lines, problem = _child(left, nursery, len(tasks))
        said |= zip(left, lines, strict=False)
        left = left[len(lines) :]
        if left:
            problems[left.pop(0)] = problem
    return problems, said


def _started(words: Sequence[str], threads: int | None, gpu: bool) -> Child:
    command = [sys.executable, "-m", "qquant.checks.loading_child", *words]
    search_path = os.pathsep.join([HOME, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": search_path, "HF_HUB_OFFLINE": "1"}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    pipe = subprocess.PIPE
    ears = pipe if words == ["-"] else None
    return subprocess.Popen(command, cwd="/", env=environment, stdin=ears, stdout=pipe, stderr=pipe)


def _asked(words: Sequence[str], nursery: Nursery) -> Child:
    """A child that loads: one that waits and still lives, or a new one."""
    threads = max(1, devices.cores() // nursery.children) if nursery.children > 1 else None
    with contextlib.suppress(IndexError):
        while True:
            child = nursery.idle.pop()
            try:
                assert child.stdin is not None
                child.stdin.write(json.dumps([threads, *words]).encode() + b"\n")
                child.stdin.flush()
            except OSError:
                child.communicate()
            else:
                return child
    return _started(words, threads, nursery.device != "cpu")


def _child(tasks: Sequence[LoadTask], nursery: Nursery, of: int) -> tuple[list[bytes], str]:
    """(what it said of each of `tasks` that loaded, what happened to the next). `tasks`: the last ones of so many."""
    limit = sum((nursery.seconds + task.bytes() / BYTES_A_SECOND for task in tasks), nursery.seconds)
    words = [word for task in tasks for word in (task.what, str(task.path.absolute()))]
    with _asked([str(nursery.children), nursery.device, *words], nursery) as child:
        in_time = _wait(child, limit, nursery.stop, lambda lines: nursery.tell(of - len(tasks) + lines, of))
        output, errors = child.communicate()
    done = output.split(b"\n")[:-1]
    if not in_time:
        return done, f"not loaded after {limit:.0f} s"
    if child.returncode < 0:
        return done, f"the process died of {signal.Signals(-child.returncode).name}"
    said = errors.decode(errors="replace").strip().splitlines()
    return done, said[-1] if said else f"the process ended with {child.returncode}"


def _wait(child: Child, limit: float, stop: Event, tell: Callable[[int], None]) -> bool:
    """Whether a child ends within `limit` seconds by itself; it is ended where it does not, is not wanted, or nobody can wait.

    `tell`: of every line that it says meanwhile.
    """
    late, lines = time.monotonic() + limit, 0
    try:
        while time.monotonic() < late and not stop.is_set():
            try:
                child.communicate(timeout=LOOK)
            except subprocess.TimeoutExpired as waited:
                if (waited.output or b"").count(b"\n") > lines:
                    lines = waited.output.count(b"\n")
                    tell(lines)
            else:
                return True
    finally:
        child.kill()
    return False


def size_of(path: Path) -> int:
    """Bytes of the weights of an artifact."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))
