"""Artifacts that answer: a transformers model whose linears hold the packed weights.

    model = qquant.load("release/Qwen1.5-0.5B-Chat-GPTQ-Int4")        a folder, a .gguf file, or a 16-bit checkpoint
    model.generate(...)                                               transformers' Qwen2ForCausalLM, nothing else changed

A format says what its weights are (`Integers`: codes, scales, zero points), whoever wrote them; they are repacked once, at load,
and no 16-bit copy is made. q, k, v are one product, gate and up another, where their groups agree. What runs:

    CUDA    up to 64 rows `qquant::wq_mm`, above that `qquant::dequant` and the vendor's product
    CPU     torch's int4 product for few rows (twice, for 8 bits), above that dequantize and multiply (`kernels.cpu_int4`)

What has no operator (K-quants and the affine types of GGUF, groups that no layout has, 16-bit tensors) is dequantized once, at
load. Which way each linear went stands in its `repr` and in `paths(model)`: nothing falls back in silence. Sums are float32,
activations bf16 or fp16 (also fp32, without the int4 product on the CPU, which would be slow).

To fuse without touching transformers' code, q_proj is a `Part` that makes the product for all three, and k_proj and v_proj hand
out what it made. Left out: training, other families, several devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qquant.algorithms.grid import Integers
from qquant.artifact.opening import open_weights
from qquant.errors import EnvironmentMissingError, InputError, UsageError
from qquant.families import ModelConfig
from qquant.families.decoder import HEAD_ROWS
from qquant.families.weights import WeightSource
from qquant.formats import ArtifactSource
from qquant.formats.gguf.source import GgufSource
from qquant.kernels import cpu_int4, jit
from qquant.kernels.dequant import dequant
from qquant.kernels.unpack import check_group, repack
from qquant.kernels.wq_mm import MAX_ROWS, quantized_linear
from qquant.source.checkpoint import Checkpoint
from qquant.source.untrusted import read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, Qwen2ForCausalLM

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# -- modules


class Linear(nn.Module):
    """y = x W' + b; what every kind of it has."""

    def __init__(self, shape: tuple[int, int], bias: Tensor | None, stored: str) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.stored = stored

    @property
    def path(self) -> str:
        """What runs, in words."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Memory of the weights and of what belongs to them."""
        held = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        return sum(tensor.nbytes for tensor in held)

    def extra_repr(self) -> str:
        """Shape, what the file holds, what runs."""
        return f"{self.in_features} -> {self.out_features}, {self.stored}; {self.path}"


class DenseLinear(Linear):
    """Weights of 16 (or 32) bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stored: str) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), bias, stored)
        self.weight = nn.Parameter(weight, requires_grad=False)

    @property
    def path(self) -> str:
        """What runs, in words."""
        name = str(self.weight.dtype).removeprefix("torch.")
        return f"torch linear in {name}" + ("" if self.stored in ("bf16", "f16", "f32") else ", dequantized at load")

    def forward(self, x: Tensor) -> Tensor:
        """X [..., K] -> [..., N]."""
        return F.linear(x, self.weight, self.bias)


class QuantLinear(Linear):
    """Weights of 4 or 8 bits in groups, in the layout of `qquant.kernels.unpack`; `order`: see `Integers`."""

    def __init__(self, weight: Integers, bias: Tensor | None, stored: str) -> None:
        super().__init__((weight.codes.shape[0], weight.codes.shape[1]), bias, stored)
        self.bits = weight.bits
        self.group_size = weight.codes.shape[1] // weight.scales.shape[1]
        qweight, params = repack(weight.codes, weight.scales, weight.zeros, weight.bits)
        self.qweight, self.params = nn.Buffer(qweight), nn.Buffer(params)
        self.order = None if weight.order is None else nn.Buffer(weight.order)

    @property
    def path(self) -> str:
        """What runs, in words."""
        if jit.path("wq_mm", self.qweight.device) == "triton":
            way = f"Triton kernel up to {MAX_ROWS} rows, above dequantize and multiply"
        else:
            way = "dequantize and multiply (no kernel for this device and shape)"
        return way + ("" if self.order is None else ", inputs reordered")

    def forward(self, x: Tensor) -> Tensor:
        """X [..., K] -> [..., N]."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if jit.path("wq_mm", x.device) == "triton" and x.dtype != torch.float32:
            return quantized_linear(x, self.qweight, self.params, self.bias, self.bits, self.group_size)
        return F.linear(x, dequant(self.qweight, self.params, self.bits, self.group_size, x.dtype), self.bias)


