"""GGUF files of Qwen2 models as llama.cpp's own converter and llama-quantize write them.

Names: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight (no permutation: rotary is of the NEOX kind). Norms and biases are
F32; every matrix has the type that `gguf_mix` gives it for the file type; block layouts are in `gguf_types`. Tensors stand in
llama-quantize's order: those outside the blocks first, then block by block, by name. A tied head is not stored.

Metadata: the converter's fields in its order, then general.quantization_version and general.file_type at the end and the
quantize.imatrix.* fields, where llama-quantize puts them. Token ids without a token are `[PAD i]`, type UNUSED.
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

from qquant.checkpoint import Checkpoint, read_json
from qquant.errors import InputError, QQuantError, UsageError
from qquant.families import FAMILIES, Family, ModelConfig
from qquant.formats import gguf_mix, gguf_types
from qquant.formats.gguf_container import Field, Header, StoredTensor, header_bytes, read_header
from qquant.formats.imatrix import CHUNK, Imatrix
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
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types
SAMPLING = (
    ("top_k", "top_k", "i32"),
    ("top_p", "top_p", "f32"),
    ("temperature", "temp", "f32"),
)  # what the converter takes over


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


def metadata(
    checkpoint: Checkpoint, spec: GgufArtifact, recipe: Recipe, name: str, imatrix: Imatrix | None = None
) -> list[Field]:
    """Every field of the file, in order."""
    config, arch = checkpoint.config, checkpoint.family.gguf_architecture
    fields = [Field("general.architecture", "str", arch), Field("general.type", "str", "model")]
    fields += _general(checkpoint, name)
    fields += [
        Field(f"{arch}.block_count", "u32", config.layers),
        Field(f"{arch}.context_length", "u32", config.positions),
        Field(f"{arch}.embedding_length", "u32", config.hidden),
        Field(f"{arch}.feed_forward_length", "u32", config.intermediate),
        Field(f"{arch}.attention.head_count", "u32", config.heads),
        Field(f"{arch}.attention.head_count_kv", "u32", config.kv_heads),
        Field(f"{arch}.rope.freq_base", "f32", config.rope_theta),
        Field(f"{arch}.attention.layer_norm_rms_epsilon", "f32", config.epsilon),
    ]
    fields += _tokenizer(checkpoint)
    fields += [
        Field("general.quantization_version", "u32", 2),
        Field("general.file_type", "u32", gguf_mix.FILE_TYPES[spec.type]),
    ]
    tokens = recipe.calibration.samples * recipe.calibration.length
    if spec.imatrix and spec.type not in ("f16", "bf16"):
        fields += [
            Field("quantize.imatrix.file", "str", "imatrix.gguf"),
            Field(
                "quantize.imatrix.dataset",
                "str",
                (imatrix.dataset if imatrix else f"qquant recipe {recipe.name}")[:127],
            ),
            Field("quantize.imatrix.entries_count", "u32", config.layers * len(checkpoint.family.linears)),
            Field("quantize.imatrix.chunks_count", "u32", imatrix.chunks if imatrix else -(-tokens // CHUNK)),
        ]
    return fields


def _general(checkpoint: Checkpoint, name: str) -> list[Field]:
    parameters = checkpoint.family.parameters(checkpoint.config)
    fields = []
    generation = checkpoint.path / "generation_config.json"
    settings = read_json(generation) if generation.is_file() else {}
    for key, name_there, kind in SAMPLING:
        if isinstance(settings.get(key), int | float):
            fields.append(Field(f"general.sampling.{name_there}", kind, settings[key]))
    fields.append(Field("general.name", "str", " ".join(_titled(word) for word in name.replace("-", " ").split())))
    match = re.fullmatch(r"(?P<basename>[A-Za-z].*?)-(?P<size>\d+(\.\d+)?[KMBT])(-(?P<finetune>.+))?", name)
    for key in ("finetune", "basename"):
        if match and match[key]:
            fields.append(Field(f"general.{key}", "str", match[key]))
    fields.append(Field("general.size_label", "str", match["size"] if match else _size_label(parameters)))
    return fields


def _titled(word: str) -> str:
    """As llama.cpp's converter writes names: words in lower case get a capital, numbers and mixed case stay."""
    return word if not word.islower() or re.match(r"v?\d", word) else word.title()


