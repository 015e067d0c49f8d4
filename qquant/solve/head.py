"""The output head in the backward pass: draws from the model's own prediction, the gradients that they give, and what the head itself sees.

    g_t = d(log p_t(w) - log p_t(v)) / d h_t / sqrt 2 = (head_w - head_v) / sqrt 2,     v, w ~ p_t = softmax(head h_t)

has the Fisher information at the head's input as its second moment. At the head's output, the logits, that information is
diag(p_t) - p_t p_t'; its trace 1 - sum_v p_tv^2 is what an error of all rows together costs at token t, and weighs the token in

    H = sum_t (1 - sum_v p_tv^2) h_t h_t'        how often v was drawn beside another word estimates sum_t p_tv (1 - p_tv), its row's share
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qquant import devices
from qquant.exchange import ALONE, Exchange, Parcels
from qquant.families.decoder import read_slices, rms_norm, slices
from qquant.kernels.gram import gram
from qquant.source.checkpoint import Checkpoint

STRIP = 64  # columns of a slice whose mass is summed first
SEED = 0


@dataclass
class HeadInput:
    """What the head saw: sums over the tokens so far."""

    matrix: Tensor  # H, float32 [hidden, hidden]
    predicted: Tensor  # float32 [vocab]: half the draws of each word whose pair is of two words
    spread: float = 0.0  # sum of the weights of the tokens
    largest: float = 0.0  # largest |h|

    @classmethod
    def zeros(cls, source: Checkpoint, device: torch.device) -> HeadInput:
        """Sums over no tokens yet."""
        config = source.config
        return cls(torch.zeros(config.hidden, config.hidden, device=device), torch.zeros(config.vocab))

    def add(self, normed: Tensor, words: Tensor, spread: Tensor) -> None:
        """Add normed states [T, hidden], and the words and the spread that were `Drawn` for them."""
        gram(self.matrix, (normed * spread.sqrt().to(normed.dtype).unsqueeze(1)).contiguous())
        pairs = words[words[:, 0] != words[:, 1]]
        self.predicted += torch.bincount(pairs.flatten().cpu(), minlength=len(self.predicted)) / 2
        self.spread += float(spread.double().sum())
        self.largest = max(self.largest, float(normed.abs().max()))


@dataclass(frozen=True)
class Drawn:
    """What a draw gives for T tokens: the gradient at the head's input, and the words that were drawn."""

    gradient: Tensor  # [T, hidden]
    words: Tensor  # int64 [T, 2]
    spread: Tensor  # float32 [T]: 1 - sum of p^2


