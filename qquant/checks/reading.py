"""Whether users' tokenizer reads the texts of a build as the build does: a stretch of each, tokenized by transformers and by us.

    tokenizer.json, read literally  ->  calibration, checks, GGUF files, llama.cpp
    AutoTokenizer                   ->  users of GPTQ and AWQ folders; for some families it takes its own pre-tokenizer instead of the file's

Where the two give other ids the folder is read otherwise than it was calibrated and judged. Counted is a lower bound: ids of ours that are not
among theirs, as often. Left out: llama.cpp, which `make test-oracles` asks for the same texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import torch

from qquant.calibration import Tokenizer
from qquant.calibration.samples import CalibrationSet
from qquant.calibration.slices import Sliced
from qquant.checks.loading import Texts
from qquant.formats.folder_claims import SAMPLE
from qquant.report.conditions import TokensRead

TOKENS = 4096  # of each text
SHOWN = 3  # tokens, from the first that differs on

Stretches = Mapping[str, str]  # text -> a stretch of it


def stretches(
    tokenizer: Tokenizer,
    heldout: Mapping[str, torch.Tensor],
    sliced: Sliced | None = None,
    used: CalibrationSet | None = None,
) -> Stretches:
    """A stretch of every held-out text (windows of ids, by name), of every slice and of every calibration source."""
    ids = {name: windows.flatten()[:TOKENS].tolist() for name, windows in heldout.items()}
    ids |= dict(_slices(sliced)) if sliced else {}
    for name, samples in (used.by_source() if used else {}).items():
        ids[f"calibration: {name}"] = list(islice(chain.from_iterable(sample.tolist() for sample in samples), TOKENS))
    return {"a sample of signs": "\n".join(SAMPLE), **{name: tokenizer.decode(kept) for name, kept in ids.items()}}


def _slices(sliced: Sliced) -> Iterator[tuple[str, list[int]]]:
    place = 0
    for entry in sliced.slices:
        yield f"slice: {entry.name}", sliced.short[place : place + entry.windows].ravel()[:TOKENS].tolist()
        place += entry.windows
    for number, document in enumerate(sliced.long, start=1):
        yield f"slice: long document {number}", document[:TOKENS].tolist()


def asked(folder: Path, texts: Stretches) -> Texts:
    """What a clean process is to tokenize with the tokenizer in `folder`."""
    return Texts(folder, tuple(texts.values()))


def compare(tokenizer: Tokenizer, texts: Stretches, theirs: Sequence[Sequence[int]] | None) -> TokensRead | None:
    """What transformers reads otherwise than `tokenizer`; None where it did not read."""
    if theirs is None:
        return None
    ours = tokenizer.encode_all(list(texts.values()))
    differing, example = {}, ""
    for name, mine, other in zip(texts, ours, theirs, strict=True):
        if mine != list(other):
            differing[name] = max(1, (Counter(mine) - Counter(other)).total())
            example = example or _example(tokenizer, mine, other)
    return TokensRead(sum(map(len, ours)), differing, example)


def _example(tokenizer: Tokenizer, mine: Sequence[int], other: Sequence[int]) -> str:
    """The tokens of both, from the first that differs on."""
    pairs = zip(mine, other, strict=False)
    first = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(other)))
    shown = [[tokenizer.decode([number]) for number in ids[first : first + SHOWN]] for ids in (mine, other)]
    return f"{shown[0]} in the file, {shown[1]} there"
