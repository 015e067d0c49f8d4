"""Answers of a model whose weights are dequantized, for many prompts at once: the arithmetic of `qquant.families.decoder`, with a cache.

    read     prompts into a cache of keys and values that fits the whole answer: what all begin with once, for all rows of the
             cache; then the rest of each, padded on the left, [B, T] tokens at once
    step     one token of each, until all have stopped or the budget is used
    draft    an answer that is guessed already is read in one pass: as far as the model would have chosen the same tokens, it
             is the answer; from the first other choice on, steps. The choices are those of the model and never the guess.

A pad never counts: it is a key for itself only, and positions go on after it as if it were not there.
On the CPU keys and values are held in float32, rounded as the dtype rounds them, and a float16 product of several rows is made in float32
from the float16 weights and rounded once, as hardware with float16 products does it; torch's own is several times slower where the
processor has none. Sums are float32 in either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qquant.families.decoder import Block, rms_norm, rotary, rotate, source_block
from qquant.families.forward import through
from qquant.families.linear import linear
from qquant.families.weights import WeightSource

FEW = 2  # rows up to which a float16 product on the CPU is torch's
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Answered:
    """An answer: its ids with the stop token, and whether all logits it was chosen from were finite."""

    ids: list[int]
    finite: bool


class PromptDecoder:
    """All weights of a source in one dtype on a device."""

    def __init__(self, source: WeightSource, dtype: torch.dtype, device: torch.device) -> None:
        self.family, self.config, self.dtype, self.device = source.family, source.config, dtype, device
        self.blocks = [source_block(source, layer, dtype, device) for layer in range(source.config.layers)]
        names = {self.family.embedding, self.family.final_norm, self.head}
        self.weights = {name: source.tensor(name).to(device=device, dtype=dtype) for name in names}

    @property
    def head(self) -> str:
        """The name of the output head's weights."""
        return self.family.embedding if self.config.tied else self.family.head

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Sequence[int]], length: int, chooser: Chooser, draft: Sequence[int] = ()
    ) -> list[Answered]:
        """Up to `length` new tokens after each prompt; a draft is for one prompt and a chooser that draws nothing."""
        draft = draft[: length - 1]  # the last token of an answer is read by nothing
        cache = _Cache(self, prompts, length)
        if cache.shared:
            self._read(torch.tensor([prompts[0][: cache.shared]]), cache, 1)
        logits = self._read(cache.rest(draft), cache, 1 + len(draft))
        talk = _Talk(len(prompts), chooser)
        for position in range(len(draft)):
            if talk.add(logits[:, position]) != [draft[position]] or talk.over:
                cache.end -= len(draft) - position
                break
        else:
            talk.add(logits[:, -1])
        while not talk.over and talk.length < length:
            logits = self._read(torch.tensor(talk.last)[:, None], cache, 1)
            talk.add(logits[:, -1])
        return talk.answers()

    def _read(self, ids: Tensor, cache: _Cache, kept: int) -> Tensor:
        """Float32 logits [B, kept, vocabulary] after the last `kept` of ids [B, T], which join the cache."""
        family, config = self.family, self.config
        cache.place(ids.shape[1])
        x = self.weights[family.embedding][ids.to(self.device)]
        for layer in range(config.layers):
            x = through(family.forward(_AnsweringBlock(self, cache, layer), x))
        h = rms_norm(x[:, -kept:], self.weights[family.final_norm], config.epsilon)
        return self.product(h, self.weights[self.head]).float()

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product with W', plus b, of x [B, T, in]."""
        if x.dtype != torch.float16 or x.device.type != "cpu" or x.shape[0] * x.shape[1] <= FEW:
            return linear(x, weight, bias)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


