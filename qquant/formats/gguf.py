"""GGUF files of Qwen2 models as llama.cpp's own converter and llama-quantize write them.

Names: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight (no permutation: rotary is of the NEOX kind). Norms and biases are
F32; every matrix has the type that `gguf_mix` gives it for the file type; block layouts are in `gguf_types`. Tensors stand in
llama-quantize's order: those outside the blocks first, then block by block, by name. A tied head is not stored.

Metadata: see `gguf_metadata`.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.checkpoint import Checkpoint
from qquant.errors import InputError, QQuantError, UsageError
from qquant.families import FAMILIES, Family, ModelConfig, require_bounds
from qquant.formats import gguf_mix, gguf_types
from qquant.formats.gguf_container import Header, StoredTensor, header_bytes, read_header
from qquant.formats.gguf_metadata import metadata
from qquant.formats.imatrix import Imatrix
from qquant.layout import PlannedArtifact, PlannedFile, PlannedTensor
from qquant.recipe import GgufArtifact, Recipe
from qquant.resources import lazy
from qquant.safetensors_file import TensorInfo, read_bytes
from qquant.tensor import Integers, checksum

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.tensor import Grid, QuantizedTensor
else:
    torch = lazy("torch")

RUNTIME_BITS = {
    "q4_0": 4,
    "q5_0": 8,
    "q8_0": 8,
}  # types that `GgufSource.integers` gives, and the width it gives them in


def file_name(model: str, type_name: str) -> str:
    """As in Qwen's repositories: Qwen1.5-7B-Chat, q4_k_m -> qwen1_5-7b-chat-q4_k_m.gguf."""
    return f"{model.lower().replace('.', '_')}-{type_name}.gguf"


