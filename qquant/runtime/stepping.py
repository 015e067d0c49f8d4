"""The forward pass that answers, and that the speed check times: a static cache, and nothing to read back between two tokens.

    extend(parts, starts)   all tokens of a prompt at once, or of the rest of it, into the cache of keys and values
    advance()               logits after one token of every sequence; tokens and positions stay on the device, so a graph can hold it

The order of the steps is the family's, the arithmetic that of `qquant.families.decoder`, with what stands between the products fused
(`qquant.runtime.fused`). On CUDA a step, or a prefill, can be recorded as one graph (`qquant.kernels.replay`): launches from Python take longer than the
kernels. Sequences of a batch need not be of one length: each fills its row of the cache from the left, so there is no padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qquant.families import Family, ModelConfig
from qquant.families.forward import through
from qquant.families.weights import WeightSource
from qquant.kernels.between import add_norm, attend, rotate
from qquant.resources import lazy
from qquant.runtime.fused import Fused, Layer, Sum
from qquant.runtime.linears import RuntimeLinear
from qquant.runtime.parts import Loader

bias = lazy("torch.nn.attention.bias")  # imports all of torch's compiler, which takes seconds


@dataclass(frozen=True)
class ModelWeights:
    """Everything that a step reads."""

    family: Family
    layers: tuple[Layer, ...]
    embedding: nn.Module
    final_norm: Tensor
    head: nn.Module

    def bytes_read(self) -> int:
        """Bytes of weights that one step of one row reads: all but the embedding's other rows."""
        return sum(_nbytes(module) for module in self.modules())

    def modules(self) -> list[nn.Module]:
        """The linears in the order of the layers, and the head."""
        return [*(module for layer in self.layers for module in _flat(layer)), self.head]

    def bytes_held(self) -> int:
        """Memory: what a step reads, and the embedding unless it is the head's too."""
        shared = isinstance(self.embedding, nn.Embedding) and any(
            self.embedding.weight.data_ptr() == tensor.data_ptr() for tensor in self.head.parameters()
        )
        return self.bytes_read() + (0 if shared else _nbytes(self.embedding))


def _flat(layer: Layer) -> list[nn.Module]:
    return [
        module for stage in layer.linears.values() for module in ([stage] if isinstance(stage, nn.Module) else stage)
    ]


def _nbytes(module: nn.Module) -> int:
    if isinstance(module, RuntimeLinear):
        return module.nbytes
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def read_weights(source: WeightSource, device: torch.device, dtype: torch.dtype) -> ModelWeights:
    """The weights of an artifact or a checkpoint as `loading.load` holds them."""
    family, config, loader = source.family, source.config, Loader(source, device, dtype)
    layers = []
    for index in range(config.layers):
        stages = loader.linears(index).items()
        linears = {name: modules[0] if len(modules) == 1 else modules for name, modules in stages}
        layers.append(Layer.of(family, config, index, linears, loader.vector))
    embedding, head = loader.embedding_and_head()
    return ModelWeights(family, tuple(layers), embedding, loader.vector(family.final_norm), head)


