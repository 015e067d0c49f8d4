"""The set: samples drawn from the sources, in a seeded order, with a hash and the story of every row.

Draws rank candidates by sha256(seed, source, index): the same on every machine and with every version of every library.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.calibration import background, openings
from qquant.calibration.chats import ChatRecord, brings_system, chat_tokens, give_systems
from qquant.calibration.draw import allot, rank, shuffled
from qquant.calibration.sources import Corpus, Drop, Messages, Reading, SourceRecord, open_source
from qquant.calibration.tokenizer import Tokenizer
from qquant.disk.writes import make_folder, write_synced
from qquant.errors import InputError
from qquant.resources import lazy

if TYPE_CHECKING:
    import numpy as np
    import safetensors
    import safetensors.numpy as safetensors_numpy
    from numpy.typing import NDArray

    from qquant import recipe
else:
    np, safetensors, safetensors_numpy = lazy("numpy"), lazy("safetensors"), lazy("safetensors.numpy")

READ_AHEAD = 8  # a hub dataset is read until it gave this many times what is needed
CHARACTERS_PER_TOKEN = 4  # of English, about
SET_FILE, PROVENANCE_FILE = "calibration.safetensors", "provenance.json"
SCHEMA = "qquant.calibration/1"

_Talk = tuple[Corpus, str, Messages]  # (source, place, chat)


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """The samples, in a seeded order, and where they came from."""

    tokens: tuple[NDArray[np.int32], ...]  # each int32 [n], n <= length; n < length only for chats
    sources: tuple[SourceRecord, ...]
    chats: ChatRecord | None  # None: no chats
    asked: int  # samples the recipe asked for
    length: int
    seed: int
    notes: tuple[str, ...] = ()  # what the reader of a report should know
    background: tuple[SourceRecord, ...] = ()  # beside the sources, by corpus

    @functools.cached_property
    def sha256(self) -> str:
        """Hex sha256 of the number of samples, their lengths and their ids, as little-endian int32."""
        lengths = np.array([len(self.tokens), *map(len, self.tokens)], dtype="<i4")
        return hashlib.sha256(lengths.tobytes() + np.concatenate(self.tokens).astype("<i4").tobytes()).hexdigest()

    def by_source(self) -> dict[str, list[NDArray[np.int32]]]:
        """The samples of every source that gave any, in the order in which they were drawn: texts, then chats."""
        drawn = [
            sample
            for _, sample in sorted(
                zip(shuffled(self.seed, "samples", len(self.tokens)), self.tokens, strict=True),
                key=lambda pair: pair[0],
            )
        ]
        samples: dict[str, list[NDArray[np.int32]]] = {}
        for source in (*sorted(self.sources, key=lambda record: record.kind == "chat"), *self.background):
            taken, drawn = drawn[: source.samples], drawn[source.samples :]
            if taken:
                samples.setdefault(source.name, []).extend(taken)
        return samples

    def from_sources(self) -> tuple[int, int]:
        """(samples, tokens) without the background."""
        beside = [sum(getattr(record, key) for record in self.background) for key in ("samples", "tokens")]
        return len(self.tokens) - beside[0], sum(map(len, self.tokens)) - beside[1]

    def provenance(self) -> dict[str, Any]:
        """Everything but the tokens, for the report."""
        return {
            "schema": SCHEMA, "sha256": self.sha256, "seed": self.seed, "length": self.length, "asked": self.asked,
            "samples": len(self.tokens), "tokens": sum(map(len, self.tokens)), "sources": [asdict(source) for source in self.sources],
            "chats": {**asdict(self.chats), "default_system_share": self.chats.default_system_share} if self.chats else None, "notes": list(self.notes),
            **({"background": [asdict(record) for record in self.background]} if self.background else {}),
        }  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Write calibration.safetensors (tokens int32 [total], lengths int32 [samples]) and provenance.json; same set, same bytes."""
        folder = Path(folder)
        make_folder(folder)
        arrays = {
            "lengths": np.array([len(sample) for sample in self.tokens], np.int32),
            "tokens": np.concatenate(self.tokens),
        }
        write_synced(folder / SET_FILE, safetensors_numpy.save(arrays, {"sha256": self.sha256}))
        text = json.dumps(self.provenance(), indent=2, ensure_ascii=False, sort_keys=True)
        write_synced(folder / PROVENANCE_FILE, (text + "\n").encode())

    @classmethod
    def open(cls, folder: str | Path) -> CalibrationSet:
        """A saved set. Raises InputError if a file is missing or corrupt, or if the tokens are not those of the recorded hash."""
        file, record = Path(folder) / SET_FILE, Path(folder) / PROVENANCE_FILE
        try:
            arrays = safetensors_numpy.load(file.read_bytes())
            said = json.loads(record.read_text(encoding="utf-8"))
            lengths, tokens = arrays["lengths"], arrays["tokens"]
            if (
                lengths.dtype != np.int32
                or tokens.dtype != np.int32
                or (lengths < 1).any()
                or lengths.sum() != len(tokens)
            ):
                raise ValueError("lengths and tokens do not fit each other")
            samples = tuple(np.split(tokens, np.cumsum(lengths)[:-1]))
            sources, beside = (tuple(map(_record, said.get(key, ()))) for key in ("sources", "background"))
            if said["chats"]:
                said["chats"].pop("default_system_share")
            chats = ChatRecord(**said["chats"]) if said["chats"] else None
            calibration = cls(
                samples, sources, chats, said["asked"], said["length"], said["seed"], tuple(said["notes"]), beside
            )
        except FileNotFoundError as error:
            raise InputError(
                f"{error.filename}: no such file; a saved calibration is {SET_FILE} and {PROVENANCE_FILE}"
            ) from error
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder}: no saved calibration: {error!r}. Build the calibration again") from error
        if calibration.sha256 != said["sha256"]:
            raise InputError(
                f"{file}: sha256 {calibration.sha256}, {record.name} says {said['sha256']}. Build the calibration again"
            )
        return calibration


