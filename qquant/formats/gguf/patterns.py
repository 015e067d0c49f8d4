"""What a recipe's `types` says of each matrix of a GGUF file: patterns of tensor names, and the types that they allow.

    types:
      token_embd: q8_0             names as in the file, with or without .weight
      "blk.*.attn_v": q6_k         * stands for any characters, ? for one, [0-3] for one of a range
      "blk.0.attn_v": [q6_k, q8_0] beside `size`: one of these

The longest pattern that fits a tensor counts (an exact name before any pattern), whatever the order of the lines; two of one length that
say different things are refused, and so is what fits no matrix, or asks for a block that does not divide the rows. llama-quantize's
`--tensor-type` falls back to another type there, and takes the first pattern that is found anywhere in a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from qquant.errors import InputError, UsageError
from qquant.formats.gguf.mix import FALLBACK
from qquant.formats.gguf.types import TYPES
from qquant.recipe.words import hint, nearest

SUFFIX = ".weight"


def short(tensor: str) -> str:
    """The name of a matrix as recipes have it: blk.0.attn_q."""
    return tensor.removesuffix(SUFFIX)


def allowed(
    types: Mapping[str, str | tuple[str, ...]], matrices: Mapping[str, tuple[int, int]], artifact: str
) -> dict[str, tuple[str, ...]]:
    """The types that `types` allows each matrix that it speaks of; `matrices`: (rows, columns) by name.

    Raises:
        UsageError: a pattern fits no matrix, or two of one length disagree.
        InputError: no type that a matrix may have divides its rows.
    """
    names = {short(tensor): tensor for tensor in matrices}
    longest: dict[str, tuple[int, str, tuple[str, ...]]] = {}
    for pattern, choice in types.items():
        wanted, several = short(pattern), (choice,) if isinstance(choice, str) else tuple(choice)
        fitting = [name for name in names if fnmatchcase(name, wanted)]
        if not fitting:
            raise UsageError(
                f"artifact {artifact}: types: {pattern}: fits no matrix of this model; it has {_listed(names)}{hint(nearest(wanted, names))}"
            )
        weight = len(names) + len(wanted) if wanted in names else len(wanted)
        for name in fitting:
            before = longest.get(name)
            if before and before[0] == weight and set(before[2]) != set(several):
                raise UsageError(
                    f"artifact {artifact}: types: {before[1]} and {pattern} are equally long and both fit {name}. Name the tensor"
                )
            if before is None or before[0] < weight:
                longest[name] = weight, pattern, several
    return {
        names[name]: _dividing(several, matrices[names[name]][1], f"artifact {artifact}: types: {pattern}: {name}")
        for name, (_, pattern, several) in longest.items()
    }


def _dividing(several: Iterable[str], columns: int, where: str) -> tuple[str, ...]:
    """Types, of those given, whose blocks divide a row."""
    fitting = tuple(name for name in several if columns % TYPES[name].block == 0)
    if not fitting:
        name = next(iter(several))
        instead = FALLBACK.get(name, "f16")
        near = instead if columns % TYPES[instead].block == 0 else "f16"
        raise InputError(
            f"{where} has rows of {columns}, and {name} needs a multiple of {TYPES[name].block}; {near} is the nearest that fits"
        )
    return fitting


def _listed(names: Mapping[str, str]) -> str:
    """Some names: those outside the blocks, and the roles inside."""
    roles = dict.fromkeys(f"blk.*.{name.split('.', 2)[2]}" if name.startswith("blk.") else name for name in names)
    return ", ".join(roles)
