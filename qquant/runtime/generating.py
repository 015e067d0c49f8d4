"""`generate` of a loaded model: transformers' method, by `decoding` where it knows how, by transformers' own loop where not.

Known are prompts of up to 16 sequences (padded on the left, by their attention mask), greedy and sampled choice with temperature,
top_k, top_p and repetition_penalty, max_new_tokens or max_length, stop tokens, and streamers; the result is transformers' too: prompt
and tokens int64 [B, T], ended rows filled with the pad token. Anything else that is asked for (beams, processors, scores, caches of the
caller, an assistant) goes to transformers untouched, as does a model whose modules were replaced or hooked since it was loaded.

A request is read as transformers reads it: what is given to the call, then the given config, the model's, its own defaults.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from qquant.errors import NumericalError
from qquant.families import Family, ModelConfig
from qquant.runtime.decoding import ATTENTION, AnswerLimits, GraphDecoder
from qquant.runtime.fused import Layer
from qquant.runtime.linears import FusedSlice, QuantEmbedding, RuntimeLinear
from qquant.runtime.sampling import Sampling
from qquant.runtime.snapshot import Snapshot
from qquant.runtime.stepping import ModelWeights

MOST_ROWS = 16  # sequences of an answer
READ = {
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "max_length", "eos_token_id", "pad_token_id",
}  # fmt: skip
WITHOUT_EFFECT = {  # on one answer a prompt without beams, or on the loop here
    "bos_token_id", "transformers_version", "early_stopping", "length_penalty", "typical_p", "use_cache", "_from_model_config",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "disable_compile", "num_beam_groups", "diversity_penalty", "decoder_start_token_id",
}  # fmt: skip


@dataclass(frozen=True)
class GenerateCall:
    """A call of `generate` that `decoding` can answer."""

    ids: Tensor  # int64 [B, T], as given
    prompts: tuple[tuple[int, ...], ...]  # without padding
    sampling: Sampling
    limits: AnswerLimits
    pad: int
    streamer: Any


class Answering:
    """What turns a transformers class into one whose `generate` takes the quick way, once `_quick` knows the weights."""

    keeps_history = False  # go on from keys and values of the last call where a prompt begins as it did
    _quick: Quick | None = None

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *others: Any, **options: Any
    ) -> Any:
        """What transformers' `generate` returns; see the head of `qquant.runtime.generating` for what it answers by itself."""
        quick = self._quick
        if quick is not None and not others and quick.lock.acquire(blocking=False):
            try:
                decoder = quick.decoder(cast(nn.Module, self))
                request = decoder and understood(self, inputs, generation_config, options)
                if decoder and request:
                    return _answer(decoder, request, self.keeps_history)
            finally:
                quick.lock.release()
        with _quick_attention(self):
            return super().generate(inputs, generation_config, *others, **options)  # type: ignore[misc] # of the class beside


class Quick:
    """The decoder of a model as long as its modules are the loaded ones."""

    def __init__(self, family: Family, config: ModelConfig, dtype: torch.dtype, devices: Sequence[str]) -> None:
        self.family, self.config, self.dtype, self.devices = family, config, dtype, devices
        self.lock = threading.Lock()
        self._made: tuple[Snapshot, GraphDecoder] | None = None

    def __deepcopy__(self, _: dict[int, Any]) -> Quick:
        return Quick(self.family, self.config, self.dtype, self.devices)

    def __reduce__(self) -> tuple[Any, ...]:
        return Quick, (self.family, self.config, self.dtype, self.devices)

    def decoder(self, model: nn.Module) -> GraphDecoder | None:
        """The decoder of these modules, None if they are not what was loaded, or elsewhere."""
        if model.training:
            return None
        if self._made is not None and self._made[0].holds(model):
            return self._made[1]
        weights = weights_of(model, self.family, self.config)
        if weights is None or weights.final_norm.device.type not in self.devices:
            return None
        snapshot = Snapshot(model)
        if self._made is None or self._made[0].pointers != snapshot.pointers:
            decoder = GraphDecoder(self.config, weights, weights.final_norm.device, self.dtype)
        else:
            decoder = self._made[1]
        self._made = snapshot, decoder
        return decoder


def weights_of(model: nn.Module, family: Family, config: ModelConfig) -> ModelWeights | None:
    """The modules of a loaded model as a pass reads them; None if one of them is not of `linears`, or has hooks."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None

    def module(name: str) -> nn.Module:
        return model.get_submodule(name.removesuffix(".weight"))

    def weight(name: str) -> Tensor:
        return cast(Tensor, module(name).weight)

    layers = []
    for index in range(config.layers):
        prefix = family.block.format(index)
        held = {stage.name: _held([module(prefix + name) for name in stage.linears]) for stage in family.stages}
        linears = {name: stage for name, stage in held.items() if stage is not None}
        if len(linears) < len(held):
            return None
        layers.append(Layer.of(family, config, index, linears, weight))
    embedding, head = module(family.embedding), module(family.head)
    if not isinstance(embedding, nn.Embedding | QuantEmbedding) or not isinstance(head, RuntimeLinear):
        return None
    return ModelWeights(family, tuple(layers), embedding, weight(family.final_norm), head)


def _held(modules: Sequence[nn.Module]) -> RuntimeLinear | list[RuntimeLinear] | None:
    first = modules[0]
    if isinstance(first, FusedSlice) and all(isinstance(module, FusedSlice) for module in modules):
        return first.fused
    if not all(isinstance(module, RuntimeLinear) for module in modules):
        return None
    linears = [cast(RuntimeLinear, module) for module in modules]
    return linears[0] if len(linears) == 1 else linears


@contextmanager
def _quick_attention(model: Any) -> Iterator[None]:
    """A context without cuDNN's attention, which builds a plan for every new length, 50 to 90 ms each."""
    if model.device.type != "cuda":
        yield
        return
    with sdpa_kernel(ATTENTION):
        yield


