r"""Linears of a model folder that stay as they are in the checkpoint (`keep` of a recipe), and how a config says so.

    GPTQ   "dynamic": {"-:^model\\.layers\\.0\\.mlp\\.down_proj$": {}}     GPTQModel, vLLM, SGLang: no codes where a name fits
           "modules_in_block_to_quantize": [[every other linear by its full name]]     transformers and optimum, which read no `dynamic`
    AWQ    "modules_to_not_convert": ["model.layers.0.mlp.down_proj"]     transformers, vLLM, SGLang

vLLM makes one linear of q, k and v, and of gate and up, and asks for it by a name of its own: so linears that share an input are kept
together, and the names of what they are fused to are said too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from qquant.errors import UsageError
from qquant.families import Family, ModelConfig
from qquant.recipe.words import hint, nearest

if TYPE_CHECKING:
    from pathlib import Path

    from qquant.formats.folder import FolderSource, ModelFolder


def kept(patterns: Sequence[str], family: Family, config: ModelConfig, artifact: str) -> tuple[str, ...]:
    """Names of the linears that `patterns` mean, without .weight, in the order of the model.

    Raises:
        UsageError: a pattern fits no linear, or only some of those that share an input.
    """
    names = [weight.removesuffix(".weight") for weight in family.matrices(config)]
    fitted: set[str] = set()
    for pattern in patterns:
        fitting = [name for name in names if fnmatchcase(name, pattern.removesuffix(".weight"))]
        if not fitting:
            roles = ", ".join(dict.fromkeys(name.replace(".0.", ".*.", 1) for name in names if ".0." in name))
            raise UsageError(
                f"artifact {artifact}: keep: {pattern}: fits no linear of this model; it has {roles}{hint(nearest(pattern, names))}"
            )
        fitted.update(fitting)
    for group in groups(family, config):
        missing = [name for name in group if name not in fitted]
        if missing and len(missing) < len(group):
            there = next(name for name in group if name in fitted)
            raise UsageError(
                f"artifact {artifact}: keep: {there} without {', '.join(missing)}: they share an input, and runtimes make one linear of "
                "them. Keep all or none"
            )
    return tuple(name for name in names if name in fitted)


def divided(
    patterns: Sequence[str], family: Family, config: ModelConfig, artifact: str
) -> tuple[tuple[str, ...], dict[str, tuple[int, int]]]:
    """The linears that are kept, without .weight, and the shapes of the weights of all others.

    Raises:
        UsageError: as `kept`.
    """
    names = kept(patterns, family, config, artifact)
    shapes = family.matrices(config)
    return names, {weight: shape for weight, shape in shapes.items() if weight.removesuffix(".weight") not in names}


def numbers(source: FolderSource) -> tuple[list[str], list[str]]:
    """Linears of a folder that hold numbers, and those that hold codes."""
    names = [weight.removesuffix(".weight") for weight in source.family.matrices(source.config)]
    coded = [name for name in names if source.layout.holds(name, source.tensors)]
    return [name for name in names if name not in coded], coded


def in_16_bits(layout: ModelFolder[Any], path: Path, tensors: Sequence[str], dtype: str) -> dict[str, Any]:
    """`keep` with the linears among `tensors` besides those that the folder at `path` keeps already."""
    del dtype
    source = layout.read(path)
    names = {*numbers(source)[0], *(tensor.removesuffix(".weight") for tensor in tensors)}
    linears = (weight.removesuffix(".weight") for weight in source.family.matrices(source.config))
    return {"keep": [name for name in linears if name in names]}


def groups(family: Family, config: ModelConfig) -> Iterator[tuple[str, ...]]:
    """Names of the linears that share an input, for every stage of every block."""
    for layer in range(config.layers):
        prefix = family.block.format(layer)
        yield from (tuple(f"{prefix}{linear}" for linear in stage.linears) for stage in family.stages)


def skipped(family: Family, names: Sequence[str]) -> list[str]:
    """The names, and those of what runtimes fuse of them."""
    named = list(names)
    for stage in family.stages:
        first, *others = stage.linears
        for name in names if stage.fused else ():
            prefix = name.removesuffix(first)
            if family.inside(name) == first and all(prefix + other in names for other in others):
                named.append(prefix + stage.fused)
    return named


def expression(name: str) -> str:
    """A key of `dynamic` that takes one module out."""
    return f"-:^{re.escape(name)}$"
