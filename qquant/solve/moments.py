"""What is kept of the calibration pass besides the artifacts: the second moments of every stage's input.

    DIR/.partial/moments-<key>/block-<n>    sums of squares [K] of each stage, and the number of tokens, one file a block:
                                            sha256 of the rest | safetensors

They become the importance matrix that a build leaves in DIR/calibration for other tools. A block's file is written before any
artifact's block is journalled, so an interrupted build finds them again. Of several ranks the first keeps them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save

from qquant.algorithms.gram import Gram
from qquant.disk.writes import make_folder, write_synced
from qquant.errors import InputError
from qquant.formats.gguf.imatrix import Imatrix, mended
from qquant.ranks import ALONE, Ranks
from qquant.source.checkpoint import Checkpoint


@dataclass(frozen=True)
class Moments:
    """Second moments by block; `imatrix` is an importance matrix of the user's, used instead of the measured one.

    `folder` is where `ranks`, who walk the same blocks, keep what they measure.
    """

    folder: Path
    imatrix: Imatrix | None = None
    ranks: Ranks = ALONE

    def path(self, layer: int) -> Path:
        """The file of block `layer`."""
        return self.folder / f"block-{layer}"

    def lacks(self, layer: int) -> bool:
        """Whether this rank should measure a block's."""
        return self.ranks.first and self.load(layer) is None

    def save(self, layer: int, grams: Mapping[str, Gram]) -> None:
        """Keep the sums of squares of a block's stage inputs, on the first rank."""
        if not self.ranks.first:
            return
        make_folder(self.folder)
        tensors = {stage: mended(gram.squares.cpu()).contiguous() for stage, gram in grams.items()}
        tokens = torch.tensor(next(iter(grams.values())).tokens)
        content = save(tensors | {"tokens": tokens})
        write_synced(self.path(layer), hashlib.sha256(content).digest() + content)

    def load(self, layer: int) -> dict[str, torch.Tensor] | None:
        """What was kept of a block; None if nothing was, or if it is not what was written."""
        if not self.path(layer).is_file():
            return None
        content = self.path(layer).read_bytes()
        return load(content[32:]) if hashlib.sha256(content[32:]).digest() == content[:32] else None

    def importance(self, name: str, gram: Gram) -> torch.Tensor:
        """The importance of each input of a linear (GGUF name): the given one, else the measured one."""
        stated = self.imatrix.importance(name) if self.imatrix else None
        if stated is None:  # as readers of the exported matrix will compute it
            stated = mended(gram.squares.cpu()) / max(1, gram.tokens)
        return stated.to(gram.matrix)

    def collect(self, checkpoint: Checkpoint, dataset: str) -> Imatrix | None:
        """The importance matrix of the whole model; None if a block was not measured (everything was built before).

        None, too, for a family that llama.cpp has no names for.
        """
        family, sums, counts = checkpoint.family, {}, {}
        if family.gguf is None:
            return None
        for layer in range(checkpoint.config.layers):
            stored = self.load(layer)
            if stored is None:
                return None
            for stage in family.stages:
                for linear in stage.linears:
                    name = family.gguf_name(f"{family.block.format(layer)}{linear}.weight")
                    sums[name], counts[name] = stored[stage.name], int(stored["tokens"])
        return Imatrix(sums, counts, dataset)


def require_fit(imatrix: Imatrix, checkpoint: Checkpoint, path: Path) -> None:
    """Raise InputError unless `imatrix` has an entry of the right width for every linear of the checkpoint."""
    family = checkpoint.family
    for layer in range(checkpoint.config.layers):
        for linear, (_, columns) in family.linear_shapes(checkpoint.config, layer).items():
            name = family.gguf_name(f"{family.block.format(layer)}{linear}.weight")
            importance = imatrix.importance(name)
            if importance is None or len(importance) != columns:
                has = "no entry" if importance is None else f"{len(importance)} values"
                raise InputError(f"{path}: {has} for {name}, which has {columns} inputs; was it made from this model?")


def write_imatrix(importance: Imatrix | None, folder: Path) -> None:
    """Leave the importance matrix beside the calibration tokens, in both formats that other tools read."""
    if importance is not None:
        write_synced(folder / "imatrix.gguf", importance.gguf_bytes())
        write_synced(folder / "imatrix.dat", importance.dat_bytes())
