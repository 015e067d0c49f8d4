"""What the numbers of a report depend on: the text that judged, hashes and versions of what was built, the calibration set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic takes that of `typing` from Python 3.12 on

from qquant.disk.records import Count, Number


@dataclass(frozen=True)
class TextFacts:
    """The held-out text that judged, and how much of it was read at first."""

    name: str
    windows: Count
    length: Count
    protocol: str = ""
    sha256: str = ""  # of the text
    tokens_sha256: str = ""  # of the first window
    further: Mapping[str, Count] = field(default_factory=dict)  # windows of texts that are measured, and judge nothing

    @property
    def every_token(self) -> bool:
        """Whether every token of a window is scored; else its second half, as llama-perplexity does."""
        return self.protocol == "sliding"


@dataclass(frozen=True)
class TokensRead:
    """What transformers' AutoTokenizer made of a stretch of every text, beside tokenizer.json read literally."""

    tokens: Count  # that were compared
    differing: Mapping[str, Count] = field(
        default_factory=dict
    )  # at least so many tokens, by text; none: all are the same
    example: str = ""  # the first

    def __str__(self) -> str:
        """What a reader should know; empty where both read the same."""
        if not self.differing:
            return ""
        return (
            f"transformers' AutoTokenizer reads at least {sum(self.differing.values()):,} of {self.tokens:,} tokens otherwise than "
            f"tokenizer.json says, by which the model was calibrated and checked ({', '.join(self.differing)}; {self.example})"
        )


@dataclass(frozen=True)
class Conditions:
    """What the numbers depend on."""

    text: TextFacts
    detectable: Mapping[str, Mapping[str, Number]] = field(
        default_factory=dict
    )  # by artifact and gate, before it was read
    inputs: Mapping[str, str] = field(default_factory=dict)  # hashes, versions, device; beside `text` in the file
    tokenizer: TokensRead | None = None  # null: was not compared

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Fields that the file has beside the inputs."""
        return tuple(item.name for item in fields(cls) if item.name != "inputs")


@with_config(ConfigDict(extra="allow"))
class SourceFacts(TypedDict, total=False):
    """A source of calibration text; the file holds more of it."""

    name: str
    licence: str | None
    revision: str | None
    tokens: Count


@with_config(ConfigDict(extra="allow"))
class CalibrationFacts(TypedDict, total=False):
    """The calibration set; the file holds more of it."""

    samples: Count
    tokens: Count
    sha256: str
    sources: list[SourceFacts]
    background: list[SourceFacts]  # beside the sources; absent: there is none


def background(made: CalibrationFacts) -> str | None:
    """What was read beside the sources, why and at what cost, in a sentence; None where nothing was."""
    beside = made.get("background")
    if not beside:
        return None
    tokens = sum(source.get("tokens", 0) for source in beside)
    share = tokens / max(made.get("tokens", 0) - tokens, 1)
    names = ", ".join(f"{source.get('name', '?')} ({source.get('licence') or 'licence unknown'})" for source in beside)
    return (
        f"{tokens} of these tokens, {100 * share:.1f} % of the others, from bundled texts of other kinds: on the demo checkpoint 2 % more divergence "
        f"at home for 3 to 55 % less elsewhere; {names}"
    )
