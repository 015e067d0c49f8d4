"""A model folder as transformers, vLLM and SGLang load it: what GPTQ and AWQ artifacts have in common.

    config.json (the source's, plus quantization_config), model.safetensors or shards with an index, and the source's tokenizer,
    generation config, chat template and licence files byte for byte.

Embedding, norms, biases and head keep the dtype of the source. A tied head is not stored twice, and no zero biases are written. What is
outside the blocks stands first, as in GGUF files: it is written first, and a file is read back from its beginning on while blocks are solved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qquant.errors import InputError
from qquant.families import Family, ModelConfig, family_of, parse_config
from qquant.formats import beside, folder_claims, keeping
from qquant.formats.claims import Claims, claims, shown
from qquant.formats.folder_read_back import FolderReadBack
from qquant.formats.gguf.imatrix import Imatrix
from qquant.formats.planned import ModelFile, PlannedArtifact, Stored, copied_file, safetensors_files, small_file
from qquant.recipe import ArtifactSpec, IntegerArtifact, Recipe
from qquant.resources import lazy
from qquant.source.checkpoint import FLOATS, Checkpoint, read_config, read_tensors
from qquant.source.safetensors_file import TensorInfo, read_tensor, torch_dtype
from qquant.source.untrusted import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.algorithms.grid import Grid, Integers, QuantizedTensor
else:
    torch = lazy("torch")

Entry = tuple[str, str, tuple[int, ...]]  # suffix, dtype as safetensors names it ("I8", "BF16"), shape
GROUPS = (128, 64, 32)  # sizes to suggest
PACKED = "packed"  # `Stored.type` of what a layout holds
Spec = TypeVar("Spec", bound=IntegerArtifact)


class QuantizedLayout(ABC):
    """How a quantized linear lies in a file; one subclass per format."""

    suffixes: tuple[str, ...]

    @property
    @abstractmethod
    def label(self) -> str:
        """The format, its bits and its groups, in words for people."""

    def holds(self, module: str, names: Container[str]) -> bool:
        """Whether a folder with tensors `names` has the weight of `module` in this layout, and not as numbers."""
        return f"{module}.{self.suffixes[0]}" in names

    @property
    @abstractmethod
    def kind(self) -> str:
        """The row of `recipe.limits.LIMITS` for what it holds; "" if none fits."""

    @abstractmethod
    def problems(self, shape: tuple[int, int]) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""

    @abstractmethod
    def entries(self, shape: tuple[int, int]) -> list[Entry]:
        """(suffix, dtype, shape) of the stored tensors."""

    @abstractmethod
    def pack(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Stored tensors by suffix."""

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """float32 [N, K] of stored tensors."""

    @abstractmethod
    def integers(self, tensors: Mapping[str, Tensor]) -> Integers | None:
        """What a runtime's operators compute with; None: they have no such scales or groups."""


@dataclass(frozen=True)
class Stated:
    """A key of quantization_config that runtimes read: the values that are true of the weights, and what follows from others."""

    true: Container[Any]
    otherwise: str
    absent: Any = None  # what a runtime takes without the key


