"""Which linears carry the loss of an artifact, and which of them in 16 bits would make its gate pass.

A mixed model takes some linears from the checkpoint and the rest from the artifact. One reading of the text, all mixtures in lockstep,
gives the KL divergence with each linear restored alone; gain(i) = KL(artifact) - KL(i restored). Linears are then restored in the order
of gain per byte, cheapest first, until the mean KL divergence is within the limit; the set is tried as a whole (gains add up only
roughly), found by bisection over how many are taken, and then thinned: what can go back to the artifact without missing the limit does.

The stages of a block are candidates as a whole (q, k, v are one), so that runtimes that fuse them still can. So are the embedding and the
head of a file that has codes of them, which most GGUF files do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qquant.checks.fidelity import Scored, measure
from qquant.families import Family, ModelConfig
from qquant.families.weights import WeightSource
from qquant.formats import ArtifactSource
from qquant.progress import Progress
from qquant.source.safetensors_file import SIZES

TOGETHER = 16  # mixtures read at a time


@dataclass
class PatchedWeights:
    """An artifact with some weights taken from the checkpoint."""

    artifact: WeightSource
    checkpoint: WeightSource
    restored: frozenset[str]  # names of weights

    def __post_init__(self) -> None:
        """Take over what the artifact says about itself."""
        self.family: Family = self.artifact.family
        self.config: ModelConfig = self.artifact.config

    def tensor(self, name: str) -> Tensor:
        """Tensor `name` of the checkpoint if it is restored, else of the artifact."""
        return (self.checkpoint if name in self.restored else self.artifact).tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of tensor `name` of the checkpoint if it is restored, else of the artifact."""
        return (self.checkpoint if name in self.restored else self.artifact).rows(name, start, stop)


@dataclass(frozen=True)
class Restorable:
    """Linears that are restored together: one stage of one block, the embedding or the head."""

    name: str
    weights: tuple[str, ...]
    size: int  # parameters


@dataclass(frozen=True)
class Bisection:
    """What restoring brings."""

    kl: float  # of the artifact
    limit: float
    gains: tuple[tuple[Restorable, float], ...]  # largest first
    restored: tuple[Restorable, ...]  # the smallest set that was found; empty if nothing has to be restored
    kl_restored: float  # with `restored` in 16 bits


@dataclass(frozen=True)
class Search:
    """What a bisection reads, and how."""

    checkpoint: WeightSource
    artifact: WeightSource
    text: Scored
    device: torch.device
    progress: Progress

    def kl(self, sets: Sequence[Iterable[Restorable]]) -> list[float]:
        """Mean KL divergence with each of `sets` restored."""
        divergences: list[float] = []
        for start in range(0, len(sets), TOGETHER):
            group = sets[start : start + TOGETHER]
            mixed: Mapping[str, WeightSource] = {
                str(index): PatchedWeights(
                    self.artifact, self.checkpoint, frozenset(n for restorable in parts for n in restorable.weights)
                )
                for index, parts in enumerate(group)
            }
            measured = measure(self.checkpoint, mixed, self.text, self.device, self.progress)
            divergences += [measured[name].mean_kl for name in mixed]
        return divergences


def stages(source: WeightSource) -> list[Restorable]:
    """Every stage of every block, in order. AWQ's folded scales keep a block's stages together."""
    family, config = source.family, source.config
    restorables = []
    for layer in range(config.layers):
        shapes = family.linear_shapes(config, layer)
        prefix = family.block.format(layer)
        for stage in family.stages:
            weights = tuple(f"{prefix}{linear}.weight" for linear in stage.linears)
            restorables.append(
                Restorable(f"{prefix}{stage.name}", weights, sum(math.prod(shapes[x]) for x in stage.linears))
            )
    return restorables


def tables(source: WeightSource) -> list[Restorable]:
    """The embedding and the head, where the artifact holds codes of them; a tied table is one."""
    if not isinstance(source, ArtifactSource):
        return []
    family, config = source.family, source.config
    size = config.vocab * config.hidden
    if config.tied:
        restorables = [Restorable(family.embedding.removesuffix(".weight"), (family.embedding, family.head), size)]
    else:
        names = family.embedding, family.head
        restorables = [Restorable(name.removesuffix(".weight"), (name,), size) for name in names]
    return [table for table in restorables if source.stored_as(table.weights[0]).upper() not in SIZES]


def whole_blocks(source: WeightSource) -> list[Restorable]:
    """Every block with its norms and biases: what can be restored where scales are folded between neighbours."""
    family, config = source.family, source.config
    blocks = []
    for layer in range(config.layers):
        shapes = family.block_shapes(config, layer)
        name = family.block.format(layer).rstrip(".")
        blocks.append(Restorable(name, tuple(shapes), sum(math.prod(shape) for shape in shapes.values())))
    return blocks


def bisect(search: Search, candidates: Sequence[Restorable], limit: float) -> Bisection:
    """Find a small set of `candidates` that brings the mean KL divergence to `limit`, cheapest gain first."""
    start, *alone = search.kl([(), *((candidate,) for candidate in candidates)])
    gains = sorted(zip(candidates, (start - kl for kl in alone), strict=True), key=lambda pair: -pair[1])
    if start <= limit:
        return Bisection(start, limit, tuple(gains), (), start)
    order = [candidate for candidate, gain in sorted(gains, key=lambda pair: -pair[1] / pair[0].size)]
    low, high = 0, len(order)
    kl_reached = search.kl([order])[0]
    while high - low > 1:
        middle = (low + high) // 2
        kl = search.kl([order[:middle]])[0]
        low, high, kl_reached = (low, middle, kl) if kl <= limit else (middle, high, kl_reached)
    return _thinned(search, Bisection(start, limit, tuple(gains), tuple(order[:high]), kl_reached))


def _thinned(search: Search, bisection: Bisection) -> Bisection:
    """The bisection without the parts that turn out not to be needed; the largest is tried first."""
    restored, kl_reached = list(bisection.restored), bisection.kl_restored
    if kl_reached > bisection.limit:
        return bisection
    for candidate in sorted(bisection.restored, key=lambda part: -part.size):
        fewer = [other for other in restored if other != candidate]
        kl = search.kl([fewer])[0]
        if fewer and kl <= bisection.limit:
            restored, kl_reached = fewer, kl
    return Bisection(bisection.kl, bisection.limit, bisection.gains, tuple(restored), kl_reached)
