"""How an artifact says that its answers are drawn, and where they end: read from its files, which are strangers', before transformers sees it.

    folders   generation_config.json, else the token ids in config.json
    GGUF      tokenizer.ggml.*_token_id, general.sampling.*

`Settings` are the keys by which transformers' `generate` draws something else, in the types and ranges for which it does not fail. Left out:
keys of speed and of training, and those that only describe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from qquant.disk.records import typed
from qquant.disk.writes import finite
from qquant.errors import InputError
from qquant.formats.gguf.source import GgufSource
from qquant.source.untrusted import read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig

Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Length = Annotated[int, Field(ge=0, lt=1 << 31)]
Number = Annotated[int, Field(ge=1, lt=1 << 16)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, lt=1e6)]
FILE = "generation_config.json"
SAMPLING = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "penalty_repeat"}
IDS = {"eos_token_id": "eos", "bos_token_id": "bos", "pad_token_id": "padding"}
ENDS = ("<|im_end|>", "<|endoftext|>")  # of Qwen's tokens, those that llama.cpp takes for ends of generation


@dataclass(frozen=True)
class TokenIds:
    """Tokens by which texts begin, end and are filled up."""

    bos_token_id: Id | None = None
    eos_token_id: Id | tuple[Id, ...] | None = None
    pad_token_id: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None  # -1: there is none


@dataclass(frozen=True)
class Settings(TokenIds):
    """Everything of a generation_config.json that changes answers."""

    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, lt=1e6)] | None = None
    top_k: Length | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Share | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    epsilon_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    eta_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Positive | None = None
    encoder_repetition_penalty: Positive | None = None
    no_repeat_ngram_size: Length | None = None
    length_penalty: Annotated[float, Field(gt=-1e6, lt=1e6)] | None = None
    num_beams: Number | None = None
    num_return_sequences: Number | None = None
    early_stopping: bool | Literal["never"] | None = None
    bad_words_ids: tuple[tuple[Id, ...], ...] | None = None
    suppress_tokens: tuple[Id, ...] | None = None
    begin_suppress_tokens: tuple[Id, ...] | None = None
    forced_bos_token_id: Id | None = None
    forced_eos_token_id: Id | tuple[Id, ...] | None = None
    max_length: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    min_length: Length | None = None
    min_new_tokens: Length | None = None
    renormalize_logits: bool | None = None
    remove_invalid_values: bool | None = None


@dataclass(frozen=True)
class Drawn:
    """Settings that were read and fit; `where` says from what."""

    stated: Mapping[str, Any]
    where: str

    def made(self) -> GenerationConfig:
        """A GenerationConfig of them. Raises InputError if some do not go together."""
        from transformers import GenerationConfig  # costs seconds

        try:
            return GenerationConfig(**self.stated)
        except ValueError as error:
            raise InputError(f"{self.where}: {str(error).splitlines()[0][:300]}. Repair it") from None


def of_folder(folder: Path, raw: Mapping[str, Any], vocabulary: int) -> Drawn:
    """The settings of a folder whose config.json is `raw`, for a model with so many rows in its embedding.

    Raises:
        InputError: one is of another type, or of a value with which nothing can be drawn.
    """
    path = folder / FILE
    if path.is_file():
        return _drawn(read_json(path), str(path), vocabulary)
    return _drawn(ids_of(raw, folder, vocabulary), str(folder / "config.json"), vocabulary)


def ids_of(raw: Mapping[str, Any], folder: Path, vocabulary: int) -> dict[str, Any]:
    """The token ids of a config.json. Raises InputError if one is no id of the model."""
    where = str(folder / "config.json")
    return _plain(typed(TokenIds, {key: raw[key] for key in IDS if key in raw}, where), where, vocabulary)


def of_gguf(source: GgufSource) -> Drawn:
    """The settings in the metadata of a GGUF file. Raises InputError as `of_folder`."""
    value = source.header.value
    content = {key: value(f"general.sampling.{name}") for key, name in SAMPLING.items()}
    content |= {key: value(f"tokenizer.ggml.{name}_token_id") for key, name in IDS.items()}
    heat = content["temperature"]  # 0: the likeliest token, always
    content["do_sample"] = heat != 0 and any(content[name] is not None for name in ("temperature", "top_p", "top_k"))
    drawn = _drawn(
        {key: number for key, number in finite(content).items() if number is not None},
        str(source.path),
        source.config.vocab,
    )
    if "eos_token_id" not in drawn.stated:
        return drawn
    return Drawn({**drawn.stated, "eos_token_id": _stops(source, drawn.stated["eos_token_id"])}, drawn.where)


def _stops(source: GgufSource, eos: int) -> int | list[int]:
    """The token that the file names, and those on which llama.cpp ends an answer whatever the file names, if it has them."""
    tokens = source.header.fields.get("tokenizer.ggml.tokens")
    if tokens is not None and tokens.kind != "[str]":
        raise InputError(f"{source.path}: tokenizer.ggml.tokens is of kind {tokens.kind}; expected [str]")
    texts = tokens.value if tokens else []
    ends = list(dict.fromkeys([eos, *(texts.index(name) for name in ENDS if name in texts)]))
    return ends if len(ends) > 1 else eos


def _drawn(content: Mapping[str, Any], where: str, vocabulary: int) -> Drawn:
    settings = typed(Settings, dict(content), where)
    if settings.do_sample and settings.temperature == 0:
        raise InputError(
            f"{where}: temperature: is 0 and do_sample is true, which draws nothing. Set do_sample to false"
        )
    return Drawn(_plain(settings, where, vocabulary), where)


def _plain(settings: TokenIds, where: str, vocabulary: int) -> dict[str, Any]:
    """What is stated, in lists. Raises InputError if a token is none of the model's."""
    stated = {key: value for key, value in vars(settings).items() if value is not None}
    for key in IDS.keys() & stated.keys():
        for number in stated[key] if isinstance(stated[key], tuple) else (stated[key],):
            if number >= vocabulary:
                raise InputError(f"{where}: {key}: {number} is no token of a model with {vocabulary:,}")
    return {key: _lists(value) for key, value in stated.items()}


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
