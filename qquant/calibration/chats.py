"""Chats as the checkpoint's template renders them: which system turn each gets, and whether each answer ends with the stop token.

The template of Qwen1.5 of February 2024 leaves the end-of-turn token off the last turn unless a generation prompt is asked for, which
the published recipe for quantizing does not do. So every assistant turn is found in the rendered ids, and the id after its content must
be the end-of-turn token. Nothing is repaired here: the template ships with the artifacts, and its fault would too.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qquant.calibration.draw import shuffled
from qquant.calibration.sources import Messages, read_yaml
from qquant.calibration.tokenizer import Tokenizer
from qquant.errors import InputError
from qquant.resources import data_dir

TOGETHER = 64  # chats that are rendered and tokenized in one go
PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters that mean nothing by themselves


def brings_system(chat: Messages, default: str | None) -> bool:
    """Whether a chat has a system turn of its own; one with the template's default text renders the same as none."""
    return chat[0]["role"] == "system" and chat[0]["content"] != default


@dataclass(frozen=True)
class ChatRecord:
    """How the chats of a set were rendered."""

    count: int
    default_system: int  # with the system turn that the template adds
    own_system: int
    varied_system: int  # given one of calibration/system-turns.yaml
    end_of_turn: int  # id that follows every assistant turn
    template_sha256: str

    @property
    def default_system_share(self) -> float:
        """Share of the chats that got the template's default system turn."""
        return self.default_system / self.count


def give_systems(
    chats: list[Messages], tokenizer: Tokenizer, share: float, seed: int
) -> tuple[list[Messages], ChatRecord]:
    """Decide the system turn of every chat. Raises InputError if `share` cannot be had."""
    default = tokenizer.default_system
    bare = [i for i, chat in enumerate(chats) if not brings_system(chat, default)]
    wanted = len(bare) if share == 1 else round(share * len(chats))  # 1: no system turn is made up
    if wanted and default is None:
        raise InputError(
            f"{tokenizer.path / tokenizer.template_origin}: the chat template has no default system turn, but "
            f"calibration.default_system_share is {share:g}. Set it to 0"
        )
    if wanted > len(bare):
        raise InputError(
            f"calibration.default_system_share is {share:g}, which is {wanted} of {len(chats)} chats, but only {len(bare)} come without "
            f"a system turn of their own. Lower it to at most {len(bare) / len(chats):.3f}, or add chats without one"
        )
    order = [bare[i] for i in shuffled(seed, "default system", len(bare))]
    turns = read_yaml(data_dir("calibration") / "system-turns.yaml")
    result = [list(chat) for chat in chats]
    for rank, i in enumerate(order):
        talk = [message for message in chats[i] if message["role"] != "system"]
        if rank >= wanted:
            words = turns["zh" if _is_chinese(talk) else "en"]
            talk.insert(0, {"role": "system", "content": words[(rank - wanted) % len(words)]})
        result[i] = talk
    template = hashlib.sha256(str(tokenizer.template).encode()).hexdigest()
    own = len(chats) - len(bare)
    return result, ChatRecord(len(chats), wanted, own, len(bare) - wanted, tokenizer.end_of_turn, template)


def _is_chinese(chat: Messages) -> bool:
    text = "".join(message["content"] for message in chat)
    return sum("\u4e00" <= c <= "\u9fff" for c in text) > len(text) / 10


def chat_tokens(tokenizer: Tokenizer, chats: Sequence[tuple[str, Messages]]) -> Iterator[list[int]]:
    """Ids of each rendered chat, given with its place, untruncated, without a generation prompt.

    Raises InputError, naming the place, unless the id after the content of every assistant turn is the end-of-turn token.
    """
    for start in range(0, len(chats), TOGETHER):
        some = chats[start : start + TOGETHER]
        marks = [_marks(chat) for _, chat in some]
        marked = [_marked(chat, mark) for (_, chat), mark in zip(some, marks, strict=True)]
        texts = tokenizer.render_all([*(chat for _, chat in some), *marked])
        texts, frames = texts[: len(some)], texts[len(some) :]
        ends = [
            _answer_ends(tokenizer, chat, text, frame, mark, where)
            for (where, chat), text, frame, mark in zip(some, texts, frames, marks, strict=True)
        ]
        pieces = [text[:end] for text, stops in zip(texts, ends, strict=True) for end in (*stops, None)]
        ids = iter(tokenizer.encode_all(pieces))
        for (where, _), text, stops in zip(some, texts, ends, strict=True):
            before = [next(ids) for _ in stops]
            yield _closed(tokenizer, text, next(ids), before, stops, where)


def _closed(
    tokenizer: Tokenizer, text: str, ids: list[int], before: list[list[int]], ends: list[int], where: str
) -> list[int]:
    """`ids` of `text`, if the end-of-turn token follows what stands `before` each of its `ends`."""
    for turn, (start, end) in enumerate(zip(before, ends, strict=True), start=1):
        if ids[: len(start)] == start and ids[len(start) : len(start) + 1] == [tokenizer.end_of_turn]:
            continue
        token = tokenizer.decode([tokenizer.end_of_turn])
        follows = repr(text[end : end + 20]) if text[end:] else "nothing"
        raise InputError(
            f"{where}: assistant turn {turn} of {len(ends)} does not end with {token} (id {tokenizer.end_of_turn}): after "
            f"{text[max(end - 20, 0) : end]!r} the chat template of {tokenizer.path / tokenizer.template_origin} renders {follows}. "
            "A model calibrated so forgets to stop. Qwen1.5's template of February 2024 leaves the last turn open unless a generation "
            f"prompt is asked for; the one of April 2024 closes every turn: put that one, or one that writes {token} after each "
            "message, into the checkpoint"
        )
    return ids


def _marks(chat: Messages) -> list[str]:
    """A character for each answer that stands nowhere in the chat."""
    used = {character for message in chat for character in message["content"]}
    answers = sum(message["role"] == "assistant" for message in chat)
    return list(itertools.islice((mark for mark in map(chr, PRIVATE_USE) if mark not in used), answers))


def _marked(chat: Messages, marks: list[str]) -> Messages:
    """The chat with a mark in place of each answer."""
    left = iter(marks)
    return [{**message, "content": next(left)} if message["role"] == "assistant" else message for message in chat]


def _answer_ends(
    tokenizer: Tokenizer, chat: Messages, text: str, frame: str, marks: list[str], where: str
) -> list[int]:
    """The positions in the rendered `text` where assistant messages end.

    `frame` is the chat rendered with a mark in place of each answer; what stands between the marks is the template's own.
    """
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    position, ends = 0, list[int]()
    for answer, mark in zip(answers, marks, strict=True):
        between, mark, frame = frame.partition(mark)
        match = next(
            (form for form in (answer, answer.strip()) if mark and text.startswith(between + form, position)), None
        )
        if match is None:
            raise InputError(
                f"{where}: the chat template of {tokenizer.path / tokenizer.template_origin} changes or leaves out assistant turn {len(ends) + 1}, "
                "so that its end cannot be checked. Use a template that renders every message as it is"
            )
        position += len(between) + len(match)
        ends.append(position)
    return ends
