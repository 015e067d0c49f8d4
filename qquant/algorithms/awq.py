"""AWQ: scale input channels up before rounding, and the operator before them down (Lin et al. 2023, arXiv 2306.00978).

For every scale pair (norm -> q,k,v; v -> o; norm -> gate,up; up -> down) choose s > 0 per input channel,

    s = mean|x|^r / (mean|w|^(1-r) + 1e-4),  normalised by sqrt(max s * min s),  r on a grid in [0, 1),

by the output error of the weights as they will be dequantized, tr(E H E') with E = Q(W s) / s - W: the loss over all calibration
tokens, from the Gram matrix alone. mean|w| is relative to the largest |w| of a group of the grid. r = 0 without the weight term
(s = 1) is always among the candidates, so a pair is left alone where scaling does not pay.

Where the scaled weights will be solved and not just rounded, Q is a solve. Its loss is foreseen for every candidate from one rounding,
sum_j c_j (q_j - w_j)^2 with c_j what a squared error of column j costs the solver (c_j / s_j^2 after scaling), and the FINALISTS with
the least, and s = 1, are solved. Losses are of about ROWS rows of each matrix.

The function of the block stays the same: the producer's rows and bias (or the norm's weight) are divided by s. A norm is stored
in 16 bits, so s is re-derived from the rounded norm and the product stays exact. With grouped-query attention a value channel
feeds several query heads, so s is tied over them. Left out: AutoAWQ's clipping by output error; the grid's own weighted search
over scales takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qquant.algorithms.gram import Gram
from qquant.algorithms.grid import Grid, nearest, value_of
from qquant.families import Family, ModelConfig, ScalePair, Stage

GridFor = Callable[[str, tuple[int, int]], Grid | None]  # None: the linear stays as it is
Weights = Mapping[str, Tensor]  # by linear, float32 [N, K]
FINALISTS = 3
ROWS = 1024  # of a matrix that scales are compared by, about: every so many of its rows


@dataclass(frozen=True)
class Rounding:
    """How weights will be rounded for inputs of some Gram matrix."""

    cost: Tensor  # of a squared error, by column, float32 [K]
    solve: Callable[[Weights, Mapping[str, Grid]], Weights]  # the values that are written


@dataclass(frozen=True)
class ScaleSearch:
    """What is tried, and on which grids."""

    grid_for: GridFor
    ratios: int  # grid points of r
    rounding: Callable[[Gram], Rounding] | None  # None: to nearest


@dataclass(frozen=True)
class Choice:
    """What the search found for one stage."""

    stage: str
    ratio: float | None  # None: not scaled
    loss: float  # relative output error of what the search rounded
    unscaled: float  # the same without scaling


@dataclass
class Transformed:
    """A block whose function is unchanged, and the statistics of its new stage inputs."""

    weights: dict[str, Tensor]  # by name in the block; float32 where they changed
    grams: dict[str, Gram]
    choices: tuple[Choice, ...] = ()
    divided: dict[str, Tensor] = field(default_factory=dict)  # producer -> what its rows were divided by


@dataclass(frozen=True)
class Tie:
    """Input channels [heads, groups, dim] of a stage that are fed by output channels [heads, dim] of its producer."""

    heads: int
    groups: int
    dim: int

    def tied(self, channels: Tensor) -> Tensor:
        """Mean over the input channels that share a producer channel."""
        return channels.view(self.heads, self.groups, self.dim).mean(1).flatten()

    def spread(self, producer: Tensor) -> Tensor:
        """A value per producer channel, repeated for every input channel that it feeds."""
        return producer.view(self.heads, 1, self.dim).expand(-1, self.groups, -1).flatten()


def awq(
    family: Family,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    grams: Mapping[str, Gram],
    grid_for: GridFor,
    ratios: int,
    rounding: Callable[[Gram], Rounding] | None = None,
) -> Transformed:
    """Scale every pair of a block; weights by name in the block, one Gram per stage; no `rounding`: to nearest.

    Norm weights come back as values of their own dtype, so that storing them changes nothing.
    """
    scales = ScaleSearch(grid_for, ratios, rounding)
    new = Transformed({name: value.float() for name, value in weights.items()}, dict(grams))
    for pair in family.scale_pairs:
        stage = family.stage(pair.stage)
        tie = Tie(1, 1, len(grams[stage.name].absolute))
        if pair.tied_over_query_heads:
            tie = Tie(config.kv_heads, config.heads // config.kv_heads, config.head_dim)
        linears = {linear: new.weights[f"{linear}.weight"] for linear in stage.linears}
        if any(grid_for(linear, (len(weight), weight.shape[1])) is None for linear, weight in linears.items()):
            continue
        scale, choice = _best(stage, linears, grams[stage.name], scales, tie)
        new.choices += (choice,)
        if choice.ratio is not None:
            _apply(new, pair, stage, scale, tie, weights)
    return new


def _apply(
    new: Transformed, pair: ScalePair, stage: Stage, scale: Tensor, tie: Tie, original: Mapping[str, Tensor]
) -> None:
    """Divide the producer by `scale` (one value per producer channel), multiply the stage's columns by it."""
    norm = f"{pair.producer}.weight"
    if original[norm].dim() == 1:
        divided = (new.weights[norm] / scale).to(original[norm].dtype).float()
        scale = torch.where(divided == 0, torch.ones_like(scale), new.weights[norm] / divided)
        new.weights[norm] = torch.where(divided == 0, new.weights[norm], divided)
    else:
        new.weights[norm] = new.weights[norm] / scale[:, None]
        new.divided[pair.producer] = scale
        bias = f"{pair.producer}.bias"
        if bias in new.weights:
            new.weights[bias] = new.weights[bias] / scale
    spread = tie.spread(scale)
    for linear in stage.linears:
        new.weights[f"{linear}.weight"] = new.weights[f"{linear}.weight"] * spread
    new.grams[stage.name] = new.grams[stage.name].scaled(spread)


