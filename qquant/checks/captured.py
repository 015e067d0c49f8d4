"""Greedy answers of many prompts at once on a GPU: the recorded passes of `qquant.runtime.decoding` over dequantized weights.

A `PromptDecoder` launches every kernel of a token from Python, which takes a GPU longer than the kernels do. Here its weights, the same
tensors, answer by one recorded graph a token. Rows of the head beyond the tokenizer's are cut off, so nothing there is ever chosen.
Where logits are not finite the `PromptDecoder` answers, which says so of each answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from qquant.checks.decoding import Answered, Chooser, PromptDecoder
from qquant.devices import policy
from qquant.errors import NumericalError
from qquant.families.decoder import Block
from qquant.families.weights import WeightSource
from qquant.runtime.decoding import AnswerLimits, GraphDecoder
from qquant.runtime.fused import Layer
from qquant.runtime.linears import DenseLinear
from qquant.runtime.sampling import Sampling
from qquant.runtime.stepping import ModelWeights


def decoder(source: WeightSource, dtype: torch.dtype, device: torch.device) -> PromptDecoder | CapturedDecoder:
    """What answers quickest on a device."""
    model = PromptDecoder(source, dtype, device)
    return CapturedDecoder(model) if policy(device).waits else model


class CapturedDecoder:
    """The weights of a `PromptDecoder`, with its answers to greedy choosers."""

    def __init__(self, model: PromptDecoder) -> None:
        self.model = model
        self._made: tuple[int, GraphDecoder] | None = None

    def answer(self, prompts: Sequence[Sequence[int]], length: int, chooser: Chooser) -> list[Answered]:
        """Up to `length` new tokens after each prompt; the chooser draws nothing."""
        ids: list[list[int]] = [[] for _ in prompts]
        limits, stops = AnswerLimits(length, frozenset(chooser.stops)), set(chooser.stops)
        try:
            for tokens in self._decoder(chooser.vocabulary).answer(prompts, Sampling(), limits):
                for mine, token in zip(ids, tokens, strict=True):
                    if not mine or mine[-1] not in stops:
                        mine.append(token)
        except NumericalError:
            return self.model.answer(prompts, length, chooser)
        return [Answered(mine, True) for mine in ids]

    def _decoder(self, vocabulary: int) -> GraphDecoder:
        if self._made is None or self._made[0] != vocabulary:
            model = self.model
            config = replace(model.config, vocab=min(vocabulary, model.config.vocab))
            self._made = vocabulary, GraphDecoder(config, _weights(model, config.vocab), model.device, model.dtype)
        return self._made[1]


def _weights(model: PromptDecoder, vocabulary: int) -> ModelWeights:
    family, config = model.family, model.config
    layers = []
    for index, block in enumerate(model.blocks):
        linears = {stage.name: [_linear(block.weights, name) for name in stage.linears] for stage in family.stages}
        modules = {name: held[0] if len(held) == 1 else held for name, held in linears.items()}
        layers.append(Layer.of(family, config, index, modules, partial(_vector, block, family.block.format(index))))
    table = model.weights[family.embedding]
    embedding = nn.Embedding.from_pretrained(table)
    head = DenseLinear(model.weights[model.head][:vocabulary], None, "")
    return ModelWeights(family, tuple(layers), embedding, model.weights[family.final_norm], head)


def _vector(block: Block, prefix: str, name: str) -> Tensor:
    return block.weights[name.removeprefix(prefix)]


def _linear(weights: Mapping[str, Tensor], name: str) -> DenseLinear:
    return DenseLinear(weights[f"{name}.weight"], weights.get(f"{name}.bias"), "")
