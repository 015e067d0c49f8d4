"""Calibration text that the checkpoint writes itself: every sample a position at a time, each token a draw from its own prediction.

    for batch of rows:  for position:  x = embedding of the rows' tokens here
                                       for block: x = block(x), keys and values join the cache
                                       p = softmax(head(x));  next token: the opening's while there is one, else drawn from p
    draw    u = hash(seed, source, row, position) / 2^53,   token = min {t : p_0 + ... + p_t > u total}

The draw depends on no generator of a library, and a row on no other. All rows stand at the same position, so nothing is padded or
masked. Blocks, embedding and head are kept where the device has room for them; where not they are read at every position, in the memory
of one block, with the same arithmetic and so the same tokens: how many positions that is, `qquant plan` says. On the CPU in float32.

What was written is kept in a folder by the hash of what was asked, a file a batch, so that a build that goes on, or is made again, has
the same tokens without writing them again. Left out: speculation, and batches that close up when some answers have ended.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qquant.calibration.draw import rank
from qquant.calibration.openings import Writer, Writing, rows_at_once
from qquant.devices import free_memory
from qquant.disk.writes import make_folder, write_synced
from qquant.errors import NumericalError
from qquant.families import Family, ModelConfig
from qquant.families.decoder import HEAD_ROWS, Block, embed, rms_norm, rotary, rotate, source_block
from qquant.families.linear import linear
from qquant.families.weights import WeightSource
from qquant.progress import Progress
from qquant.ranks import Ranks
from qquant.source.checkpoint import Checkpoint

KEEP = 0.5  # of the memory that is free
WRITTEN = "generated"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Cache:
    """Keys and values of one batch of rows, which all stand at `position`."""

    def __init__(self, config: ModelConfig, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.layers, rows, config.kv_heads, length, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.cosine, self.sine = rotary(config, length, device, dtype)
        self.position = 0


class _WritingBlock(Block):
    """A block on one token of each row, [rows, features]."""

    cache: Cache
    layer: int

    @classmethod
    def of(cls, block: Block, cache: Cache, layer: int) -> _WritingBlock:
        """`block`, with what was read before."""
        twin = cls(block.family, block.config, block.weights, block.dtype)
        twin.cache, twin.layer = cache, layer
        return twin

    def attend(self, heads: Sequence[Tensor]) -> Tensor:
        """Attention of each row over its own past -> [rows, heads * head_dim]."""
        config, cache, at = self.config, self.cache, self.cache.position
        query, key, value = (x.view(len(x), -1, 1, config.head_dim) for x in heads)
        cosine, sine = cache.cosine[at], cache.sine[at]
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        keys[:, :, at : at + 1], values[:, :, at : at + 1] = rotate(key, cosine, sine), value
        past = keys[:, :, : at + 1], values[:, :, : at + 1]
        mixed = F.scaled_dot_product_attention(
            rotate(query, cosine, sine), *past, enable_gqa=config.heads != config.kv_heads
        )
        return mixed.reshape(len(mixed), -1)


@dataclass
class Weights:
    """The weights of `source` in `dtype` on `device`, kept if there is room for all, else read whenever they are asked for."""

    source: WeightSource
    device: torch.device
    dtype: torch.dtype
    keeps: bool
    blocks: dict[int, Block] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, source: WeightSource, dtype: torch.dtype, device: torch.device) -> Weights:
        """The weights of `source`, kept where that takes at most KEEP of the memory that is free."""
        size = dtype.itemsize * sum(map(math.prod, source.family.shapes(source.config).values()))
        return cls(source, device, dtype, keeps=size <= KEEP * free_memory(device))

    @property
    def family(self) -> Family:
        """The family of the model."""
        return self.source.family

    def block(self, layer: int) -> Block:
        """A decoder block."""
        if layer in self.blocks:
            return self.blocks[layer]
        block = source_block(self.source, layer, self.dtype, self.device)
        if self.keeps:
            self.blocks[layer] = block
        return block

    def embedded(self, ids: Tensor) -> Tensor:
        """The embeddings [rows, hidden] of ids [rows]."""
        if not self.keeps:
            return embed(self.source, ids, self.dtype).to(self.device)
        return self._table(self.family.embedding)[ids.to(self.device)]

    def logits(self, hidden: Tensor, vocabulary: int) -> Tensor:
        """Float32 logits [rows, vocabulary] of the last block's output [rows, hidden], from slices of the head."""
        family, config = self.family, self.source.config
        norm = self.source.tensor(family.final_norm).to(device=self.device, dtype=self.dtype)
        x = rms_norm(hidden, norm, config.epsilon)
        parts = []
        for start in range(0, vocabulary, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, vocabulary)
            part = (
                self._table(family.embedding if config.tied else family.head)[start:stop]
                if self.keeps
                else self.source.rows(family.head, start, stop).to(device=self.device, dtype=self.dtype)
            )
            parts.append(linear(x, part).float())
        return torch.cat(parts, 1)

    def _table(self, name: str) -> Tensor:
        if name not in self.tables:
            self.tables[name] = self.source.tensor(name).to(device=self.device, dtype=self.dtype)
        return self.tables[name]


