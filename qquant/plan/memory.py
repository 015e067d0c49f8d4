"""How much memory and scratch disk a build takes, from shapes alone.

Memory (host, or GPU with `--device cuda`): the process itself, one block twice in its own dtype (and in float32 where AWQ transforms
it), four Gram matrices and one factorisation of the widest, a few copies of the largest stage, and hidden states of every calibration
token. It does not depend on the number of layers. Scratch, for `objective: kl`: the inputs of all blocks for the tokens that curvature
is measured on, which give way to the curvature itself.
"""

from __future__ import annotations

import math

from qquant.plan.writing import writing_bytes
from qquant.recipe import Recipe
from qquant.source.checkpoint import Checkpoint
from qquant.source.safetensors_file import SIZES

PROCESS = 600 << 20  # bytes: interpreter, torch, tokenizer
ROWS = 2048  # as in `qquant.solve.curvature`, which needs torch


def build_memory(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """Bytes at the peak of a build."""
    config, family = checkpoint.config, checkpoint.family
    layers = range(config.layers)
    shapes = family.matrices(config)
    widest = max(columns for _, columns in shapes.values())
    grams = max(sum(columns * columns for columns in family.inputs(config, layer).values()) for layer in layers)
    block = max(sum(map(math.prod, family.linear_shapes(config, layer).values())) for layer in layers)
    tallest = max(family.stage_parameters(config, layer, stage) for layer in layers for stage in family.stages)
    tokens = recipe.calibration.samples * recipe.calibration.length
    stream = tokens * config.hidden * (2 if checkpoint.dtype == "BF16" else 4)
    sample = recipe.calibration.length * config.intermediate * 4 * 4
    solve = 4 * (grams + 4 * widest * widest + 6 * tallest)
    rows = 8 * max(count * min(count, ROWS) for count, _ in shapes.values())
    if recipe.calibration.objective != "kl":
        rows = 0
    transforms = any(spec.transforms for spec in recipe.artifacts)
    own = [spec.eight_bit for spec in recipe.artifacts if spec.own_stream]
    lockstep = stream // config.hidden * (8 * config.hidden + config.intermediate) if own else 0
    if any(own):  # float32, and a 16-bit stream beside it in float32 too
        lockstep = 2 * lockstep + 8 * tokens * config.hidden
    weights = block * (SIZES[checkpoint.dtype] * 2 + 4 * transforms + 8 * any(own))
    solving = stream + sample + solve + rows + lockstep + weights
    return PROCESS + max(solving, writing_bytes(recipe, checkpoint))


def scratch_bytes(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """Bytes on disk, while the build runs, of block inputs and of the curvature that is measured with them."""
    if recipe.calibration.objective != "kl":
        return 0
    config = checkpoint.config
    calibration = recipe.calibration
    tokens = max(calibration.length, min(calibration.curvature_tokens, calibration.samples * calibration.length))
    rows = max(
        sum(2 * count * min(count, ROWS) for count, _ in checkpoint.family.linear_shapes(config, layer).values())
        for layer in range(config.layers)
    )
    states = tokens * config.hidden * (2 if checkpoint.dtype == "BF16" else 4)
    tables = 8 * config.hidden * config.hidden + 8 * config.vocab
    return config.layers * (max(states, rows) + 16 * tokens) + rows + tables