def answering_class(base: type[Any]) -> type[Any]:
    """`base`, a class of transformers, with the `generate` of this file; it keeps its name."""
    return type(base.__name__, (Answering, base), {"__doc__": base.__doc__, "__module__": base.__module__})


def require_finite(ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor for transformers' own loop; the one here looks by itself.

    Raises:
        NumericalError: scores are not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise NumericalError(
            f"logits after {ids.shape[1]} tokens are not finite: activations overflow in this dtype. Try --dtype bfloat16"
        )
    return scores


# -- what is asked for


def understood(model: Any, inputs: Tensor | None, config: Any, options: Mapping[str, Any]) -> GenerateCall | None:
    """The request, or None if it has anything that only transformers knows."""
    left = dict(options)
    ids = inputs if inputs is not None else left.pop("input_ids", None)
    mask, streamer = left.pop("attention_mask", None), left.pop("streamer", None)
    processors = left.pop("logits_processor", None) or ()
    if not _is_batch(ids) or any(processor is not require_finite for processor in processors):
        return None
    settings = _settings(model.generation_config, config, left)
    if settings is None:
        return None
    stops, pad = _stops(settings)
    prompts = _prompts(ids, mask, pad if settings["pad_token_id"] is not None else None, stops)
    room = _room(settings, ids.shape[1], left)
    sampling = _sampling(settings)
    if prompts is None or room is None or sampling is None:
        return None
    return GenerateCall(ids, prompts, sampling, AnswerLimits(room, frozenset(stops)), pad, streamer)


def _is_batch(ids: Any) -> bool:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        return False
    return 0 < len(ids) <= MOST_ROWS and ids.shape[1] > 0


def _settings(models: Any, config: Any, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Every setting of the generation, None if one is not known here."""
    usual: dict[str, Any] = getattr(models, "_get_default_generation_params", dict)()
    settings: dict[str, Any] = dict.fromkeys(READ) | usual
    for source in (models, config):
        values = source.to_dict() if source is not None else {}
        settings |= {key: value for key, value in values.items() if value is not None}
    settings |= options
    for key, value in settings.items():
        if key not in READ | WITHOUT_EFFECT and value is not None and value != usual.get(key):
            return None
    return settings if settings.get("use_cache", True) else None


def _room(settings: Mapping[str, Any], length: int, options: Mapping[str, Any]) -> int | None:
    """New tokens at most, None if nobody said."""
    if settings["max_new_tokens"] is not None:
        room = settings["max_new_tokens"]
    elif options.get("max_length") is not None:
        room = options["max_length"] - length
    else:
        return None
    return room if isinstance(room, int) and room > 0 else None


def _stops(settings: Mapping[str, Any]) -> tuple[list[int], int]:
    """Stop tokens, and what fills a row that has ended."""
    eos, pad = settings["eos_token_id"], settings["pad_token_id"]
    stops = [] if eos is None else [int(token) for token in (eos if isinstance(eos, list | tuple) else [eos])]
    return stops, int(pad) if pad is not None else (stops or [0])[0]


def _sampling(settings: Mapping[str, Any]) -> Sampling | None:
    penalty = settings["repetition_penalty"]
    penalty = 1.0 if penalty is None else float(penalty)
    if penalty <= 0:
        return None  # transformers says what is wrong
    if not settings["do_sample"]:
        return Sampling(repetition_penalty=penalty)
    heat, top_k, top_p = (settings[name] for name in ("temperature", "top_k", "top_p"))
    heat, top_k, top_p = 1.0 if heat is None else heat, 0 if top_k is None else top_k, 1.0 if top_p is None else top_p
    if not heat > 0 or not isinstance(top_k, int) or top_k < 0 or not 0 < top_p <= 1:
        return None
    return Sampling(True, float(heat), top_k, float(top_p), penalty)


def _prompts(ids: Tensor, mask: Any, pad: int | None, stops: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
    """The sequences without their padding, None where it does not stand on the left."""
    rows = ids.tolist()
    if mask is None:
        if pad is not None and pad not in stops and any(pad in row for row in rows):
            return None  # transformers guesses which of them is padding
        return tuple(map(tuple, rows))
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return None
    prompts = []
    for row, there in zip(rows, mask.tolist(), strict=True):
        count = sum(map(bool, there))
        if not count or not all(there[len(row) - count :]):
            return None
        prompts.append(tuple(row[len(row) - count :]))
    return tuple(prompts)


# -- the answer


def _answer(decoder: GraphDecoder, request: GenerateCall, keep: bool) -> Tensor:
    """Ids int64 [B, T + new], on the device of the prompt."""
    if request.streamer is not None:
        request.streamer.put(request.ids.cpu())
    made: list[list[int]] = []
    ended = [False] * len(request.prompts)
    for tokens in decoder.answer(request.prompts, request.sampling, request.limits, keep):
        shown = [request.pad if over else token for over, token in zip(ended, tokens, strict=True)]
        ended = [over or token in request.limits.stops for over, token in zip(ended, tokens, strict=True)]
        made.append(shown)
        if request.streamer is not None:
            request.streamer.put(torch.tensor(shown))
    if request.streamer is not None:
        request.streamer.end()
    new = torch.tensor(made, dtype=request.ids.dtype).T
    return torch.cat([request.ids, new.to(request.ids.device)], dim=1)
