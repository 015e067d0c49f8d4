"""What a build will do, from config and headers alone: every file to the byte, memory, disk. Needs no torch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qquant.devices import POLICIES
from qquant.disk.output import PARTIAL
from qquant.errors import EnvironmentMissingError, UsageError
from qquant.formats import FORMATS, by_size
from qquant.formats.gguf.imatrix import Imatrix
from qquant.formats.planned import Losses, PlannedArtifact
from qquant.plan.memory import Memory, build_memory, scratch_bytes
from qquant.plan.parallel import rank_sizes
from qquant.plan.places import require_model_name
from qquant.plan.texts import NOT_COUNTED, PlannedTexts, examine
from qquant.plan.writing import PlannedWriting, planned_writing
from qquant.recipe import Checks, Gates, Recipe
from qquant.recipe.limits import Reach, reach, resolved
from qquant.source.checkpoint import Checkpoint

TEMPORARY = 32 << 20  # bytes in the folder for temporary files
MARGIN = 64 << 20  # bytes of disk for manifests, reports, calibration


@dataclass(frozen=True)
class Plan:
    """Everything that is known before work begins."""

    model: str
    artifacts: tuple[PlannedArtifact, ...]
    needs: Mapping[str, Memory]  # by kind of device
    disk: int  # bytes
    gates: Mapping[str, Gates]  # by artifact, defaults filled in
    checks: Checks
    tokens: int  # of the calibration
    inputs: int  # of the widest linear
    imatrix: Imatrix | None = None  # the user's, instead of the measured one
    parallel: Mapping[str, Mapping[str, list[int]]] = field(default_factory=dict)  # by artifact: tensor-parallel sizes
    texts: PlannedTexts = NOT_COUNTED
    in_float32: tuple[str, ...] = ()  # artifacts that keep float32 where they are not quantized
    unsettled: tuple[str, ...] = ()  # artifacts whose types are still to be chosen; their files have the right size
    expected: Mapping[str, float] = field(default_factory=dict)  # KL divergence of those that were chosen, by artifact
    writing: PlannedWriting | None = None  # calibration that the checkpoint writes itself
    background: int = 0  # of the tokens, those beside the sources

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        checkpoint: Checkpoint,
        only: Sequence[str] = (),
        model: str | None = None,
        imatrix: Imatrix | None = None,
        losses: Mapping[str, Mapping[str, Losses]] = MappingProxyType({}),
    ) -> Plan:
        """Plan the artifacts of `recipe` (those named in `only`, if any) for `checkpoint`.

        `losses`: by artifact that asks for a size, and by tensor, where they were measured.

        Raises:
            UsageError: `only` names an artifact that the recipe does not have, a name cannot be that of a file, or two artifacts would write the same file.
            InputError: a shape does not fit a format.
        """
        checkpoint.require_tokenizer()
        known = [spec.name for spec in recipe.artifacts]
        unknown = [name for name in only if name not in known]
        if unknown:
            raise UsageError(
                f"--only {unknown[0]}: recipe {recipe.name} has no such artifact; it has {', '.join(known)}"
            )
        specs = [spec for spec in recipe.artifacts if not only or spec.name in only]
        unsettled = tuple(spec.name for spec in specs if spec.sized and spec.name not in losses)
        name = model or checkpoint.name
        require_model_name(name)
        specs = [
            by_size(spec).settled(checkpoint, spec, recipe, name, imatrix, losses.get(spec.name))
            if spec.sized
            else spec
            for spec in specs
        ]
        settled = {spec.name: spec for spec in specs}
        recipe = recipe.model_copy(
            update={"artifacts": tuple(settled.get(spec.name, spec) for spec in recipe.artifacts)}
        )
        planned = tuple(FORMATS[spec.format].plan(checkpoint, spec, recipe, name, imatrix) for spec in specs)
        _require_apart(planned)
        parameters = checkpoint.family.parameters(checkpoint.config)
        gates = {spec.name: resolved(spec.gates, spec.kind, parameters) for spec in specs}
        texts = examine(recipe, checkpoint.path)
        held = texts.of(recipe)  # what memory and disk have to hold
        disk = sum(artifact.size for artifact in planned) + MARGIN + scratch_bytes(held, checkpoint)
        parallel = {spec.name: rank_sizes(checkpoint, spec) for spec in specs if FORMATS[spec.format].is_folder}
        inputs = max(columns for _, columns in checkpoint.family.matrices(checkpoint.config).values())
        needs = {kind: build_memory(held, checkpoint, kind, specs) for kind in POLICIES}
        in_float32 = tuple(one.name for one in planned if one.stored[checkpoint.family.embedding].type == "F32")
        expected = {one.name: _expected(one, losses[one.name]) for one in planned if one.name in losses}
        return cls(
            name, planned, needs, disk, gates, recipe.checks, held.calibration.tokens, inputs, imatrix, parallel,
            texts=texts, in_float32=in_float32, unsettled=unsettled, expected=expected,
            writing=planned_writing(recipe, checkpoint), background=held.calibration.beside,
        )  # fmt: skip

    @property
    def memory(self) -> int:
        """Bytes at the peak of a build on a CPU."""
        return self.needs["cpu"].device

    @property
    def looks(self) -> list[int]:
        """Windows of text that are read at each look, if the text has as many."""
        most = self.checks.max_windows or self.checks.windows
        return self.checks.looks(most if self.texts.windows is None else min(most, self.texts.windows))

    def reach(self, artifact: str) -> tuple[Reach, ...]:
        """What the gates of an artifact can tell at the first look."""
        checks = self.checks
        return reach(self.gates[artifact], self.looks[0], checks.scored, len(self.looks))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What does not stop a build, and will make it worse."""
        warnings = list(self.texts.warnings)
        if self.tokens < self.inputs:
            asked = f"give at least {self.inputs:,}, better ten times as many"
            warnings.append(f"{self.tokens:,} calibration tokens for linears of {self.inputs:,} inputs: {asked}")
        if self.in_float32:
            sizes = {one.name: one.bits_per_weight for one in self.artifacts}
            listed = ", ".join(f"{name} has {sizes[name]:.1f} bits per weight" for name in self.in_float32)
            warnings.append(
                f"the checkpoint is float32, and what is not quantized stays so: {listed}. Read it as bfloat16: "
                "`dtype: bfloat16` in the recipe, or --set dtype=bfloat16"
            )
        return tuple(warnings)

    def still_to_write(self, out: Path) -> int:
        """Bytes that are still to be written: files that are finished, or have their place in an interrupted build, are there."""
        there = 0
        for artifact in self.artifacts:
            for file in artifact.files:
                for path in (out / artifact.folder / file.name, out / PARTIAL / artifact.name / file.name):
                    if path.is_file() and path.stat().st_size == file.size:
                        there += file.size
                        break
        return self.disk - there

    def require_room(self, out: Path) -> None:
        """Raise EnvironmentMissingError if a file system has less room than the build needs on it."""
        nearest = out.absolute()
        while not nearest.exists():
            nearest = nearest.parent
        for folder, need in ((nearest, self.still_to_write(out)), (Path(tempfile.gettempdir()), TEMPORARY)):
            usage = shutil.disk_usage(folder)
            if not usage.total:
                raise EnvironmentMissingError(f"{folder}: is no place for files (0 bytes in all). Choose another --out")
            free = usage.free
            if free < need:
                raise EnvironmentMissingError(
                    f"{out if folder == nearest else folder}: the build writes {need:,} bytes, {free:,} are free; {need - free:,} bytes are missing. "
                    "Free some space, or choose another --out"
                )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for `--json`."""
        written: dict[str, Any] = (
            {"generated": vars(self.writing) | {"tokens": self.writing.tokens}} if self.writing else {}
        )
        written |= {"background": {"tokens": self.background}} if self.background else {}
        return written | {
            "schema": "qquant-plan-1",
            "model": self.model,
            "memory_bytes": self.memory,
            "memory": {kind: vars(needs) for kind, needs in self.needs.items()},
            "disk_bytes": self.disk,
            "warnings": list(self.warnings),
            "types_chosen_by_build": list(self.unsettled),
            "checks": self.checks.model_dump(mode="json")
            | {"looks": self.looks, "scored_per_window": self.checks.scored},
            "artifacts": [
                {
                    "name": artifact.name,
                    "folder": artifact.folder,
                    "bytes": artifact.size,
                    "bits_per_weight": artifact.bits_per_weight,
                    "fallbacks": list(artifact.fallbacks),
                    "files": [{"name": file.name, "bytes": file.size} for file in artifact.files],
                    "gates": [vars(gate) for gate in self.reach(artifact.name)],
                    "tensor_parallel": self.parallel.get(artifact.name),
                    "tensors": {name: stored.label for name, stored in artifact.stored.items()},
                }
                for artifact in self.artifacts
            ],
        }


def _expected(planned: PlannedArtifact, losses: Mapping[str, Losses]) -> float:
    """Losses of tensors add up."""
    return sum(by_type[planned.stored[tensor].type] for tensor, by_type in losses.items())


def _require_apart(planned: Sequence[PlannedArtifact]) -> None:
    """Raise UsageError where two artifacts would write the same file, so that the later one would stand under both names."""
    owners: dict[tuple[str, str], str] = {}
    for artifact in planned:
        for file in artifact.files:
            first = owners.setdefault((artifact.folder, file.name), artifact.name)
            if first != artifact.name:
                raise UsageError(
                    f"artifacts {first} and {artifact.name} would both write {artifact.folder}/{file.name}. Build each into a folder of "
                    f"its own: --only {first} --out ONE, then --only {artifact.name} --out OTHER"
                )
