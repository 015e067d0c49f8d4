"""What is wrong with an artifact whatever its perplexity, each fault by its name.

Weights are looked at as they pass by, in the same reading that measures fidelity. With W of the checkpoint, A of the artifact:

    holds NaN                not every value is finite
    in another order         |A - W| > 0.7 |W|, but rows of A, moved within groups of 8, are those of W: a packing order
    of another weight        |A - W| > 0.7 |W| otherwise: a swapped shard, a wrong tensor, a head that is not the tied one
    scaled                   A is s W and an error that knows nothing of W, and s is further from 1 than rounding brings it (the error's share of |W|^2)
    shifted                  the error is the same sign over whole groups (mean over 32 columns, root mean square, at least 0.6
                             of the error's): zero points that are off by a step

Vectors, which no format rounds, are told where they are more than VECTOR off. AWQ folds scales into neighbouring weights, A = r W c by row and column: r and c are fitted first, where scales are folded. Any layout can
hold folded scales, so the weights themselves tell (`folds`): the outputs of a norm are divided by what the columns after it are multiplied by.
What the files around the weights say is compared apart (`formats.claims_of`). Out of reach: a scale or a bias of a block into which scales are
folded, where the likelihood of texts does not show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from qquant.algorithms.grid import finite
from qquant.families import Family, ModelConfig
from qquant.families.weights import WeightSource

FAR = 0.7  # relative error of what cannot be the same weight; two-bit types stay below 0.5
LEANING = 0.6  # share of an error that is common to a group; 1 / sqrt(32) = 0.18 by chance
GROUP = 32  # columns that every format's group holds whole
ALIKE = 0.6  # cosine of two rows that are the same but for rounding and scales; a seventh of it by chance
SCALED = 0.01  # distance of s from 1, beside twice the error's share; measured: 0.0005 at most, in formats of 2 to 8 bits, of any tool
VECTOR = 0.01  # relative error of a vector; rounding it to 16 bits changes it by less than 0.004
PACKED = 8  # rows that share an int32 in the AWQ layout
FOLDED = 0.01  # root mean square of the log of folded scales; rounding a norm to 16 bits changes it by less than 0.004


@dataclass
class CachedWeights:
    """A checkpoint that keeps the tensors of the block it was last asked for, so that artifacts are compared without reading twice."""

    source: WeightSource
    device: torch.device | None = None  # where its tensors are wanted; None: where they are
    blocks: Mapping[int, Mapping[str, Tensor]] = field(
        default_factory=dict
    )  # that are there already, by layer and name within
    kept: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take over what the source says about itself."""
        self.family: Family = self.source.family
        self.config: ModelConfig = self.source.config
        self._lock = Lock()  # several threads read a block

    def tensor(self, name: str) -> Tensor:
        """The source's tensor `name`, kept where several ask for it."""
        layer = self.family.layer_of(name)
        if layer is not None and layer in self.blocks:
            return self.blocks[layer][name.removeprefix(self.family.block.format(layer))]
        with self._lock:
            if self._block(name) != self._block(next(iter(self.kept), name)):
                self.kept.clear()
            value = self.kept.get(name)
        if value is None:
            value = self.source.tensor(name).to(self.device)
            with self._lock:
                self.kept[name] = value
        return value

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The source's rows of tensor `name`."""
        return self.source.rows(name, start, stop).to(self.device)

    def _block(self, name: str) -> int | str:
        layer = self.family.layer_of(name)
        return name if layer is None else layer


@dataclass
class InspectedWeights:
    """An artifact whose weights are compared with the checkpoint's as they are read; `problems` gathers what is found."""

    source: WeightSource
    checkpoint: CachedWeights
    folds: bool  # scales are folded into neighbouring weights
    problems: dict[str, str] = field(default_factory=dict)  # by tensor
    remarks: dict[str, str] = field(default_factory=dict)  # by tensor: what may be meant so

    def __post_init__(self) -> None:
        """Take over what the source says about itself."""
        self.family: Family = self.source.family
        self.config: ModelConfig = self.source.config

    def tensor(self, name: str) -> Tensor:
        """Tensor `name` of the artifact, inspected as it passes."""
        value = self.source.tensor(name)
        self._look(name, value, self.checkpoint.tensor(name))
        return value

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of tensor `name` of the artifact, inspected as they pass."""
        value = self.source.rows(name, start, stop)
        self._look(name, value, self.checkpoint.rows(name, start, stop))
        return value

    def told(self, found: Mapping[str, str]) -> tuple[str, ...]:
        """`problems` or `remarks` as lines in the order of a checkpoint's tensors, whichever thread came first."""
        places = {name: place for place, name in enumerate(self.family.shapes(self.config))}
        ordered = sorted(found.items(), key=lambda item: places.get(item[0], len(places)))
        return tuple(f"{name} {text}" for name, text in ordered)

    def _look(self, name: str, value: Tensor, truth: Tensor) -> None:
        if name not in self.problems:
            folds = self.folds and self.family.layer_of(name) is not None
            problem = fault(value.float(), truth.float(), folds)
            if problem:
                self.problems[name] = problem
            elif truth.dim() == 1 and not folds and (off := _off(value.float(), truth.float())) > VECTOR:
                self.remarks[name] = f"is {off:.1%} off the checkpoint's vector"


