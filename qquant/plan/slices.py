"""What each slice of `checks.profile: release` can tell before it is read. Tokenizes the bundled texts, which takes seconds; needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qquant.calibration import Tokenizer
from qquant.calibration.slices import FIRST, LENGTH, REFERENCE, sliced
from qquant.recipe.limits import slice_reach

SCORED = LENGTH - FIRST - 1


@dataclass(frozen=True)
class SliceReach:
    """A slice, what is read of it, and which ratio to English, or to the same tokens in short windows, it can tell from its limit."""

    name: str
    windows: int
    tokens: int  # read by each model
    limit: float
    detectable: float  # distance from the limit that is proven in 80 % of runs


def slice_reaches(tokenizer: Tokenizer, positions: int, limit: float) -> tuple[SliceReach, ...]:
    """Every slice that stands beside another, for a context of `positions` tokens and `gates.worst_slice`."""
    text = sliced(tokenizer, positions)
    english = next(one.windows for one in text.slices if one.name == REFERENCE)
    reaches = [
        SliceReach(one.name, one.windows, one.windows * LENGTH, limit, slice_reach(limit, SCORED, one.windows, english))
        for one in text.slices
        if one.name != REFERENCE
    ]
    own = math.sqrt(limit)
    for name, start, stop in text.stretches():
        windows = len(text.long) * (stop - start)
        reaches.append(SliceReach(name, windows, 2 * windows * LENGTH, own, slice_reach(own, SCORED, windows, None)))
    return tuple(reaches)