class ModelFolder(ABC, Generic[Spec]):
    """A format that is a folder with quantized linears in the decoder blocks; `Spec` is its entry in a recipe."""

    entry: type[Spec]
    method: str  # quant_method of its config
    is_folder = True
    library = "transformers"
    in_16_bits = keeping.in_16_bits
    config_copy: str | None  # file that repeats quantization_config, where readers expect one

    @abstractmethod
    def folder_suffix(self, spec: Spec) -> str: ...
    @abstractmethod
    def layout(self, spec: Spec) -> QuantizedLayout: ...
    @abstractmethod
    def grid(self, spec: Spec, columns: int) -> Grid: ...
    @abstractmethod
    def label(self, spec: Spec) -> str: ...
    @abstractmethod
    def quantization_config(self, spec: Spec) -> dict[str, Any]: ...
    @abstractmethod
    def read_layout(self, config: Mapping[str, Any], where: str) -> QuantizedLayout: ...

    def keeping(self, family: Family, kept: Sequence[str], quantized: Sequence[str]) -> dict[str, Any]:
        """Keys of quantization_config that say which linears hold numbers, and which codes; by their full names."""
        return {}

    harmless: frozenset[str] = frozenset()  # keys of quantization_config that tell how it was made, and change nothing
    demanded: tuple[str, ...] = ()  # keys of quantization_config without which vLLM and SGLang load nothing

    def stated(self, source: FolderSource) -> Mapping[str, Stated]:
        """The keys of quantization_config that runtimes read; none: it is not compared."""
        return {}

    def recognises(self, quantization: Mapping[str, Any]) -> bool:
        """Whether `quantization` has the quant_method of this format."""
        return quantization.get("quant_method") == self.method

    def begins(self, head: bytes) -> bool:
        """False: an artifact is a folder."""
        return False

    def kind(self, path: Path) -> str:
        """The row of `recipe.limits.LIMITS` for its layout."""
        return self._layout_of(path).kind

    def path_of(self, folder: Path, files: Iterable[str]) -> Path:
        """The folder itself: readers open it as a whole."""
        return folder

    def weight_files(self, path: Path) -> tuple[Path, ...]:
        """Every safetensors file."""
        return tuple(sorted(path.glob("*.safetensors")))

    def models(self, files: Sequence[str]) -> list[ModelFile]:
        """An empty list: the folder is the model."""
        return []

    def describe(self, path: Path) -> dict[str, Any]:
        """Config and tensors of a folder, for `qquant inspect`."""
        return beside.describe(path)

    def _own(self, spec: ArtifactSpec) -> Spec:
        assert isinstance(spec, self.entry)
        return spec

    def _fits(self, spec: Spec, group_size: int, linears: Mapping[str, tuple[int, int]]) -> bool:
        """Whether every linear could be stored in groups of this size."""
        layout = self.layout(spec.model_copy(update={"group_size": group_size}))
        return all(layout.problems(matrix) is None for matrix in linears.values())

    def plan(
        self, checkpoint: Checkpoint, spec: ArtifactSpec, recipe: Recipe, name: str, imatrix: Imatrix | None = None
    ) -> PlannedArtifact:
        """Every file of the artifact, to the byte.

        Raises:
            InputError: a linear's shape does not fit the layout.
        """
        own = self._own(spec)
        family, layout = checkpoint.family, self.layout(own)
        kept, linears = keeping.divided(own.keep, family, checkpoint.config, spec.name)
        for weight, matrix in linears.items():
            problem = layout.problems(matrix)
            if problem:
                linear = family.inside(weight).removesuffix(".weight")
                fitting = " or ".join(str(size) for size in GROUPS if self._fits(own, size, linears))
                remedy = f"Give it group_size: {fitting}" if fitting else "No group_size fits: pad the model"
                raise InputError(f"artifact {spec.name}: {linear} {problem}. {remedy}")
        outside, inside = list[Entry](), list[Entry]()
        kinds: dict[str, Stored] = {}
        for tensor, shape in family.shapes(checkpoint.config).items():
            module, _ = tensor.rsplit(".", 1)
            entries = outside if family.layer_of(tensor) is None else inside
            if tensor in linears:
                for suffix, dtype, stored in layout.entries((shape[0], shape[1])):
                    entries.append((f"{module}.{suffix}", dtype, stored))
                kinds[tensor] = Stored(PACKED, self.label(own), numbers=False)
            else:
                dtype = checkpoint.dtype_of(tensor)
                entries.append((tensor, dtype, shape))
                kinds[tensor] = Stored(dtype, dtype.lower(), numbers=True)
        stated = self.quantization_config(own)
        if kept:
            stated |= self.keeping(family, kept, [weight.removesuffix(".weight") for weight in linears])
        config = dict(checkpoint.raw_config) | {"quantization_config": stated}
        files = [small_file("config.json", config), *safetensors_files([*outside, *inside], recipe.shard_size)]
        if self.config_copy:
            files.append(small_file(self.config_copy, stated))
        files += [copied_file(path) for path in checkpoint.side_files]
        folder = f"{name}-{self.folder_suffix(own)}"
        return PlannedArtifact(spec.name, spec, folder, tuple(files), family.parameters(checkpoint.config), kinds)

    def grid_for(self, planned: PlannedArtifact, name: str, columns: int) -> Grid | None:
        """The grid of weight `name` with `columns` inputs; None if it is stored as it is."""
        spec = self._own(planned.spec)
        return None if planned.stored[name].numbers else self.grid(spec, columns)

    def pack(self, planned: PlannedArtifact, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Tensors of the file that hold linear weight `name`."""
        module = name.removesuffix(".weight")
        packed = self.layout(self._own(planned.spec)).pack(quantized)
        return {f"{module}.{suffix}": value for suffix, value in packed.items()}

    def store(self, planned: PlannedArtifact, name: str, value: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """Tensors of the file that hold `name` (or some of its rows) without a grid: itself, in the planned dtype."""
        return {name: value.to(torch_dtype(planned.stored[name].type))}

    def restore(self, planned: PlannedArtifact, name: str, stored: Mapping[str, Tensor]) -> Tensor:
        """float32 of what `store` or `pack` gave."""
        if name in stored:
            return stored[name].float()
        module = name.removesuffix(".weight")
        layout = self.layout(self._own(planned.spec))
        return layout.dequantize({suffix: stored[f"{module}.{suffix}"] for suffix in layout.suffixes})

    def claims(self, path: Path, checkpoint: Checkpoint) -> Claims:
        """Faults and warnings where config.json and the files beside it are not what `plan` would have written for the checkpoint."""
        return folder_claims.compare(path, checkpoint) + self._quantization_claims(path)

    def _quantization_claims(self, path: Path) -> Claims:
        """Faults and warnings of quantization_config, of its copy, and of the names of tensors."""
        source, copy = self.read(path), self.config_copy
        contents = {"quantization_config": read_config(path)["quantization_config"]}
        if copy and (path / copy).is_file():
            contents[copy] = read_json(path / copy)
        stated, faults = self.stated(source), []
        warnings = folder_claims.left_out(self.demanded, contents["quantization_config"])
        for where, content in contents.items() if stated else ():
            for key in sorted({*content, *stated} - self.harmless):
                subject = f"{where}: {key} is {shown(content.get(key))}: "
                if key not in stated:
                    warnings.append(f"{subject}qquant does not know whether a runtime reads it")
                elif content.get(key, stated[key].absent) not in stated[key].true:
                    faults.append(subject + stated[key].otherwise)
        further = "the checkpoint has no such thing; some runtimes refuse it"
        warnings += [f"tensor {name}: {further}" for name in source.further()]
        return claims(faults, warnings)

    def read_back(self, files: Sequence[Path], device: torch.device) -> FolderReadBack:
        """The files of a folder that was written, read with the `safetensors` package, and dequantized on `device`."""
        return FolderReadBack(files, lambda: self.read(files[0].parent).on(device), device)

    def read(self, path: Path) -> FolderSource:
        """The dequantized weights of a folder made by any tool.

        Raises:
            InputError: tensors are missing or of the wrong shape.
        """
        raw, where = read_config(path), str(path / "config.json")
        config = parse_config(raw, where)
        source = FolderSource(path, family_of(raw, where), config, read_tensors(path)[0], self._layout_of(path))
        source.verify()
        return source

    def _layout_of(self, path: Path) -> QuantizedLayout:
        where = str(path / "config.json")
        if not isinstance(quantization := read_config(path).get("quantization_config"), dict):
            raise InputError(f"{where}: quantization_config is {str(quantization)[:80]}; expected a mapping")
        return self.read_layout(quantization, where)


@dataclass
class FolderSource:
    """Weights of a quantized folder, dequantized one tensor at a time."""

    path: Path
    family: Family
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    layout: QuantizedLayout
    device: torch.device | None = None  # where weights are dequantized; None: on the CPU

    def on(self, device: torch.device) -> FolderSource:
        """This source, dequantizing on `device`."""
        return replace(self, device=device)

    def verify(self) -> None:
        """Raise InputError unless every tensor the config implies is there, in its shape; zero biases may be extra."""
        for name, shape in self.family.shapes(self.config).items():
            module = name.removesuffix(".weight")
            if not self.layout.holds(module, self.tensors):
                expected = {name: ("F32", shape)}
            else:
                problem = self.layout.problems((shape[0], shape[1]))
                if problem:
                    raise InputError(f"{self.path}: {module} {problem}")
                expected = {
                    f"{module}.{suffix}": (dtype, stored)
                    for suffix, dtype, stored in self.layout.entries((shape[0], shape[1]))
                }
            for stored_name, (dtype, stored) in expected.items():
                if stored_name not in self.tensors:
                    raise InputError(f"{self.path}: tensor {stored_name} is missing")
                if self.tensors[stored_name].shape != stored:
                    stored_shape = list(self.tensors[stored_name].shape)
                    raise InputError(
                        f"{self.path}: tensor {stored_name} is {stored_shape}; config.json implies {list(stored)}"
                    )
                allowed = FLOATS if dtype in FLOATS else (dtype,)
                if self.tensors[stored_name].dtype not in allowed:
                    raise InputError(
                        f"{self.path}: tensor {stored_name} is {self.tensors[stored_name].dtype}; expected {' or '.join(allowed)}"
                    )
        for name in self.tensors:
            if (
                name.endswith(".bias")
                and name not in self.family.shapes(self.config)
                and bool(read_tensor(self.tensors[name]).any())
            ):
                raise InputError(f"{self.path}: {name} is not zero, and the model has no such bias")

    def further(self) -> list[str]:
        """Stored tensors that belong to no weight of the model; biases are zero (`verify`)."""
        shapes = {*self.family.shapes(self.config), self.family.head}
        parts = {*self.layout.suffixes, "bias"}

        def belongs(name: str) -> bool:
            module, _, last = name.rpartition(".")
            return name in shapes or (last in parts and f"{module}.weight" in shapes) or last == "inv_freq"

        return sorted(name for name in self.tensors if not belongs(name))

    def _named(self, name: str) -> str:
        """A tied head is the embedding, whatever else is stored: so every runtime takes it."""
        return self.family.embedding if name == self.family.head and self.config.tied else name

    def tensor(self, name: str) -> Tensor:
        """float32; a quantized weight is dequantized."""
        name = self._named(name)
        module = name.removesuffix(".weight")
        if self.layout.holds(module, self.tensors):
            return self.layout.dequantize(self._stored(module))
        return read_tensor(self.tensors[name]).to(self.device).float()

    def integers(self, name: str, device: torch.device) -> Integers | None:
        """Weight `name` for the operators of a runtime, unpacked on `device`; None if they cannot take it as it is."""
        module = name.removesuffix(".weight")
        if not self.layout.holds(module, self.tensors):
            return None
        return self.layout.integers({suffix: value.to(device) for suffix, value in self._stored(module).items()})

    def stored_as(self, name: str) -> str:
        """The file's type of `name`, in words for people."""
        module = name.removesuffix(".weight")
        if self.layout.holds(module, self.tensors):
            return self.layout.label
        return self.tensors[self._named(name)].dtype.lower()

    def _stored(self, module: str) -> dict[str, Tensor]:
        return {
            suffix: read_tensor(self.tensors[f"{module}.{suffix}"]).to(self.device) for suffix in self.layout.suffixes
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of a matrix, float32; a quantized one is dequantized as a whole for them."""
        if self.layout.holds(name.removesuffix(".weight"), self.tensors):
            return self.tensor(name)[start:stop]
        return read_tensor(self.tensors[self._named(name)], slice(start, stop)).to(self.device).float()