def load(
    spec: recipe.Calibration, tokenizer: Tokenizer, template_expected: bool, write: openings.Writer = openings.refuse
) -> CalibrationSet:
    """The calibration set of a recipe, the same for the same recipe, sources and tokenizer.

    `template_expected`: the checkpoint is a chat model, so a missing chat template is an error even where only texts are read.
    `write`: the model, where a source is generated.
    Raises InputError, UsageError (unknown bundled name) or EnvironmentMissingError (hub out of reach).
    """
    has_chats = any(source.kind == "chat" for source in spec.sources)
    if template_expected or has_chats:
        _ = tokenizer.end_of_turn
    weights = [source.weight for source in spec.sources]
    first = allot(weights, [spec.samples] * len(weights), spec.samples)
    reading = Reading(frozenset(tokenizer.special))
    read = []
    for source, count in zip(spec.sources, first, strict=True):
        if source.generated:
            read.append(openings.open_openings(source, spec.seed, reading.special))
            continue
        size = 1 if source.kind == "chat" else spec.length * CHARACTERS_PER_TOKEN
        read.append(open_source(source, reading, READ_AHEAD * max(count, 1) * size))
    for corpus in read:
        if corpus.openings:
            continue
        corpus.ids = tokenizer.encode("\n\n".join(corpus.texts), special=False)
        if not corpus.capacity(spec.length, spec.samples):
            raise InputError(
                f"{corpus.where}: {len(corpus.ids)} tokens, fewer than one sample of {spec.length}. Lower calibration.length or give more text"
            )
    counts = allot(weights, [corpus.capacity(spec.length, spec.samples) for corpus in read], spec.samples)
    samples, chats = _draw(read, counts, spec, tokenizer, write)
    beside = background.drawn(spec, tokenizer, reading, sum(map(len, samples)))
    samples += beside.pieces
    order = shuffled(spec.seed, "samples", len(samples))
    tokens = tuple(np.array(samples[i], dtype=np.int32) for i in order)
    notes = _notes(read, first, counts, spec)
    return CalibrationSet(
        tokens, tuple(corpus.record for corpus in read), chats, spec.samples, spec.length, spec.seed, notes,
        tuple(beside.records),
    )  # fmt: skip


def _record(said: dict[str, Any]) -> SourceRecord:
    """A source as `CalibrationSet.provenance` says it."""
    return SourceRecord(**said | {"dropped": {key: Drop(**drop) for key, drop in said["dropped"].items()}})


