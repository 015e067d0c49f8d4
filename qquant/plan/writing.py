"""What it costs that the checkpoint writes its calibration itself: positions at which every weight is used, memory, and a line of both."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qquant.calibration.draw import allot
from qquant.calibration.openings import rows_at_once
from qquant.recipe import Recipe
from qquant.source.checkpoint import Checkpoint
from qquant.source.safetensors_file import SIZES


@dataclass(frozen=True)
class PlannedWriting:
    """Samples that the checkpoint will write."""

    texts: int  # samples of exactly `length` tokens
    chats: int  # of at most as many
    length: int
    rows: int  # at a time
    passes: int  # positions, of all batches: each uses every weight once
    cache: int  # bytes of keys and values of a batch
    weights: int  # bytes of the checkpoint's

    @property
    def tokens(self) -> int:
        """The largest number of tokens that are written."""
        return (self.texts + self.chats) * self.length

    def __str__(self) -> str:
        parts = [f"{self.texts} texts of {self.length:,} tokens"] if self.texts else []
        parts += [f"{self.chats} chats of at most {self.length:,} tokens"] if self.chats else []
        read = f"{self.passes:,} passes over {self.weights / 1e9:.2g} GB of weights, {self.rows} samples at a time"
        where = "they are read from disk in every pass where the memory that is free holds less than twice their bytes"
        return f"{' and '.join(parts)}, written by the checkpoint itself before it is quantized: {read}; {where}"


def planned_writing(recipe: Recipe, checkpoint: Checkpoint) -> PlannedWriting | None:
    """What the recipe's generated sources ask for, where no other source has too little; None if there are none."""
    asked, config = recipe.calibration, checkpoint.config
    counts = allot([source.weight for source in asked.sources], [asked.samples] * len(asked.sources), asked.samples)
    written = [(source.kind, count) for source, count in zip(asked.sources, counts, strict=True) if source.generated]
    if not written:
        return None
    rows = rows_at_once(config, asked.length)
    batches = sum(math.ceil(count / rows) for _, count in written)
    most = min(rows, max(count for _, count in written))
    width = 4 if checkpoint.dtype == "F32" else 2
    cache = 8 * config.layers * config.kv_heads * config.head_dim * asked.length * most
    weights = width * checkpoint.family.parameters(config)
    texts, chats = (sum(count for kind, count in written if kind == which) for which in ("text", "chat"))
    return PlannedWriting(texts, chats, asked.length, most, batches * (asked.length - 1), cache, weights)


def writing_bytes(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """Bytes that writing takes where no weight is kept: one block and a batch's keys and values, in float32."""
    planned = planned_writing(recipe, checkpoint)
    if planned is None:
        return 0
    family, config = checkpoint.family, checkpoint.config
    blocks = (sum(map(math.prod, family.linear_shapes(config, layer).values())) for layer in range(config.layers))
    return planned.cache + (4 + SIZES[checkpoint.dtype]) * max(blocks) + 32 * planned.rows * config.vocab
