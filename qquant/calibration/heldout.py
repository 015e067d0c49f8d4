"""Evaluation texts, and the proof that a calibration set does not contain them.

A run of ids a[0..n) at position p is hashed as sum a[i] B^(p+i) * B^-p = sum a[i] B^i modulo 2**64, from running sums, so equal runs have
equal hashes wherever they stand. Equal hashes are then compared id by id: a collision cannot invent a shared run.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.calibration.chats import chat_tokens
from qquant.calibration.samples import CalibrationSet
from qquant.calibration.sources import (
    Corpus,
    Reading,
    SourceRecord,
    collect,
    decoded,
    file_rows,
    heldout_texts,
    read_file,
)
from qquant.calibration.tokenizer import Tokenizer
from qquant.errors import InputError, UsageError
from qquant.resources import lazy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")


RUN = 32  # tokens
LETTERS = 40  # of a shared stretch that are no accident; the bundled texts share none of 8 words, or 24 letters without spaces


def heldout(name_or_path: str, tokenizer: Tokenizer) -> tuple[NDArray[np.int32], dict[str, Any]]:
    """(ids int32 [n], provenance) of an evaluation text: "bundled:NAME" of calibration/heldout.yaml, or a .txt or .jsonl file.

    Chats are rendered one after the other with the template's default system turn. Raises InputError, UsageError.
    """
    if name_or_path.startswith("bundled:"):
        entry = heldout_texts().get(name_or_path.removeprefix("bundled:"))
        if entry is None:
            raise UsageError(
                f"checks.text: no held-out text {name_or_path!r}; there are bundled:{', bundled:'.join(heldout_texts())}"
            )
        path, content, kind, licence = Path(entry.file), entry.read(), entry.kind, entry.licence
    else:
        path, licence = Path(name_or_path), "unknown"
        content, kind = read_file(path), "chat" if path.name.removesuffix(".gz").endswith(".jsonl") else "text"
    if kind == "chat":
        corpus = Corpus(SourceRecord(path.name, kind, licence), name_or_path)
        collect(corpus, file_rows(path, content), Reading(frozenset(tokenizer.special)))
        placed = [(f"{name_or_path}, {location}", chat) for location, chat in corpus.chats]
        ids = [i for chat in chat_tokens(tokenizer, placed) for i in chat]
    else:
        ids = tokenizer.encode(decoded(content, path), special=False)
    if not ids:
        raise InputError(f"{name_or_path}: an empty evaluation text")
    name = name_or_path if name_or_path.startswith("bundled:") else path.name
    digest = hashlib.sha256(content).hexdigest()
    provenance = {"name": name, "kind": kind, "licence": licence, "sha256": digest, "tokens": len(ids)}
    return np.array(ids, np.int32), provenance


def _run_hashes(ids: NDArray[np.int32], run: int) -> NDArray[np.uint64]:
    """uint64 [n - run + 1]: the hash of each run of `ids` int32 [n], n >= run."""
    base, inverse = 0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 2**64)
    powers = np.cumprod(np.full(len(ids), base, np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * powers)])
    scale = np.cumprod(np.full(len(ids) - run + 1, inverse, np.uint64))
    return (sums[run:] - sums[:-run]) * scale


def shared_runs(calibration: CalibrationSet, heldout_tokens: NDArray[np.int32], run: int = RUN) -> NDArray[np.int64]:
    """Positions in `heldout_tokens`, ascending, where a run of `run` ids begins that also stands in a calibration sample."""
    samples = [sample for sample in calibration.tokens if len(sample) >= run]
    if not samples or len(heldout_tokens) < run:
        return np.zeros(0, np.int64)
    ids = np.concatenate(samples)
    starts = np.cumsum([0, *map(len, samples)])[:-1]
    positions = np.concatenate(
        [at + np.arange(len(sample) - run + 1) for at, sample in zip(starts, samples, strict=True)]
    )
    hashes = np.concatenate([_run_hashes(sample, run) for sample in samples])
    order = np.argsort(hashes, kind="stable")
    hashes, positions = hashes[order], positions[order]
    wanted = _run_hashes(heldout_tokens, run)
    nearest = np.searchsorted(hashes, wanted).clip(max=len(hashes) - 1)
    candidates = np.flatnonzero(hashes[nearest] == wanted)
    span = np.arange(run)
    equal = [bool((ids[positions[nearest[at]] + span] == heldout_tokens[at + span]).all()) for at in candidates]
    return candidates[np.array(equal, bool)]


def require_apart(calibration: CalibrationSet, heldout_tokens: NDArray[np.int32], tokenizer: Tokenizer) -> None:
    """Raise InputError, showing the first shared text, if the model was calibrated on the text that judges it.

    Shared is a stretch of `RUN` tokens or more that holds LETTERS letters: where a tokenizer spells a script byte by byte, so many tokens are a
    phrase that anybody may write, and in tool calls they are brackets and quotes.
    """
    positions = shared_runs(calibration, heldout_tokens)
    gaps = np.flatnonzero(np.diff(positions) > 1) + 1
    for stretch in np.split(positions, gaps) if len(positions) else ():
        start = int(stretch[0])
        passage = tokenizer.decode(heldout_tokens[start : int(stretch[-1]) + RUN].tolist())
        if sum(map(str.isalpha, passage)) < LETTERS:
            continue
        text = tokenizer.decode(heldout_tokens[start : start + RUN].tolist())
        raise InputError(
            f"the held-out text shares {len(positions)} runs of {RUN} tokens with the calibration set, the first at token {start}: {text!r}. "
            "Its perplexity would flatter the artifacts: take another checks.text or another calibration source"
        )
