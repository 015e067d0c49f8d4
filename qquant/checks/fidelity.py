"""How close an artifact stays to its 16-bit checkpoint, token by token, on held-out text.

Baseline and artifacts walk the text together, one decoder block at a time, so only one block of each is in memory and no logits
are stored. Where hidden states of all windows are more than `qquant.plan.room.CHECK` of the free memory, windows go in groups, each through all layers:
weights are read once for each group, and the numbers are the same to the bit. Then the heads are read once, in slices of the vocabulary, and per scored position these sums are kept in float64:

    Z_b = sum exp(b),  Z_a = sum exp(a),  T = sum exp(b) (b - a)          b, a: float32 logits of baseline and artifact
    KL(baseline || artifact) = T / Z_b - ln Z_b + ln Z_a                   nats, exact over the real vocabulary
    NLL = ln Z - logit of the next token;  perplexity = exp(mean NLL)

Equal logits give exactly zero. Weights are dequantized to float32 and activations are float32, so the numbers are about the
artifact and not about a kernel. Windows do not overlap. Protocol "llama.cpp" (llama-perplexity): the second half of each window
is scored, so every token has half a window of context; "sliding" (GPTQ papers): all but its first token, which has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qquant.background import prefetch
from qquant.devices import free_memory, readers, return_freed, threads_help
from qquant.errors import NumericalError
from qquant.families.decoder import Block, embed, rms_norm, source_block
from qquant.families.weights import WeightSource
from qquant.plan.room import CHECK, HELD
from qquant.progress import Progress, SharedProgress

SLICE = 1024  # rows of the heads at a time, of every source at once
HEAD = 2.0  # times the products of the head that its sums cost
TILE = 1024  # positions at a time, in whole windows or parts of one, so that how windows are grouped changes no product


@dataclass(frozen=True)
class Fidelity:
    """Per scored token, in window order; float64 [windows, scored]."""

    nll: Tensor
    nll_baseline: Tensor
    kl: Tensor
    same_top: Tensor  # bool
    delta_p: Tensor  # probability of the right token, artifact minus baseline
    right: Tensor  # bool: the artifact ranks the next token of the text first
    right_baseline: Tensor

    def window_means(self) -> dict[str, NDArray[np.float64]]:
        """Per gated loss its mean in each window, float64 [windows]: what the statistics resample."""
        losses = {"nll": self.nll - self.nll_baseline, "kl": self.kl, "top1": 1 - self.same_top.double()}
        return {name: loss.mean(1).numpy() for name, loss in losses.items()}

    def part(self, windows: slice | Tensor) -> Fidelity:
        """These numbers for some of the windows."""
        return Fidelity(**{name: column[windows] for name, column in vars(self).items()})

    @classmethod
    def joined(cls, parts: Sequence[Fidelity]) -> Fidelity:
        """The windows of `parts`, one after the other."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})

    @property
    def perplexity(self) -> float:
        """Perplexity of the artifact."""
        return float(self.nll.mean().exp())

    @property
    def perplexity_baseline(self) -> float:
        """Perplexity of the checkpoint."""
        return float(self.nll_baseline.mean().exp())

    @property
    def perplexity_ratio(self) -> float:
        """Artifact over checkpoint, paired on the same tokens."""
        return float((self.nll - self.nll_baseline).mean().exp())

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence from the checkpoint, nats per token."""
        return float(self.kl.mean())

    @property
    def top1(self) -> float:
        """Share of tokens on which both rank the same token first."""
        return float(self.same_top.double().mean())


def first_scored(protocol: str, length: int) -> int:
    """The position in a window of `length` from which the next token is scored."""
    return length // 2 if protocol == "llama.cpp" else 0


@dataclass(frozen=True)
class Scored:
    """Windows int64 [W, L] of a text; positions from `first` on are scored against their next token."""

    windows: Tensor
    first: int
    vocabulary: int  # token ids from here on are padding


@dataclass
class _LogitSums:
    """Running sums of one source over slices of the vocabulary, float64 per position."""

    peak: Tensor
    total: Tensor
    target: Tensor
    best: Tensor  # float32 logit and id of the first token
    best_id: Tensor
    cross: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def start(cls, positions: int, device: torch.device) -> _LogitSums:
        low = torch.full((positions,), -torch.inf, device=device)
        zero = torch.zeros(positions, dtype=torch.float64, device=device)
        return cls(low.double(), zero.clone(), zero.clone(), low, zero.long())

    def add(self, logits: Tensor, first: int, rows: slice, targets: Tensor) -> None:
        """Take in logits float32 [P, V'] of token ids first ... for positions `rows`."""
        top, best = logits.max(1)
        peak = torch.maximum(self.peak[rows], top.double())
        self.total[rows] = self.total[rows] * (self.peak[rows] - peak).exp() + (
            logits - peak[:, None].float()
        ).exp().double().sum(1)
        self.peak[rows] = peak
        better = top > self.best[rows]
        self.best[rows] = torch.where(better, top, self.best[rows])
        self.best_id[rows] = torch.where(better, best + first, self.best_id[rows])
        inside = (targets >= first) & (targets < first + logits.shape[1])
        picked = logits.gather(1, (targets - first).clamp(0, logits.shape[1] - 1)[:, None])[:, 0].double()
        self.target[rows] = torch.where(inside, picked, self.target[rows])

    @property
    def log_z(self) -> Tensor:
        return self.peak + self.total.log()

    @property
    def nll(self) -> Tensor:
        return self.log_z - self.target


@dataclass
class Peaks:
    """The largest |input of a linear, or output of a block| by source (the baseline is 0) and block, whatever was read."""

    largest: dict[tuple[int, int], float] = field(default_factory=dict)

    def observer(self, source: int, layer: int) -> Callable[[str, Tensor], None]:
        """Takes in the activations of one block."""

        def observe(_: str, x: Tensor) -> None:
            low, high = torch.aminmax(x)
            peak = float(torch.maximum(-low, high))
            before = self.largest.get((source, layer), 0.0)
            self.largest[source, layer] = peak if math.isnan(peak) else max(before, peak)

        return observe

    def of(self, source: int) -> tuple[float, ...]:
        """The largest activation of each block of a model."""
        return tuple(peak for (index, _), peak in sorted(self.largest.items()) if index == source)


def measure(
    baseline: WeightSource,
    artifacts: Mapping[str, WeightSource],
    text: Scored,
    device: torch.device,
    progress: Progress,
    peaks: Peaks | None = None,
    memory: float | None = None,
) -> dict[str, Fidelity]:
    """Compare artifacts with `baseline` on a text; token ids >= `text.vocabulary` are padding and never count.

    `peaks` takes in the largest activations, the artifacts numbered from 1 in their order. `memory`: bytes that activations may take.

    Raises:
        NumericalError: an activation of the baseline is not finite. An artifact's are measured as they are (infinite KL).
    """
    sources = [baseline, *artifacts.values()]
    held = HELD * 4 * len(sources) * text.windows.shape[1] * baseline.config.hidden  # bytes of a window
    room = CHECK * free_memory(device) if memory is None else memory
    together = max(1, TILE // max(1, text.windows.shape[1] - text.first - 1))
    groups = text.windows.split(max(1, int(room / held / together)) * together)
    parts = []
    for number, windows in enumerate(groups):
        share = SharedProgress(progress, number, len(groups))
        parts.append(_measure(sources, replace(text, windows=windows), device, share, peaks))
    return {name: Fidelity.joined([part[index] for part in parts]) for index, name in enumerate(artifacts)}


def _measure(
    sources: Sequence[WeightSource], text: Scored, device: torch.device, progress: Progress, peaks: Peaks | None
) -> list[Fidelity]:
    """The fidelity of every source but the first, against the first."""
    layers, share = sources[0].config.layers, _head_share(sources[0], text)
    finals = final_states(sources, text, device, progress, peaks=peaks, more=share)
    targets = text.windows[:, text.first + 1 :].to(device)
    reached = 0

    def tell(words: int) -> None:
        """So many words of the vocabulary are read."""
        nonlocal reached
        if reached < share * words // text.vocabulary:
            reached = share * words // text.vocabulary
            progress.advance("check", layers + reached, layers + share)
        progress.at(f"the head, word {words:,} of {text.vocabulary:,}")

    sums = _heads(sources, [states.flatten(0, 1) for states in finals], targets, text.vocabulary, tell)
    shape = (len(text.windows), text.windows.shape[1] - text.first - 1)
    return [_fidelity(sums[0], other, targets.flatten(), shape) for other in sums[1:]]


def plain_block(source: WeightSource, layer: int, device: torch.device) -> Block:
    """A block that computes in float32; several threads read it where that gains anything."""
    return source_block(source, layer, torch.float32, device, readers(device))


def final_states(
    sources: Sequence[WeightSource],
    text: Scored,
    device: torch.device,
    progress: Progress,
    block_of: Callable[[WeightSource, int, torch.device], Block] = plain_block,
    peaks: Peaks | None = None,
    more: int = 0,
) -> list[Tensor]:
    """Per source the input of its head at the scored positions, float32 [windows, scored, hidden]; the first source must stay finite.

    `peaks` takes in the largest |activation| of each source and block. `more`: steps of `progress` that follow those of the blocks.
    """
    layers = sources[0].config.layers
    progress.advance("check", 0, layers + more)
    hidden = [_embedded(source, text.windows, device) for source in sources]
    places = product(range(layers), range(len(sources)))
    with prefetch(lambda place: block_of(sources[place[1]], place[0], device), places, threads_help(device)) as blocks:
        for layer in range(layers):
            for index, states in enumerate(hidden):
                at = f"block {layer + 1} of {layers}, model {index + 1} of {len(sources)}"
                observe = peaks.observer(index, layer) if peaks else None
                _through(next(blocks), states, observe, partial(_at_window, progress, at, len(states)))
                return_freed(device)
            if not all(bool(torch.isfinite(x).all()) for x in hidden[0]):
                raise NumericalError(f"block {layer}: activations of the checkpoint are not finite")
            progress.advance("check", layer + 1, layers + more)
            progress.check_stop()
    return [_final(source, states, text.first) for source, states in zip(sources, hidden, strict=True)]


def _at_window(progress: Progress, at: str, windows: int, index: int) -> None:
    """Say that a window goes through a block: one of 32,768 tokens takes minutes on a CPU."""
    progress.at(f"{at}, window {index + 1} of {windows}")


def _embedded(source: WeightSource, windows: Tensor, device: torch.device) -> list[Tensor]:
    """The embeddings [length, hidden] of each window; the table is read once for all of them."""
    return list(embed(source, windows.flatten(), torch.float32).to(device).split(windows.shape[1]))


def _through(
    block: Block, states: list[Tensor], observe: Callable[[str, Tensor], None] | None, at: Callable[[int], None]
) -> None:
    """Take `states` through a block, in place; the block is gone before the next one is read."""
    for index, x in enumerate(states):
        at(index)
        states[index] = block.forward(x, observe)
        if observe:
            observe("", states[index])


def _final(source: WeightSource, states: list[Tensor], first: int) -> Tensor:
    scored = torch.stack([x[first:-1] for x in states])
    states.clear()
    return rms_norm(scored, source.tensor(source.family.final_norm).to(scored), source.config.epsilon)


def _tiles(windows: int, scored: int) -> list[slice]:
    """Positions that are computed together: as many whole windows as fit into `TILE`, or a part of one."""
    step = TILE // scored * scored
    if step:
        return [slice(start, min(start + step, windows * scored)) for start in range(0, windows * scored, step)]
    cuts = [*range(0, scored, TILE), scored]
    return [
        slice(window * scored + start, window * scored + stop)
        for window in range(windows)
        for start, stop in pairwise(cuts)
    ]


def _head_share(source: WeightSource, text: Scored) -> int:
    """What the head costs on a text, in forward passes of all windows through a block; at least 1."""
    block = (
        sum(rows * columns for rows, columns in source.family.matrices(source.config).values()) / source.config.layers
    )
    scored = (text.windows.shape[1] - text.first - 1) / text.windows.shape[1]
    return max(1, round(HEAD * scored * text.vocabulary * source.config.hidden / block))


def _heads(
    sources: Sequence[WeightSource],
    finals: list[Tensor],
    tokens: Tensor,
    vocabulary: int,
    tell: Callable[[int], None],
) -> list[_LogitSums]:
    tiles, targets = _tiles(*tokens.shape), tokens.flatten()
    positions, device = len(targets), targets.device
    sums = [_LogitSums.start(positions, device) for _ in sources]
    cross = [torch.zeros(positions, dtype=torch.float64, device=device) for _ in sources]
    for first in range(0, vocabulary, SLICE):
        heads = [
            source.rows(source.family.head, first, min(first + SLICE, vocabulary)).to(finals[0]) for source in sources
        ]
        for rows in tiles:
            base = finals[0][rows] @ heads[0].T
            before = sums[0].peak[rows].clone()
            sums[0].add(base, first, rows, targets[rows])
            weight = (base - sums[0].peak[rows, None].float()).exp()
            shrink = (before - sums[0].peak[rows]).exp()
            for index in range(1, len(sources)):
                logits = finals[index][rows] @ heads[index].T
                sums[index].add(logits, first, rows, targets[rows])
                cross[index][rows] = cross[index][rows] * shrink + (weight * (base - logits)).double().sum(1)
        tell(min(first + SLICE, vocabulary))
    for total, value in zip(sums, cross, strict=True):
        total.cross = value
    return sums


def _fidelity(base: _LogitSums, other: _LogitSums, targets: Tensor, shape: tuple[int, int]) -> Fidelity:
    kl = other.cross / base.total - base.log_z + other.log_z
    probability = (-other.nll).exp() - (-base.nll).exp()
    right = (other.best_id == targets, base.best_id == targets)
    columns = (other.nll, base.nll, kl.clamp(min=0), base.best_id == other.best_id, probability, *right)
    return Fidelity(*(column.cpu().view(shape) for column in columns))
