"""A check on several ranks: the windows of a text are split, artifacts to be loaded and asked are shared out.

What is known of a window depends on no other window, so every rank reads some of them, in the pieces in which one rank would read them
all (`fidelity.TILE`), and then has the numbers of all, in their order: statistics, looks and verdicts follow on every rank alike, to the
last bit. Largest activations are the largest of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from safetensors.torch import load, save

from qquant.checks.fidelity import TILE, Fidelity, Peaks, Scored
from qquant.disk.records import to_plain, typed
from qquant.ranks import Ranks, dealt
from qquant.report.record import Answers

Read = Callable[[Scored], dict[str, Fidelity]]


def windows(read: Read, text: Scored, names: Sequence[str], ranks: Ranks) -> dict[str, Fidelity]:
    """What `read` gives for all of `text`, by artifact of `names`."""
    if ranks.world == 1:
        return read(text)
    mine = text.windows[_part(text, ranks)]
    measured = read(replace(text, windows=mine)) if len(mine) else {}
    said = save(
        {
            f"{names.index(name)} {key}": value
            for name, losses in measured.items()
            for key, value in vars(losses).items()
        }
    )
    parts = [load(part) for part in ranks.gather_bytes(said)]
    return {
        name: Fidelity.joined(
            [
                Fidelity(**{key.split(" ")[1]: value for key, value in part.items() if key.startswith(f"{index} ")})
                for part in parts
                if part
            ]
        )
        for index, name in enumerate(names)
    }


def _part(text: Scored, ranks: Ranks) -> slice:
    """The windows of this rank: whole tiles, about as many as every other rank has; the first always has some."""
    count, length = text.windows.shape
    together = max(1, TILE // max(1, length - text.first - 1))
    tiles = math.ceil(count / together)
    start, stop = (together * math.ceil(tiles * rank / ranks.world) for rank in (ranks.rank, ranks.rank + 1))
    return slice(start, stop)


def largest(peaks: Peaks, ranks: Ranks) -> Peaks:
    """The largest activations that any rank has seen."""
    said = ranks.gather([[source, layer, peak] for (source, layer), peak in peaks.largest.items()])
    highest: dict[tuple[int, int], float] = {}
    for source, layer, peak in (row for rows in said for row in rows):
        before = highest.get((int(source), int(layer)), 0.0)
        highest[int(source), int(layer)] = math.nan if math.isnan(peak) or math.isnan(before) else max(before, peak)
    return Peaks(highest)


def mine(sizes: Mapping[str, int], ranks: Ranks) -> list[str]:
    """The names whose artifacts this rank loads and asks, in their order; `sizes` in bytes."""
    hand = dealt({name: float(size) for name, size in sizes.items()}, ranks.world)[ranks.rank]
    return [name for name in sizes if name in hand]


def answers(mine: Mapping[str, Answers], asked: bool, ranks: Ranks) -> dict[str, Answers]:
    """The answers to all ranks; none if a rank that was to ask could not."""
    if not all(ranks.gather(bool(mine) or not asked)):
        return {}
    said = ranks.gather({name: to_plain(answered) for name, answered in mine.items()})
    return {name: typed(Answers, one, name) for theirs in said for name, one in theirs.items()}


def problems(mine: Mapping[str, str], ranks: Ranks) -> dict[str, str]:
    """What any rank found, by name."""
    return {name: problem for theirs in ranks.gather(dict(mine)) for name, problem in theirs.items()}
