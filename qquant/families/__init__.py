"""Model families: a table and a forward pass each. To add one: its own file, and a line in FAMILIES.

Such a file says how config.json is read, what the tensors are called and how large they are, in which order a block computes (with the
operators of `forward`), and what transformers and llama.cpp call it, if they know it. tests/worlds/toy_family.py is one that is like no
other here, complete; tests/families run for every family, and so does every test with the fixture `family`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qquant.errors import InputError
from qquant.families.config import ModelConfig, require_bounds
from qquant.families.family import Family, Linear, ScalePair, Shape, Stage, Vector
from qquant.families.qwen2 import QWEN2

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN2,)}

__all__ = [
    "FAMILIES",
    "Family",
    "Linear",
    "ModelConfig",
    "ScalePair",
    "Shape",
    "Stage",
    "Vector",
    "family_of",
    "parse_config",
    "require_bounds",
]


def family_of(raw: Mapping[str, Any], where: str) -> Family:
    """The family of a `config.json` mapping.

    Raises:
        InputError: the model type is not one that qquant knows.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"{where}: model_type is {kind!r}; qquant builds {', '.join(map(repr, FAMILIES))} (Qwen1.5)")
    family = FAMILIES[kind]
    architectures = raw.get("architectures") or [family.architecture]
    if not isinstance(architectures, list) or family.architecture not in architectures:
        raise InputError(f"{where}: architectures is {str(architectures)[:80]}; expected {family.architecture!r}")
    return family


def parse_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """The numbers of a `config.json` mapping, as its family reads them. Raises InputError as `family_of` and `Family.parse` do."""
    return family_of(raw, where).parse(raw, where)