def fault(value: Tensor, truth: Tensor, folds: bool) -> str:
    """What is wrong with a weight [N, K] or a vector [N] of the artifact, against the checkpoint's; empty: nothing."""
    if not finite(value):
        return "holds NaN or infinity"
    if truth.dim() == 1:
        return "is not the checkpoint's vector" if not folds and _off(value, truth) > FAR else ""
    fitted = _scaled_like(truth, value) if folds else truth
    error = value - fitted
    size = float(error.norm())
    if size > FAR * float(fitted.norm()):
        if _reordered(value, truth):
            return (
                f"has the checkpoint's rows in another order within groups of {PACKED}: packed in another nibble order"
            )
        return "is not the checkpoint's weight: swapped, or of another model"
    scale = 1.0 if folds else _scale(float(value.norm()), float(truth.norm()), size)
    if scale != 1.0:
        return f"is {scale:.3f} times the checkpoint's weight"
    columns = truth.shape[1] - truth.shape[1] % GROUP
    if size == 0 or columns == 0:
        return ""
    means = error[:, :columns].reshape(-1, GROUP).mean(1)
    spread = float(error[:, :columns].square().mean().sqrt())
    if spread and float(means.square().mean().sqrt()) > LEANING * spread:
        return "is shifted by whole groups against the checkpoint: zero points are off"
    return ""


def _off(value: Tensor, truth: Tensor) -> float:
    """Relative error of a vector."""
    size = float((value - truth).norm())
    return size / max(float(truth.norm()), 1e-30) if size else 0.0


def _scale(value: float, truth: float, error: float) -> float:
    """The s of A = s W + rest, from the norms of A, W and A - W; 1 where rounding explains it: it shortens W by about the error's share."""
    if truth == 0 or error == 0:
        return 1.0
    scale, share = (value**2 + truth**2 - error**2) / (2 * truth**2), (error / truth) ** 2
    return scale if SCALED + 2 * share < abs(scale - 1) else 1.0


def folds(source: WeightSource, checkpoint: CachedWeights) -> bool:
    """Whether scales are folded into the weights of an artifact: into the norms of any block, or into the linears of the first."""
    family, config = checkpoint.family, checkpoint.config
    stages = {stage.name: stage for stage in family.stages}
    for layer in range(config.layers):
        prefix, shapes = family.block.format(layer), family.block_shapes(config, layer)
        for pair in family.scale_pairs:
            producer, consumers = f"{prefix}{pair.producer}.weight", stages[pair.stage].linears
            consumer = f"{prefix}{consumers[0]}.weight"
            if len(shapes[producer]) > 1 and (layer > 0 or shapes[producer][0] != shapes[consumer][1]):
                continue  # as large as what is compared anyway, or rows that several heads share
            divided = _log_ratio(checkpoint.tensor(producer), source.tensor(producer), 1)
            if _rms(divided) > FOLDED:
                multiplied = _log_ratio(source.tensor(consumer), checkpoint.tensor(consumer), 0)
                if _rms(multiplied - divided) < 0.5 * _rms(divided):
                    return True
    return False


def _log_ratio(above: Tensor, below: Tensor, axis: int) -> Tensor:
    """Logarithm of the ratio of two weights [N, K], of their norms along `axis`; of two vectors, by element."""
    sizes = [value.float().abs() if value.dim() == 1 else value.float().norm(dim=axis) for value in (above, below)]
    return (sizes[0].clamp(min=1e-30) / sizes[1].clamp(min=1e-30)).log()


def _rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


def _scaled_like(truth: Tensor, value: Tensor) -> Tensor:
    """Rows and columns of `truth` scaled to fit `value` best, by alternating least squares."""
    fitted = truth
    for _ in range(2):
        for axis in (0, 1):
            scale = (fitted * value).sum(axis, keepdim=True) / fitted.square().sum(axis, keepdim=True).clamp(min=1e-30)
            fitted = fitted * scale
    return fitted


def _reordered(value: Tensor, truth: Tensor) -> bool:
    """Whether each row of the first groups looks most like another row of its group, and very much so."""
    count = min(len(truth) // PACKED, 4) * PACKED
    if count == 0:
        return False
    mine = torch.nn.functional.normalize(value[:count]).view(-1, PACKED, value.shape[1])
    theirs = torch.nn.functional.normalize(truth[:count]).view(-1, PACKED, truth.shape[1])
    best = (mine @ theirs.transpose(1, 2)).max(2)
    order = best.indices.unique(dim=0)  # of the rows in each group
    moved = len(order) == 1 and bool((order[0] != torch.arange(PACKED, device=order.device)).any())
    return moved and bool((best.values > ALIKE).float().mean() > 0.9)