def tensor_order(name: str) -> tuple[int, str]:
    """Sort key of a GGUF tensor name: outside the blocks first, then by block, then by name."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) + 1 if match else 0, name)


class Gguf:
    """The `gguf` format of a recipe."""

    def plan(
        self, checkpoint: Checkpoint, spec: GgufArtifact, recipe: Recipe, name: str, imatrix: Imatrix | None = None
    ) -> PlannedArtifact:
        """The file, to the byte."""
        family, config = checkpoint.family, checkpoint.config
        shapes = {family.gguf_name(tensor): shape for tensor, shape in family.shapes(config).items()}
        names = {family.gguf_name(tensor): tensor for tensor in family.shapes(config)}
        mix = gguf_mix.tensor_types(spec.type, _mix_shape(config), spec.imatrix)
        types = {tensor: mix.types.get(tensor, "f32") for tensor in sorted(shapes, key=tensor_order)}
        fields = metadata(checkpoint, spec, recipe, name, imatrix)
        sizes = {tensor: _nbytes(types[tensor], shapes[tensor]) for tensor in types}
        entries = [(tensor, shapes[tensor], gguf_types.TYPES[types[tensor]].ggml_id, sizes[tensor]) for tensor in types]
        head, offsets, size = header_bytes(fields, entries)
        if size > recipe.gguf_split_size:
            raise UsageError(
                f"artifact {spec.name}: {file_name(name, spec.type)} takes {size:,} bytes, gguf_split_size is "
                f"{recipe.gguf_split_size:,}; qquant does not split GGUF files yet. Raise it, and split with llama-gguf-split"
            )
        planned = tuple(
            PlannedTensor(tensor, types[tensor], shapes[tensor], offsets[tensor], sizes[tensor]) for tensor in types
        )
        return PlannedArtifact(
            name=spec.name,
            spec=spec,
            folder=f"{name}-GGUF",
            files=(PlannedFile(file_name(name, spec.type), size, head, planned),),
            parameters=family.parameters(config),
            grids={names[tensor]: type_name for tensor, type_name in types.items()},
            fallbacks=tuple(f"{tensor}: {wanted} -> {given}" for tensor, wanted, given in mix.fallbacks),
        )

    def grid_for(self, planned: PlannedArtifact, name: str, columns: int) -> Grid | None:
        """The grid of linear weight `name` for the `gptq` solver; None: the type's own quantizer decides."""
        del columns
        type_name = planned.grids[name]
        if planned.spec.solver == "ggml" or not gguf_types.TYPES[type_name].levels:
            return None
        return gguf_types.grid(type_name)

    def pack(self, planned: PlannedArtifact, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """The blocks that hold linear weight `name`."""
        assert isinstance(quantized.params, gguf_types.BlockParams)
        blocks = gguf_types.pack(quantized.codes, quantized.params)
        return {_gguf_name(name): blocks}

    def store(self, planned: PlannedArtifact, name: str, value: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """The blocks of `name` (or of some of its rows) by the type's own quantizer."""
        type_name = planned.grids[name]
        matrix = value.float().reshape(-1, value.shape[-1])
        weights = importance if planned.spec.imatrix else None
        return {_gguf_name(name): gguf_types.quantize(matrix, type_name, weights)}

    def restore(self, planned: PlannedArtifact, name: str, stored: Mapping[str, Tensor]) -> Tensor:
        """float32 of what `store` or `pack` gave."""
        return gguf_types.dequantize(stored[_gguf_name(name)], planned.grids[name])

    def read(self, path: Path) -> GgufSource:
        """The dequantized weights of a GGUF file made by any tool.

        Raises:
            InputError: malformed, another architecture, an unsupported type, a missing tensor.
        """
        return GgufSource.open(path)

    def verify(self, files: Sequence[Path], written: Mapping[str, str], values: Mapping[str, str]) -> None:
        """Read the files with the `gguf` package and compare bytes and dequantized values.

        Raises:
            QQuantError: they differ.
        """
        import gguf  # the independent reader; costs a quarter of a second

        names = {_gguf_name(name): value for name, value in values.items()}
        for path in files:
            reader = gguf.GGUFReader(path)
            pages: Any = reader.data.base
            for tensor in reader.tensors:
                pages.madvise(mmap.MADV_DONTNEED)  # the file is mapped, and what was read would stay in memory
                if hashlib.sha256(tensor.data.data).hexdigest() != written[tensor.name]:
                    raise QQuantError(f"{path}: tensor {tensor.name} read back differs from what was written")
                if tensor.name in names:
                    decoded = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
                    if checksum(decoded) != names[tensor.name]:
                        raise QQuantError(f"{path}: tensor {tensor.name} decodes to other values than were solved for")


def _gguf_name(name: str) -> str:
    return next(iter(FAMILIES.values())).gguf_name(name)


def _mix_shape(config: ModelConfig) -> gguf_mix.ModelShape:
    return gguf_mix.ModelShape(
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        hidden=config.hidden,
        intermediate=config.intermediate,
        vocab=config.vocab,
        tied=config.tied,
    )


def _nbytes(type_name: str, shape: tuple[int, ...]) -> int:
    kind = gguf_types.TYPES[type_name]
    return math.prod(shape[:-1]) * (shape[-1] // kind.block) * kind.bytes


@dataclass
class GgufSource:
    """Weights of a GGUF file by their checkpoint names, dequantized one tensor at a time."""

    path: Path
    family: Family
    config: ModelConfig
    header: Header

    @classmethod
    def open(cls, path: Path) -> GgufSource:
        """Read and verify the header; see `Gguf.read`."""
        header = read_header(path)
        arch = header.value("general.architecture")
        family = next((family for family in FAMILIES.values() if family.gguf_architecture == arch), None)
        if family is None:
            raise InputError(
                f"{path}: architecture {arch!r}; qquant reads {', '.join(repr(f.gguf_architecture) for f in FAMILIES.values())}"
            )
        if header.value("split.count", 1) not in (0, 1):
            raise InputError(
                f"{path}: is one of {str(header.value('split.count'))[:20]} shards; merge them with gguf-split first"
            )
        source = cls(path, family, _config(path, header), header)
        source.verify()
        return source

    def verify(self) -> None:
        """Raise InputError unless every tensor is there, of a known type, with its data inside the file."""
        expected = {self.family.gguf_name(name): shape for name, shape in self.family.shapes(self.config).items()}
        for name, shape in expected.items():
            found = self.header.tensors.get(name)
            if found is None or found.shape != shape:
                raise InputError(
                    f"{self.path}: tensor {name} is {list(found.shape) if found else 'missing'}; expected {list(shape)}"
                )
        for tensor in self.header.tensors.values():
            if tensor.type_id not in _TYPE_NAMES:
                raise InputError(
                    f"{self.path}: tensor {tensor.name} has type {tensor.type_id}; qquant reads {', '.join(gguf_types.TYPES)}"
                )

    def tensor(self, name: str) -> Tensor:
        """float32, dequantized."""
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
        kind = _TYPE_NAMES[stored.type_id]
        if kind not in RUNTIME_BITS:
            return None
        codes, params = gguf_types.unpack(self._blocks(stored, 0, math.prod(stored.shape[:-1])).to(device), kind)
        bits = RUNTIME_BITS[kind]
        codes += (1 << (bits - 1)) - gguf_types.TYPES[kind].centre
        return Integers(codes, params.d, None, bits)

    def stored_as(self, name: str) -> str:
        """For people: the file's type of `name`."""
        return _TYPE_NAMES[self._stored(name).type_id]

    def _stored(self, name: str) -> StoredTensor:
        if name == self.family.head and self.config.tied:
            name = self.family.embedding
        return self.header.tensors[self.family.gguf_name(name)]

    def _rows(self, stored: StoredTensor, start: int, stop: int) -> Tensor:
        return gguf_types.dequantize(self._blocks(stored, start, stop), _TYPE_NAMES[stored.type_id])

    def _blocks(self, stored: StoredTensor, start: int, stop: int) -> Tensor:
        kind = _TYPE_NAMES[stored.type_id]
        row = _nbytes(kind, stored.shape[-1:])
        info = TensorInfo(stored.name, "U8", stored.shape, self.path, stored.offset, _nbytes(kind, stored.shape))
        return torch.frombuffer(read_bytes(info, start * row, stop * row), dtype=torch.uint8).view(stop - start, row)


_TYPE_NAMES = {kind.ggml_id: name for name, kind in gguf_types.TYPES.items()}


def _config(path: Path, header: Header) -> ModelConfig:
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
    config = ModelConfig(
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
    )
    return require_bounds(config, str(path))