class CpuQuantLinear(Linear):
    """The same for torch's int4 product on the CPU."""

    def __init__(self, weight: Integers, bias: Tensor | None, stored: str) -> None:
        super().__init__((weight.codes.shape[0], weight.codes.shape[1]), bias, stored)
        self.packed = cpu_int4.pack_cpu(weight.codes, weight.scales, weight.zeros, weight.bits)
        self.bits = weight.bits
        self.order = None if weight.order is None else nn.Buffer(weight.order)

    @property
    def nbytes(self) -> int:
        """Memory of the weights and of what belongs to them."""
        return super().nbytes + self.packed.nbytes

    @property
    def path(self) -> str:
        """What runs, in words."""
        product = "torch's int4 product" if self.bits == 4 else "torch's int4 product, twice,"
        way = f"{product} up to {cpu_int4.MAX_ROWS[self.bits]} rows, above dequantize and multiply"
        return way + ("" if self.order is None else ", inputs reordered")

    def forward(self, x: Tensor) -> Tensor:
        """X [..., K] -> [..., N]; float32 takes the exact way for any number of rows."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        flat = x.reshape(-1, self.in_features)
        if x.dtype == torch.float32:
            y = cpu_int4.many_rows(flat, self.packed)
            y = y if self.bias is None else y + self.bias
        else:
            y = cpu_int4.cpu_linear(flat, self.packed, self.bias)
        return y.view(*x.shape[:-1], -1)


class Part(nn.Module):
    """One of several linears with the same input: the first makes the product of all, the others hand out theirs."""

    def __init__(self, whole: Linear, sizes: Sequence[int], index: int) -> None:
        super().__init__()
        self.index, self.sizes = index, tuple(sizes)
        self.made: tuple[Tensor, tuple[Tensor, ...]] | None = None  # of the first: its input and outputs
        self.first: list[Part] = []  # a list, so that the module is registered in one place
        if index == 0:
            self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        """X [..., K] -> [..., sizes[index]].

        Raises:
            RuntimeError: called with another input than the first part was.
        """
        if self.index == 0:
            outputs = self.whole(x).split(self.sizes, dim=-1)
            self.made = (x, outputs)
            return outputs[0]
        (first,) = self.first
        if first.made is None or first.made[0] is not x:
            raise RuntimeError("a fused linear was called out of order: the first of its parts has not seen this input")
        y = first.made[1][self.index]
        if self.index == len(self.sizes) - 1:
            first.made = None
        return y

    def extra_repr(self) -> str:
        """Which rows of the whole these are."""
        return f"part {self.index + 1} of {len(self.sizes)}: {self.sizes[self.index]} outputs"


class QuantEmbedding(nn.Module):
    """An embedding that dequantizes the rows it is asked for."""

    def __init__(self, weight: Integers, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits = weight.bits
        self.group_size = weight.codes.shape[1] // weight.scales.shape[1]
        self.dtype = dtype
        qweight, params = repack(weight.codes, weight.scales, weight.zeros, weight.bits)
        self.qweight, self.params = nn.Buffer(qweight), nn.Buffer(params)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., K] of ids [...]."""
        flat = ids.reshape(-1)
        rows = dequant(self.qweight[flat], self.params[flat], self.bits, self.group_size, self.dtype)
        return rows.view(*ids.shape, -1)


