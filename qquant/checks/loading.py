"""Whether an artifact loads in a clean process, as a user's program would: another interpreter, nothing of ours imported before.

    transformers   config, generation config and tokenizer of the folder, or of the GGUF file, without network and without remote code
    qquant.load    the model on its packed weights, one forward pass, finite logits over the whole vocabulary; where the model does
                   not fit in memory, the first block and some rows of the head instead

A child process takes its artifacts in turn and says one line after each. One that is missing failed: by an error (its last line is the
finding), a signal, or the limit of time. The rest go on in a new child. Several children share out the artifacts, the cores and the
memory of a machine that has nothing better to do; one has all of them. No child outlives the call. Left out: vLLM and llama.cpp, which
`make test-oracles` asks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import Any

from qquant import background

SECONDS = 60  # that a child may take to start, and for each artifact besides
LOOK = 0.2  # seconds between looks at whether a child is still wanted
BYTES_A_SECOND = 20_000_000  # read, repacked and multiplied once, on the slowest machine
TEXT = "The 3 quick brown foxes — 你好，世界 def f(x):\n    return x**2"
HOME = str(Path(__file__).parents[2])  # where the child finds qquant
TOKENIZERS = ("tokenizer.json", "vocab.json")


def faults(
    paths: Sequence[Path], stop: Event | None = None, children: int = 1, seconds: float = SECONDS
) -> dict[Path, str]:
    """What keeps each of `paths` from loading; those that load are missing.

    `stop`: once it is set the children are ended and the rest is not tried; the answer means nothing then. `children`: at a time.
    """
    stop = stop or Event()
    shares = _dealt(paths, children)
    if len(shares) <= 1:
        return _in_turn(paths, seconds, stop, 1)
    with ThreadPoolExecutor(len(shares), "qquant-loading") as pool:
        doing = [pool.submit(_in_turn, share, seconds, stop, len(shares)) for share in shares]
        try:
            found = {path: problem for done in as_completed(doing) for path, problem in done.result().items()}
        except BaseException:
            stop.set()
            raise
    return {path: found[path] for path in paths if path in found}


def _dealt(paths: Sequence[Path], hands: int) -> list[list[Path]]:
    """`paths` in at most so many shares of about the same size."""
    shares: list[list[Path]] = [[] for _ in range(min(hands, len(paths)))]
    for path in sorted(paths, key=_size, reverse=True):
        min(shares, key=lambda share: (sum(map(_size, share)), len(share))).append(path)
    return shares


def _in_turn(paths: Sequence[Path], seconds: float, stop: Event, children: int) -> dict[Path, str]:
    left, found = list(paths), dict[Path, str]()
    while left and not stop.is_set():
        done, problem = _child(left, seconds, stop, children)
        left = left[done:]
        if left:
            found[left.pop(0)] = problem
    return found


def _child(paths: Sequence[Path], seconds: float, stop: Event, children: int) -> tuple[int, str]:
    """(how many of `paths` loaded, what happened to the next)."""
    limit = sum((seconds + _size(path) / BYTES_A_SECOND for path in paths), seconds)
    command = [sys.executable, "-m", "qquant.checks.loading", str(children), *(str(path.absolute()) for path in paths)]
    places = os.pathsep.join([HOME, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": places, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    if children > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, background.cores() // children))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd="/", env=environment, stdout=pipe, stderr=pipe) as child:
        in_time = _wait(child, limit, stop)
        lines, errors = child.communicate()
    done = lines.count(b"\n")
    if not in_time:
        return done, f"not loaded after {limit:.0f} s"
    if child.returncode < 0:
        return done, f"the process died of {signal.Signals(-child.returncode).name}"
    said = errors.decode(errors="replace").strip().splitlines()
    return done, said[-1] if said else f"the process ended with {child.returncode}"


def _wait(child: subprocess.Popen[bytes], limit: float, stop: Event) -> bool:
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


def load(path: Path, children: int = 1) -> dict[str, Any]:
    """Do what the head of this file says with one artifact; whatever goes wrong is raised. What was loaded, for people.

    `children`: that load artifacts at this time, each of which may take its part of the free memory.
    """
    import torch
    import transformers

    from qquant import runtime
    from qquant.artifact import open_weights

    folder, where = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **where)
    ids = [0]
    if where or any((folder / name).is_file() for name in TOKENIZERS):
        ids = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **where)(TEXT).input_ids
    if (folder / "generation_config.json").is_file():
        transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    if 3 * children * _size(path) > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        source = open_weights(path)
        tensors = [source.tensor(name) for name in source.family.block_shapes(source.config, 0)]
        values = torch.cat([tensor.flatten().float() for tensor in (*tensors, source.rows(source.family.head, 0, 64))])
        what = "first block"
    else:
        with torch.no_grad():
            values = runtime.load(path, "cpu")(torch.tensor([ids])).logits[0, -1].float()
        what = "whole model"
        if len(values) < config.vocab_size:
            raise ValueError(f"{len(values)} logits, config.json has a vocabulary of {config.vocab_size}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{what}: values that are not finite")
    return {"loaded": what, "tokens": len(ids)}


def main() -> None:
    """The child: a line for each path that loads; the first that does not ends it."""
    children, *paths = sys.argv[1:]
    for path in paths:
        sys.stdout.write(json.dumps({"path": path} | load(Path(path), int(children))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
