"""A model made for the clock: the same forward pass for every contender, only its linears differ.

    prefill(ids)   all tokens of a prompt at once, into a static cache of keys and values
    step()         the likeliest next token and its position, kept on the device: nothing to read back, so a graph can hold it

The arithmetic is that of `qquant.families.decoder`, with what stands between the products fused (`qquant.kernels.between`). On CUDA `capture`
records a step, or a prefill, as one graph: launches from Python would hide what the kernels do. One sequence at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qquant.families import ModelConfig
from qquant.families.weights import WeightSource
from qquant.kernels.between import add_norm, attend, gate, rotate
from qquant.runtime import linears, parts


@dataclass(frozen=True)
class Layer:
    """The weights of one block."""

    attention_norm: Tensor
    mlp_norm: Tensor
    linears: Mapping[str, nn.Module | Sequence[nn.Module]]  # by stage: one fused, or several side by side


@dataclass(frozen=True)
class Weights:
    """Everything that a step reads."""

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
    if isinstance(module, linears.Linear):
        return module.nbytes
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def read_weights(source: WeightSource, device: torch.device, dtype: torch.dtype) -> Weights:
    """The weights of an artifact or a checkpoint as `loading.load` holds them."""
    family, config = source.family, source.config
    layers = []
    for index in range(config.layers):
        prefix = family.block.format(index)
        first, second = (
            source.tensor(prefix + norm).to(device, dtype) for norm in (family.attention_norm, family.mlp_norm)
        )
        stages = parts.linears(source, index, device, dtype)
        found = {name: modules[0] if len(modules) == 1 else modules for name, modules in stages.items()}
        layers.append(Layer(first, second, found))
    embedding, head = parts.ends(source, device, dtype)
    return Weights(tuple(layers), embedding, source.tensor(family.final_norm).to(device, dtype), head)


def _apply(linear: nn.Module | Sequence[nn.Module], x: Tensor) -> Tensor:
    if isinstance(linear, nn.Module):
        return linear(x)
    return torch.cat([part(x) for part in linear], dim=-1)


class Stepper:
    """One sequence of at most `capacity` tokens in a static cache."""

    def __init__(
        self, config: ModelConfig, weights: Weights, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.weights, self.capacity, self.device = config, weights, capacity, device
        shape = (config.layers, config.kv_heads, capacity, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.position = torch.zeros(1, dtype=torch.int32, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
        angle = torch.outer(torch.arange(capacity, device=device).float(), 1.0 / config.rope_theta**exponent)
        self.table = torch.cat((angle.cos(), angle.sin()), dim=-1).contiguous()

    def cache_bytes(self) -> int:
        """Memory of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def _forward(self, ids: Tensor, mix: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Normed hidden states [M, hidden]; `mix(layer, q)` is the attention."""
        x, y = self.weights.embedding(ids), None
        epsilon = self.config.epsilon
        for index, layer in enumerate(self.weights.layers):
            qkv, out, gate_up, down = layer.linears.values()
            x, h = add_norm(x, y, layer.attention_norm, epsilon)
            query = rotate(_apply(qkv, h), self.table, self.position, self.keys[index], self.values[index])
            x, h = add_norm(x, _apply(out, mix(index, query)), layer.mlp_norm, epsilon)
            y = _apply(down, gate(_apply(gate_up, h)))
        return add_norm(x, y, self.weights.final_norm, epsilon)[1]

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits [1, vocab] after ids int64 [T], which become the sequence."""
        self.position.zero_()
        count, config = len(ids), self.config

        def mix(layer: int, query: Tensor) -> Tensor:
            q = query.view(1, count, config.heads, config.head_dim).transpose(1, 2)
            key, value = self.keys[layer, None, :, :count], self.values[layer, None, :, :count]
            grouped = config.heads != config.kv_heads
            mixed = F.scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=grouped)
            return mixed.transpose(1, 2).reshape(count, -1)

        logits = self.weights.head(self._forward(ids, mix)[-1:])
        self.token.copy_(logits.argmax(-1))
        self.position.fill_(count)
        return logits

    def step(self) -> Tensor:
        """Logits [1, vocab] after the current token; the likeliest one becomes the next."""
        hidden = self._forward(
            self.token, lambda layer, query: attend(query, self.keys[layer], self.values[layer], self.position)
        )
        logits = self.weights.head(hidden)
        self.token.copy_(logits.argmax(-1))
        self.position += 1
        return logits

    def rewind(self, position: int, token: int = 0) -> None:
        """Go back to `position`, with `token` as the next to read."""
        self.position.fill_(position)
        self.token.fill_(token)

    def with_copied_weights(self) -> Stepper:
        """The same with weights of its own, so that caches that hold the others' do not help."""
        twin = copy.copy(self)
        embedding = self.weights.embedding
        copied = copy.deepcopy(self.weights, {id(embedding): embedding})
        twin.weights = replace(copied, embedding=embedding)
        return twin


def capture(work: Callable[[], object]) -> Callable[[], None]:
    """`work` as one CUDA graph: call the result to replay it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles kernels and fills caches of the libraries
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay() -> None:
        graph.replay()

    return replay
