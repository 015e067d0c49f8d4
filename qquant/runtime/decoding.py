"""Answers token by token: a prompt in one pass, then one captured graph for every token, and another that chooses it.

Launching the 300 kernels of a token takes a host ten times as long as they run. So the pass of one token, for sequences that each
stand at a place of their own, is recorded once and replayed; what it reads and writes (tokens, places, logits) stays on the device.
The choice is a second graph, one for each way to choose. The host learns a token when the next one is already being computed
(`AHEAD`), so stopping costs at most one token that nobody asked for, and no token waits for the host.

The cache grows by half when it is full, up to what the answer may need: the new one takes over what is in the old one and the pass is
recorded again. With `keep`, a prompt that begins as the last sequence of its row did (a conversation) is read from where they part.
Where nothing can be recorded the same functions run one by one, and it is said once.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qquant.errors import NumericalError
from qquant.families import ModelConfig
from qquant.kernels.replay import Work, recorded
from qquant.runtime.sampling import Sampling, choose
from qquant.runtime.stepping import ModelWeights, Stepper

AHEAD = 1  # tokens that a GPU computes before the host has read the one before
BLOCK = 256  # places by which a cache is measured
FIRST = 768  # places for new tokens that a first cache has at most
PREFILL = 8192  # tokens of a prompt at a time
KEPT = 8  # ways to choose whose graphs are kept
ATTENTION = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # not cuDNN's: a plan a length


def one_by_one(work: Work) -> Work:
    """`work` itself: where nothing is launched there is nothing to record."""
    return work


@dataclass(frozen=True)
class AnswerLimits:
    """When an answer ends: after so many new tokens, or when every sequence has had a stop token."""

    tokens: int
    stops: frozenset[int] = frozenset()


class GraphDecoder:
    """The sequences of one loaded model; one answer at a time."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        device: torch.device,
        dtype: torch.dtype,
        record: Callable[[Work], Work] | None = None,
    ) -> None:
        self.config, self.weights, self.device, self.dtype = config, weights, device, dtype
        on_gpu = device.type == "cuda"
        self.ahead = AHEAD if on_gpu else 0
        self._record = record or (recorded if on_gpu else one_by_one)
        self.stepper: Stepper | None = None
        self._pass: Work | None = None  # None: not recorded since the cache is new
        self._choices: dict[Sampling, Work] = {}
        self._history: list[list[int]] = []  # by row, the tokens in the cache; it may lack the last one
        self._longest = 0  # places taken of the fullest row

    def answer(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: AnswerLimits, keep: bool = False
    ) -> Iterator[list[int]]:
        """The next token of every sequence, again and again; one that had a stop token goes on with any until all had.

        Raises:
            NumericalError: logits are not finite.
        """
        longest = max(map(len, prompts))
        self._begin(prompts, sampling, longest + min(limits.tokens, FIRST), keep)
        told, running, asked = _Told(self.told, self.ahead), set(range(len(prompts))), 1
        told.ask()
        for made in range(1, limits.tokens + 1):
            ahead = self.ahead if made > 1 else 0  # nothing comes before the first token
            while asked < min(made + ahead, limits.tokens):
                self._next(sampling, longest + limits.tokens)
                told.ask()
                asked += 1
            tokens = self._heard(told.answer())
            yield tokens
            running = {row for row in running if tokens[row] not in limits.stops}
            if not running:
                return

    # -- the prompt

    @torch.inference_mode()
    def _begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling, positions: int, keep: bool) -> None:
        """Read the prompts, and choose the first tokens."""
        self._prepare(len(prompts), positions)
        starts = [self._common(row, prompt) if keep else 0 for row, prompt in enumerate(prompts)]
        self._history = []
        with sdpa_kernel(ATTENTION):
            self._read(prompts, starts)
        self._history = [list(prompt) for prompt in prompts]
        self._longest = max(map(len, prompts))
        if sampling.repetition_penalty != 1:
            self.seen.zero_()
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.tensor(prompt, device=self.device)] = True
        self._choose(sampling)

    def _common(self, row: int, prompt: Sequence[int]) -> int:
        """Tokens at the head of `prompt` that the cache holds; its last one is always read."""
        if row >= len(self._history):
            return 0
        pairs = zip(prompt[:-1], self._history[row][:-1], strict=False)
        return next(
            (position for position, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(self._history[row])) - 1
        )

    def _read(self, prompts: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        stepper = _given(self.stepper)
        rests = [torch.tensor(prompt[start:]).to(self.device) for prompt, start in zip(prompts, starts, strict=True)]
        if sum(map(len, rests)) <= PREFILL:
            self.logits.copy_(stepper.extend(rests, starts))
            return
        for row, (rest, start) in enumerate(zip(rests, starts, strict=True)):
            for first in range(0, len(rest), PREFILL):
                logits = stepper.extend([rest[first : first + PREFILL]], [start + first], [row])
            self.logits[row].copy_(logits[0])

    # -- the cache

    def _prepare(self, batch: int, positions: int) -> None:
        """A cache for `batch` sequences with at least so many places; what it holds stays where it can."""
        if self.stepper is None or self.stepper.batch != batch:
            self.stepper, self._pass, self._choices, self._history = None, None, {}, []
            capacity = _blocks(positions)
            self.stepper = Stepper(self.config, self.weights, capacity, self.device, self.dtype, batch)
            self.logits = torch.empty((batch, self.config.vocab), dtype=torch.float32, device=self.device)
            self.seen = torch.zeros((batch, self.config.vocab), dtype=torch.bool, device=self.device)
            self.told = torch.zeros(batch + 1, dtype=torch.int64, device=self.device)
        self._grow(positions, positions)

    def _grow(self, positions: int, most: int) -> None:
        """Room for `positions`: by half of what there is, but not for more than `most`."""
        stepper = _given(self.stepper)
        if positions <= stepper.capacity:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the pass that is replayed reads the old cache
        self._pass = None
        self.stepper = stepper.grown(_blocks(max(positions, min(stepper.capacity * 3 // 2, most))))

    # -- a token

    @torch.inference_mode()
    def _next(self, sampling: Sampling, most: int) -> None:
        """One pass and one choice; the first of either runs by itself, later ones are replayed."""
        self._grow(self._longest + 1, most)
        if self._pass is None:
            self._advance()
            self._pass = self._recorded(self._advance)
        else:
            self._pass()
        self._longest += 1
        if sampling not in self._choices:
            if len(self._choices) >= KEPT:
                self._choices.pop(next(iter(self._choices)))
            self._choices[sampling] = self._recorded(partial(self._choose, sampling))
        self._choices[sampling]()

    def _advance(self) -> None:
        self.logits.copy_(_given(self.stepper).advance())

    def _choose(self, sampling: Sampling) -> None:
        """Tokens from the logits, to where the pass reads them and to where the host does, with a word about the logits."""
        tokens = choose(self.logits, self.seen, sampling)
        if sampling.repetition_penalty != 1:
            self.seen.scatter_(1, tokens[:, None], True)
        _given(self.stepper).token.copy_(tokens)
        self.told[:-1].copy_(tokens)
        self.told[-1:].copy_(self.logits.sum().isfinite())

    def _recorded(self, work: Work) -> Work:
        try:
            return self._record(work)
        except RuntimeError as error:
            self._record = one_by_one
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"answers come slower: no CUDA graph could be recorded ({reason})", RuntimeWarning, stacklevel=2
            )
            return work

    def _heard(self, told: list[int]) -> list[int]:
        *tokens, finite = told
        if not finite:
            raise NumericalError(
                f"logits after {len(self._history[0])} tokens are not finite: activations overflow in this dtype. "
                "Try bfloat16 (--dtype bfloat16)"
            )
        for row, token in zip(self._history, tokens, strict=True):
            row.append(token)
        return tokens


class _Told:
    """What the device told the host, in order, read later than it was asked for."""

    def __init__(self, source: Tensor, ahead: int) -> None:
        self.source = source
        self.waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.buffers = [torch.empty_like(source, device="cpu", pin_memory=source.is_cuda) for _ in range(ahead + 2)]

    def ask(self) -> None:
        """Have what stands there now copied."""
        buffer = self.buffers.pop()
        buffer.copy_(self.source, non_blocking=True)
        event = torch.cuda.Event() if self.source.is_cuda else None
        if event is not None:
            event.record()
        self.waiting.append((buffer, event))

    def answer(self) -> list[int]:
        """The oldest copy that was asked for, once it is there."""
        buffer, event = self.waiting.popleft()
        if event is not None:
            event.synchronize()
        self.buffers.append(buffer)
        return buffer.tolist()


def _blocks(positions: int) -> int:
    return -(-positions // BLOCK) * BLOCK


def _given(stepper: Stepper | None) -> Stepper:
    assert stepper is not None
    return stepper