# -- loading


def _half(weight: Integers) -> tuple[Integers, str]:
    """The weight with float16 scales, and a note if that moved one."""
    if weight.scales.dtype == torch.float16:
        return weight, ""
    scales = weight.scales.half()
    moved = ((scales.double() - weight.scales.double()).abs() / weight.scales.double().abs().clamp_min(1e-30)).max()
    note = f", scales rounded to fp16 (by up to {float(moved):.1e})" if bool(moved > 0) else ""
    return Integers(weight.codes, scales, weight.zeros, weight.bits, weight.order), note


def _together(weights: Sequence[Integers]) -> Integers | None:
    """One matrix of all rows, or None if their groups differ."""
    first = weights[0]
    for weight in weights[1:]:
        same_order = (weight.order is None and first.order is None) or (
            weight.order is not None and first.order is not None and torch.equal(weight.order, first.order)
        )
        if weight.bits != first.bits or weight.scales.shape[1] != first.scales.shape[1] or not same_order:
            return None
    zeros = None
    if any(weight.zeros is not None for weight in weights):
        zeros = torch.cat(
            [
                torch.full_like(weight.scales, 1 << (first.bits - 1), dtype=torch.float32)
                if weight.zeros is None
                else weight.zeros
                for weight in weights
            ]
        )
    codes, scales = (torch.cat([getattr(weight, name) for weight in weights]) for name in ("codes", "scales"))
    return Integers(codes, scales, zeros, first.bits, first.order)


