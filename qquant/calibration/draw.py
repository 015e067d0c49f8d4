"""Draws that depend on a seed and on nothing else: the same on every machine and with every version of every library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def rank(seed: int, label: str, index: int) -> int:
    """A number that depends on nothing but its arguments."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{label}:{index}".encode()).digest()[:8], "big")


def shuffled(seed: int, label: str, count: int) -> list[int]:
    """The numbers 0 to count - 1 in a seeded order."""
    return sorted(range(count), key=lambda index: rank(seed, label, index))


def allot(weights: Sequence[float], capacities: Sequence[int], total: int) -> list[int]:
    """Samples per source, in proportion to `weights` (largest remainder), at least one each; what a source lacks goes to the others."""
    counts = [0] * len(weights)
    while left := min(total, sum(capacities)) - sum(counts):
        open_ = [i for i, capacity in enumerate(capacities) if counts[i] < capacity]
        scale = left / sum(weights[i] for i in open_)
        quota = {i: weights[i] * scale for i in open_}
        extra = {i: int(quota[i]) for i in open_}
        for i in sorted(open_, key=lambda i: (extra[i] - quota[i], i))[: left - sum(extra.values())]:
            extra[i] += 1
        for i in open_:
            counts[i] += min(extra[i], capacities[i] - counts[i])
    for i in (i for i, count in enumerate(counts) if not count and capacities[i]):
        richest = max(range(len(counts)), key=counts.__getitem__)
        if counts[richest] > 1:
            counts[richest], counts[i] = counts[richest] - 1, 1
    return counts
