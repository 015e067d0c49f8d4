"""One decoder block during the walk: its weights, what is known of it, and what an artifact wants of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from qquant.algorithms.awq import Transformed, awq
from qquant.algorithms.gram import Gram, NotPositiveDefiniteError
from qquant.algorithms.grid import Grid
from qquant.artifact.draft import Draft
from qquant.families import Stage
from qquant.families.decoder import Block
from qquant.formats import FORMATS
from qquant.progress import Progress, Quiet
from qquant.solve.curvature import BlockCurvature
from qquant.solve.fused import block_of
from qquant.solve.solver import Rows, rounding_of
from qquant.solve.stream import Piece
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import without_padding


@dataclass(frozen=True)
class View:
    """One block of the checkpoint, and what is known of it."""

    checkpoint: Checkpoint
    layer: int
    weights: Mapping[str, Tensor]  # in the checkpoint's dtype
    dtype: torch.dtype  # of activations
    curvature: BlockCurvature | None
    progress: Progress = field(default_factory=Quiet)

    def at(self, draft: Draft, stage: Stage) -> None:
        """Say that `stage` is solved for an artifact now."""
        self.progress.at(f"{draft.plan.name} {stage.name}")

    def block(self, weights: Mapping[str, Tensor] | None = None) -> Block:
        """The block with its own weights, or with others."""
        source = without_padding(self.checkpoint)
        return block_of(source.family, source.config, weights or self.weights, self.dtype)

    def add(self, gram: Gram, stage: str, x: Tensor, piece: Piece) -> None:
        """Add the input [..., T, K] of a stage for a piece of the samples to its Gram matrix, weighted as `token_weights` says."""
        gram.add(x.flatten(0, -2), self.token_weights(stage, piece, x.shape[-2]))

    def token_weights(self, stage: str, piece: Piece, length: int) -> Tensor | None:
        """What an error at each token of samples of `length` costs, float32 [B T]; None, which is 1, where no gradient was measured.

        Measured weights have mean 1, so that samples of both kinds count alike. Means of the measured ones by position
        predict no better (tests/bench/LOG.md).
        """
        measured = self.curvature.weights[stage] if self.curvature else {}
        weights_of = [measured.get(sample) for sample in piece]
        one = next((weights for weights in weights_of if weights is not None), None)
        if one is None or len(piece) == 1:
            return one
        return torch.cat([one.new_ones(length) if weights is None else weights for weights in weights_of])

    def grams(self, device: torch.device, matrices: bool = True) -> dict[str, Gram]:
        """Empty accumulators, by stage; without `matrices` of the moments of single channels only."""
        return {stage: Gram.zeros(columns, device, matrices) for stage, columns in self.inputs.items()}

    @property
    def inputs(self) -> Mapping[str, int]:
        """Columns of the input of each stage, without padding."""
        return self.checkpoint.family.inputs(without_padding(self.checkpoint).config, self.layer)

    def rows(self, transformed: Transformed) -> Rows:
        """The curvature of every linear's rows after a transform; nothing where it was not measured."""
        return self.curvature.rows.divided(transformed.divided) if self.curvature else {}


def copies(draft: Draft, checkpoint: Checkpoint) -> bool:
    """Whether an artifact stores the embedding as numbers, and not as codes that have to be found."""
    return draft.plan.stored[checkpoint.family.embedding].numbers


def transform(view: View, draft: Draft, grams: Mapping[str, Gram]) -> Transformed:
    """The block with scales folded into the operators before its linears, where the artifact asks for it."""
    checkpoint, spec, prefix = view.checkpoint, draft.plan.spec, view.checkpoint.family.block.format(view.layer)
    if not spec.transforms:
        return Transformed(dict(view.weights), dict(grams))

    def grid_for(linear: str, shape: tuple[int, int]) -> Grid | None:
        return FORMATS[spec.format].grid_for(draft.plan, f"{prefix}{linear}.weight", shape[1])

    scaled = partial(awq, checkpoint.family, checkpoint.config, view.weights, grams, grid_for, spec.fold_points)
    if not spec.feedback:
        return scaled()
    try:
        return scaled(rounding_of(spec.damping))
    except NotPositiveDefiniteError:  # what is written will be rounded too
        return scaled()
