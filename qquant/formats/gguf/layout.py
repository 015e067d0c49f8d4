"""GGUF files of Qwen2 models as llama.cpp's own converter and llama-quantize write them.

Names: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight (no permutation: rotary is of the NEOX kind). Norms and biases are
F32; every matrix has the type that `mix` gives it for the file type; block layouts are in `types`. Tensors stand in
llama-quantize's order: those outside the blocks first, then block by block, by name. A tied head is not stored.

Metadata is in `metadata`, several files for one model in `shards`, reading in `source`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.errors import InputError
from qquant.families import Family
from qquant.formats.claims import Claims
from qquant.formats.gguf import blocks, budget, inside, mix, patterns, quantize, types
from qquant.formats.gguf import claims as said
from qquant.formats.gguf.container import MAGIC, header_bytes
from qquant.formats.gguf.imatrix import Imatrix
from qquant.formats.gguf.metadata import metadata
from qquant.formats.gguf.ollama import modelfile
from qquant.formats.gguf.read_back import GgufReadBack
from qquant.formats.gguf.shards import SUFFIX, Shard, named, shard_paths, split
from qquant.formats.gguf.source import GgufSource
from qquant.formats.planned import Losses, ModelFile, PlannedArtifact, PlannedFile, PlannedTensor, Stored
from qquant.recipe import ArtifactSpec, GgufArtifact, Recipe
from qquant.resources import lazy
from qquant.source.checkpoint import Checkpoint
from qquant.source.safetensors_file import SIZES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.algorithms.grid import Grid, QuantizedTensor
else:
    torch = lazy("torch")


def stem(model: str, type_name: str) -> str:
    """Names as in Qwen's repositories: Qwen1.5-7B-Chat, q4_k_m -> qwen1_5-7b-chat-q4_k_m, to which .gguf is added."""
    return f"{model.lower().replace('.', '_')}-{type_name}"


