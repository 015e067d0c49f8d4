"""A size instead of a type: of all types of all tensors those with the least expected loss in so many bytes.

Every matrix of the file is one of its types; a type has bytes b and a loss l, in nats of KL divergence per token. Losses of tensors add up
to second order, so what is sought is

    minimise  sum l(tensor, type)    with    sum b(tensor, type) <= room

a knapsack with one choice from every class, solved by dynamic programming over bytes: best[w] is the least loss of the tensors so far in
w units more than their smallest types take. The unit is what all differences of bytes are multiples of, so the answer is exact; where
that makes more than CELLS of them, bytes are rounded up to a larger unit, and what this leaves unused goes to the tensors for which
another type gains most per byte. The size is that of the files, with their headers: never more than was asked for.

Where losses were not measured yet, every weight counts alike: an error of half the bits is four times as large. A plan has that map, of
the right size; the build puts the measured one in its place.

The mix in the metadata is the largest of llama-quantize's that is not larger than the file, as `claims.kind` holds strangers' files to.
Reference: llama.cpp #15550 (a target in bits per weight, by measured errors).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from qquant.errors import UsageError
from qquant.formats.gguf import claims, patterns
from qquant.formats.gguf.container import padded
from qquant.formats.gguf.mix import INSIDE, ModelShape
from qquant.formats.gguf.types import TYPES
from qquant.recipe import GgufArtifact
from qquant.recipe.artifacts import NO_CODES
from qquant.recipe.tensors import TENSOR_TYPES
from qquant.resources import lazy

if TYPE_CHECKING:
    import numpy as np

    from qquant.formats.planned import Losses, PlannedArtifact
else:
    np = lazy("numpy")

CELLS = 200_000  # units of bytes that are told apart
SIXTEEN = {"BF16": "bf16", "F16": "f16", "F32": "f16"}  # the largest type that is worth its bytes
NOT_ASKED_FOR = {"q2_k_s": "q2_k", "f32": "f16"}  # mixes that no recipe has, and what is said instead


@dataclass(frozen=True)
class Option:
    """A type that a tensor may have."""

    type: str
    bytes: int
    loss: float


Options = Mapping[str, Sequence[Option]]  # by tensor
Trial = Callable[[GgufArtifact], "PlannedArtifact"]


def candidates(spec: GgufArtifact, shape: ModelShape, dtype: str) -> dict[str, tuple[str, ...]]:
    """The types that each matrix may have: those of the recipe's `types`, else all up to the checkpoint's own `dtype`.

    Raises:
        UsageError, InputError: as `patterns.allowed`.
    """
    allowed = patterns.allowed(spec.types, shape.matrices(), spec.name)
    usual = tuple(
        name for name in TENSOR_TYPES if TYPES[name].levels or name.startswith("iq4") or name == SIXTEEN[dtype]
    )
    return {
        name: allowed.get(name) or tuple(kind for kind in usual if columns % TYPES[kind].block == 0)
        for name, (_, columns) in shape.matrices().items()
    }


def settled(
    spec: GgufArtifact, shape: ModelShape, dtype: str, losses: Mapping[str, Losses] | None, trial: Trial
) -> GgufArtifact:
    """The entry with a literal map of types instead of its size; `trial` plans such an entry.

    `losses`: by tensor of the file and type; None: not measured yet.

    Raises:
        UsageError: no map has that size, or as many bits.
    """
    matrices = shape.matrices()
    options = {
        name: [
            Option(kind, padded(rows * TYPES[kind].row_bytes(columns)), _loss(losses, name, kind, rows * columns))
            for kind in kinds
        ]
        for (name, kinds), (rows, columns) in zip(
            candidates(spec, shape, dtype).items(), matrices.values(), strict=True
        )
    }

    def literal(types: Mapping[str, str]) -> GgufArtifact:
        mix = claims.kind_of(types, shape)
        mix = NOT_ASKED_FOR.get(mix, mix)
        update = {"type": mix, "size": None, "bits_per_weight": None, "types": abridged(types)}
        return spec.model_copy(update=update | ({"solver": "ggml", "propagate": False} if mix in NO_CODES else {}))

    smallest, largest = (sum(choose(one.bytes for one in those) for those in options.values()) for choose in (min, max))
    least = _Size.of(spec, trial(literal({name: min(those, key=_bytes).type for name, those in options.items()})))
    most = least.value + (largest - smallest) / least.unit
    if not least.value <= least.asked <= most:
        raise UsageError(
            f"artifact {spec.name}: {least.key} {least.shown(least.asked)}: this model with these types can have {least.shown(least.value)} "
            f"to {least.shown(most)}"
        )
    room = least.room(smallest)
    while True:
        entry = literal(with_least_loss(options, room))
        over = _Size.of(spec, trial(entry)).over
        if over <= 0:
            return entry
        room = max(smallest, room - over)


@dataclass(frozen=True)
class _Size:
    """How large a plan is, in what the recipe counts in."""

    key: str
    asked: float
    value: float
    parameters: int

    @classmethod
    def of(cls, spec: GgufArtifact, planned: PlannedArtifact) -> _Size:
        files = sum(file.size for file in planned.files if file.tensors)
        if spec.bits_per_weight is not None:
            return cls("bits_per_weight", spec.bits_per_weight, planned.bits_per_weight, planned.parameters)
        return cls("size", spec.most or 0, files, planned.parameters)

    @property
    def unit(self) -> float:
        """Bytes of one."""
        return self.parameters / 8 if self.key == "bits_per_weight" else 1

    @property
    def over(self) -> int:
        """Bytes too many; not above 0: none."""
        return math.ceil((self.value - self.asked) * self.unit) if self.value > self.asked else 0

    def room(self, smallest: int) -> int:
        """Bytes for matrices, if this is the plan in which they take `smallest`."""
        return smallest + math.floor((self.asked - self.value) * self.unit)

    def shown(self, value: float) -> str:
        """A size in the words of the recipe: bytes, or bits per weight."""
        return f"{value:.4g}" if self.key == "bits_per_weight" else f"{int(value):,} bytes"


def _bytes(option: Option) -> int:
    return option.bytes


def _loss(losses: Mapping[str, Losses] | None, name: str, kind: str, count: int) -> float:
    if losses is None:
        return count * 4.0 ** (-8 * TYPES[kind].bytes / TYPES[kind].block)
    return losses[name][kind]


def with_least_loss(options: Options, room: int) -> dict[str, str]:
    """The types with the least sum of losses that take at most `room` bytes, which is enough for the smallest of each."""
    least = {name: min(one.bytes for one in those) for name, those in options.items()}
    left = room - sum(least.values())
    assert left >= 0
    steps = [one.bytes - least[name] for name, those in options.items() for one in those]
    unit = max(reduce(math.gcd, steps) or 1, -(-left // CELLS))
    cells = left // unit
    best, marks = np.zeros(cells + 1), []
    for name, those in options.items():
        now, mark = np.full(cells + 1, np.inf), np.zeros(cells + 1, np.int8)
        for index, one in enumerate(those):
            step = -(-(one.bytes - least[name]) // unit)
            if step <= cells:
                loss = best[: cells + 1 - step] + one.loss
                better = loss < now[step:]
                now[step:][better], mark[step:][better] = loss[better], index
        best = now
        marks.append(mark)
    place = int(best.argmin())
    types: dict[str, Option] = {}
    for name, mark in zip(reversed(list(options)), reversed(marks), strict=True):
        one = options[name][mark[place]]
        types[name] = one
        place -= -(-(one.bytes - least[name]) // unit)
    _fill(options, types, room - sum(one.bytes for one in types.values()))
    return {name: types[name].type for name in options}


def _fill(options: Options, types: dict[str, Option], left: int) -> None:
    """Give away `left` bytes while some type that fits loses less, the largest gain per byte first."""
    while True:
        steps = [
            ((types[name].loss - one.loss) / max(1, one.bytes - types[name].bytes), name, one)
            for name, those in options.items()
            for one in those
            if one.loss < types[name].loss and one.bytes - types[name].bytes <= left
        ]
        if not steps:
            return
        _, name, one = max(steps, key=lambda step: step[0])
        left -= one.bytes - types[name].bytes
        types[name] = one


def abridged(types: Mapping[str, str]) -> dict[str, str]:
    """A map of tensors as `types` of a recipe: the usual type of every role, and the tensors that have another one."""
    places = {name: INSIDE.match(name) for name in types}
    kinds: dict[str, Counter[str]] = {}
    for name, place in places.items():
        if place:
            kinds.setdefault(place[2], Counter())[types[name]] += 1
    usual = {role: counter.most_common(1)[0][0] for role, counter in kinds.items()}
    by_role = {f"blk.*.{role}": kind for role, kind in usual.items()}
    apart = {name: kind for name, kind in types.items() if not (place := places[name]) or kind != usual[place[2]]}
    return (
        {patterns.short(name): kind for name, kind in apart.items() if not places[name]}
        | by_role
        | {patterns.short(name): kind for name, kind in apart.items() if places[name]}
    )
