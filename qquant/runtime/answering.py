"""Answers of an artifact: its own tokenizer, chat template, sampling settings and stop tokens, text as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qquant.artifact.opening import open_weights
from qquant.calibration import Tokenizer
from qquant.errors import InputError, UsageError
from qquant.formats.gguf.source import GgufSource
from qquant.formats.gguf.tokenizer import gguf_tokenizer
from qquant.runtime import loading
from qquant.runtime.generating import require_finite
from qquant.source.hub import resolve


@dataclass(frozen=True)
class AnswerSettings:
    """How to choose tokens; None: as the artifact's generation config says."""

    max_new_tokens: int = 512
    greedy: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """A text that the model generated, and how long it took."""

    text: str
    tokens: int  # with the one it stopped on, and those that are no text
    stopped: bool  # by a stop token; else the budget ran out
    to_first: float  # seconds to the first token, visible or not
    seconds: float  # to the last one

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first one; None if it is the only one."""
        after = self.seconds - self.to_first
        return (self.tokens - 1) / after if self.tokens > 1 and after > 0 else None


class Answerer:
    """A loaded artifact and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Tokenizer, name: str, load_seconds: float = 0.0) -> None:
        self.model, self.tokenizer, self.name, self.load_seconds = model, tokenizer, name, load_seconds
        self.model.keeps_history = True
        self.runs_on = ""  # why answers in a chat may go on after their end
        self.stops = self._stops()

    @classmethod
    def open(
        cls,
        artifact: str | Path,
        device: str | torch.device = "auto",
        dtype: str | None = None,
        revision: str | None = None,
    ) -> Answerer:
        """Load the artifact, that of a hub id at `revision`; see `loading.load` for what it raises."""
        path = Path(artifact)
        if not path.exists():
            path, _ = resolve(str(artifact), revision)
        began = time.perf_counter()
        model = loading.load(path, device, dtype)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return cls(model, _tokenizer(path), str(artifact), time.perf_counter() - began)

    def _stops(self) -> list[int]:
        settings = self.model.generation_config.eos_token_id
        stops = list(settings) if isinstance(settings, list | tuple) else [settings]
        stops += self.tokenizer.eos
        if self.tokenizer.template is not None:
            try:
                stops.append(self.tokenizer.end_of_turn)
            except InputError as error:  # a base model's template ends turns with a token that the model never learned
                self.runs_on = str(error)
        return sorted({stop for stop in stops if stop is not None})

    def paths(self) -> dict[str, str]:
        """What runs for every linear."""
        return loading.paths(self.model)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens by name are themselves.

        Raises:
            UsageError: there is no text.
        """
        ids = self.tokenizer.encode(text)
        if not ids:
            raise UsageError("the prompt is empty")
        return ids

    def encode_chat(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation up to where the answer begins.

        Raises:
            UsageError: the artifact has no chat template.
            InputError: its template refuses the conversation, or writes nothing.
        """
        if self.tokenizer.template is None:
            raise UsageError(f"{self.name}: has no chat template (a base model?); use --raw to continue plain text")
        ids = self.tokenizer.encode(self.tokenizer.render(turns, add_generation_prompt=True))
        if not ids:
            raise InputError(f"{self.name}: its chat template writes nothing. Use --raw, or repair the template")
        return ids

    def answer(self, ids: Sequence[int], settings: AnswerSettings, write: Callable[[str], None]) -> Answer:
        """Generate after `ids`; `write` gets the text in whole characters as soon as they are there.

        Raises:
            UsageError: the prompt fills the context.
            NumericalError: logits are not finite.
        """
        positions = self.model.config.max_position_embeddings
        if len(ids) >= positions:
            raise UsageError(
                f"{self.name}: the prompt has {len(ids)} tokens, the model reads {positions}. Shorten the prompt"
            )
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        streamer = Text(self.tokenizer, self.stops, len(ids), write)
        prompt = torch.tensor([list(ids)], device=self.model.device)
        began = time.perf_counter()
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=streamer,
            logits_processor=[require_finite],
            max_new_tokens=min(settings.max_new_tokens, positions - len(ids)),
            **self._sampling(settings),
        )
        made = out[0, len(ids) :].tolist()
        stopped = bool(made) and made[-1] in self.stops
        return Answer(streamer.text, len(made), stopped, streamer.first - began, streamer.last - began)

    def _sampling(self, settings: AnswerSettings) -> dict[str, Any]:
        stated = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
        given = {name: value for name, value in stated.items() if value is not None}
        asked = any(name != "repetition_penalty" for name in given)
        sample = not settings.greedy and (asked or bool(self.model.generation_config.do_sample))
        if not sample:
            given |= {"temperature": None, "top_p": None, "top_k": None}
        pad = self.model.generation_config.pad_token_id
        stops: dict[str, Any] = {"eos_token_id": self.stops} if self.stops else {}
        return given | stops | {"do_sample": sample, "pad_token_id": pad if pad is not None else (self.stops or [0])[0]}


class Text:
    """What `generate` tells token by token, as text: a character that is not whole yet waits for its next byte."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[int], prompt: int, write: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.write = tokenizer, set(stops), write
        self.prompt = prompt  # tokens that come first and are not the answer's
        self.waiting: list[int] = []
        self.text = ""
        self.first = self.last = 0.0  # when the first and the last token came

    def put(self, value: Tensor) -> None:
        """Take in the prompt, later one token at a time."""
        ids = value.reshape(-1).tolist()
        if self.prompt:
            self.prompt -= len(ids)
            return
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.waiting += [token for token in ids if token not in self.stops]
        self._tell(more=True)

    def end(self) -> None:
        """Tell what still waits."""
        self._tell(more=False)

    def _tell(self, more: bool) -> None:
        text = self.tokenizer.decode(self.waiting)
        if not text or (more and text.endswith("\ufffd")):
            return
        self.waiting = []
        self.text += text
        self.write(text)


def _tokenizer(path: Path) -> Tokenizer:
    if path.is_dir():
        return Tokenizer.open(path)
    source = open_weights(path)
    assert isinstance(source, GgufSource)
    return gguf_tokenizer(path, source.header)