def _windows(corpus: Corpus, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` windows, one from each of `count` equal stretches of the source."""
    total = len(corpus.ids) // length
    samples = []
    for i in range(count):
        first, last = i * total // count, (i + 1) * total // count
        start = (first + rank(seed, corpus.record.name, i) % (last - first)) * length
        samples.append(corpus.ids[start : start + length])
    return samples


def _pick(corpus: Corpus, count: int, share: float, default: str | None, seed: int) -> list[tuple[str, Messages]]:
    """`count` chats by seed, enough of them without a system turn of their own for `share`, where the source has them."""
    order = [corpus.chats[i] for i in shuffled(seed, corpus.record.name, len(corpus.chats))]
    picked, rest = order[:count], order[count:]
    bare = [chat for chat in rest if not brings_system(chat[1], default)]
    short = round(share * count) - sum(not brings_system(chat, default) for _, chat in picked)
    for i in [i for i, (_, chat) in enumerate(picked) if brings_system(chat, default)][: max(short, 0)]:
        if bare:
            picked[i] = bare.pop(0)
    return picked


def _draw(
    read: list[Corpus], counts: list[int], spec: recipe.Calibration, tokenizer: Tokenizer, write: openings.Writer
) -> tuple[list[list[int]], ChatRecord | None]:
    """The samples of every source, texts before chats, each in the order of the sources, and how chats were rendered."""
    samples: list[list[int]] = []
    talks: list[_Talk] = []
    for corpus, count in zip(read, counts, strict=True):
        corpus.record.samples = count
        if corpus.record.kind == "text":
            samples += (
                openings.texts(corpus, count, spec, tokenizer, write)
                if corpus.openings
                else _windows(corpus, count, spec.length, spec.seed)
            )
            corpus.record.tokens = count * spec.length
        elif corpus.openings:
            talks += [
                (corpus, corpus.where, [{"role": "user", "content": opening}])
                for opening in openings.drawn(corpus, count, spec.seed)
            ]
        else:
            picked = _pick(corpus, count, spec.default_system_share, tokenizer.default_system, spec.seed)
            talks += [(corpus, f"{corpus.where}, {location}", chat) for location, chat in picked]
    if not talks:
        return samples, None
    rendered, chats = give_systems([chat for _, _, chat in talks], tokenizer, spec.default_system_share, spec.seed)
    given = [(corpus, where, chat) for (corpus, where, _), chat in zip(talks, rendered, strict=True)]
    for (corpus, _, _), (ids, cut) in zip(talks, _rendered(given, spec, tokenizer, write), strict=True):
        corpus.record.truncated += cut
        samples.append(ids)
        corpus.record.tokens += len(ids)
    return samples, chats


def _rendered(
    talks: list[_Talk], spec: recipe.Calibration, tokenizer: Tokenizer, write: openings.Writer
) -> Iterator[tuple[list[int], bool]]:
    """Each chat as ids, answered by the model where its source is generated; and whether it was cut."""
    answered = {}
    for corpus in {id(corpus): corpus for corpus, _, _ in talks if corpus.openings}.values():
        asked = [chat for owner, _, chat in talks if owner is corpus]
        answered[id(corpus)] = iter(openings.answers(corpus, asked, spec, tokenizer, write))
    encoded = chat_tokens(tokenizer, [(where, chat) for corpus, where, chat in talks if not corpus.openings])
    for corpus, _, _ in talks:
        if corpus.openings:
            ids = next(answered[id(corpus)])
            yield ids, ids[-1] not in (tokenizer.end_of_turn, *tokenizer.eos)
        else:
            ids = next(encoded)
            yield ids[: spec.length], len(ids) > spec.length


def _notes(read: list[Corpus], asked: list[int], counts: list[int], spec: recipe.Calibration) -> tuple[str, ...]:
    notes = []
    for corpus, want, got in zip(read, asked, counts, strict=True):
        if got < want:
            notes.append(f"{corpus.record.name}: {got} samples, its share is {want}: the source has no more")
    if sum(counts) < spec.samples:
        notes.append(
            f"{sum(counts)} samples of the {spec.samples} asked for: the sources have no more, nothing is repeated"
        )
    return tuple(notes)
