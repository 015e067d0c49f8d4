"""What a recipe says of single tensors of an artifact: types of GGUF matrices, sizes, linears that are kept as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema

from qquant.recipe.fields import Conflict, Text
from qquant.recipe.words import hint, nearest, shown

TENSOR_TYPES = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k", "q2_k",
)  # fmt: skip
"""What a single tensor of a GGUF file can be."""
UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
SIZE = re.compile(rf"(\d{{1,15}}(?:\.\d{{1,6}})?) ?({'|'.join(UNITS)})")

TypeChoice = Annotated[
    str | tuple[str, ...],
    PlainValidator(lambda value: value),  # `conflicts` says what is wrong with it
    PlainSerializer(lambda value: value),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(TENSOR_TYPES), "type": "string"},
                {"type": "array", "items": {"enum": list(TENSOR_TYPES), "type": "string"}, "minItems": 1},
            ]
        }
    ),
]
Keep = Annotated[
    tuple[Text, ...],
    Field(
        min_length=0,
        max_length=2000,
        description="linears that stay as they are in the checkpoint, by name or pattern (`model.layers.0.mlp.down_proj`, `model.layers.*.self_attn.o_proj`); those that share an input together",
    ),
]


def bytes_of(size: str) -> int | None:
    """The bytes that a text such as 4.4GB means; None: it is not a size."""
    match = SIZE.fullmatch(size)
    return int(Decimal(match[1]) * UNITS[match[2]]) if match else None


def unknown_types(types: Mapping[str, Any], lists: bool) -> Iterator[Conflict]:
    """Types that are none; `lists`: several may be named, to choose from."""
    for pattern, choice in types.items():
        place = ("types", pattern)
        if isinstance(choice, tuple | list) and not lists:
            yield place, "a list is what a size chooses from, and `type` is given; allowed: one type"
            continue
        several = choice if isinstance(choice, tuple | list) else (choice,)
        for name in several or (choice,):
            if name not in TENSOR_TYPES:
                meant = hint(nearest(name, TENSOR_TYPES))
                yield place, f"not a type of a tensor, got {shown(name)}; allowed: {', '.join(TENSOR_TYPES)}{meant}"
                break