def head_gradients(
    source: Checkpoint,
    hidden: Sequence[Tensor],
    seen: HeadInput,
    tell: Callable[[int, int], None],
    exchange: Exchange = ALONE,
    kept: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Gradients of log p(v) - log p(w), over sqrt 2, for drawn v and w by the output of the last block, in the shapes of `hidden` [..., hidden].

    `hidden`: of all samples; slices of their tokens are shared out among ranks, of which the first fills `seen` with what the head sees.
    `tell`: (tokens done, of all), after every slice of the tokens. `kept`: slices of the head that are on the device already.
    """
    generator = torch.Generator().manual_seed(SEED)
    head = Head(source, hidden[0].device, kept)
    norm = source.tensor(source.family.final_norm).to(hidden[0])
    pieces: list[Tensor] = []
    rows = [x.flatten(0, -2) for x in hidden]
    tokens = torch.cat(rows)
    parts = tokens.split(devices.policy(tokens.device).head_tokens)
    every = [head.chances(len(part), generator) for part in parts]

    def give(number: int) -> Parcels:
        leaf = parts[number].clone().requires_grad_()
        normed = rms_norm(leaf, norm, source.config.epsilon)
        drawn = head.draw(normed.detach(), every[number])
        normed.backward(drawn.gradient)
        assert leaf.grad is not None
        return [[leaf.grad, normed.detach(), drawn.words, drawn.spread]] + [[leaf.grad]] * (exchange.world - 1)

    for _, (gradient, *known) in exchange.in_turn(len(parts), give):
        if exchange.first:
            seen.add(*known)
        pieces.append(gradient)
        tell(sum(map(len, pieces)), len(tokens))
    split = torch.cat(pieces).split([len(x) for x in rows])
    return [gradient.view(x.shape) for gradient, x in zip(split, hidden, strict=True)]


class Head:
    """The output head, in slices of rows; they stay on a GPU, and are read again for every call elsewhere."""

    def __init__(self, source: Checkpoint, device: torch.device, kept: Sequence[Tensor] = ()) -> None:
        self.source = source
        self.slices = slices(source.config.vocab)
        self.kept = kept or (self._to(device) if device.type == "cuda" else [])

    def _to(self, device: torch.device) -> list[Tensor]:
        with read_slices(self.source, self.source.family.head, self.slices, device) as read:
            return [rows.to(device) for rows in read]

    def _rows(self, number: int) -> Tensor:
        if self.kept:
            return self.kept[number]
        span = self.slices[number]
        return self.source.rows(self.source.family.head, span.start, span.stop)

    def chances(self, count: int, generator: torch.Generator) -> Tensor:
        """The numbers by which `count` tokens draw, float64 [count, slices, 2], on the CPU."""
        return torch.rand(count, len(self.slices), 2, dtype=torch.float64, generator=generator)

    def draw(self, normed: Tensor, chances: Tensor) -> Drawn:
        """Independent v, w ~ softmax(normed @ head') for every row of `normed` [T, hidden].

        Slices are seen once: what was drawn so far gives way to a draw from the next slice with that one's share of the mass so far.
        Every token has its own `chances`, so that calls with fewer tokens draw the same.
        """
        chances = chances.to(normed.device)
        top = torch.full((len(normed), 1), -torch.inf, device=normed.device)
        total = torch.zeros(len(normed), 1, dtype=torch.float64, device=normed.device)
        squares = torch.zeros_like(total)
        drawn = [torch.zeros_like(normed), torch.zeros_like(normed)]
        words = torch.zeros(len(normed), 2, dtype=torch.int64, device=normed.device)
        for index, span in enumerate(self.slices):
            rows = self._rows(index).to(normed)
            scores = normed @ rows.T
            before, top = top, torch.maximum(top, scores.amax(1, keepdim=True).float())
            strips, sums = _mass(scores, top)
            fade = (before - top).exp()
            total = total * fade + sums[:, -1:]
            squares = squares * fade.double().square() + strips.square().sum((1, 2)).double().unsqueeze(1)
            for number, chance in enumerate(chances[:, index].split(1, dim=1)):
                drawn_rows = _drawn(strips, sums, chance * total).clamp(max=len(rows) - 1)
                here = chance * total < sums[:, -1:]
                drawn[number] = torch.where(here, rows[drawn_rows], drawn[number])
                words[:, number] = torch.where(here[:, 0], span.start + drawn_rows, words[:, number])
        spread = (1 - squares / total.square()).clamp_(min=0).float()[:, 0]
        return Drawn((drawn[0] - drawn[1]) * 0.5**0.5, words, spread)


def _mass(scores: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """exp(scores - top) of scores [T, R] in strips, float32 [T, R / STRIP, STRIP], and their sums from the left, float64."""
    mass = scores.float().sub_(top).exp_()
    if mass.shape[1] % STRIP:
        mass = pad(mass, (0, -mass.shape[1] % STRIP))
    strips = mass.view(len(mass), -1, STRIP)
    return strips, strips.sum(2).double().cumsum(1)


def _drawn(strips: Tensor, sums: Tensor, level: Tensor) -> Tensor:
    """The word at which the running sum of `_mass` exceeds level [T, 1], int64 [T]."""
    strip = torch.searchsorted(sums, level, right=True).clamp_(max=sums.shape[1] - 1)
    inside = strips.gather(1, strip.unsqueeze(2).expand(-1, -1, STRIP))[:, 0].double().cumsum(1)
    behind = level - sums.gather(1, strip) + inside[:, -1:]
    return (strip * STRIP + torch.searchsorted(inside, behind, right=True).clamp_(max=STRIP - 1))[:, 0]
