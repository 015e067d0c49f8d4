"""What an artifact must hold where its recipe says nothing, and what a text of some length can tell at all.

Limits by format and size of the model are starting values, to be tightened with `regression_vs` once a release was measured. Perplexity:
what the published GGUF files of Qwen1.5 lose against their own 16-bit file, with room for noise. KL divergence and top-1: above llama.cpp's
scoreboard of 7B and 8B models, with more room for smaller ones. No limit was fitted to artifacts of ours. Eight bits have no perplexity
limit: they move perplexity by less than a text of any usual length resolves. q2_k is lossy by design: only a broken file fails.

The detectable effect: the distance from a limit that is proven in `POWER` of all runs with n windows of S scored tokens each,

    (z(1 - ASKED / looks) + z(POWER)) sd / sqrt(n)

before anything was measured, from how window means spread at the limit (KL divergence k, disagreement q), as seen on artifacts of the demo
model (tests/bench/gate_simulation.py prints these; tokens of a window hang together, which is in the factors):

    NLL difference   sd = 1.4 sqrt(2 k / S)        the log ratio of near distributions has variance 2 KL
    KL divergence    sd = 0.3 k (255 / S)^(1/4)    0.31 k was seen with 63 tokens, 0.21 k with 255: longer windows help little
    disagreement     sd = 1.1 sqrt(q (1 - q) / S)

The worst slice (`checks.profile: release`): its KL divergence over that of English, in logarithms, so its error is that of both.
Languages and kinds of text differ in how much there is to lose, and twice was seen on harmless artifacts; a stretch of positions is
compared with the same tokens in short windows, so its limit is half as far, in logarithms. Below `RESOLVED` nats nobody is told apart.

Behaviour (the same profile): of what the checkpoint answers rightly, how much may be lost on balance. A few dozen questions of a kind resolve
a tenth to a quarter; an artifact that may choose another token more often than that may lose as much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from qquant.recipe import Gates

LEVEL = 0.05  # chance of a wrong verdict that is promised for one artifact, over its gates and looks
ASKED = 0.8 * LEVEL  # what p-values are held to: with 40 windows, up to 5.8 % of those of real texts are below 5 %
POWER = 0.8  # of the detectable effect
SLICES = 0.006  # of `LEVEL`, for the worst of all slices
BEHAVIOUR = LEVEL - ASKED - SLICES  # of `LEVEL`, for the worst of all kinds of questions
WORST_SLICE = 3.0  # default of `gates.worst_slice`
LOST = 0.2  # default of `gates.behaviour`, or the disagreement that is allowed where that is more
RESOLVED = (
    0.001  # nats, what 16-bit artifacts may lose: English counts as at least this where slices are compared with it
)
LARGE = 5 * 10**9  # parameters from which on a model loses less
LOSSY = 1.2  # perplexity ratio that is worth a warning where nothing limits it


@dataclass(frozen=True)
class Limits:
    """Default limits of a kind of artifact; None: not gated."""

    perplexity_ratio: float | None
    kl_divergence: float
    top1_agreement: float


_FOUR = Limits(1.08, 0.10, 0.85), Limits(1.04, 0.05, 0.90)
_FOUR_K = Limits(1.03, 0.06, 0.88), Limits(1.015, 0.04, 0.91)
_FIVE = Limits(1.015, 0.03, 0.91), Limits(1.015, 0.02, 0.93)
_THREE = Limits(1.12, 0.20, 0.78), Limits(1.07, 0.12, 0.84)
_TWO = Limits(None, 1.0, 0.55), Limits(None, 0.5, 0.65)
_EIGHT = Limits(None, 0.005, 0.97), Limits(None, 0.003, 0.975)
_SIXTEEN = Limits(None, 0.001, 0.985), Limits(None, 0.001, 0.985)
LIMITS: dict[str, tuple[Limits, Limits]] = {  # kind -> (below LARGE parameters, from there on)
    "int4": _FOUR,
    "int8": _EIGHT,
    "f32": _SIXTEEN,
    "f16": _SIXTEEN,
    "bf16": _SIXTEEN,
    "q8_0": _EIGHT,
    "q6_k": (Limits(1.015, 0.015, 0.94), Limits(1.01, 0.01, 0.95)),
    "q5_k_m": _FIVE,
    "q5_k_s": _FIVE,
    "q5_1": _FIVE,
    "q5_0": _FIVE,
    "q4_k_m": _FOUR_K,
    "q4_k_s": _FOUR_K,
    "q4_1": _FOUR,
    "q4_0": _FOUR,
    "iq4_nl": _FOUR,
    "iq4_xs": _FOUR,
    "q3_k_l": _THREE,
    "q3_k_m": _THREE,
    "q3_k_s": (Limits(1.20, 0.30, 0.72), Limits(1.10, 0.18, 0.80)),
    "q2_k": _TWO,
    "q2_k_s": _TWO,
}


def resolved(gates: Gates, kind: str, parameters: int) -> Gates:
    """`gates` with the limits that it leaves open filled in for a kind of artifact, unless it declines them."""
    if not gates.defaults or kind not in LIMITS:
        return gates
    limits = LIMITS[kind][parameters >= LARGE]
    lost = max(LOST, round(1 - limits.top1_agreement, 6))
    filled = vars(limits) | {"worst_slice": WORST_SLICE, "behaviour": lost}
    open_ones = {key: value for key, value in filled.items() if getattr(gates, key) is None}
    return gates.model_copy(update=open_ones)


def normal_quantile(p: float) -> float:
    """The z below which the normal distribution has the share p, 0 < p < 1."""
    return NormalDist().inv_cdf(p)


@dataclass(frozen=True)
class Reach:
    """What a gate can tell before it was run."""

    gate: str
    limit: float
    detectable: float  # distance from the limit, in the units of the limit


def reach(gates: Gates, windows: int, scored: int, looks: int = 1) -> tuple[Reach, ...]:
    """The detectable effect of every gate of `gates` (resolved) with windows of `scored` tokens."""
    factor = (normal_quantile(1 - ASKED / looks) + normal_quantile(POWER)) / math.sqrt(windows)
    reaches = []
    ratio, kl, top1 = gates.perplexity_ratio, gates.kl_divergence, gates.top1_agreement
    if ratio is not None:
        spread = 1.4 * math.sqrt(2 * (kl if kl is not None else math.log(ratio)) / scored)
        reaches.append(Reach("perplexity ratio", ratio, ratio * math.expm1(factor * spread)))
    if kl is not None:
        reaches.append(Reach("mean KL divergence", kl, factor * 0.3 * kl * (255 / scored) ** 0.25))
    if top1 is not None:
        reaches.append(Reach("top-1 agreement", top1, factor * 1.1 * math.sqrt(top1 * (1 - top1) / scored)))
    return tuple(reaches)


def slice_reach(limit: float, scored: int, windows: int, beside: int | None) -> float:
    """Distance from `limit` that the worst slice's ratio can be told apart at; `beside`: windows of English, None where both are the same tokens."""
    spread = 0.3 * (255 / scored) ** 0.25
    error = spread * math.sqrt(1 / windows + (1 / beside if beside else 0.0))
    return limit * math.expm1((normal_quantile(1 - ASKED) + normal_quantile(POWER)) * error)


def reference() -> str:
    """The default limits as a Markdown table, as in recipes/README.md."""
    lines = ["| kind | perplexity ratio | KL divergence | top-1 | from 5B parameters on |", "|---|---:|---:|---:|---|"]
    for kind, (small, large) in LIMITS.items():
        more = "the same" if small == large else ", ".join(_cells(large))
        lines.append(f"| {kind} | {' | '.join(_cells(small))} | {more} |")
    return "\n".join(lines) + "\n"


def _cells(limits: Limits) -> list[str]:
    return ["none" if value is None else f"{value:g}" for value in vars(limits).values()]