def drawn(logits: Tensor, uniform: Sequence[float]) -> list[int]:
    """One token for each row of logits [rows, vocabulary], by the inverse of its distribution at a number in [0, 1)."""
    sums = logits.double().cpu().softmax(1).cumsum(1)
    at = torch.tensor(uniform, dtype=torch.float64)[:, None] * sums[:, -1:]
    last = (sums < sums[:, -1:]).sum(1)  # the last token that has a chance at all
    return torch.minimum(torch.searchsorted(sums, at, right=True)[:, 0], last).tolist()


def uniforms(writing: Writing, rows: Sequence[int], position: int) -> list[float]:
    """Numbers in [0, 1) that depend on nothing but seed, source, row and position."""
    return [(rank(writing.seed, f"{writing.label}:{row}", position) >> 11) / 2**53 for row in rows]


@torch.inference_mode()
def write_rows(weights: Weights, writing: Writing, rows: Sequence[int], progress: Progress) -> list[list[int]]:
    """What the model makes of the prompts of `rows`, at most `writing.length` tokens each, with the prompt.

    Raises:
        NumericalError: logits are not finite.
    """
    config, length = weights.source.config, writing.length
    ids = [list(writing.prompts[row]) for row in rows]
    over, stops = [False] * len(rows), set(writing.stops)
    cache = Cache(config, len(rows), length, weights.device, weights.dtype)
    for position in range(length - 1):
        x = weights.embedded(torch.tensor([row[min(position, len(row) - 1)] for row in ids]))
        for layer in range(config.layers):
            x = _WritingBlock.of(weights.block(layer), cache, layer).forward(x)
        cache.position += 1
        progress.advance("generate", rows[0] * length + position * len(rows), len(writing.prompts) * length)
        progress.check_stop()
        due = [index for index, row in enumerate(ids) if len(row) == position + 1 and not over[index]]
        if not due:
            continue
        logits = weights.logits(x[due], writing.vocabulary)
        _require_finite(logits, position)
        tokens = drawn(logits, uniforms(writing, [rows[index] for index in due], position))
        for index, token in zip(due, tokens, strict=True):
            ids[index].append(token)
            over[index] = token in stops
        if all(over):
            break
    return ids


def _require_finite(logits: Tensor, position: int) -> None:
    if not bool(logits.isfinite().all()):
        raise NumericalError(
            f"calibration.sources: the checkpoint's logits after {position + 1} tokens are not finite, so nothing can be drawn from "
            "them. Read it as bfloat16 (--set dtype=bfloat16), or calibrate on texts"
        )


@dataclass(frozen=True)
class Author:
    """A checkpoint that writes; what it wrote is kept in `folder`/generated under the hash of all that it depends on."""

    source: Checkpoint
    versions: Mapping[str, str]  # of what computes: tokens depend on them
    folder: Path
    device: torch.device
    progress: Progress

    def __call__(self, writing: Writing) -> list[list[int]]:
        """The samples, written now or before.

        Raises:
            NumericalError: logits are not finite.
            StoppedError: somebody asked for an end; the batches so far are kept.
        """
        asked = json.dumps([writing.sha256, self.source.content_hash(), dict(self.versions)], sort_keys=True)
        key, count = hashlib.sha256(asked.encode()).hexdigest(), len(writing.prompts)
        dtype = torch.float32 if self.device.type == "cpu" else DTYPES[self.source.dtype]
        step, samples = rows_at_once(self.source.config, writing.length), list[list[int]]()
        weights: Weights | None = None
        folder = self.folder / WRITTEN
        make_folder(folder)
        for start in range(0, count, step):
            path = folder / f"{key[:16]}-{start:05}.json"
            rows = range(start, min(start + step, count))
            written = _kept(path, key, len(rows))
            if written is None:
                weights = weights or Weights.of(self.source, dtype, self.device)
                written = write_rows(weights, writing, rows, self.progress)
                write_synced(path, _content(key, written))
            samples += written
        self.progress.advance("generate", count * writing.length, count * writing.length)
        return samples

    def for_all(self, ranks: Ranks) -> Writer:
        """The author on the first rank, for all of them: each has the tokens that were drawn there."""
        return lambda writing: ranks.once(lambda: self(writing))


def _content(key: str, samples: list[list[int]]) -> bytes:
    digest = hashlib.sha256(json.dumps(samples).encode()).hexdigest()
    return json.dumps({"asked": key, "sha256": digest, "samples": samples}).encode()


def _kept(path: Path, key: str, count: int) -> list[list[int]] | None:
    """The samples in a file of an earlier build; None if it is not there, or not what was written."""
    try:
        said = json.loads(path.read_bytes())
        samples: list[list[int]] = said["samples"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    intact = len(samples) == count and _content(key, samples) == path.read_bytes()
    return samples if intact else None
