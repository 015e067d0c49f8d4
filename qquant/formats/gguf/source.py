"""The weights in a GGUF model of any tool, dequantized tensor by tensor; in one file or in parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.algorithms.grid import Integers
from qquant.errors import InputError
from qquant.families import FAMILIES, Family, ModelConfig, require_bounds
from qquant.formats.gguf import quantize, types
from qquant.formats.gguf.container import Header, StoredTensor, type_name
from qquant.formats.gguf.shards import read_model
from qquant.resources import lazy
from qquant.source.safetensors_file import TensorInfo, read_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

RUNTIME_BITS = {
    "q4_0": 4,
    "q5_0": 8,
    "q8_0": 8,
}  # types that `GgufSource.integers` gives, and the width it gives them in


def of_architecture(name: Any, path: Path) -> Family:
    """The family that llama.cpp calls so. Raises InputError if there is none."""
    known = {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf}
    if not isinstance(name, str) or name not in known:
        raise InputError(f"{path}: architecture {name!r}; qquant reads {', '.join(map(repr, known))}")
    return known[name]


@dataclass
class GgufSource:
    """Weights of a GGUF model by their checkpoint names, dequantized one tensor at a time."""

    path: Path
    family: Family
    config: ModelConfig
    header: Header
    device: torch.device | None = None  # where blocks are dequantized; None: on the CPU

    def on(self, device: torch.device) -> GgufSource:
        """This source, dequantizing on `device`."""
        return replace(self, device=device)

    @classmethod
    def open(cls, path: Path) -> GgufSource:
        """Read and verify the header; see `Gguf.read`."""
        header = read_model(path)
        arch = header.value("general.architecture")
        family = of_architecture(arch, path)
        source = cls(path, family, _config(path, header, family), header)
        source.verify()
        return source

    def verify(self) -> None:
        """Raise InputError unless every tensor is there, of a known type, with its data inside the file."""
        expected = {self.family.gguf_name(name): shape for name, shape in self.family.shapes(self.config).items()}
        for name, shape in expected.items():
            stored = self.header.tensors.get(name)
            if stored is None or stored.shape != shape:
                raise InputError(
                    f"{self.path}: tensor {name} is {list(stored.shape) if stored else 'missing'}; expected {list(shape)}"
                )
        for tensor in self.header.tensors.values():
            if type_name(tensor.type_id) not in types.TYPES:
                raise InputError(
                    f"{self.path}: tensor {tensor.name} has type {type_name(tensor.type_id)}; qquant reads {', '.join(types.TYPES)}"
                )

    def tensor(self, name: str) -> Tensor:
        """Tensor `name`, dequantized to float32."""
        stored = self._stored(name)
        return self._rows(stored, 0, math.prod(stored.shape[:-1])).view(stored.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop, float32."""
        return self._rows(self._stored(name), start, stop)

    def integers(self, name: str, device: torch.device) -> Integers | None:
        """Matrix `name` for the operators of a runtime; None if its type has no scale of its own in every group.

        q4_0, q5_0 and q8_0 are fp16 scales times integers, which is what those operators take. The others are left out: the scales
        of K-quants are products that fp16 does not hold, and the affine types have zero points that are not whole.
        """
        stored = self._stored(name)
        kind = type_name(stored.type_id)
        if kind not in RUNTIME_BITS:
            return None
        codes, params = quantize.unpack(self._blocks(stored, 0, math.prod(stored.shape[:-1])).to(device), kind)
        bits = RUNTIME_BITS[kind]
        codes += (1 << (bits - 1)) - types.TYPES[kind].centre
        return Integers(codes, params.d, None, bits)

    def stored_as(self, name: str) -> str:
        """The file's type of `name`, in words for people."""
        return type_name(self._stored(name).type_id)

    def _stored(self, name: str) -> StoredTensor:
        if name == self.family.head and self.config.tied:
            name = self.family.embedding
        return self.header.tensors[self.family.gguf_name(name)]

    def _rows(self, stored: StoredTensor, start: int, stop: int) -> Tensor:
        return quantize.dequantize(self._blocks(stored, start, stop).to(self.device), type_name(stored.type_id))

    def _blocks(self, stored: StoredTensor, start: int, stop: int) -> Tensor:
        row = types.TYPES[type_name(stored.type_id)].row_bytes(stored.shape[-1])
        info = TensorInfo(stored.name, "U8", stored.shape, stored.path, stored.offset, stored.nbytes)
        return read_bytes(info, start * row, stop * row).view(stop - start, row)


def _config(path: Path, header: Header, family: Family) -> ModelConfig:
    arch = header.value("general.architecture")

    def number(key: str, default: Any = None) -> Any:
        value = header.value(f"{arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise InputError(f"{path}: {arch}.{key} is {str(value)[:80]!r}; expected a positive number")
        return value

    heads, hidden = number("attention.head_count"), number("embedding_length")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{path}: tensor token_embd.weight is missing")
    more = {attribute: number(key) for key, _, attribute in family.llama_cpp.numbers}
    config = family.llama_cpp.config(
        hidden=hidden,
        intermediate=number("feed_forward_length"),
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv"),
        head_dim=number("attention.key_length", max(1, hidden // heads)),
        vocab=embedding.shape[0],
        tied="output.weight" not in header.tensors,
        epsilon=number("attention.layer_norm_rms_epsilon"),
        rope_theta=number("rope.freq_base", 10000.0),
        positions=number("context_length"),
        **more,
    )
    return require_bounds(config, str(path))
