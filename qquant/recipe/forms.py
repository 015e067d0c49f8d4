"""A recipe as data: what somebody wrote, and the shortest file that means the same."""

from __future__ import annotations

from typing import Any

from qquant.recipe.efforts import CALIBRATING, SOLVING
from qquant.recipe.model import Recipe


def literal(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default, but without what an effort decides and nobody wrote down."""
    data = recipe.model_dump()
    for key in CALIBRATING - recipe.calibration.model_fields_set:
        del data["calibration"][key]
    for entry, spec in zip(data["artifacts"], recipe.artifacts, strict=True):
        for key in SOLVING - spec.model_fields_set:
            entry.pop(key, None)
    return data


def brief(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON, without what it would have anyway, by default or by its effort."""
    data = recipe.model_dump(mode="json", exclude_defaults=True)
    full = recipe.model_dump(mode="json")
    silent = recipe.model_dump()
    for entry in silent["artifacts"]:
        _drop(entry, SOLVING)
    _drop(silent["calibration"], CALIBRATING)
    filled = Recipe.model_validate(silent).model_dump(mode="json")
    _keep(data["calibration"], full["calibration"], filled["calibration"])
    for entry, mine, theirs in zip(data["artifacts"], full["artifacts"], filled["artifacts"], strict=True):
        _keep(entry, mine, theirs)
    return data


def _drop(data: dict[str, Any], keys: frozenset[str]) -> None:
    for key in keys:
        data.pop(key, None)


def _keep(data: dict[str, Any], mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Leave of what efforts decide only that in which `mine` is not `theirs`."""
    for key in (CALIBRATING | SOLVING) & mine.keys():
        if mine[key] == theirs[key]:
            data.pop(key, None)
        else:
            data[key] = mine[key]
