"""Whether an artifact loads in a clean process, as a user's program would: another interpreter, nothing of ours imported before.

    metadata   transformers: config, generation config and tokenizer of the folder, or of the GGUF file, without network and without
               remote code. Of GGUF files that differ in nothing but their type it reads one: it parses a vocabulary of 152,000
               tokens three times, which takes longer than the weights.
    weights    qquant.load: the model on its packed weights, one forward pass, finite logits over the whole vocabulary; where the
               model does not fit in memory, the first block and some rows of the head instead
    tokens     the ids that transformers gives to texts, once: for some checkpoints it takes another pre-tokenizer than their file's

A child process takes its parts in turn and says one line after each. One that is missing failed: by an error (its last line is the
finding), a signal, or the limit of time. The rest go on in a new child. Several children share out the parts, the cores and the
memory of a machine that has nothing better to do; one has all of them. No child outlives the call. A build that will ask has some
started before (`waiting`), which import meanwhile what takes longest. Left out: vLLM and llama.cpp, which `make test-oracles` asks.
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from qquant import background
from qquant.errors import InputError
from qquant.families import family_of
from qquant.formats.gguf.container import read_header
from qquant.source.checkpoint import read_config

SECONDS = 60  # that a child may take to start, and for each part besides
LOOK = 0.2  # seconds between looks at whether a child is still wanted
BYTES_A_SECOND = 20_000_000  # read, repacked and multiplied once, on the slowest machine
METADATA = 300_000_000  # bytes of weights that take as long as reading metadata
TOKENS = 32  # of the forward pass, from all over the vocabulary
TEXT = "The 3 quick brown foxes — 你好，世界 def f(x):\n    return x**2"
HOME = str(Path(__file__).parents[2])  # where the child finds qquant
EARLY = 3  # children that a build starts before it asks: metadata, weights and tokens of one artifact
TOKENIZERS = ("tokenizer.json", "vocab.json")
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
        """The size of it, for how long it may take and for who takes it."""
        return _size(self.path) if self.what == "weights" else METADATA


class Nursery(NamedTuple):
    """How children are had."""

    children: int  # at a time
    seconds: float  # that one may take to start, and for each part besides
    stop: Event
    idle: list[Child]  # that wait already


Said = tuple[dict[LoadTask, str], dict[LoadTask, bytes]]
"""What went wrong, and the line that was said, by part."""


def faults(
    paths: Sequence[Path], stop: Event | None = None, children: int = 1, seconds: float = SECONDS
) -> dict[Path, str]:
    """The faults of `examine`."""
    return examine(paths, None, stop, children, seconds=seconds).faults


def examine(
    paths: Sequence[Path],
    texts: Texts | None,
    stop: Event | None = None,
    children: int = 1,
    idle: list[Child] | None = None,
    seconds: float = SECONDS,
) -> Loaded:
    """What keeps each of `paths` from loading, and the ids that transformers gives to `texts`.

    `stop`: once it is set the children are ended and the rest is not tried; the answer means nothing then. `children`: at a time, of
    which the first are taken from `idle`.
    """
    nursery = Nursery(children, seconds, stop or Event(), [] if idle is None else idle)
    if texts is None:
        return _examine(paths, [], nursery)
    with tempfile.TemporaryDirectory(prefix="qquant-") as place:
        asked = Path(place, "texts.json")
        asked.write_text(json.dumps({"folder": str(texts.folder.absolute()), "texts": texts.texts}), "utf-8")
        return _examine(paths, [LoadTask("tokens", asked)], nursery)


@contextmanager
def waiting(count: int) -> Iterator[list[Child]]:
    """So many children that import what they will need, for `examine` to take; those that nobody took are ended."""
    idle: list[Child] = []
    try:
        for _ in range(count):
            idle.append(_started(["-"], None))
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
    by_task, said = _shared([*tasks, *more], nursery)
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
            return hashlib.sha256(json.dumps(said, default=vars).encode()).digest()
    return path


def _shared(tasks: Sequence[LoadTask], nursery: Nursery) -> Said:
    shares = _dealt(tasks, nursery.children)
    nursery = nursery._replace(children=max(1, len(shares)))
    if len(shares) <= 1:
        return _in_turn(tasks, nursery)
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
    """`tasks` in at most so many shares of about the same size."""
    shares: list[list[LoadTask]] = [[] for _ in range(min(hands, len(tasks)))]
    for task in sorted(tasks, key=LoadTask.bytes, reverse=True):
        min(shares, key=lambda share: (sum(map(LoadTask.bytes, share)), len(share))).append(task)
    return shares


def _in_turn(tasks: Sequence[LoadTask], nursery: Nursery) -> Said:
    left, problems, said = list(tasks), dict[LoadTask, str](), dict[LoadTask, bytes]()
    while left and not nursery.stop.is_set():
        lines, problem = _child(left, nursery)
        said |= zip(left, lines, strict=False)
        left = left[len(lines) :]
        if left:
            problems[left.pop(0)] = problem
    return problems, said


def _started(words: Sequence[str], threads: int | None) -> Child:
    command = [sys.executable, "-m", "qquant.checks.loading", *words]
    search_path = os.pathsep.join([HOME, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": search_path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    pipe = subprocess.PIPE
    ears = pipe if words == ["-"] else None
    return subprocess.Popen(command, cwd="/", env=environment, stdin=ears, stdout=pipe, stderr=pipe)


def _asked(words: Sequence[str], nursery: Nursery) -> Child:
    """A child that loads: one that waits and still lives, or a new one."""
    threads = max(1, background.cores() // nursery.children) if nursery.children > 1 else None
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
    return _started(words, threads)


def _child(tasks: Sequence[LoadTask], nursery: Nursery) -> tuple[list[bytes], str]:
    """(what it said of each of `tasks` that loaded, what happened to the next)."""
    limit = sum((nursery.seconds + task.bytes() / BYTES_A_SECOND for task in tasks), nursery.seconds)
    words = [word for task in tasks for word in (task.what, str(task.path.absolute()))]
    with _asked([str(nursery.children), *words], nursery) as child:
        in_time = _wait(child, limit, nursery.stop)
        output, errors = child.communicate()
    done = output.split(b"\n")[:-1]
    if not in_time:
        return done, f"not loaded after {limit:.0f} s"
    if child.returncode < 0:
        return done, f"the process died of {signal.Signals(-child.returncode).name}"
    said = errors.decode(errors="replace").strip().splitlines()
    return done, said[-1] if said else f"the process ended with {child.returncode}"


def _wait(child: Child, limit: float, stop: Event) -> bool:
    """Whether a child ends within `limit` seconds by itself; it is ended where it does not, is not wanted, or nobody can wait."""
    late = time.monotonic() + limit
    try:
        while time.monotonic() < late and not stop.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=LOOK)
                return True
    finally:
        child.kill()
    return False


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))


def metadata(path: Path) -> dict[str, Any]:
    """What transformers reads besides the weights; whatever goes wrong is raised. What was read, for people."""
    import transformers

    if path.is_dir() and family_of(read_config(path), str(path / "config.json")).transformers is None:
        return {"tokens": 0}  # no program but ours reads it
    folder, where = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **where)
    ids: list[int] = []
    if where or any((folder / name).is_file() for name in TOKENIZERS):
        ids = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **where)(TEXT).input_ids
        if not ids or max(ids) >= config.vocab_size:
            raise ValueError(f"the tokenizer makes {ids} of {TEXT!r}, the vocabulary has {config.vocab_size}")
    if (folder / "generation_config.json").is_file():
        transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return {"tokens": len(ids)}


def weights(path: Path, children: int = 1) -> dict[str, Any]:
    """A forward pass of the model, or the part of it that fits; whatever goes wrong is raised. What was loaded, for people.

    `children`: that load artifacts at this time, each of which may take its part of the free memory.
    """
    import torch

    from qquant.artifact.opening import open_weights
    from qquant.runtime import loading

    if 3 * children * _size(path) > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        source = open_weights(path)
        tensors = [source.tensor(name) for name in source.family.block_shapes(source.config, 0)]
        values = torch.cat([tensor.flatten().float() for tensor in (*tensors, source.rows(source.family.head, 0, 64))])
        loaded = "first block"
    else:
        model = loading.load(path, "cpu")
        vocabulary = int(model.config.vocab_size)
        with torch.no_grad():
            values = model(torch.linspace(0, vocabulary - 1, TOKENS).long()[None]).logits[0, -1].float()
        loaded = "whole model"
        if len(values) < vocabulary:
            raise ValueError(f"{len(values)} logits, the vocabulary has {vocabulary}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{loaded}: values that are not finite")
    return {"loaded": loaded}


def tokens(path: Path) -> dict[str, Any]:
    """What transformers' tokenizer makes of the texts in the file `path`; nothing where it has none for the family."""
    import transformers

    asked = json.loads(path.read_text("utf-8"))
    folder = Path(asked["folder"])
    if family_of(read_config(folder), str(folder / "config.json")).transformers is None:
        return {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return {"ids": tokenizer(asked["texts"], add_special_tokens=False, verbose=False).input_ids}


def _waited() -> list[str]:
    """What a child is asked for that was started before; it imports meanwhile what it will need."""
    with contextlib.suppress(ImportError):  # who needs it says so
        import torch
        import transformers  # noqa: F401

        from qquant.runtime import loading  # noqa: F401
    threads, *words = json.loads(sys.stdin.readline() or "[null, 0]")
    if threads:
        torch.set_num_threads(threads)
    return [str(word) for word in words]


def main() -> None:
    """The child: a line for each part that loads; the first that does not ends it."""
    children, *words = sys.argv[1:] if sys.argv[1:] != ["-"] else _waited()
    load = {"metadata": metadata, "weights": lambda path: weights(path, int(children)), "tokens": tokens}
    for what, path in zip(words[::2], words[1::2], strict=True):
        said = load[what](Path(path))
        sys.stdout.write(json.dumps({"path": path} | said) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
