"""A decoder block of any family, stage by stage, and the output head in slices.

    norm       x / sqrt(mean x^2 + epsilon) * weight
    attend     softmax(rope(q) rope(k)' / sqrt(d), causal) v
    gated      silu(gate) * up

The order of these is the family's (`families.forward`). Follows the arithmetic of transformers' models (norms and rotary tables in
float32, the rest in the dtype of the activations), so that logits agree. No padding: sequences [T, features], or [B, T, features] of one length.
Left out: KV cache, sliding windows, dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qquant import background, devices
from qquant.families import Family, ModelConfig
from qquant.families.forward import StageInput
from qquant.families.linear import by_float32, linear
from qquant.families.weights import WeightSource

Observer = Callable[[str, Tensor], None]
HEAD_ROWS = 16384  # rows of the head that are float32 at a time
AHEAD = 4  # slices of so many rows that are read at a time


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32, rounded to `x.dtype` before the weight is applied."""
    as_float32 = x.float()
    as_float32 = as_float32 * torch.rsqrt(as_float32.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * as_float32.to(x.dtype)


def rms_norm_heads(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm` over each head of x [..., heads * d], weight [d]."""
    return rms_norm(x.unflatten(-1, (-1, len(weight))), weight, epsilon).flatten(-2)


def rotary(config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables [length, head_dim] for positions 0 .. length - 1."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    angle = torch.outer(torch.arange(length, device=device).float(), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The heads x [..., T, head_dim] turned to their positions by tables [..., T, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class Block:
    """One decoder block with its weights in the dtype of the activations: `Operators` on sequences [..., T, features] of one length."""

    def __init__(self, family: Family, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.family = family
        self.config = config
        self.dtype = dtype
        self.weights = {name: value.to(dtype) for name, value in weights.items()}

    def in_float32(self) -> Block:
        """The same block with activations in float32."""
        return self if self.dtype == torch.float32 else Block(self.family, self.config, self.weights, torch.float32)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply linear `name` (e.g. "mlp.up_proj") to x [..., in]."""
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def normed(self, stage: str, x: Tensor) -> Tensor:
        """The residual stream x [T, hidden] through the norm before `stage`."""
        return rms_norm(x, self.weights[self.family.stage(stage).norm], self.config.epsilon)

    def apply(self, stage: str, x: Tensor) -> list[Tensor]:
        """What each linear of `stage` makes of x."""
        return [self.linear(name, x) for name in self.family.stage(stage).linears]

    def head_norm(self, name: str, x: Tensor) -> Tensor:
        """Each head of x [T, heads * head_dim] through the norm whose weight is vector `name`."""
        return rms_norm_heads(x, self.weights[name], self.config.epsilon)

    def attend(self, heads: Sequence[Tensor]) -> Tensor:
        """Causal self-attention over sequences of queries, keys and values -> [..., T, heads * head_dim]."""
        config, (*_, length, _) = self.config, heads[0].shape
        query, key, value = (x.unflatten(-1, (-1, config.head_dim)).transpose(-3, -2) for x in heads)
        del heads
        query, key = self.turned(query, key)
        groups = config.heads // config.kv_heads
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=-3), value.repeat_interleave(groups, dim=-3)
        lead = query.shape[:-3]
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        return self.mixed(query, key, value).transpose(1, 2).reshape(*lead, length, -1)

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention [B, heads, T, head_dim] of as large queries to keys and values."""
        if by_float32(query):
            return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True).to(
                query.dtype
            )
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def turned(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key [..., heads, T, head_dim] at their positions, from 0 on."""
        cosine, sine = rotary(self.config, query.shape[-2], query.device, query.dtype)
        return rotate(query, cosine, sine), rotate(key, cosine, sine)

    def gated(self, pair: Sequence[Tensor]) -> Tensor:
        """silu(first) * second."""
        gate, up = pair
        return F.silu(gate) * up

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum, in a new tensor."""
        return x + y

    def stages(self, x: Tensor) -> Generator[StageInput[Tensor], None, None]:
        """Yield every stage with its input in order for sequences x [..., T, hidden], last ("", output of the block).

        The weights of a stage are read only after its input was yielded, so a caller may replace them in between.
        """
        passage = self.family.forward(self, x)
        del x  # the family lets go of it
        output = yield from passage
        yield StageInput("", output)

    def forward(self, x: Tensor, observe: Observer | None = None) -> Tensor:
        """Output [..., T, hidden] of the block; `observe(stage, input)` sees the input of every stage."""
        for stage, value, _ in self.stages(x):
            if stage and observe:
                observe(stage, value)
        return value


def source_block(
    source: WeightSource, layer: int, dtype: torch.dtype, device: torch.device | str = "cpu", threads: int = 1
) -> Block:
    """Block `layer` of a checkpoint or an artifact, ready to compute in `dtype` on `device`, read by so many threads."""
    prefix = source.family.block.format(layer)
    names = list(source.family.block_shapes(source.config, layer))

    def tensor(name: str) -> tuple[str, Tensor]:
        return name.removeprefix(prefix), source.tensor(name).to(device=device, dtype=dtype)

    if threads == 1:
        return Block(source.family, source.config, dict(map(tensor, names)), dtype)
    with ThreadPoolExecutor(threads) as pool:
        return Block(source.family, source.config, dict(pool.map(tensor, names)), dtype)


def embed(source: WeightSource, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Embeddings [T, hidden] of int token ids [T]; only slices of the table that hold a token are read."""
    return embed_each(source, [tokens], dtype, torch.device("cpu"))[0]


def embed_each(source: WeightSource, texts: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Embeddings [T, hidden] on `device` of the int token ids [T] of each text, for which the table is read once."""
    ids, places = torch.unique(torch.cat(list(texts)).long(), return_inverse=True)
    out = torch.empty(len(ids), source.config.hidden, dtype=dtype, device=device)
    wanted = [span for span in slices(source.config.vocab) if bool(((ids >= span.start) & (ids < span.stop)).any())]
    with read_slices(source, source.family.embedding, wanted, device) as read:
        for span, rows in zip(wanted, read, strict=True):
            inside = (ids >= span.start) & (ids < span.stop)
            out[inside.to(device)] = rows[ids[inside] - span.start].to(out)
    return [out[part] for part in places.to(device).split([len(text) for text in texts])]


def slices(vocabulary: int) -> list[slice]:
    """The rows of a table of words, HEAD_ROWS at a time."""
    return [slice(start, min(start + HEAD_ROWS, vocabulary)) for start in range(0, vocabulary, HEAD_ROWS)]


@contextmanager
def read_slices(
    source: WeightSource, name: str, spans: Sequence[slice], device: torch.device
) -> Iterator[Iterator[Tensor]]:
    """Rows of tensor `name` on the CPU, slice after slice; some are read ahead where that helps a computation on `device`."""

    def read(span: slice) -> Tensor:
        return source.rows(name, span.start, span.stop)

    groups = (partial(_alone, partial(read, span)) for span in spans)
    with background.in_parallel(groups, min(AHEAD, devices.readers(device))) as found:
        yield (rows for (rows,) in found)


def _alone(work: background.Task[Tensor]) -> list[background.Task[Tensor]]:
    return [work]


def logits(source: WeightSource, hidden: Tensor) -> Tensor:
    """Float32 logits [T, vocab] of float32 hidden states [T, hidden] (after the last block), with the head read in slices."""
    config = source.config
    norm = source.tensor(source.family.final_norm).to(hidden)
    normed = rms_norm(hidden, norm, config.epsilon)
    out = torch.empty(len(hidden), config.vocab, dtype=hidden.dtype, device=hidden.device)
    for start in range(0, config.vocab, HEAD_ROWS):
        stop = min(start + HEAD_ROWS, config.vocab)
        out[:, start:stop] = normed @ source.rows(source.family.head, start, stop).to(hidden).T
    return out