def _best(stage: Stage, weights: Weights, gram: Gram, search: ScaleSearch, tie: Tie) -> tuple[Tensor, Choice]:
    """The scale [K] of the producer's channels with the least loss, and what is known of it."""
    tried = {linear: search.grid_for(linear, (weight.shape[0], weight.shape[1])) for linear, weight in weights.items()}
    grids = {linear: grid for linear, grid in tried.items() if grid is not None}
    candidates = _candidates(weights, grids, gram, search.ratios, tie)
    some = {linear: weight[:: max(1, len(weight) // ROWS)] for linear, weight in weights.items()}
    energy = sum(float(gram.energy(weight).sum()) for weight in some.values()) or 1.0
    spread = [tie.spread(scale) for _, scale in candidates]
    if search.rounding is None:
        values = (_nearest(_times(some, scale), grids, gram.importance / scale.square()) for scale in spread)
        losses = [_loss(each, some, gram, scale) / energy for each, scale in zip(values, spread, strict=True)]
    else:
        kept, solved = _finalists(some, grids, gram, search.rounding, spread)
        candidates, losses = [candidates[index] for index in kept], [loss / energy for loss in solved]
    best = losses.index(min(losses))
    return candidates[best][1], Choice(stage.name, candidates[best][0], losses[best], losses[0])


def _finalists(
    weights: Weights,
    grids: Mapping[str, Grid],
    gram: Gram,
    rounding_of: Callable[[Gram], Rounding],
    scales: Sequence[Tensor],
) -> tuple[list[int], list[float]]:
    """The first of `scales`, none, and FINALISTS of the others, by their places, and what they lose solved."""
    rounding = rounding_of(gram)
    foreseen = {
        index: _foreseen(weights, grids, rounding.cost, scale) for index, scale in enumerate(scales) if index > 0
    }
    kept = sorted(foreseen, key=foreseen.__getitem__)[:FINALISTS]
    losses = [_loss(rounding.solve(weights, grids), weights, gram, scales[0])]
    del rounding  # one factor at a time
    for scale in (scales[index] for index in kept):
        values = rounding_of(gram.scaled(scale)).solve(_times(weights, scale), grids)
        losses.append(_loss(values, weights, gram, scale))
    return [0, *kept], losses


def _candidates(
    weights: Weights, grids: Mapping[str, Grid], gram: Gram, ratios: int, tie: Tie
) -> list[tuple[float | None, Tensor]]:
    """(r, s), that without scaling first."""
    activation, magnitude = tie.tied(gram.mean_absolute), tie.tied(_relative_magnitude(weights, grids))
    candidates: list[tuple[float | None, Tensor]] = [(None, torch.ones_like(activation))]
    for point in range(ratios):
        ratio = point / ratios
        scale = (activation.pow(ratio) / (magnitude.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        candidates.append((ratio, torch.where(torch.isfinite(scale) & (activation > 0), scale, torch.ones_like(scale))))
    return candidates


def _relative_magnitude(weights: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> Tensor:
    sums = []
    for linear, weight in weights.items():
        grouped = weight.abs().view(len(weight), -1, grids[linear].width)
        sums.append((grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).view_as(weight).sum(0))
    return torch.stack(sums).sum(0) / sum(len(weight) for weight in weights.values())


def _nearest(weights: Weights, grids: Mapping[str, Grid], importance: Tensor) -> dict[str, Tensor]:
    values = {}
    for linear, weight in weights.items():
        spacing = grids[linear].fit(weight, importance).step_and_offset()
        values[linear] = value_of(nearest(weight, *spacing, grids[linear]), *spacing, grids[linear])
    return values


def _foreseen(weights: Weights, grids: Mapping[str, Grid], cost: Tensor, scale: Tensor) -> float:
    scaled, importance = _times(weights, scale), cost / scale.square()
    values = _nearest(scaled, grids, importance)
    return sum(float(((values[linear] - scaled[linear]).square() @ importance).sum()) for linear in weights)


def _times(weights: Weights, scale: Tensor) -> dict[str, Tensor]:
    return {linear: weight * scale for linear, weight in weights.items()}


def _loss(values: Weights, weights: Weights, gram: Gram, scale: Tensor) -> float:
    """The output error of `values` that stand for weights times `scale`."""
    return sum(float(gram.energy(values[linear] / scale - weight).sum()) for linear, weight in weights.items())
