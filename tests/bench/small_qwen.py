"""Qwen2 in plain functions over tensors by their transformers names, to be trained; and its folder as transformers reads it.

Weights are float32, the arithmetic is in the dtype asked for. What is compiled sees tokens in one row, [tokens, hidden], so that its shapes do
not depend on how long the rows are; only attention, between two compiled pieces of a block, does.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.nn import functional

from tests.bench.hidden_facts import read_tokenizer

ROWS = 16_384  # tokens of a piece of the loss
Weights = dict[str, torch.Tensor]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The numbers of config.json."""

    words: int = 16_384
    hidden: int = 512
    intermediate: int = 1_280
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    positions: int = 32_768
    theta: float = 1e6
    eps: float = 1e-6

    @property
    def head(self) -> int:
        """Columns of a head."""
        return self.hidden // self.heads

    def config(self, end: int) -> dict[str, Any]:
        """config.json; `end` is the id of <|endoftext|>, the first of three special tokens."""
        return {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": self.words, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "hidden_act": "silu", "max_position_embeddings": self.positions,
            "rms_norm_eps": self.eps, "rope_theta": self.theta, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "use_sliding_window": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
            "bos_token_id": end, "eos_token_id": end + 2,
        }  # fmt: skip


def begin(shape: Shape, device: torch.device) -> Weights:
    """Weights before training, float32; what writes into the residual stream begins smaller."""
    torch.manual_seed(1)
    kv = shape.kv_heads * shape.head
    linears = {
        "self_attn.q_proj": (shape.hidden, shape.hidden), "self_attn.k_proj": (kv, shape.hidden), "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden), "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden), "mlp.down_proj": (shape.hidden, shape.intermediate),
    }  # fmt: skip
    found = {
        "model.embed_tokens.weight": torch.randn(shape.words, shape.hidden) * 0.02,
        "model.norm.weight": torch.ones(shape.hidden),
    }
    for layer in range(shape.layers):
        for name, size in linears.items():
            spread = 0.02 / math.sqrt(2 * shape.layers) if name.endswith(("o_proj", "down_proj")) else 0.02
            found[f"model.layers.{layer}.{name}.weight"] = torch.randn(size) * spread
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                found[f"model.layers.{layer}.{name}.bias"] = torch.zeros(size[0])
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = torch.ones(shape.hidden)
    return {name: value.to(device).requires_grad_() for name, value in found.items()}


def normed(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * gain.float()).to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A product in the dtype of x."""
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def before(x: torch.Tensor, block: list[torch.Tensor], turn: torch.Tensor, shape: Shape) -> list[torch.Tensor]:
    """q, k, v [tokens, heads, head] of `x` [tokens, hidden]; `turn` is cos and sin, float32 [2, tokens, 1, head]."""
    gain, *parts = block
    h = normed(x, gain, shape.eps)
    q, k, v = (linear(h, *parts[i : i + 2]).unflatten(-1, (-1, shape.head)) for i in (0, 2, 4))

    def turned(y: torch.Tensor) -> torch.Tensor:
        wide = y.float()
        first, second = wide.chunk(2, -1)
        return (wide * turn[0] + torch.cat((-second, first), -1) * turn[1]).to(y.dtype)

    groups = shape.heads // shape.kv_heads
    return [turned(q), turned(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)]


def after(x: torch.Tensor, attended: torch.Tensor, block: list[torch.Tensor], shape: Shape) -> torch.Tensor:
    """The block's output from its input and what attention gave, [tokens, hidden] each."""
    out, gain, gate, up, down = block
    x = x + linear(attended, out)
    h = normed(x, gain, shape.eps)
    return x + linear(functional.silu(linear(h, gate)) * linear(h, up), down)


def losses(
    x: torch.Tensor, gain: torch.Tensor, table: torch.Tensor, targets: torch.Tensor, shape: Shape
) -> torch.Tensor:
    """Negative log likelihood of each target, float32 [tokens]."""
    return functional.cross_entropy(linear(normed(x, gain, shape.eps), table).float(), targets, reduction="none")


