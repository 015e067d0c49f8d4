"""Which block type each tensor of a GGUF file gets: llama-quantize's type mixes for dense models, as a table.

A file type such as q4_k_m names a default block type and exceptions by role and layer. For one matrix, in this order:

1. `MIXES[file type]`: the first entry of the role whose condition holds, else the default. With 80 layers, attn_v of type
   q3_k or q4_k becomes q5_k (`ROOMY_LAYERS`; llama.cpp takes any such model of 80 layers for a 70B).
2. The head (`output.weight`, or `token_embd.weight` where it is tied) is q6_k whatever the default; q8_0 if that is the
   default or does not divide the row. An untied `token_embd.weight` has the default type.
3. A type that the recipe gives the tensor (`types`, llama-quantize's `--tensor-type`) takes the place of these.
4. A row that the block does not divide falls back to `FALLBACK`, and to f16 if that does not help. This hits ffn_down of
   Qwen1.5 1.8B (5504) and 14B (13696).

Norms and biases are f32. The rules are those of llama.cpp of October 2026; an importance matrix changes some of them.
Left out: IQ1, IQ2, IQ3, TQ and expert models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from qquant.errors import UsageError
from qquant.families import Family, ModelConfig, Shape
from qquant.formats.gguf.types import TYPES, block_type

FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "q2_k_s": 21, "iq4_nl": 25,
    "iq4_xs": 30, "bf16": 32,
}  # fmt: skip
"""general.file_type of each file type."""
INSIDE = re.compile(r"blk\.(\d+)\.(.+)\.weight$")
"""Block and role of a matrix."""


@dataclass(frozen=True)
class ModelShape:
    """The tensors of a model by their names in a GGUF file, as its family's table and its config give them."""

    family: Family
    config: ModelConfig

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of every matrix by tensor name; those outside the blocks first."""
        matrices = {name: (shape[0], shape[1]) for name, shape in self._shapes().items() if len(shape) == 2}
        return dict(sorted(matrices.items(), key=lambda item: bool(INSIDE.match(item[0]))))

    def vectors(self) -> dict[str, int]:
        """Length of every norm and bias, by tensor name."""
        return {name: shape[0] for name, shape in self._shapes().items() if len(shape) == 1}

    def _shapes(self) -> dict[str, Shape]:
        return {self.family.gguf_name(name): shape for name, shape in self.family.shapes(self.config).items()}


@dataclass(frozen=True)
class _Place:
    """The layer of a matrix and what else the conditions ask."""

    layer: int
    layers: int
    sharing: int  # query heads per key-value head
    imatrix: bool


def _more_bits(place: _Place) -> bool:
    eighth = place.layers // 8
    outer = place.layer < eighth or place.layer >= 7 * place.layers // 8
    return outer or (place.layer - eighth) % 3 == 2


CONDITIONS: dict[str, Callable[[_Place], bool]] = {
    "always": lambda _place: True,
    "first 2": lambda place: place.layer < 2,
    "first 4": lambda place: place.layer < 4,
    "first 1/8": lambda place: place.layer < place.layers // 8,
    "first 1/16": lambda place: place.layer < place.layers // 16,
    "first 1/8, imatrix": lambda place: place.imatrix and place.layer < place.layers // 8,
    "first 1/8, no imatrix": lambda place: not place.imatrix and place.layer < place.layers // 8,
    "half": _more_bits,  # the first and last eighth, and every third layer between them
    "grouped": lambda place: place.sharing >= 4,
}


@dataclass(frozen=True)
class _Mix:
    default: str
    roles: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)  # role: ((condition, type), ...)


MIXES: dict[str, _Mix] = {
    "f32": _Mix("f32"),
    "f16": _Mix("f16"),
    "bf16": _Mix("bf16"),
    "q8_0": _Mix("q8_0"),
    "q6_k": _Mix("q6_k"),
    "q5_1": _Mix("q5_1"),
    "q4_1": _Mix("q4_1"),
    "q5_0": _Mix("q5_0", {"ffn_down": (("first 1/8, imatrix", "q5_1"),)}),
    "q4_0": _Mix("q4_0", {"ffn_down": (("first 1/8, imatrix", "q4_1"),)}),
    "iq4_nl": _Mix("iq4_nl", {"attn_v": (("grouped", "q5_k"),), "ffn_down": (("first 1/8, no imatrix", "q5_k"),)}),
    "iq4_xs": _Mix("iq4_xs", {"attn_v": (("grouped", "q5_k"),), "ffn_down": (("first 1/8, no imatrix", "q5_k"),)}),
    "q5_k_m": _Mix("q5_k", {"attn_v": (("half", "q6_k"),), "ffn_down": (("half", "q6_k"),)}),
    "q5_k_s": _Mix("q5_k"),
    "q4_k_m": _Mix("q4_k", {"attn_v": (("half", "q6_k"),), "ffn_down": (("half", "q6_k"),)}),
    "q4_k_s": _Mix("q4_k", {"attn_v": (("first 4", "q5_k"),), "ffn_down": (("first 1/8", "q5_k"),)}),
    "q3_k_l": _Mix(
        "q3_k",
        {"attn_v": (("always", "q5_k"),), "attn_output": (("always", "q5_k"),), "ffn_down": (("always", "q5_k"),)},
    ),
    "q3_k_m": _Mix(
        "q3_k",
        {
            "attn_v": (("first 2", "q5_k"), ("always", "q4_k")),
            "attn_output": (("always", "q4_k"),),
            "ffn_down": (("first 1/16", "q5_k"), ("always", "q4_k")),
        },
    ),
    "q3_k_s": _Mix("q3_k"),
    "q2_k": _Mix(
        "q2_k",
        {
            "attn_v": (("grouped", "q4_k"), ("always", "q3_k")),
            "attn_output": (("always", "q3_k"),),
            "ffn_down": (("always", "q3_k"),),
        },
    ),
    "q2_k_s": _Mix("q2_k", {"attn_v": (("grouped", "q4_k"),), "ffn_down": (("first 1/8", "q4_k"),)}),
}
NEEDS_IMATRIX = frozenset({"q2_k_s"})
ROOMY_LAYERS = 80
ROOMY = {"q3_k": "q5_k", "q4_k": "q5_k"}
HEAD = {"f32": "f32", "f16": "f16", "bf16": "bf16", "q8_0": "q8_0"}  # by default type; all others q6_k
FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


@dataclass(frozen=True)
class TypeMap:
    """Every tensor of a file."""

    types: dict[str, str]  # tensor name: block type
    fallbacks: tuple[tuple[str, str, str], ...]  # (tensor, wanted, given): its row is not a multiple of the block


def tensor_types(
    file_type: str, shape: ModelShape, imatrix: bool, fixed: Mapping[str, str] = MappingProxyType({})
) -> TypeMap:
    """The types that llama-quantize gives the tensors of a model; `imatrix`: it is given an importance matrix.

    `fixed`: types that tensors get whatever the mix says, and that their rows can have.

    Raises:
        UsageError: unknown file type, or one that needs an importance matrix.
    """
    if file_type not in MIXES:
        raise UsageError(f"unknown GGUF file type {file_type!r}; known: {', '.join(FILE_TYPES)}")
    if file_type in NEEDS_IMATRIX and not imatrix:
        raise UsageError(
            f"GGUF file type {file_type} needs an importance matrix: its 2-bit blocks are unusable without one"
        )
    mix = MIXES[file_type]
    wanted = {
        name: (fixed.get(name) or _wanted(name, mix, shape.config, imatrix), size)
        for name, size in shape.matrices().items()
    }
    types = {name: fitting(wish, size[1]) for name, (wish, size) in wanted.items()}
    fallbacks = tuple((name, wish, types[name]) for name, (wish, _) in wanted.items() if types[name] != wish)
    return TypeMap(types | dict.fromkeys(shape.vectors(), "f32"), fallbacks)


def fitting(type_name: str, columns: int) -> str:
    """`type_name`, or what llama-quantize falls back to for rows of `columns` values.

    Raises:
        UsageError: unknown type.
    """
    if columns % block_type(type_name).block == 0:
        return type_name
    fallback = FALLBACK.get(type_name, "f16")
    return fallback if columns % TYPES[fallback].block == 0 else "f16"


def _wanted(name: str, mix: _Mix, config: ModelConfig, imatrix: bool) -> str:
    inside = INSIDE.match(name)
    if not inside:
        return _outside(name, mix, config)
    return _inside(inside[2], mix, _Place(int(inside[1]), config.layers, config.heads // config.kv_heads, imatrix))


def _inside(role: str, mix: _Mix, place: _Place) -> str:
    entries = mix.roles.get(role, ())
    type_name = next((type_name for condition, type_name in entries if CONDITIONS[condition](place)), mix.default)
    if role == "attn_v" and place.layers == ROOMY_LAYERS:
        return ROOMY.get(type_name, type_name)
    return type_name


def _outside(name: str, mix: _Mix, config: ModelConfig) -> str:
    if name == "token_embd.weight" and not config.tied:
        return mix.default
    if config.hidden % TYPES[mix.default].block:
        return "q8_0"
    return HEAD.get(mix.default, "q6_k")
