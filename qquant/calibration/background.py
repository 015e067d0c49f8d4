"""A background for calibration: a small share of bundled texts of every kind, added to text of one kind.

Statistics of one kind of text leave directions of a linear's input nearly unseen, and a solver spends them: away from home the loss grows
several times as fast as at home. A few tokens of everything else bound them, where damping, which knows no direction, does not (the numbers
are in recipes/README.md). The term is that of language modelling: in-domain text against a background corpus.

    tokens = round(share * tokens of the sources), in pieces of one length, at most PIECE, at most `length`

The pieces take turns: every language of the bundled texts, code, and every corpus of chats where the checkpoint's template renders chats, in an
order by the recipe's seed; several texts of a language take turns too. A piece of text begins at a line, a piece of a chat anywhere in it.
Corpora that the recipe names itself give nothing more. Held-out texts are in another manifest, and are never read here.

Left out: a share chosen by what it gains on sources left out, which would need builds to choose it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qquant import recipe
from qquant.calibration.chats import chat_tokens
from qquant.calibration.draw import rank, shuffled
from qquant.calibration.sources import Bundled, Corpus, Reading, SourceRecord, corpora, open_source
from qquant.calibration.tokenizer import Tokenizer
from qquant.errors import InputError

PIECE = 64  # tokens
LEAST = 16  # tokens of a piece: a recipe's shortest sample
ASKED = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
CHARACTERS = 16  # of a text that are read for a token


@dataclass
class Background:
    """What a background gives: its pieces, by corpus, and where they came from."""

    records: list[SourceRecord] = field(default_factory=list)
    pieces: list[list[int]] = field(default_factory=list)  # those of the first record, then of the second, ...


def drawn(asked: recipe.Calibration, tokenizer: Tokenizer, reading: Reading, tokens: int) -> Background:
    """The background of samples that have `tokens` tokens together.

    Raises InputError where a bundled text was changed.
    """
    budget = round(asked.background * tokens)
    if budget < LEAST:
        return Background()
    count = -(-budget // min(PIECE, asked.length))
    turns = _turns(asked, tokenizer, count)
    read = {one.name: _opened(one, reading) for one in turns}
    pieces: dict[str, list[list[int]]] = {name: [] for name in read}
    for number, one in enumerate(turns):
        pieces[one.name].append(_piece(read[one.name], number, budget // count, asked.seed, tokenizer))
    for name, corpus in read.items():
        corpus.record.samples, corpus.record.tokens = len(pieces[name]), sum(map(len, pieces[name]))
    return Background(
        [corpus.record for corpus in read.values()], [piece for some in pieces.values() for piece in some]
    )


def _turns(asked: recipe.Calibration, tokenizer: Tokenizer, count: int) -> list[Bundled]:
    """The corpus of every piece."""
    kinds = list(_kinds({source.bundled for source in asked.sources}, _renders_chats(tokenizer)))
    order = shuffled(asked.seed, "background", len(kinds))
    turns = []
    for number in range(count):
        lap, place = divmod(number, len(kinds))
        kind = kinds[order[place]]
        turns.append(kind[lap % len(kind)])
    return turns


def _kinds(named: set[str | None], chats: bool) -> Iterator[Sequence[Bundled]]:
    """The corpora that are not `named`: texts by language, every corpus of chats for itself."""
    texts: dict[str, list[Bundled]] = {}
    for one in corpora().values():
        if one.name in named:
            continue
        if one.kind == "text":
            texts.setdefault(one.language, []).append(one)
        elif chats:
            yield [one]
    yield from texts.values()


def _renders_chats(tokenizer: Tokenizer) -> bool:
    """Whether the template ends every answer with a token on which generation stops: base models have not learnt it."""
    if tokenizer.template is None:
        return False
    try:
        list(chat_tokens(tokenizer, [("a chat", ASKED)]))
    except InputError:
        return False
    return True


def _opened(one: Bundled, reading: Reading) -> Corpus:
    source = recipe.Source(bundled=one.name, kind="chat" if one.kind == "chat" else "text")
    return open_source(source, Reading(reading.special), 0)


def _piece(corpus: Corpus, number: int, length: int, seed: int, tokenizer: Tokenizer) -> list[int]:
    """At most `length` ids of a corpus, from a place that the seed and the piece's `number` choose."""
    place = rank(seed, f"background {corpus.record.name}", number)
    if corpus.chats:
        where, chat = corpus.chats[place % len(corpus.chats)]
        ids = next(chat_tokens(tokenizer, [(f"{corpus.where}, {where}", chat)]))
        corpus.record.truncated += len(ids) > length
        start = place // len(corpus.chats) % max(len(ids) - length + 1, 1)
        return ids[start : start + length]
    text = "\n\n".join(corpus.texts)
    start = place % max(len(text) - CHARACTERS * length, 1)
    start = text.find("\n", start, len(text) - CHARACTERS * length) + 1 or start
    return tokenizer.encode(text[start : start + CHARACTERS * length], special=False)[:length]