def _fits(weight: Integers) -> bool:
    columns = weight.codes.shape[1]
    try:
        check_group(columns, columns // weight.scales.shape[1], weight.bits)
    except InputError:
        return False
    return True


class _Loader:
    """Reads one artifact tensor by tensor into modules on a device."""

    def __init__(self, source: WeightSource, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.artifact = None if isinstance(source, Checkpoint) else cast(ArtifactSource, source)  # there is no third
        self.biases = set(source.family.shapes(source.config))

    def vector(self, name: str) -> Tensor:
        """A norm or a bias."""
        return self.source.tensor(name).to(device=self.device, dtype=self.dtype)

    def matrix(self, name: str, rows: int, columns: int) -> Tensor:
        """A dequantized matrix, a slice of float32 rows at a time."""
        out = torch.empty((rows, columns), dtype=self.dtype, device=self.device)
        if self.artifact is not None and self.integers(name) is not None:  # folders read quantized weights whole
            return out.copy_(self.source.tensor(name))
        for start in range(0, rows, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, rows)
            out[start:stop] = self.source.rows(name, start, stop)
        return out

    def integers(self, name: str) -> Integers | None:
        """What the operators take, if they take it."""
        found = self.artifact.integers(name, self.device) if self.artifact else None
        return found if found is not None and _fits(found) else None

    def stored_as(self, names: Sequence[str]) -> str:
        """For people: what the file holds."""
        if self.artifact is None:
            assert isinstance(self.source, Checkpoint)
            return self.source.dtype.lower()
        return ", ".join(dict.fromkeys(self.artifact.stored_as(name) for name in names))

    def fused(self, modules: Sequence[str], shapes: Sequence[tuple[int, int]]) -> list[Linear]:
        """One linear of all `modules`, or one of each where they do not go together."""
        names = [f"{module}.weight" for module in modules]
        biases = [self.vector(f"{module}.bias") if f"{module}.bias" in self.biases else None for module in modules]
        weights = [self.integers(name) for name in names]
        if len(names) > 1 and len({weight is None for weight in weights}) > 1:
            return self._apart(modules, shapes)
        bias = None if all(bias is None for bias in biases) else torch.cat([_given(b) for b in biases])
        if weights[0] is None:
            whole = torch.empty((sum(rows for rows, _ in shapes), shapes[0][1]), dtype=self.dtype, device=self.device)
            start = 0
            for name, (rows, columns) in zip(names, shapes, strict=True):
                whole[start : start + rows] = self.matrix(name, rows, columns)
                start += rows
            return [DenseLinear(whole, bias, self.stored_as(names))]
        halves = [_half(_given(weight)) for weight in weights]
        together = _together([weight for weight, _ in halves])
        if together is None:
            return self._apart(modules, shapes)
        return [self.quantized(together, bias, self.stored_as(names) + max(note for _, note in halves))]

    def _apart(self, modules: Sequence[str], shapes: Sequence[tuple[int, int]]) -> list[Linear]:
        return [self.fused([module], [shape])[0] for module, shape in zip(modules, shapes, strict=True)]

    def quantized(self, weight: Integers, bias: Tensor | None, stored: str) -> Linear:
        """The module for this device."""
        (rows, columns), groups = weight.codes.shape, weight.scales.shape[1]
        if self.device.type == "cpu" and cpu_int4.available(rows, columns, columns // groups):
            return CpuQuantLinear(weight, bias, stored)
        return QuantLinear(weight, bias, stored)

    def embedding(self) -> nn.Module:
        """The token embedding."""
        name, config = self.source.family.embedding, self.source.config
        weight = self.integers(name)
        if weight is not None:
            return QuantEmbedding(_half(weight)[0], self.dtype)
        table = nn.Embedding(1, 1, device="meta")
        table.weight = nn.Parameter(self.matrix(name, config.vocab, config.hidden), requires_grad=False)
        table.num_embeddings, table.embedding_dim = config.vocab, config.hidden
        return table

    def head(self, embedding: nn.Module) -> Linear:
        """The output head; a tied 16-bit one shares the embedding's memory."""
        name, config = self.source.family.head, self.source.config
        if config.tied and isinstance(embedding, nn.Embedding):
            return DenseLinear(embedding.weight.data, None, self.stored_as([self.source.family.embedding]))
        return self.fused([name.removesuffix(".weight")], [(config.vocab, config.hidden)])[0]


def _given(value: Any) -> Any:
    assert value is not None
    return value


def linears(source: WeightSource, layer: int, device: torch.device, dtype: torch.dtype) -> dict[str, list[Linear]]:
    """The linears of a block by stage, fused where they go together."""
    loader, family = _Loader(source, device, dtype), source.family
    shapes, prefix = family.linear_shapes(source.config), family.block.format(layer)
    return {
        stage.name: loader.fused([prefix + name for name in stage.linears], [shapes[name] for name in stage.linears])
        for stage in family.stages
    }


def ends(source: WeightSource, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Linear]:
    """The token embedding and the output head."""
    loader = _Loader(source, device, dtype)
    embedding = loader.embedding()
    return embedding, loader.head(embedding)


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(owner), leaf, module)


def load(
    path: str | Path, device: str | torch.device = "auto", dtype: torch.dtype | str | None = None
) -> Qwen2ForCausalLM:
    """A causal language model that computes with the packed weights of an artifact, made by any tool.

    path: a GPTQ or AWQ folder, a GGUF file, or a 16-bit checkpoint (which also may be a hub id).
    device: cpu, cuda, cuda:1; auto is CUDA if there is one.
    dtype: of the activations: bfloat16, float16 or float32; by default the checkpoint's, bfloat16 for GGUF.

    Raises:
        InputError: it is no artifact or checkpoint, or is damaged.
        UsageError: another dtype.
        EnvironmentMissingError: the device is not there.
    """
    import transformers  # the door to transformers; costs seconds

    place = _device(device)
    source = _open(path)
    raw = {} if isinstance(source, GgufSource) else _raw_config(source)
    number = _dtype(dtype, raw)
    config, family = source.config, source.family
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(_transformers_config(source, raw, number))
    loader = _Loader(source, place, number)
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(config=model.config).to(place)
    embedding = loader.embedding()
    body.embed_tokens = embedding
    body.norm.weight = nn.Parameter(loader.vector(family.final_norm), requires_grad=False)
    model.lm_head = loader.head(embedding)
    for layer in range(config.layers):
        _fill(model, source, layer, loader)
    model.generation_config = _generation(source, raw)
    return model.eval()


def _fill(model: nn.Module, source: WeightSource, layer: int, loader: _Loader) -> None:
    family, prefix = source.family, source.family.block.format(layer)
    for norm in (family.attention_norm, family.mlp_norm):
        module = model.get_submodule(prefix + norm.removesuffix(".weight"))
        module.weight = nn.Parameter(loader.vector(prefix + norm), requires_grad=False)
    shapes = family.linear_shapes(source.config)
    found = linears(source, layer, loader.device, loader.dtype)
    for stage in family.stages:
        modules = found[stage.name]
        if len(modules) == len(stage.linears):
            for linear, module in zip(stage.linears, modules, strict=True):
                _place(model, prefix + linear, module)
            continue
        sizes = [shapes[linear][0] for linear in stage.linears]
        parts = [Part(modules[0], sizes, index) for index in range(len(sizes))]
        for linear, part in zip(stage.linears, parts, strict=True):
            part.first = [parts[0]] if part.index else []
            _place(model, prefix + linear, part)


def _open(path: str | Path) -> WeightSource:
    place = Path(path)
    return open_weights(place) if place.exists() else Checkpoint.open(path)


def _device(name: str | torch.device) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentMissingError(f"device {name}: this torch ({torch.__version__}) sees no CUDA device")
    return device


def _dtype(wanted: torch.dtype | str | None, raw: dict[str, Any]) -> torch.dtype:
    if wanted is None:
        wanted = raw.get("dtype", raw.get("torch_dtype")) or "bfloat16"
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype) or found not in DTYPES:
        raise UsageError(f"dtype {wanted!r}: activations are bfloat16, float16 or float32")
    return found


def _raw_config(source: Any) -> dict[str, Any]:
    return read_json(source.path / "config.json")


def _transformers_config(source: WeightSource, raw: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import Qwen2Config

    config: ModelConfig = source.config
    stops = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw}
    return Qwen2Config(  # type: ignore[call-arg] # head_dim is read by the model and not declared by its config
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.positions,
        rms_norm_eps=config.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,  # shared or not, the head is a module of its own here
        use_sliding_window=False,
        dtype=dtype,
        **stops,
    )


def _generation(source: WeightSource, raw: dict[str, Any]) -> GenerationConfig:
    from transformers import GenerationConfig

    if isinstance(source, GgufSource):
        value = source.header.value
        names = {"eos_token_id": "eos", "bos_token_id": "bos", "pad_token_id": "padding"}
        ids = {key: value(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
        sampling = {key: value(f"general.sampling.{name}") for key, name in SAMPLING.items()}
        given = {key: value for key, value in (ids | sampling).items() if value is not None}
        return GenerationConfig(**given, do_sample=any(name in given for name in SAMPLING))
    folder = source.path  # type: ignore[attr-defined] # every source of a folder has it
    if (folder / "generation_config.json").is_file():
        return GenerationConfig(**read_json(folder / "generation_config.json"))
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{key: raw[key] for key in keys if key in raw})


SAMPLING = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k"}


# -- what runs


def paths(model: nn.Module) -> dict[str, str]:
    """Linear (or fused linears, or embedding) -> what the file holds and what runs, in words."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            found[name.removesuffix(".whole")] = module.extra_repr()
        elif isinstance(module, QuantEmbedding):
            found[name] = f"{module.bits} bit; rows dequantized when they are asked for"
    return found


def weight_bytes(model: nn.Module) -> int:
    """Memory of all weights of a loaded model; shared ones count once."""
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen[tensor.data_ptr()] = tensor.nbytes
    packed = sum(module.packed.nbytes for module in model.modules() if isinstance(module, CpuQuantLinear))
    return sum(seen.values()) + packed
