"""How the next token is chosen from logits, in operators that a captured graph can hold: nothing waits for the device.

    s       logits / penalty where positive, * penalty where negative, for tokens that occurred      (repetition_penalty)
    s       s / temperature
    keep    the top_k largest s; of these the fewest whose probabilities reach top_p
    token   argmax of p / e, p = softmax of what is kept, e exponential of rate 1: a draw from p (the exponential race)

The order and the rules are transformers', and on the CPU its `multinomial` draws by the same race, so that a seed gives the same
tokens. Without sampling, the token is the argmax of the first line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The choice of tokens; the defaults take the likeliest."""

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def choose(logits: Tensor, seen: Tensor | None, sampling: Sampling) -> Tensor:
    """Tokens int64 [B] from float32 logits [B, V]; seen: bool [B, V], the tokens that occurred, where there is a penalty."""
    scores, penalty = logits, sampling.repetition_penalty
    if seen is not None and penalty != 1:
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if not sampling.sample:
        return scores.argmax(-1)
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        scores = scores.masked_fill(scores < _least(scores, sampling), -torch.inf)
    chances = scores.softmax(-1)
    return chances.div_(torch.empty_like(chances).exponential_(1)).argmax(-1)


def _least(scores: Tensor, sampling: Sampling) -> Tensor:
    """The smallest score [B, 1] that is kept."""
    count = min(sampling.top_k, scores.shape[-1])
    ranked = scores.topk(count, -1).values if count else scores.sort(-1, descending=True).values
    if sampling.top_p >= 1:
        return ranked[:, -1:]
    chances = ranked.softmax(-1)
    above = chances.cumsum(-1) - chances  # what more likely tokens have together
    kept = (above < sampling.top_p).sum(-1, keepdim=True).clamp_(min=1)
    return ranked.gather(-1, kept - 1)
