"""Artifacts that answer: a transformers model whose linears hold the packed weights.

    model = qquant.load("release/Qwen1.5-0.5B-Chat-GPTQ-Int4")        a folder, a .gguf file, or a 16-bit checkpoint
    model.generate(...)                                               transformers' Qwen2ForCausalLM; see `generating`

A format says what its weights are (`Integers`: codes, scales, zero points), whoever wrote them; they are repacked once, at load,
and no 16-bit copy is made. q, k, v are one product, gate and up another, where their groups agree. What runs:

    CUDA    up to 64 rows `qquant::wq_mm`, on Hopper up to 512 (8 bits: 256) `qquant::many_rows`, above that `qquant::dequant` and the vendor's product
    CPU     torch's int4 product for few rows (twice, for 8 bits), above that dequantize and multiply (`kernels.cpu_int4`); by float32, also of
            16-bit weights, where the CPU has no instructions for bfloat16

What has no operator (K-quants and the affine types of GGUF, groups that no layout has, 16-bit tensors) is dequantized once, at
load. Which way each linear went stands in its `repr` and in `paths(model)`: nothing falls back in silence. Sums are float32,
activations bf16 or fp16 (also fp32, without the int4 product on the CPU, which would be slow).

To fuse without touching transformers' code, q_proj is a `FusedSlice` that makes the product for all three, and k_proj and v_proj hand
out what it made; norms and MLPs are those of `layers`. Left out: training, other families, several devices.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qquant.algorithms.grid import Integers
from qquant.families.linear import FEW, by_float32, linear
from qquant.kernels import cpu_int4, direct, jit
from qquant.kernels.dequant import dequant
from qquant.kernels.many_rows import most_rows, quantized_linear
from qquant.kernels.unpack import repack
from qquant.kernels.wq_mm import MAX_ROWS


class RuntimeLinear(nn.Module):
    """y = x W' + b; what every kind of it has."""

    def __init__(self, shape: tuple[int, int], bias: Tensor | None, stored: str) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.stored = stored

    @property
    def path(self) -> str:
        """The operator that runs, in words for people."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Memory of the weights and of what belongs to them."""
        held = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        return sum(tensor.nbytes for tensor in held)

    def extra_repr(self) -> str:
        """Shape, what the file holds, what runs."""
        return f"{self.in_features} -> {self.out_features}, {self.stored}; {self.path}"


class DenseLinear(RuntimeLinear):
    """Weights of 16 (or 32) bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stored: str) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), bias, stored)
        self.weight = nn.Parameter(weight, requires_grad=False)

    @property
    def path(self) -> str:
        """The operator that runs, in words for people."""
        name = str(self.weight.dtype).removeprefix("torch.")
        name += f", by float32 above {FEW} rows" if by_float32(self.weight) else ""
        return f"torch linear in {name}" + ("" if self.stored in ("bf16", "f16", "f32") else ", dequantized at load")

    def forward(self, x: Tensor) -> Tensor:
        """X [..., K] -> [..., N]."""
        return linear(x, self.weight, self.bias)


class QuantLinear(RuntimeLinear):
    """Weights of 4 or 8 bits in groups, in the layout of `qquant.kernels.unpack`; `order`: see `Integers`."""

    def __init__(self, weight: Integers, bias: Tensor | None, stored: str) -> None:
        super().__init__((weight.codes.shape[0], weight.codes.shape[1]), bias, stored)
        self.bits = weight.bits
        self.group_size = weight.codes.shape[1] // weight.scales.shape[1]
        qweight, params = repack(weight.codes, weight.scales, weight.zeros, weight.bits)
        self.qweight, self.params = nn.Buffer(qweight), nn.Buffer(params)
        self.order = None if weight.order is None else nn.Buffer(weight.order)
        self._calls: dict[tuple[Hashable, torch.dtype], direct.Call | direct.ManyRows | direct.Unpacking] = {}

    @property
    def path(self) -> str:
        """The operator that runs, in words for people."""
        if jit.path("wq_mm", self.qweight.device) == "triton":
            way = f"Triton kernel up to {most_rows(self.qweight.device, self.bits, self.in_features)} rows, above dequantize and multiply"
        else:
            way = "dequantize and multiply (no kernel for this device and shape)"
        return way + ("" if self.order is None else ", inputs reordered")

    def forward(self, x: Tensor) -> Tensor:
        """X [..., K] -> [..., N]."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if not torch.compiler.is_compiling():
            y = self._called(x)
            if y is not None:
                return y
        if jit.path("wq_mm", x.device) == "triton" and x.dtype != torch.float32:
            return quantized_linear(x, self.qweight, self.params, self.bias, self.bits, self.group_size)
        return F.linear(x, dequant(self.qweight, self.params, self.bits, self.group_size, x.dtype), self.bias)

    def _called(self, x: Tensor) -> Tensor | None:
        """The product by a launch that was prepared for these rows and this type, None if it must go the ordinary way."""
        rows = x.numel() // self.in_features
        kind: type[direct.Call | direct.ManyRows | direct.Unpacking]
        kind, place = (direct.Call, rows) if rows <= MAX_ROWS else direct.for_many(x, self.bits, self.out_features)
        call = self._calls.get((place, x.dtype))
        if call is not None and self._holds(call.weights):
            y = call(x)
        elif direct.usable(x):
            weights = direct.PackedWeights(self.qweight, self.params, self.bias, self.bits, self.group_size)
            y, self._calls[place, x.dtype] = kind.first(x, weights)
        else:
            return None
        return F.linear(x, y, self.bias) if y is not None and kind is direct.Unpacking else y

    def _holds(self, weights: direct.PackedWeights) -> bool:
        return weights.qweight is self._buffers["qweight"] and weights.bias is self._parameters.get("bias")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantLinear:
        self._calls.clear()  # the weights move
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch's

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_calls": {}}


class CpuQuantLinear(RuntimeLinear):
    """A linear of 4 or 8 bits in the layout of torch's int4 product on the CPU."""

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
        """The operator that runs, in words for people."""
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


class FusedSlice(nn.Module):
    """One of several linears with the same input: the first makes the product of all, the others hand out theirs."""

    def __init__(self, fused: RuntimeLinear, sizes: Sequence[int], index: int) -> None:
        super().__init__()
        self.index, self.sizes = index, tuple(sizes)
        self.made: tuple[Tensor, tuple[Tensor, ...]] | None = None  # of the first: its input and outputs
        self.first: list[FusedSlice] = []  # a list, so that the module is registered in one place
        if index == 0:
            self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """X [..., K] -> [..., sizes[index]].

        Raises:
            RuntimeError: called with another input than the first part was.
        """
        if self.index == 0:
            outputs = self.fused(x).split_with_sizes(self.sizes, dim=-1)
            self.__dict__["made"] = x, outputs  # nn.Module's own way to set an attribute takes as long as a launch
            return outputs[0]
        (first,) = self.first
        if first.made is None or first.made[0] is not x:
            raise RuntimeError("a fused linear was called out of order: the first of its parts has not seen this input")
        y = first.made[1][self.index]
        if self.index == len(self.sizes) - 1:
            first.__dict__["made"] = None
        return y

    def extra_repr(self) -> str:
        """The rows of the fused linear that these are, in words for people."""
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