def tensor_order(name: str) -> tuple[int, str]:
    """Sort key of a GGUF tensor name: outside the blocks first, then by block, then by name."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) + 1 if match else 0, name)


class Gguf:
    """The `gguf` format of a recipe."""

    is_folder = False
    library = "gguf"

    def recognises(self, quantization: Mapping[str, Any]) -> bool:
        """False: a folder of GGUF files is not a model."""
        return False

    def begins(self, head: bytes) -> bool:
        """Whether a file begins with the magic of GGUF."""
        return head.startswith(MAGIC)

    def kind(self, path: Path) -> str:
        """The mix that its tensors are."""
        source = GgufSource.open(path)
        return said.kind(source.header, source.family, source.config)

    def path_of(self, folder: Path, files: Iterable[str]) -> Path:
        """The file, or the first of its parts."""
        first = min((name for name in files if name.endswith(SUFFIX)), default=None)
        if first is None:
            raise InputError(f"{folder}: no GGUF file is named among its files")
        return folder / first

    def weight_files(self, path: Path) -> tuple[Path, ...]:
        """The file, or its parts."""
        return shard_paths(path)

    def models(self, files: Sequence[str]) -> list[ModelFile]:
        """Every file, by the type in its name; of parts the first."""
        return named(files)

    def describe(self, path: Path) -> dict[str, Any]:
        """Metadata and tensors of a file, for `qquant inspect`."""
        return inside.describe(path)

    def plan(
        self, checkpoint: Checkpoint, spec: ArtifactSpec, recipe: Recipe, name: str, imatrix: Imatrix | None = None
    ) -> PlannedArtifact:
        """The file, or its parts, to the byte, and a Modelfile for Ollama."""
        assert isinstance(spec, GgufArtifact)
        family, config = _supported(checkpoint, spec), checkpoint.config
        shape = mix.ModelShape(family, config)
        fixed = {name: choice[0] for name, choice in patterns.allowed(spec.types, shape.matrices(), spec.name).items()}
        shapes = {family.gguf_name(tensor): shape for tensor, shape in family.shapes(config).items()}
        names = {family.gguf_name(tensor): tensor for tensor in family.shapes(config)}
        mixed = mix.tensor_types(spec.kind, shape, spec.imatrix, fixed)
        kinds = {tensor: mixed.types.get(tensor, "f32") for tensor in sorted(shapes, key=tensor_order)}
        fields = metadata(checkpoint, spec, recipe, name, imatrix)
        sizes = {tensor: types.TYPES[kinds[tensor]].nbytes(shapes[tensor]) for tensor in kinds}
        entries = [(tensor, shapes[tensor], types.TYPES[kinds[tensor]].ggml_id, sizes[tensor]) for tensor in kinds]
        shards = split(stem(name, spec.label), fields, entries, recipe.gguf_split_size)
        model = modelfile(checkpoint.path, stem(name, spec.label), spec.label, [shard.name for shard in shards])
        return PlannedArtifact(
            name=spec.name,
            spec=spec,
            folder=f"{name}-GGUF",
            files=(*(_planned(shard, kinds) for shard in shards), model),
            parameters=family.parameters(config),
            file_names={tensor: name for name, tensor in names.items()},
            stored={names[tensor]: _stored(type_name) for tensor, type_name in kinds.items()},
            fallbacks=tuple(f"{tensor}: {wanted} -> {fixed}" for tensor, wanted, fixed in mixed.fallbacks),
        )

    def settled(
        self,
        checkpoint: Checkpoint,
        spec: ArtifactSpec,
        recipe: Recipe,
        name: str,
        imatrix: Imatrix | None = None,
        losses: Mapping[str, Losses] | None = None,
    ) -> GgufArtifact:
        """The entry with types for its size: those that lose least by `losses`, or alike for every weight."""
        assert isinstance(spec, GgufArtifact)
        family = _supported(checkpoint, spec)
        named = losses and {family.gguf_name(tensor): by_type for tensor, by_type in losses.items()}
        trial = partial(self.plan, checkpoint, recipe=recipe, name=name, imatrix=imatrix)
        return budget.settled(spec, mix.ModelShape(family, checkpoint.config), checkpoint.dtype, named, trial)

    def trials(
        self, checkpoint: Checkpoint, spec: ArtifactSpec, recipe: Recipe, name: str
    ) -> dict[str, PlannedArtifact]:
        """A plan for every type that a tensor may have; it counts for the tensors that have that type in it."""
        assert isinstance(spec, GgufArtifact)
        shape = mix.ModelShape(_supported(checkpoint, spec), checkpoint.config)
        kinds = budget.candidates(spec, shape, checkpoint.dtype)
        unsplit = recipe.model_copy(update={"gguf_split_size": 10**15})
        plans = {}
        for kind in dict.fromkeys(one for several in kinds.values() for one in several):
            types = {patterns.short(tensor): kind for tensor, several in kinds.items() if kind in several}
            entry = spec.model_copy(update={"type": "q8_0", "size": None, "bits_per_weight": None, "types": types})
            plans[kind] = self.plan(checkpoint, entry, unsplit, name)
        return plans

    def in_16_bits(self, path: Path, tensors: Sequence[str], dtype: str) -> dict[str, Any]:
        """`type` and `types`: of a file that is one of llama-quantize's mixes the tensors alone, else all that it has."""
        source = GgufSource.open(path)
        family, sixteen = source.family, budget.SIXTEEN[dtype]
        shape, types = mix.ModelShape(family, source.config), said.matrix_types(source.header)
        kind = said.kind_of(types, shape)
        restored = {patterns.short(name): sixteen for tensor in tensors if (name := family.gguf_name(tensor)) in types}
        plain = mix.tensor_types(kind, shape, True).types
        others = {} if all(plain[name] == types[name] for name in shape.matrices()) else budget.abridged(types)
        return {"type": budget.NOT_ASKED_FOR.get(kind, kind), "types": others | restored}

    def grid_for(self, planned: PlannedArtifact, name: str, columns: int) -> Grid | None:
        """The grid of matrix `name` for a solver with steps; None: the type's own quantizer decides."""
        del columns
        type_name = planned.stored[name].type
        if not planned.spec.steps or not types.TYPES[type_name].levels:
            return None
        return quantize.grid(type_name)

    def pack(self, planned: PlannedArtifact, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """The blocks that hold linear weight `name`."""
        assert isinstance(quantized.params, blocks.BlockParams)
        return {planned.file_names[name]: quantize.pack(quantized.codes, quantized.params)}

    def store(self, planned: PlannedArtifact, name: str, value: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """The blocks of `name` (or of some of its rows) by the type's own quantizer."""
        assert isinstance(planned.spec, GgufArtifact)
        type_name = planned.stored[name].type
        matrix = value.float().reshape(-1, value.shape[-1])
        weights = importance if planned.spec.imatrix else None
        return {planned.file_names[name]: quantize.quantize(matrix, type_name, weights)}

    def restore(self, planned: PlannedArtifact, name: str, stored: Mapping[str, Tensor]) -> Tensor:
        """float32 of what `store` or `pack` gave."""
        return quantize.dequantize(stored[planned.file_names[name]], planned.stored[name].type)

    def read(self, path: Path) -> GgufSource:
        """The dequantized weights of a GGUF file made by any tool.

        Raises:
            InputError: malformed, another architecture, an unsupported type, a missing tensor.
        """
        return GgufSource.open(path)

    def claims(self, path: Path, checkpoint: Checkpoint) -> Claims:
        """Faults and warnings where metadata, vocabulary, file type and names of tensors are not what `plan` gives the checkpoint's files."""
        return said.compare(path, checkpoint)

    def read_back(self, files: Sequence[Path], device: torch.device) -> GgufReadBack:
        """A file that was written, with its further parts, read with the `gguf` package; values are decoded on `device` where that is a GPU."""
        return GgufReadBack(files, device)


def _supported(checkpoint: Checkpoint, spec: GgufArtifact) -> Family:
    """The family, if llama.cpp has it."""
    family = checkpoint.family
    if family.gguf is None:
        raise InputError(
            f"artifact {spec.name}: llama.cpp has no architecture for {family.model_type!r}, so a GGUF file of it could not be read. "
            "Remove the artifact, or give it format: gptq or awq"
        )
    return family


def _stored(type_name: str) -> Stored:
    return Stored(type_name, type_name, numbers=type_name.upper() in SIZES)


def _planned(shard: Shard, types: Mapping[str, str]) -> PlannedFile:
    head, offsets, size = header_bytes(shard.fields, shard.entries)
    tensors = tuple(
        PlannedTensor(name, types[name], shape, offsets[name], size) for name, shape, _, size in shard.entries
    )
    return PlannedFile(shard.name, size, head, tensors)
