"""Whether an artifact is a quantization of a checkpoint, as far as the numbers of both configs say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qquant.artifact.manifest import entry_at
from qquant.errors import InputError
from qquant.families.weights import WeightSource
from qquant.source.checkpoint import Checkpoint


def require_same_shape(path: Path, source: WeightSource, checkpoint: Checkpoint) -> None:
    """Raise InputError, with the numbers that differ, unless `source` has as many weights in the same shapes as the checkpoint's model.

    Another rope, epsilon, number of heads, context, or a head stored twice is measured as it is: a runtime would run it, too.
    """
    theirs, ours = source.family.shapes(source.config), checkpoint.family.shapes(checkpoint.config)
    head = {checkpoint.family.head}
    if {name: theirs[name] for name in theirs.keys() - head} != {name: ours[name] for name in ours.keys() - head}:
        raise InputError(f"{path}: is not a quantization of {checkpoint.path}: {_difference(source, checkpoint)}")


def require_same_numbers(path: Path, source: WeightSource, checkpoint: Checkpoint) -> None:
    """Raise InputError unless `source` has the checkpoint's numbers, so that a linear of one is one of the other."""
    if _difference(source, checkpoint):
        raise InputError(f"{path}: is not a quantization of {checkpoint.path}: {_difference(source, checkpoint)}")


def merged_otherwise(paths: Sequence[Path], checkpoint: Checkpoint) -> list[str]:
    """A warning for each artifact whose manifest names another adapter than `checkpoint` has merged: the loss is then not quantization's."""
    here = checkpoint.adapter.fingerprint if checkpoint.adapter else None
    warnings = []
    for path in paths:
        named = entry_at(path)
        built = named[1].adapter if named else None
        if named and (built.sha256 if built else None) != here:
            what = (
                f"with {built.name} merged: give it by --adapter"
                if built
                else "without an adapter: leave --adapter out"
            )
            warnings.append(f"{path.name} was built {what}, or what is measured is another model's distance")
    return warnings


def _difference(source: WeightSource, checkpoint: Checkpoint) -> str:
    """The numbers of the config that differ; a head may be stored twice, and contexts may be shortened."""
    theirs, ours = vars(source.config), vars(checkpoint.config)
    differing = [
        key for key in ours if key not in ("tied", "positions") and not _alike(theirs.get(key, math.nan), ours[key])
    ]
    return ", ".join(f"{key} is {theirs.get(key)}, not {ours[key]}" for key in differing)


def _alike(theirs: Any, ours: Any) -> bool:
    """Whether two numbers are the same; a float may have been through float32."""
    if isinstance(ours, float) and isinstance(theirs, float | int):
        return math.isclose(theirs, ours, rel_tol=1e-6)
    return bool(theirs == ours)
