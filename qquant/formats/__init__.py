"""Artifact formats by the names that recipes use.

What differs between formats is answered here and nowhere else: no code outside this folder compares a format's name. To add one that is a
model folder of packed linears,

    formats/x.py          a `QuantizedLayout` (names, dtypes and shapes of what holds a weight; pack; dequantize) and a `ModelFolder` of it
    recipe/artifacts.py   its entry: an `IntegerArtifact` with the fields that its people know, named in `ArtifactSpec` and `FormatName`
    FORMATS below         a line

and a sample in tests/worlds/every_format.py, for which `tests/formats/test_every_format.py` runs, from the round trip to the card.
tests/worlds/toy_format.py is such a file, complete: another packing, bfloat16 scales, a tensor that holds a shape. A kind that is not in
`recipe.limits.LIMITS` (an artifact's `kind`: int4, int8) gets its limits there. A format that is a file of its own writes the class `Format`
out, as gguf/layout.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from qquant.errors import InputError
from qquant.families.weights import WeightSource
from qquant.formats import folder_claims
from qquant.formats.awq import Awq
from qquant.formats.claims import Claims
from qquant.formats.gguf.imatrix import Imatrix
from qquant.formats.gguf.layout import Gguf
from qquant.formats.gptq import Gptq
from qquant.formats.planned import Losses, ModelFile, PlannedArtifact
from qquant.recipe import ArtifactSpec, Recipe
from qquant.source.checkpoint import Checkpoint
from qquant.source.hub import require_model_folder
from qquant.source.untrusted import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.algorithms.grid import Grid, Integers, QuantizedTensor


@runtime_checkable
class ArtifactSource(WeightSource, Protocol):
    """The weights of an artifact, and what they are made of."""

    def on(self, device: torch.device) -> ArtifactSource:
        """This source, dequantizing on `device`."""
        ...

    def integers(self, name: str, device: torch.device) -> Integers | None:
        """Matrix `name` as the operators of a runtime take it; None if there is none for what it is."""
        ...

    def stored_as(self, name: str) -> str:
        """What the file holds of `name`, in words for people."""
        ...


class ReadBack(Protocol):
    """Files of an artifact, read by another library, against what was written.

    Each piece of work raises QQuantError where they differ. They do not depend on each other, and threads may do them.
    """

    def tensors(self, written: Mapping[str, str], values: Mapping[str, str]) -> Iterator[Callable[[], None]]:
        """The stored tensors that `written` has the sha256 of, on the CPU; `values`: checksums of solved weights, theirs among them."""
        ...

    def values(self, values: Mapping[str, str]) -> Iterator[Callable[[], None]]:
        """What `tensors` leaves of the checksums of solved weights: all values, dequantized where the build computes."""
        ...


class Format(Protocol):
    """What the rest of the program asks of a format."""

    is_folder: bool  # an artifact is a model folder, as servers load it; else a file (or its parts) among others
    library: str  # that a hub names for such repositories

    def recognises(self, quantization: Mapping[str, Any]) -> bool:
        """Whether a model folder whose config.json has this quantization_config is of this format."""
        ...

    def begins(self, head: bytes) -> bool:
        """Whether a file that begins with these bytes (16, or all of it) is of this format."""
        ...

    def kind(self, path: Path) -> str:
        """The row of `recipe.limits.LIMITS` for an artifact made by any tool; "" if none fits.

        Raises:
            InputError: it is damaged.
        """
        ...

    def path_of(self, folder: Path, files: Iterable[str]) -> Path:
        """The path at which readers find an artifact of which `folder` holds `files`: the folder, or one of them."""
        ...

    def weight_files(self, path: Path) -> tuple[Path, ...]:
        """The files with the weights of the artifact at `path`."""
        ...

    def models(self, files: Sequence[str]) -> list[ModelFile]:
        """The models among the files of a repository that are files of their own, in that order; none where the folder is the model."""
        ...

    def describe(self, path: Path) -> dict[str, Any]:
        """`facts` (name -> value) and `tensors` (name, shape, type, bytes), from headers alone."""
        ...

    def plan(
        self, checkpoint: Checkpoint, spec: ArtifactSpec, recipe: Recipe, name: str, imatrix: Imatrix | None = None
    ) -> PlannedArtifact:
        """Every file of an artifact of model `name`, to the byte."""
        ...

    def grid_for(self, planned: PlannedArtifact, name: str, columns: int) -> Grid | None:
        """The grid of weight `name`; None if the format stores it by itself."""
        ...

    def in_16_bits(self, path: Path, tensors: Sequence[str], dtype: str) -> dict[str, Any]:
        """Fields of a recipe's entry for an artifact like the one at `path`, with these tensors as in a checkpoint of `dtype`.

        A list or mapping is said whole, with what the artifact keeps already.
        """
        ...

    def pack(self, planned: PlannedArtifact, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Stored tensors of a solved weight."""
        ...

    def store(self, planned: PlannedArtifact, name: str, value: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """Stored tensors of `name` (or of some of its rows) without a solver."""
        ...

    def restore(self, planned: PlannedArtifact, name: str, stored: Mapping[str, Tensor]) -> Tensor:
        """The float32 values that readers will see for what `pack` or `store` gave."""
        ...

    def read(self, path: Path) -> ArtifactSource:
        """The dequantized weights of an artifact made by any tool."""
        ...

    def claims(self, path: Path, checkpoint: Checkpoint) -> Claims:
        """What an artifact made by any tool says of itself, where `plan` would have said something else of the checkpoint."""
        ...

    def read_back(self, files: Sequence[Path], device: torch.device) -> ReadBack:
        """The files of an artifact that is written on `device`, for another library to read; all of their heads are there."""
        ...


@runtime_checkable
class BySize(Protocol):
    """What is asked besides of a format whose artifacts can be as large as one likes."""

    def settled(
        self,
        checkpoint: Checkpoint,
        spec: ArtifactSpec,
        recipe: Recipe,
        name: str,
        imatrix: Imatrix | None = None,
        losses: Mapping[str, Losses] | None = None,
    ) -> ArtifactSpec:
        """An entry that asks for a size (`sized`) with what its tensors are instead; `losses` by tensor of the checkpoint, if measured.

        Raises:
            UsageError: it cannot have that size.
        """
        ...

    def trials(
        self, checkpoint: Checkpoint, spec: ArtifactSpec, recipe: Recipe, name: str
    ) -> dict[str, PlannedArtifact]:
        """Type -> a plan with every tensor of an entry that is `sized` stored as that, for all types that it may be stored as."""
        ...


HEAD = 16  # bytes of a file that tell its format
FORMATS: dict[str, Format] = {"gptq": Gptq(), "awq": Awq(), "gguf": Gguf()}


def by_size(spec: ArtifactSpec) -> BySize:
    """The format of an entry that asks for a size (`sized`)."""
    artifact_format = FORMATS[spec.format]
    assert isinstance(artifact_format, BySize)
    return artifact_format


def detect(path: Path) -> str | None:
    """The format of an artifact, or None for a plain checkpoint folder.

    Raises:
        InputError: neither.
    """
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(HEAD)
        return _first(
            (name for name, artifact_format in FORMATS.items() if artifact_format.begins(head)),
            f"{path}: is not a GGUF file",
        )
    if not path.is_dir():
        raise InputError(f"{path}: not found")
    require_model_folder(path)
    quantization = read_json(path / "config.json").get("quantization_config")
    if quantization is None:
        return None
    method_config = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
    method = repr(method_config.get("quant_method"))[:80]
    fault = f"{path / 'config.json'}: quant_method {method}"
    return _first(
        (name for name, artifact_format in FORMATS.items() if artifact_format.recognises(method_config)), fault
    )


def _first(names: Iterator[str], fault: str) -> str:
    name = next(names, None)
    if name is None:
        folders, files = (
            ", ".join(name for name, artifact_format in FORMATS.items() if artifact_format.is_folder == folder)
            for folder in (True, False)
        )
        raise InputError(f"{fault}; qquant reads model folders ({folders}) and files ({files})")
    return name


def format_of(path: Path) -> Format | None:
    """The format of an artifact, or None for a plain checkpoint folder.

    Raises:
        InputError: neither.
    """
    name = detect(path)
    return None if name is None else FORMATS[name]


def claims_of(path: Path, checkpoint: Checkpoint) -> Claims:
    """What any artifact says of itself that is not true of the checkpoint; a folder of 16-bit weights is one too.

    Raises:
        InputError: a file of it is damaged.
    """
    name = detect(path)
    return folder_claims.compare(path, checkpoint) if name is None else FORMATS[name].claims(path, checkpoint)


def kind_of_file(path: Path) -> str:
    """What an artifact made by any tool is, in the words of `limits.LIMITS`: "int4", "q4_k_m"; what no word fits, as a checkpoint, is "".

    Raises:
        InputError: it is damaged.
    """
    artifact_format = format_of(path)
    return "" if artifact_format is None else artifact_format.kind(path)


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files with the weights of an artifact, or of a checkpoint.

    Raises:
        InputError: neither.
    """
    artifact_format = format_of(path)
    return tuple(sorted(path.glob("*.safetensors"))) if artifact_format is None else artifact_format.weight_files(path)