class _AnsweringBlock(Block):
    """One block on [B, T, features], with the cache."""

    def __init__(self, model: PromptDecoder, cache: _Cache, layer: int) -> None:
        super().__init__(model.family, model.config, model.blocks[layer].weights, model.dtype)
        self.product, self.cache, self.layer = model.product, cache, layer

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.product(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def attend(self, heads: Sequence[Tensor]) -> Tensor:
        return self.cache.attend(self.layer, *heads)


class _Cache:
    """Keys and values [B, kv heads, T, d] by layer, with room for prompts and answers."""

    def __init__(self, model: PromptDecoder, prompts: Sequence[Sequence[int]], length: int) -> None:
        config, self.longest = model.config, max(map(len, prompts))
        self.shared = _shared(prompts) if len(prompts) > 1 else 0
        room, self.end, self.start = self.longest + length, 0, 0
        shape = (config.layers, len(prompts), config.kv_heads, room, config.head_dim)
        dtype = torch.float32 if model.device.type == "cpu" else model.dtype  # what torch's attention is fast in
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=model.device) for _ in range(2))
        self.config, self.prompts = config, prompts
        self.pads = torch.tensor([[self.longest - len(prompt)] for prompt in prompts], device=model.device)
        self.cosine, self.sine = rotary(config, room, model.device, model.dtype)
        self.tables, self.allowed = (self.cosine, self.sine), self.pads  # of what is being read; `place` sets both

    def rest(self, draft: Sequence[int]) -> Tensor:
        """What follows the shared beginning, int64 [B, T], with the draft."""
        rows = [[0] * (self.longest - len(prompt)) + list(prompt[self.shared :]) for prompt in self.prompts]
        return torch.tensor([row + list(draft) for row in rows])

    def place(self, count: int) -> None:
        """Make room for `count` tokens more: their rotations, and what each may look at."""
        self.start, self.end = self.end, self.end + count
        pads = self.pads if self.start >= self.shared else self.pads[:1] * 0  # all rows begin with the same tokens
        columns = torch.arange(self.end, device=pads.device)
        rows = columns[self.start :]
        positions = (rows - pads).clamp(min=0)
        self.tables = self.cosine[positions][:, None], self.sine[positions][:, None]
        pad = (columns >= self.shared) & (columns < self.shared + pads[:, :, None])
        seen = (columns <= rows[:, None]) & ~pad
        self.allowed = (seen | (columns == rows[:, None]))[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What [B, T, heads * d] the tokens being read take from all before them."""
        query, key, value = (x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for x in (query, key, value))
        self.keys[layer, :, :, self.start : self.end] = rotate(key, *self.tables)
        self.values[layer, :, :, self.start : self.end] = value
        mixed = F.scaled_dot_product_attention(
            rotate(query, *self.tables).to(self.keys.dtype),
            self.keys[layer, : len(query), :, : self.end],
            self.values[layer, : len(query), :, : self.end],
            attn_mask=self.allowed,
            enable_gqa=self.config.heads != self.config.kv_heads,
        )
        return mixed.transpose(1, 2).flatten(2).to(query.dtype)


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with, short of the whole of any."""
    shortest = min(map(len, prompts)) - 1
    differing = (position for position in range(shortest) if len({prompt[position] for prompt in prompts}) > 1)
    return max(next(differing, shortest), 0)


@dataclass
class Chooser:
    """How tokens are chosen: the most likely of the first `vocabulary`, or drawn at `TEMPERATURE` where there is a seed."""

    vocabulary: int
    stops: Sequence[int]
    seed: int | None = None

    def __post_init__(self) -> None:
        """Start the draws."""
        self.draw = None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def choose(self, logits: Tensor) -> list[int]:
        """One token for each row of logits [B, vocabulary]."""
        numbers = torch.nan_to_num(logits, nan=0.0)
        if self.draw is None:
            return numbers.argmax(1).tolist()
        noise = (
            -torch.empty_like(numbers).exponential_(generator=self.draw).log()
        )  # Gumbel's: the largest sum is a draw
        return (numbers / TEMPERATURE + noise).argmax(1).tolist()


class _Talk:
    """The answers so far."""

    def __init__(self, count: int, chooser: Chooser) -> None:
        self.chooser, self.ids, self.length = chooser, [[] for _ in range(count)], 0  # type: ignore[var-annotated]
        self.finite, self.done = [True] * count, [False] * count
        self.last: list[int] = []

    def add(self, logits: Tensor) -> list[int]:
        """Choose the next tokens from logits [B, V]."""
        logits = logits[:, : self.chooser.vocabulary].cpu()
        self.last, self.length = self.chooser.choose(logits), self.length + 1
        finite = torch.isfinite(logits).all(1).tolist()
        for row, token in enumerate(self.last):
            if not self.done[row]:
                self.finite[row] &= finite[row]
                self.ids[row].append(token)
                self.done[row] = token in self.chooser.stops
        return self.last

    @property
    def over(self) -> bool:
        return all(self.done)

    def answers(self) -> list[Answered]:
        return [Answered(ids, finite) for ids, finite in zip(self.ids, self.finite, strict=True)]
