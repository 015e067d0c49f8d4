"""Artifact formats by the names that recipes use. To add one: a file with a class like these, and a line in FORMATS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qquant.errors import InputError
from qquant.families.weights import WeightSource
from qquant.formats.awq import Awq
from qquant.formats.gguf.imatrix import Imatrix
from qquant.formats.gguf.layout import Gguf
from qquant.formats.gguf.mix import FILE_TYPES
from qquant.formats.gguf.shards import read_model
from qquant.formats.gptq import Gptq
from qquant.formats.planned import PlannedArtifact
from qquant.recipe import ArtifactSpec, Recipe
from qquant.source.checkpoint import Checkpoint
from qquant.source.hub import require_model_folder
from qquant.source.untrusted import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qquant.algorithms.grid import Grid, Integers, QuantizedTensor


class ArtifactSource(WeightSource, Protocol):
    """The weights of an artifact, and what they are made of."""

    def on(self, device: torch.device) -> ArtifactSource:
        """The same, dequantizing on `device`."""
        ...

    def integers(self, name: str, device: torch.device) -> Integers | None:
        """Matrix `name` as the operators of a runtime take it; None if there is none for what it is."""
        ...

    def stored_as(self, name: str) -> str:
        """For people: what the file holds."""
        ...


class Format(Protocol):
    """What the rest of the program asks of a format."""

    def plan(
        self, checkpoint: Checkpoint, spec: ArtifactSpec, recipe: Recipe, name: str, imatrix: Imatrix | None = None
    ) -> PlannedArtifact:
        """Every file of an artifact of model `name`, to the byte."""
        ...

    def grid_for(self, planned: PlannedArtifact, name: str, columns: int) -> Grid | None:
        """The grid of weight `name`; None if the format stores it by itself."""
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

    def comparisons(
        self, files: Sequence[Path], written: Mapping[str, str], values: Mapping[str, str], device: torch.device
    ) -> Iterator[Callable[[], None]]:
        """Files, read by another library, against the sha256 of stored tensors and the checksums of solved weights.

        Each piece of work raises QQuantError where they differ. They do not depend on each other, and threads may do them.
        """
        ...


FORMATS: dict[str, Format] = {"gptq": Gptq(), "awq": Awq(), "gguf": Gguf()}


def detect(path: Path) -> str | None:
    """The format of an artifact, or None for a plain checkpoint folder.

    Raises:
        InputError: neither.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return "gguf"
        raise InputError(f"{path}: is not a GGUF file; give a model folder or a .gguf file")
    if not path.is_dir():
        raise InputError(f"{path}: not found")
    require_model_folder(path)
    quantization = read_json(path / "config.json").get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method not in ("gptq", "awq"):
        raise InputError(f"{path / 'config.json'}: quant_method {method!r}; qquant reads 'gptq', 'awq' and GGUF files")
    return str(method)


def kind_of_file(path: Path) -> str:
    """What an artifact made by any tool is, in the words of `gates.LIMITS`: "int4", "q4_k_m"; what no word fits is "".

    Raises:
        InputError: it is damaged.
    """
    if detect(path) == "gguf":
        number = read_model(path).value("general.file_type")
        return next((name for name, known in FILE_TYPES.items() if known == number), "")
    quantization = read_json(path / "config.json").get("quantization_config")
    bits = quantization.get("bits", quantization.get("w_bit")) if isinstance(quantization, dict) else None
    return f"int{bits}" if isinstance(bits, int) else ""
