"""What the solver says of each linear, and of each block: in the journal, the manifest and the report alike.

One list holds both kinds, in the order in which they were solved; a block's entry has `float32_samples` or `awq`, a linear's has neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from qquant.disk.records import Count, Number

FLOAT16_MAX = 65504  # as torch.finfo has it, which a report does not import


@dataclass(frozen=True)
class LinearRecord:
    """How one linear was solved; errors are w H w' of what is missing over that of the weights."""

    name: str  # of the weight in the checkpoint
    error: Number  # of what was kept
    checksum: str = ""  # of the float32 values that readers will see
    tokens: Count | None = None  # of calibration
    inputs: Count | None = None  # channels
    dead: Count | None = None  # channels that were always zero
    largest: Number | None = None  # |input|
    steps: Mapping[str, Number] = field(default_factory=dict)  # error after each step, in their order; "rtn" to nearest
    damping: Number | None = None  # None: not solved with feedback
    fallback: str | None = None  # why it was rounded to nearest after all
    damping_asked: Number | None = None


@dataclass(frozen=True)
class ScaleChoice:
    """What a search for folded scales found for one stage."""

    stage: str
    ratio: Number | None  # None: not scaled
    loss: Number  # relative output error of what the search rounded
    unscaled: Number  # the same without scaling


@dataclass(frozen=True)
class BlockRecord:
    """What concerns a block as a whole, or a stage of it."""

    name: str
    float32_samples: Count | None = None  # samples that overflowed and were computed in float32
    awq: ScaleChoice | None = None


def _kind(entry: Any) -> str:
    if isinstance(entry, Mapping):
        return "block" if "float32_samples" in entry or "awq" in entry else "linear"
    return "block" if isinstance(entry, BlockRecord) else "linear"


Solved = Annotated[Annotated[LinearRecord, Tag("linear")] | Annotated[BlockRecord, Tag("block")], Discriminator(_kind)]


def linears(entries: Iterable[Solved]) -> list[LinearRecord]:
    """The linears among the entries."""
    return [entry for entry in entries if isinstance(entry, LinearRecord)]


def checksums(entries: Iterable[Solved]) -> dict[str, str]:
    """Checksum by the name of the weight, where one was recorded."""
    return {entry.name: entry.checksum for entry in linears(entries) if entry.checksum}


def warnings_of(entries: Sequence[Solved]) -> list[str]:
    """What a reader should know of the solve: fallbacks, raised damping, dead channels, too few tokens, range."""
    warnings = _too_few_tokens([linear for linear in linears(entries) if _above(linear.inputs, linear.tokens)])
    for entry in entries:
        lines = _of_linear(entry) if isinstance(entry, LinearRecord) else _of_block(entry)
        warnings += [f"{entry.name}: {line}" for line in lines]
    return warnings


def _too_few_tokens(short: Sequence[LinearRecord]) -> list[str]:
    """One line for all of these linears; empty where there is none."""
    if not short:
        return []
    tokens, inputs = min(linear.tokens or 0 for linear in short), max(linear.inputs or 0 for linear in short)
    which = short[0].name if len(short) == 1 else f"{len(short)} linears, {short[0].name} first"
    return [f"{which}: {tokens} calibration tokens for {inputs} inputs; give more samples"]


def _of_linear(linear: LinearRecord) -> Iterable[str]:
    if linear.fallback:
        yield linear.fallback
    if linear.dead:
        yield f"{linear.dead} input channels were always zero during calibration"
    if _above(linear.damping, linear.damping_asked):
        yield f"damping was raised from {linear.damping_asked:g} to {linear.damping:g}"
    if _above(linear.largest, FLOAT16_MAX):
        yield f"inputs up to {linear.largest:.3g} do not fit float16 ({FLOAT16_MAX}); run it in bfloat16"


def _of_block(block: BlockRecord) -> Iterable[str]:
    if block.float32_samples:
        yield f"{block.float32_samples} samples overflowed and were computed in float32"


def _above(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit
