"""What a release is looked at by: fourteen languages, four kinds of text, stretches of long documents. Windows of bundled texts; no torch.

    language, kind    up to `WINDOWS` windows of `LENGTH` tokens; from `FIRST` on each next token is scored
    position          a document fills the context, up to `CONTEXT` tokens; the same tokens are also read in windows of `LENGTH`, and scored
                      there from `FIRST` on. So the two readings of a token differ in nothing but what stood before it.

A slice of a language or a kind is judged beside English; a stretch of positions beside its own tokens in short windows.

    needed      = bits a character that the checkpoint takes for the slice's text
    frequencies = bits a character of a code that knows how often each character stands in that very text, and nothing else

A checkpoint that needs more than `FAMILIAR` of the frequencies does not know the language: nothing can be lost there.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from qquant.calibration.heldout import heldout
from qquant.calibration.sources import heldout_texts
from qquant.calibration.tokenizer import Tokenizer
from qquant.errors import InputError
from qquant.resources import lazy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")

Group = Literal["language", "kind", "position"]
LENGTH, FIRST = 512, 128
WINDOWS = 24
CONTEXT = 32768
STRETCHES = (0, 2048, 8192, 16384, 32768)
FAMILIAR = 0.6
REFERENCE = "English"
LANGUAGES = {
    "English": "en", "Chinese": "zh", "Arabic": "ar", "French": "fr", "German": "de", "Indonesian": "id", "Italian": "it",
    "Japanese": "ja", "Korean": "ko", "Portuguese": "pt", "Russian": "ru", "Spanish": "es", "Thai": "th", "Vietnamese": "vi",
}  # fmt: skip
KINDS = {
    "chat": ("chat-test", "chat-multi-test"),
    "code": ("code-test",),
    "tool calls": ("tools-test",),
    "retrieval": ("rag-test",),
}
LONG = ("long-test", "long-zh-test")


@dataclass(frozen=True)
class Slice:
    """Windows that are measured together."""

    name: str
    group: Group
    windows: int


@dataclass(frozen=True)
class Sliced:
    """The windows of all slices of languages and kinds, one slice after the other, then the long documents."""

    slices: tuple[Slice, ...]
    short: NDArray[np.int32]  # [sum of slices' windows, LENGTH]
    long: NDArray[np.int32]  # [documents, context]; no rows where the model reads nothing longer than `LENGTH`

    @property
    def again(self) -> NDArray[np.int32]:
        """The long documents in short windows, int32 [documents * context / LENGTH, LENGTH]."""
        return self.long.reshape(-1, LENGTH)

    @property
    def tokens(self) -> int:
        """Tokens that are read, by every artifact and by the checkpoint."""
        return int(self.short.size + 2 * self.long.size)

    def stretches(self) -> list[tuple[str, int, int]]:
        """(name, first, last + 1 short window) of the stretches of positions in a document."""
        length = self.long.shape[1]
        stretches = []
        for start, stop in pairwise(STRETCHES):
            if len(self.long) and start < length:
                end = min(stop, length)
                stretches.append((f"positions {start:,} to {end:,}", start // LENGTH, end // LENGTH))
        return stretches


def documents_length(positions: int) -> int:
    """Tokens of a long document that a model with `positions` reads."""
    return min(positions, CONTEXT) // LENGTH * LENGTH


def most_tokens(positions: int) -> tuple[int, int]:
    """(tokens in short windows, tokens in long documents) that each model reads at most, before the texts were tokenized."""
    long = documents_length(positions)
    documents = len(LONG) * (long if long > LENGTH else 0)
    return (len(LANGUAGES) + len(KINDS)) * WINDOWS * LENGTH + documents, documents


def sliced(tokenizer: Tokenizer, positions: int) -> Sliced:
    """The slices for a model whose context is `positions` tokens.

    Raises InputError where the context is shorter than a window.
    """
    if positions < LENGTH:
        raise InputError(
            f"checks.profile: release reads windows of {LENGTH} tokens, the checkpoint's max_position_embeddings is {positions}. "
            "Take profile: default"
        )
    named_rows = [(Slice(name, group, len(rows)), rows) for name, group, rows in _short(tokenizer)]
    long = documents_length(positions)
    documents = [ids[:long] for ids in (_ids(name, tokenizer) for name in LONG) if len(ids) >= long > LENGTH]
    return Sliced(
        tuple(entry for entry, _ in named_rows),
        np.concatenate([rows for _, rows in named_rows]),
        np.stack(documents) if documents else np.zeros((0, LENGTH), np.int32),
    )


def _short(tokenizer: Tokenizer) -> Iterator[tuple[str, Group, NDArray[np.int32]]]:
    for name, code in LANGUAGES.items():
        yield name, "language", _windows(_ids(f"{code}-test", tokenizer), WINDOWS)
    for name, texts in KINDS.items():
        share = WINDOWS // len(texts)
        yield name, "kind", np.concatenate([_windows(_ids(text, tokenizer), share) for text in texts])


def _ids(name: str, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """A text; chats as plain text where the checkpoint's template does not render them (base models)."""
    try:
        return heldout(f"bundled:{name}", tokenizer)[0]
    except InputError:
        if heldout_texts()[name].kind != "chat":
            raise
    chats = [json.loads(line)["messages"] for line in heldout_texts()[name].read().splitlines()]
    text = "\n\n".join(message["content"] for chat in chats for message in chat)
    return np.array(tokenizer.encode(text, special=False), np.int32)


def _windows(ids: NDArray[np.int32], most: int) -> NDArray[np.int32]:
    """Up to `most` windows [n, LENGTH], one from each of as many equal stretches of the text."""
    there = len(ids) // LENGTH
    count = min(most, there)
    places = [index * there // count for index in range(count)]
    return ids[: there * LENGTH].reshape(there, LENGTH)[places]


def frequencies(text: str) -> float:
    """Bits a character of a code that knows the text's own frequencies of characters; 0 for an empty text."""
    counts = Counter(text)
    return sum(-count / len(text) * math.log2(count / len(text)) for count in counts.values())
