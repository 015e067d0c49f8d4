"""The vocabulary of a checkpoint's tokenizer files, read within bounds and checked before any library sees them.

    tokenizer.json                     {"model": {"vocab": {token: id}, "merges": ["a b" or ["a", "b"]]}, "added_tokens": [{...}]}
    vocab.json, merges.txt             {token: id}; one merge a line; added tokens from tokenizer_config.json or added_tokens.json

Ids are whole, not negative, below ID_LIMIT and used once; merges are of two tokens of the vocabulary.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qquant.errors import InputError
from qquant.source.untrusted import read_json, read_text

ID_LIMIT = 1 << 22
MERGES_PER_TOKEN = 4  # converted vocabularies name several ways to one token


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary."""

    id: int
    content: str
    special: bool


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of the model by their text, merges as ("a", "b"), and added tokens."""

    tokens: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    added: Sequence[AddedToken]

    @property
    def largest(self) -> int:
        """The largest id; -1 if there is none."""
        return max([*self.tokens.values(), *(token.id for token in self.added)], default=-1)


def read(path: Path) -> Vocabulary:
    """The vocabulary of a checkpoint folder, from tokenizer.json, else from vocab.json and merges.txt.

    Raises:
        InputError: neither is there, or they are malformed.
    """
    if os.path.lexists(path / "tokenizer.json"):
        return _of_one_file(path / "tokenizer.json")
    if os.path.lexists(path / "vocab.json") and os.path.lexists(path / "merges.txt"):
        return _parts(path)
    raise InputError(
        f"{path}: no tokenizer, looked for tokenizer.json, and for vocab.json with merges.txt. Copy them from the base model"
    )


def _of_one_file(file: Path) -> Vocabulary:
    content = read_json(file)
    model = content.get("model")
    tokens, merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
    if not isinstance(tokens, dict) or not isinstance(merges, list):
        raise InputError(
            f"{file}: no `model` with `vocab` and `merges`. Copy the file again from the original checkpoint"
        )
    dropout = content["model"].get("dropout")
    if dropout:
        raise InputError(
            f"{file}: BPE dropout {str(dropout)[:20]} gives the same text other tokens every time. Remove it"
        )
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise InputError(f"{file}: added_tokens is a {type(added).__name__}, expected a list")
    return checked(file, tokens, merges, [_added(file, entry) for entry in added])


def _parts(path: Path) -> Vocabulary:
    tokens = read_json(path / "vocab.json")
    lines = read_text(path / "merges.txt").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    config, stated = path / "tokenizer_config.json", path / "added_tokens.json"
    listed = read_json(config).get("added_tokens_decoder") if os.path.lexists(config) else None
    added = []
    if isinstance(listed, dict):
        added = [
            _added(config, {**entry, "id": int(number)} if isinstance(entry, dict) and number.isdecimal() else entry)
            for number, entry in listed.items()
        ]
    elif os.path.lexists(stated):
        added = [
            _added(stated, {"content": text, "id": number, "special": None})
            for text, number in read_json(stated).items()
        ]
    return checked(path / "vocab.json", tokens, merges, added)


def _added(file: Path, entry: Any) -> AddedToken:
    content, number = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
    if not isinstance(content, str) or not isinstance(number, int) or not _is_id(number):
        raise InputError(f"{file}: added token {str(entry)[:80]}: expected `content`, and an `id` below {ID_LIMIT:,}")
    return AddedToken(number, content, bool(entry.get("special")) or bool(re.fullmatch(r"<\|.*\|>", content)))


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < ID_LIMIT


def checked(file: Path, tokens: Mapping[str, Any], merges: Sequence[Any], added: Sequence[AddedToken]) -> Vocabulary:
    """A vocabulary of these tokens, of merges ("a b" or ["a", "b"]) and of added tokens.

    Raises:
        InputError: an id is none or used twice, or a merge is not of two tokens.
    """
    bad = next((text for text, number in tokens.items() if not _is_id(number)), None)
    if bad is not None:
        raise InputError(f"{file}: token {bad[:80]!r} has the id {tokens[bad]!r}; expected 0 to {ID_LIMIT - 1:,}")
    if len(merges) > MERGES_PER_TOKEN * len(tokens):
        raise InputError(
            f"{file}: {len(merges):,} merges for {len(tokens):,} tokens; each merge makes one. Copy the file again"
        )
    holders = {number: text for text, number in tokens.items()}
    if len(holders) != len(tokens):
        raise InputError(f"{file}: {len(tokens) - len(holders)} ids of the vocabulary are used twice")
    for token in added:
        if holders.setdefault(token.id, token.content) != token.content:
            raise InputError(f"{file}: id {token.id} is {holders[token.id][:80]!r} and {token.content[:80]!r}")
    pairs = []
    for number, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(parts, list)
            or len(parts) != 2
            or not all(isinstance(part, str) and part in tokens for part in parts)
        ):
            raise InputError(
                f"{file}: merge {number} is {str(merge)[:80]!r}, expected two tokens of the vocabulary. Copy the file again"
            )
        pairs.append((parts[0], parts[1]))
    return Vocabulary(tokens, pairs, added)
