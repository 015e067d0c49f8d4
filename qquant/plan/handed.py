"""Bytes that ranks hand each other in a build, from shapes alone; W ranks, N x K weights of a stage, T tokens of b bytes a value.

    curvature    gradients at every linear's output to who sums them, G to the first: (W - 1) / W of T N b and of 2 bytes for each value of G
    head         hidden states to all, gradients back and once more, what the head sees to the first
    inputs       of a stage to the owners of its sums: (W - 1) / W of T K b for each of them, and once more without quantization
    sums         of an artifact's own stream, to all who solve the stage: 4 (W - 1) (2 K^2, and N K where residuals are summed)
    solved       by all ranks: targets, codes after every step, of coupled rows slopes, changes and gains; by one: values to all

Where ranks make artifacts apart, the first two are all of it. `tests.bench.ranks` counts what is really sent.
"""

from __future__ import annotations

from collections.abc import Sequence

from qquant.devices import POLICIES
from qquant.plan.plan import Plan
from qquant.ranks import dealt
from qquant.recipe import ArtifactSpec, Recipe
from qquant.source.checkpoint import Checkpoint

TILE = 2048  # as in `qquant.solve.drift`
ROWS = 2048  # as in `qquant.solve.backward`
APART = 3  # steps of a solver whose rows are found by ranks apart: rounding, GPTQ, descent


def handed(recipe: Recipe, checkpoint: Checkpoint, plan: Plan, kind: str, world: int, together: bool) -> int:
    """Bytes that all of `world` ranks send; `together`: all make every artifact."""
    config, family = checkpoint.config, checkpoint.family
    item = 2 if checkpoint.dtype == "BF16" else 4
    specs = [artifact.spec for artifact in plan.artifacts]
    curved = recipe.calibration.objective == "kl" and any(spec.feedback for spec in specs)
    measured = min(plan.tokens, recipe.calibration.gradient_tokens) if curved else 0
    part, others = (world - 1) / world, world - 1
    sent = measured * config.hidden * item * (3 * others + part)
    for layer in range(config.layers):
        shapes = family.linear_shapes(config, layer)
        for stage in family.stages:
            linears = [(shapes[name][0], shapes[name][1]) for name in stage.linears]
            for rows, _ in linears if measured else ():
                spans = [min(ROWS, rows - start) for start in range(0, rows, ROWS)]
                sent += part * (measured * item * rows + 2 * sum(span**2 for span in spans))
            if together:
                residual = config.hidden if stage.into_residual else 0
                of_stage = _Stage(linears, residual, plan.tokens * item, curved, POLICIES[kind].split, world)
                sent += of_stage.shared(specs) + sum(of_stage.own(spec) for spec in specs if spec.own_stream)
    return round(sent)


class _Stage:
    """What is sent for one stage."""

    def __init__(
        self, linears: Sequence[tuple[int, int]], residual: int, each: int, curved: bool, split: bool, world: int
    ) -> None:
        self.columns = linears[0][1]
        self.weights = sum(rows * columns for rows, columns in linears)
        self.residual = residual  # values of the residual stream that is written into, or 0
        self.each = each  # bytes of one value of all tokens
        self.curved, self.split, self.world = curved, split, world
        self.part, self.others = (world - 1) / world, world - 1

    def shared(self, specs: Sequence[ArtifactSpec]) -> float:
        """Bytes for artifacts that follow the 16-bit stream: inputs to the owner of H, codes to the first; H to all where scales are searched."""
        follow = [spec for spec in specs if spec.feedback and not spec.own_stream]
        scaled = any(spec.transforms for spec in specs)
        inputs = self.part * self.each * self.columns * bool(follow or scaled)
        return inputs + self.part * self.weights * len(follow) + 4 * self.others * self.columns**2 * scaled

    def own(self, spec: ArtifactSpec) -> float:
        """Bytes for an artifact with a stream of its own."""
        tiles = {
            f"rows {start}": min(TILE, self.columns - start) for start in range(0, self.columns, TILE)
        }  # by the names that owners are dealt by
        costs = {name: float(width) for name, width in tiles.items()} | {"gram": float(self.columns)}
        costs |= {"residuals": float(self.residual)} if self.residual else {}
        inputs = sum(
            self.columns + sum(tiles.get(name, 0) for name in hand) + 2 * self.residual * ("residuals" in hand)
            for hand in dealt(costs, self.world)
            if hand
        )
        summed = 4 * (2 * self.columns**2 + self.weights * bool(self.residual))
        if not self.split:
            return self.part * (self.each * inputs + summed) + 4 * self.others * self.weights
        coupled = spec.sweeps * self.curved
        solved = (4 + APART + (8 + 1) * coupled) * self.weights
        return self.part * (self.each * inputs + 4 * coupled * self.weights) + self.others * (summed + solved)
