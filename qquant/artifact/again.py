"""The recipe that a finished artifact was built from, to be built again with other settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qquant.artifact.manifest import entry_at
from qquant.disk.output import MANIFEST
from qquant.errors import UsageError
from qquant.formats import format_of
from qquant.recipe import Recipe, fit
from qquant.recipe.artifacts import TARGETS
from qquant.recipe.changes import Unplaced, frozen
from qquant.source.untrusted import read_json


def again(artifact: Path, fields: Mapping[str, Any]) -> Recipe:
    """The recipe of the artifact at `artifact`, with this artifact alone, and `fields` of its entry instead of its own.

    Its name gets `-kept`, so that it can stand beside the other; files of the user's calibration are named without their folders, as the
    manifest has them.

    Raises:
        UsageError: no build of qquant left a manifest there.
        InputError: it is malformed.
    """
    folder = artifact if artifact.is_dir() else artifact.parent
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder}: has no {MANIFEST}, so the recipe that it was built from is not known")
    named = entry_at(artifact)
    if named is None:
        raise UsageError(f"{artifact}: is not named in {folder / MANIFEST}")
    name, _ = named
    recipe = read_json(folder / MANIFEST)["artifacts"][name]["recipe"]
    spec = next((spec for spec in recipe.get("artifacts", ()) if spec.get("name") == name), None)
    if spec is None:
        raise UsageError(f"{folder / MANIFEST}: the recipe of {name} does not name it")
    targets = dict.fromkeys(TARGETS) if "type" in fields else {}
    entry = {**spec, **targets, **fields, "name": f"{name.removesuffix('-kept')[:95]}-kept"}
    return fit.fitted(Unplaced(), frozen({**recipe, "artifacts": [entry]}))


def in_16_bits(artifact: Path, tensors: Sequence[str], dtype: str) -> dict[str, Any]:
    """Fields of a recipe's entry that keep these weights in 16 bits; `dtype`: the checkpoint's. None for a folder of 16-bit weights."""
    artifact_format = format_of(artifact)
    fields = artifact_format.in_16_bits(artifact, tensors, dtype) if artifact_format else {}
    return {key: value for key, value in fields.items() if value is not None}