def _counted(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.arange(start, stop, dtype=torch.int32, device=device)


class Stepper:
    """`batch` sequences of at most `capacity` tokens each in a static cache."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        batch: int = 1,
    ) -> None:
        self.config, self.weights, self.capacity, self.device = config, weights, capacity, device
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.position = torch.zeros(batch, dtype=torch.int32, device=device)
        self.rows = torch.arange(batch, dtype=torch.int32, device=device)
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
        angle = torch.outer(torch.arange(capacity, device=device).float(), 1.0 / config.rope_theta**exponent)
        self.table = torch.cat((angle.cos(), angle.sin()), dim=-1).contiguous()

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.rows)

    def cache_bytes(self) -> int:
        """Memory of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def _forward(self, ids: Tensor, rows: Tensor, positions: Tensor, mix: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Normed hidden states [M, hidden] of tokens at `positions` of `rows`; `mix(layer, q)` is the attention."""
        forward, epsilon = self.weights.family.forward, self.config.epsilon
        x = Sum(self.weights.embedding(ids))
        for index, layer in enumerate(self.weights.layers):
            cache = {"keys": self.keys[index], "values": self.values[index]}
            turn = partial(rotate, table=self.table, rows=rows, positions=positions, **cache)
            x = through(forward(Fused(layer, epsilon, turn, partial(mix, index)), x))
        return add_norm(x.x, x.y, self.weights.final_norm, epsilon)[1]

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits [1, vocab] after ids int64 [T], which become the only sequence; the likeliest token is the next to read."""
        logits = self.extend([ids], [0])
        self.token.copy_(logits.argmax(-1))
        return logits

    def extend(self, parts: Sequence[Tensor], starts: Sequence[int], rows: Sequence[int] | None = None) -> Tensor:
        """Logits [len(parts), vocab] after sequences go on with their parts, ids int64 [T > 0], from their starts on.

        rows: of the cache, one for each part; by default all in their order.
        """
        cache_rows = range(self.batch) if rows is None else rows
        spans = [(row, len(part), start) for row, part, start in zip(cache_rows, parts, starts, strict=True)]
        positions = torch.cat([_counted(start, start + count, self.device) for _, count, start in spans])
        owners = torch.cat([self.rows[row : row + 1].expand(count) for row, count, _ in spans])

        def mix(layer: int, query: Tensor) -> Tensor:
            if len(spans) == 1:
                return self._attend_part(layer, spans[0][0], query, spans[0][2])
            mixed, first = torch.empty_like(query), 0
            for row, count, start in spans:
                here = slice(first, first := first + count)
                mixed[here] = self._attend_part(layer, row, query[here], start)
            return mixed

        hidden = self._forward(torch.cat(list(parts)), owners, positions, mix)
        last, lasts = -1, []
        for row, count, start in spans:
            self.position[row].fill_(start + count)
            last += count
            lasts.append(hidden[last : last + 1])
        return self.weights.head(torch.cat(lasts))

    def _attend_part(self, layer: int, row: int, query: Tensor, start: int) -> Tensor:
        """[T, heads * d] of the query [T, heads * d] of tokens from `start` on, each over itself and what stands before it."""
        count, config = len(query), self.config
        q = query.view(1, count, config.heads, config.head_dim).transpose(1, 2)
        key, value = (cache[layer, row, None, :, : start + count] for cache in (self.keys, self.values))
        mask = bias.causal_lower_right(count, start + count) if start and count > 1 else None
        mixed = F.scaled_dot_product_attention(
            q,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and count > 1,
            enable_gqa=config.heads != config.kv_heads,
        )
        return mixed.transpose(1, 2).reshape(count, -1)

    def advance(self) -> Tensor:
        """Logits [batch, vocab] after the current tokens; `token` is to be set before the next call."""
        hidden = self._forward(
            self.token,
            self.rows,
            self.position,
            lambda layer, query: attend(query, self.keys[layer], self.values[layer], self.position),
        )
        logits = self.weights.head(hidden)
        self.position += 1
        return logits

    def step(self) -> Tensor:
        """Logits [batch, vocab] after the current tokens; the likeliest ones become the next."""
        logits = self.advance()
        self.token.copy_(logits.argmax(-1))
        return logits

    def rewind(self, position: int, token: int = 0) -> None:
        """Go back to `position`, with `token` as the next to read."""
        self.position.fill_(position)
        self.token.fill_(token)

    def grown(self, capacity: int) -> Stepper:
        """A stepper with more places in the cache; tokens and positions are the same tensors."""
        twin = Stepper(self.config, self.weights, capacity, self.device, self.keys.dtype, self.batch)
        twin.keys[..., : self.capacity, :], twin.values[..., : self.capacity, :] = self.keys, self.values
        twin.position, twin.token, twin.rows = self.position, self.token, self.rows
        return twin

    def with_copied_weights(self) -> Stepper:
        """A stepper with weights of its own, so that caches that hold the others' do not help."""
        twin = copy.copy(self)
        embedding = self.weights.embedding
        copied = copy.deepcopy(self.weights, {id(embedding): embedding})
        twin.weights = replace(copied, embedding=embedding)
        return twin