def _size_label(parameters: int) -> str:
    """Two digits and a unit: 9.3M, 620M, 7.7B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if parameters > size:
            break
    else:
        unit, size = "K", 1e3
    return f"{parameters / size:.{1 if round(parameters / size) < 10 else 0}f}{unit}"


def _tokenizer(checkpoint: Checkpoint) -> list[Field]:
    path = checkpoint.path
    tokens, kinds, merges = _vocabulary(path, checkpoint.config.vocab)
    fields = [
        Field("tokenizer.ggml.model", "str", "gpt2"),
        Field("tokenizer.ggml.pre", "str", "qwen2"),
        Field("tokenizer.ggml.tokens", "[str]", tokens),
        Field("tokenizer.ggml.token_type", "[i32]", kinds),
        Field("tokenizer.ggml.merges", "[str]", merges),
    ]
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    numbers = {token: index for index, token in enumerate(tokens)}
    special = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        text = settings.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if text in numbers:
            special[key] = numbers[text]
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = checkpoint.raw_config.get(f"{role}_token_id")
        if key not in special and isinstance(number, int) and 0 <= number < len(tokens):
            special[key] = number
    fields += [Field(f"tokenizer.ggml.{key}_token_id", "u32", number) for key, number in special.items()]
    fields += [
        Field("tokenizer.ggml.add_bos_token", "bool", False),
        Field("tokenizer.ggml.add_eos_token", "bool", False),
    ]
    template = path / "chat_template.jinja"
    text = template.read_text("utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(text, str):
        fields.append(Field("tokenizer.chat_template", "str", text))
    return fields


def _vocabulary(path: Path, size: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens padded to `size`, their types, and merges as "a b"."""
    if (path / "tokenizer.json").is_file():
        content = read_json(path / "tokenizer.json")
        vocabulary, merges, added = (
            content["model"]["vocab"],
            content["model"]["merges"],
            content.get("added_tokens", []),
        )
    else:
        vocabulary = read_json(path / "vocab.json")
        lines = (path / "merges.txt").read_text("utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        decoder = read_json(path / "tokenizer_config.json").get("added_tokens_decoder", {})
        added = [{"id": int(number), **entry} for number, entry in decoder.items()]
    tokens = {number: token for token, number in vocabulary.items()}
    kinds = dict.fromkeys(tokens, NORMAL)
    for entry in added:
        special = entry.get("special") or re.fullmatch(r"<\|.*\|>", entry["content"])
        tokens[entry["id"]], kinds[entry["id"]] = entry["content"], CONTROL if special else USER_DEFINED
    if tokens and max(tokens) >= size:
        raise InputError(
            f"{path}: token {max(tokens)} ({tokens[max(tokens)]!r}) lies beyond vocab_size {size}; is this its tokenizer?"
        )
    return (
        [tokens.get(number, f"[PAD{number}]") for number in range(size)],
        [kinds.get(number, UNUSED) for number in range(size)],
        [
            merge if isinstance(merge, str) else " ".join(part.replace(" ", chr(288)) for part in merge)
            for merge in merges
        ],
    )


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
        if header.value("split.count", 1) > 1:
            raise InputError(
                f"{path}: is one of {header.value('split.count')} shards; merge them with gguf-split first"
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
        size = self.path.stat().st_size
        for tensor in self.header.tensors.values():
            if tensor.type_id not in _TYPE_NAMES:
                raise InputError(
                    f"{self.path}: tensor {tensor.name} has type {tensor.type_id}; qquant reads {', '.join(gguf_types.TYPES)}"
                )
            if tensor.offset + _nbytes(_TYPE_NAMES[tensor.type_id], tensor.shape) > size:
                raise InputError(
                    f"{self.path}: truncated: tensor {tensor.name} ends beyond the {size:,} bytes of the file"
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

    def number(key: str) -> Any:
        value = header.value(f"{arch}.{key}")
        if not isinstance(value, int | float) or value <= 0:
            raise InputError(f"{path}: {arch}.{key} is {value!r}; expected a positive number")
        return value

    heads, hidden = number("attention.head_count"), number("embedding_length")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{path}: tensor token_embd.weight is missing")
    return ModelConfig(
        hidden=hidden,
        intermediate=number("feed_forward_length"),
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv"),
        head_dim=header.value(f"{arch}.attention.key_length", hidden // heads),
        vocab=embedding.shape[0],
        tied="output.weight" not in header.tensors,
        epsilon=number("attention.layer_norm_rms_epsilon"),
        rope_theta=header.value(f"{arch}.rope.freq_base", 10000.0),
        positions=number("context_length"),
    )
