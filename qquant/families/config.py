"""The numbers of config.json that shapes and the forward pass depend on, and what of them a model can have.

A family reads its own `config.json` (`Family.parse`); one with more numbers extends `ModelConfig`, one whose blocks differ in width
answers `sizes` by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qquant.errors import InputError

NUMBER_LIMIT = 1e18
COUNT_LIMITS = {
    "hidden": 1 << 17, "intermediate": 1 << 20, "layers": 1024, "heads": 1024, "kv_heads": 1024, "head_dim": 4096, "vocab": 1 << 22,
    "positions": 1 << 31,
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """What every family has; `intermediate` is the widest MLP."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    epsilon: float
    rope_theta: float
    positions: int

    def sizes(self, layer: int) -> Mapping[str, int]:
        """The sizes of block `layer` by the names that a family's table uses: all query heads, all key-value heads, one head."""
        del layer
        return {
            "hidden": self.hidden,
            "heads": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "head": self.head_dim,
            "intermediate": self.intermediate,
        }


def number(raw: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """The positive int or float `raw[key]`.

    Raises:
        InputError: it is missing, of another type, not positive, or beyond `NUMBER_LIMIT`.
    """
    value: Any = raw.get(key)
    good = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not good or not 0 < value < NUMBER_LIMIT:  # NaN and infinity too
        raise InputError(f"{where}: {key} must be a positive {kind.__name__}, got {repr(value)[:80]}")
    return kind(value)


def rope_theta(raw: Mapping[str, Any], where: str) -> float:
    """The base of the rotary frequencies, wherever transformers 4 or 5 writes it.

    Raises:
        InputError: frequencies are scaled, partial, or differ by layer, or two places name two bases.
    """
    stated = {"rope_theta": raw["rope_theta"]} if raw.get("rope_theta") is not None else {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key) or {}
        if not isinstance(rope, dict):
            raise InputError(f"{where}: {key} must be a mapping, got {str(rope)[:80]}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise InputError(
                f"{where}: rope type {str(kind)[:80]!r} in {key} is not supported; qquant knows 'default'. Remove the rope scaling"
            )
        layers = next((name for name, value in rope.items() if isinstance(value, dict)), None)
        if layers is not None:
            raise InputError(f"{where}: {key} holds another rope for {layers[:80]!r}; qquant knows one for all layers")
        _require_full_rotation(rope, f"{where}: {key}")
        if rope.get("rope_theta") is not None:
            stated[f"rope_theta in {key}"] = rope["rope_theta"]
    _require_full_rotation(raw, where)
    if len({float(number(stated, key, float, where)) for key in stated}) > 1:
        raise InputError(
            f"{where}: {', '.join(f'{key} is {value}' for key, value in stated.items())}; keep the one that the model was made with"
        )
    return float(next(iter(stated.values()), 10000.0))


def _require_full_rotation(rope: Mapping[str, Any], where: str) -> None:
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise InputError(
            f"{where}: partial_rotary_factor is {str(rope['partial_rotary_factor'])[:80]}; qquant rotates whole heads"
        )


def require_full_attention(raw: Mapping[str, Any], layers: int, where: str) -> None:
    """Raise InputError where attention is another than the full, causal one of every layer, or `layer_types` names other layers."""
    for key, plain in (("is_causal", (None, True)), ("dual_chunk_attention_config", (None, {}))):
        if raw.get(key) not in plain:
            raise InputError(f"{where}: {key} is {str(raw[key])[:80]}; qquant knows full causal attention")
    kinds = raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or kinds != ["full_attention"] * layers):
        other = (
            next((kind for kind in kinds if kind != "full_attention"), f"{len(kinds)} of them")
            if isinstance(kinds, list)
            else kinds
        )
        raise InputError(
            f"{where}: layer_types holds {str(other)[:80]!r}; qquant knows 'full_attention' for each of {layers} layers"
        )


def require_bounds(config: ModelConfig, where: str) -> ModelConfig:
    """`config`, if its counts are whole and such as a model can have.

    Raises:
        InputError: a count is not whole, or so large that walking through it would take forever.
    """
    for name, limit in COUNT_LIMITS.items():
        value = getattr(config, name)
        if not isinstance(value, int) or value > limit:
            raise InputError(f"{where}: {name} is {value}; qquant takes whole numbers up to {limit:,}")
    return config
