"""The forward pass of one Qwen2 decoder block, stage by stage, and the output head in slices.

    h = norm1(x);  q,k,v = h Wq'+bq, h Wk'+bk, h Wv'+bv;  a = softmax(rope(q) rope(k)' / sqrt(d), causal) v;  x = x + a Wo'
    h = norm2(x);  m = silu(h Wg') * (h Wu');  x = x + m Wd'

Follows the arithmetic of transformers' Qwen2 (norms and rotary tables in float32, the rest in the dtype of the activations),
so that logits agree. One sequence at a time: no padding, no batch-dependent kernels, the same bits whatever the batch size.
Left out: KV cache, sliding windows, dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from qquant.families import Family, ModelConfig
from qquant.families.weights import WeightSource

Observer = Callable[[str, Tensor], None]
HEAD_ROWS = 16384  # rows of the head that are float32 at a time


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32, rounded to `x.dtype` before the weight is applied."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


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
    """One decoder block with its weights in the dtype of the activations."""

    def __init__(self, family: Family, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.family = family
        self.config = config
        self.dtype = dtype
        self.weights = {name: value.to(dtype) for name, value in weights.items()}

    def widened(self) -> Block:
        """The same block with activations in float32."""
        return self if self.dtype == torch.float32 else Block(self.family, self.config, self.weights, torch.float32)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply linear `name` (e.g. "mlp.up_proj") to x [..., in]."""
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def attend(self, h: Tensor) -> Tensor:
        """Causal self-attention over one sequence h [T, hidden] -> [T, heads * head_dim], before the output projection."""
        config = self.config
        query, key, value = (
            self.linear(name, h).view(len(h), -1, config.head_dim).transpose(0, 1)
            for name in self.family.stages[0].linears
        )
        cosine, sine = rotary(config, len(h), h.device, h.dtype)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        groups = config.heads // config.kv_heads
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
        mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
        return mixed.transpose(0, 1).reshape(len(h), -1)

    def activate(self, h: Tensor) -> Tensor:
        """silu(gate) * up, the input of the down projection."""
        gate, up = self.family.stages[2].linears
        return F.silu(self.linear(gate, h)) * self.linear(up, h)

    def stages(self, x: Tensor) -> Generator[tuple[str, Tensor], None, None]:
        """Yield (stage, its input) in order for one sequence x [T, hidden], last ("", output of the block).

        The weights of a stage are read only after its input was yielded, so a caller may replace them in between.
        """
        family, epsilon = self.family, self.config.epsilon
        attention, output, gate_up, down = family.stages
        h = rms_norm(x, self.weights[family.attention_norm], epsilon)
        yield attention.name, h
        a = self.attend(h)
        del h  # many samples may wait here at once
        yield output.name, a
        x = x + self.linear(output.linears[0], a)
        del a
        h = rms_norm(x, self.weights[family.mlp_norm], epsilon)
        yield gate_up.name, h
        m = self.activate(h)
        del h
        yield down.name, m
        yield "", x + self.linear(down.linears[0], m)

    def forward(self, x: Tensor, observe: Observer | None = None) -> Tensor:
        """Output [T, hidden] of the block; `observe(stage, input)` sees the input of every stage."""
        for stage, value in self.stages(x):
            if stage and observe:
                observe(stage, value)
        return value


def source_block(source: WeightSource, layer: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Block:
    """Block `layer` of a checkpoint or an artifact, ready to compute in `dtype` on `device`."""
    prefix = source.family.block.format(layer)
    names = source.family.block_shapes(source.config, layer)
    weights = {name.removeprefix(prefix): source.tensor(name).to(device=device, dtype=dtype) for name in names}
    return Block(source.family, source.config, weights, dtype)


def embed(source: WeightSource, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Embeddings [T, hidden] of int token ids [T]; only slices of the table that hold a token are read."""
    ids, inverse = torch.unique(tokens.long(), return_inverse=True)
    out = torch.empty(len(ids), source.config.hidden, dtype=dtype)
    for start in range(0, source.config.vocab, HEAD_ROWS):
        stop = min(start + HEAD_ROWS, source.config.vocab)
        inside = (ids >= start) & (ids < stop)
        if bool(inside.any()):
            out[inside] = source.rows(source.family.embedding, start, stop)[ids[inside] - start].to(out)
    return out[inverse]


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