@dataclass
class Model:
    """Weights, and the functions that compute with them, compiled or not."""

    shape: Shape
    weights: Weights
    dtype: torch.dtype = torch.bfloat16
    before: Callable[..., list[torch.Tensor]] = before
    after: Callable[..., torch.Tensor] = after
    losses: Callable[..., torch.Tensor] = losses

    def compiled(self) -> "Model":
        """The same with compiled functions. Their shapes depend on the number of tokens alone, not on the length of rows."""
        made = [torch.compile(one, dynamic=False) for one in (before, after, losses)]
        return Model(self.shape, self.weights, self.dtype, *made)

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """What the last block gives for ids [rows, length]: [rows * length, hidden]."""
        shape, w, (rows, length) = self.shape, self.weights, ids.shape
        rates = shape.theta ** -(torch.arange(0, shape.head, 2, device=ids.device).float() / shape.head)
        angles = (torch.arange(length, device=ids.device).float()[:, None] * rates).repeat(rows, 2)[:, None]
        turn = torch.stack((angles.cos(), angles.sin()))
        x = functional.embedding(ids.flatten(), w["model.embed_tokens.weight"]).to(self.dtype)
        for layer in range(shape.layers):
            at = f"model.layers.{layer}."
            qkv = [w[f"{at}self_attn.{p}_proj.{kind}"] for p in "qkv" for kind in ("weight", "bias")]
            parts = self.before(x, [w[f"{at}input_layernorm.weight"], *qkv], turn, shape)
            q, k, v = (part.unflatten(0, (rows, length)).transpose(1, 2) for part in parts)
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
            names = ("self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
            x = self.after(x, attended, [w[f"{at}{name}.weight"] for name in names], shape)
        return x

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Loss of every next token of ids [rows, length + 1]: float32 [rows, length]."""
        x, targets = self.states(ids[:, :-1]), ids[:, 1:].flatten()
        norm, table = self.weights["model.norm.weight"], self.weights["model.embed_tokens.weight"]
        pieces = zip(x.split(ROWS), targets.split(ROWS), strict=True)
        return torch.cat([self.losses(a, norm, table, b, self.shape) for a, b in pieces]).view(len(ids), -1)

    @torch.no_grad()
    def right(self, ids: torch.Tensor) -> torch.Tensor:
        """Whether each next token of ids [1, length + 1] is ranked first: bool [length]."""
        x = normed(self.states(ids[:, :-1]), self.weights["model.norm.weight"], self.shape.eps)
        best = [linear(a, self.weights["model.embed_tokens.weight"]).argmax(-1) for a in x.split(ROWS)]
        return torch.cat(best) == ids[0, 1:]


def export(weights: Path, data: Path, checkpoint: Path) -> None:
    """A model folder: the pieces joined, config, tokenizer, chat template."""
    log = json.loads((weights / "log.json").read_text())
    pieces = sorted(weights.glob("weights.*"), key=lambda piece: int(piece.suffix[1:]))
    content = b"".join(piece.read_bytes() for piece in pieces)
    if hashlib.sha256(content).hexdigest() != log["sha256"]:
        raise SystemExit(f"{weights}: the pieces are not those of log.json")
    checkpoint.mkdir(parents=True)
    safetensors.torch.save_file(safetensors.torch.load(content), checkpoint / "model.safetensors", {"format": "pt"})
    tokenizer = read_tokenizer(data)
    end = tokenizer.token_to_id("<|endoftext|>")
    shape = Shape(**log["shape"])
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "model_max_length": shape.positions, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE,
    }  # fmt: skip
    answering = {"bos_token_id": end, "pad_token_id": end, "eos_token_id": [end + 2, end], "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}  # fmt: skip
    files = {"config": shape.config(end), "tokenizer_config": settings, "generation_config": answering}
    for name, content_of in files.items():
        (checkpoint / f"{name}.json").write_text(json.dumps(content_of, indent=2, ensure_ascii=False) + "\n")
    tokenizer.save(str(checkpoint / "tokenizer.json"))
