"""What a model is asked to do where `checks.profile: release` looks at behaviour: facts in long documents, tool calls, programs, talk. No torch.

    retrieval   a bundled document of T tokens, T as far as the context goes, with facts at even distances in it, and after it a question about
                each, in another order, with its answer: one pass shows whether a model would have said every one of them (teacher forcing)
    calls       questions with tools at hand; in the right answers, the tokens that are structure and no argument
    code        programs to be written
    talk        what the held-out chats ask first, where its answer is in the script of the question

The rows are those of the held-out text `behaviour-test`, made by calibration/behaviour.py. Where the checkpoint's template does not render
chats, they are plain text. An answer is a model's greedy one, of at most `LENGTHS` tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from qquant.calibration.sources import heldout_texts
from qquant.calibration.tokenizer import Tokenizer
from qquant.errors import InputError
from qquant.resources import lazy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")

Task = Literal["tools", "code", "talk"]
DEPTHS = (4096, 8192, 16384, 32768)  # lengths of the documents
SHORTEST = 1024  # context from which on anything is hidden
HAYSTACKS = {"en": "long-test", "zh": "long-zh-test"}
ORDERS = {
    "en": "Answer each question from this text with the number or the name alone.",
    "zh": "请根据这段文字回答每个问题，只说数字或姓名。",
}
LENGTHS: Mapping[Task, int] = {"tools": 96, "code": 160, "talk": 128}
OPENINGS: Mapping[Task, str] = {"tools": "\n", "code": "\n\n```python\n", "talk": "\n\n"}  # of answers in plain text
ANSWERS = 172  # at most, of all tasks together
CHATS = ("chat-multi-test", "chat-test")
MARK = "\ue000"  # stands for a document or an answer while a template is rendered
SENTENCES = re.compile(r"(?<=[.!?])\s+(?=\S)|(?<=[。！？])|\n+")
SCRIPTS: Mapping[str, str] = {
    "Latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff", "Cyrillic": "\u0400-\u04ff", "Arabic": "\u0600-\u06ff", "Thai": "\u0e00-\u0e7f",
    "Korean": "\uac00-\ud7a3\u1100-\u11ff", "Japanese": "\u3040-\u30ff", "Chinese": "\u3400-\u4dbf\u4e00-\u9fff",
}  # fmt: skip


@dataclass(frozen=True)
class HiddenFacts:
    """Documents of one length: int32 [documents, length], and where the answers stand in each, [first, last + 1) as they are asked."""

    windows: NDArray[np.int32]
    answers: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def length(self) -> int:
        """Tokens of a document with its questions and answers."""
        return int(self.windows.shape[1])

    @property
    def first(self) -> int:
        """The position from which next tokens are scored: the one before the first answer of any document."""
        return min(spans[0][0] for spans in self.answers) - 1


@dataclass(frozen=True)
class OpenQuestion:
    """A question that models answer freely, and what a right answer has."""

    task: Task
    prompt: tuple[int, ...]
    text: str
    function: str = ""  # the name that a program defines
    calls: tuple[Mapping[str, Any], ...] = ()  # each right: name and arguments
    opened: bool = False  # the answer's beginning stands in the prompt


@dataclass(frozen=True)
class RightCalls:
    """Right tool calls after their questions: int32 [calls, length], padded, and which tokens are structure, bool [calls, length]."""

    windows: NDArray[np.int32]
    structure: NDArray[np.bool_]

    @property
    def first(self) -> int:
        """The position from which next tokens are scored."""
        return int(self.structure.any(0).argmax()) - 1


@dataclass(frozen=True)
class BehaviourText:
    """Everything that a release is asked."""

    hidden: tuple[HiddenFacts, ...]
    calls: RightCalls
    questions: tuple[OpenQuestion, ...] = field(default=())

    @property
    def digest(self) -> str:
        """sha256 of all token ids."""
        rows = [self.calls.windows, self.calls.structure, *(one.windows for one in self.hidden)]
        sha = hashlib.sha256(b"".join(row.tobytes() for row in rows))
        sha.update(json.dumps([(one.prompt, one.function, one.calls) for one in self.questions]).encode())
        return sha.hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens of documents and calls that every model reads."""
        return int(self.calls.windows.size + sum(one.windows.size for one in self.hidden))


def depths(positions: int) -> tuple[int, ...]:
    """Lengths of the documents for a context of `positions` tokens; of a short context its own length."""
    return tuple(length for length in DEPTHS if length <= positions) or ((positions,) if positions >= SHORTEST else ())


def most_tokens(positions: int) -> tuple[int, int]:
    """(tokens in documents with hidden facts, tokens of answers) of each model at most, before the texts were tokenized."""
    return len(HAYSTACKS) * sum(depths(positions)), ANSWERS * max(LENGTHS.values())


def behaviour_text(tokenizer: Tokenizer, positions: int) -> BehaviourText:
    """All of it for a model whose context is `positions` tokens."""
    rows = _rows()
    writer = PromptWriter(tokenizer)
    hidden = tuple(_hidden(writer, rows, length) for length in depths(positions))
    called = [row for row in rows if row["task"] == "tools"]
    most = positions - max(LENGTHS.values())
    questions = [*_questions(writer, rows), *_talk(writer)]
    return BehaviourText(
        hidden, _calls(writer, called, positions), tuple(one for one in questions if len(one.prompt) <= most)
    )


@cache
def _rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in heldout_texts()["behaviour-test"].read().splitlines()]


class PromptWriter:
    """Chats as the checkpoint reads them, in pieces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.chat = _renders(tokenizer)

    def prompt(self, messages: Sequence[Mapping[str, str]], opening: str) -> list[int]:
        """Ids of a question; `opening` begins the answer where chats are plain text."""
        if self.chat:
            return self.tokenizer.encode(self.tokenizer.render(messages, True))
        return self.tokenizer.encode("\n\n".join(message["content"] for message in messages) + opening, special=False)

    def pieces(self, questions: Sequence[str]) -> list[list[int]]:
        """Ids of what stands before a document, between it and the first answer, and between one answer and the next."""
        if self.chat:
            first, *others = questions
            turns = [_turn("user", f"{MARK}\n\n{first}"), _turn("assistant", MARK)]
            for question in others:
                turns += [_turn("user", question), _turn("assistant", MARK)]
            parts = self.tokenizer.render(turns).split(MARK)
            if len(parts) == len(questions) + 2:
                return self.tokenizer.encode_all(parts[:-1])
        texts = [f"\n\n{question}\n" for question in questions]
        return [[], *(self.tokenizer.encode(text, special=False) for text in texts)]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _renders(tokenizer: Tokenizer) -> bool:
    """Whether the template renders chats whose answers end."""
    if tokenizer.template is None:
        return False
    try:
        return tokenizer.end_of_turn >= 0
    except InputError:
        return False


# Facts in documents.


def _hidden(writer: PromptWriter, rows: Sequence[Mapping[str, Any]], length: int) -> HiddenFacts:
    documents = []
    for language in HAYSTACKS:
        mine = [row for row in rows if row.get("language") == language]
        made = None
        while made is None:
            made = _document(writer, mine, language, length)
            mine = mine[: len(mine) // 2]
        documents.append(made)
    return HiddenFacts(np.stack([ids for ids, _ in documents]), tuple(spans for _, spans in documents))


def _document(
    writer: PromptWriter, facts: Sequence[Mapping[str, Any]], language: str, length: int
) -> tuple[NDArray[np.int32], tuple[tuple[int, int], ...]] | None:
    """(ids, places of the answers) of one document; None where `facts` and their questions take more than half of it."""
    order = random.Random(language).sample(range(len(facts)), len(facts))
    chats = [facts[index]["messages"] for index in order]
    questions = [_question(facts[index]) for index in order]
    questions[0] = f"{ORDERS[language]}\n\n{questions[0]}"
    before, *between = writer.pieces(questions)
    encode = writer.tokenizer.encode
    answers = [encode(chat[1]["content"], special=False) for chat in chats]
    needles = [encode(f"\n\n{fact['fact']}\n\n", special=False) for fact in facts]
    taken = len(before) + sum(map(len, (*between, *answers, *needles)))
    if taken > length // 2:
        return None
    document = _with_needles(_sentences(language, writer.tokenizer), length - taken, needles)
    ids = [*before, *document]
    spans = []
    for piece, answer in zip(between, answers, strict=True):
        ids += piece
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer
    return np.array(ids, np.int32), tuple(spans)


def _question(fact: Mapping[str, Any]) -> str:
    return str(fact["messages"][0]["content"]).removeprefix(fact["fact"]).strip()


def _sentences(language: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of the sentences of a long text, each with the blank or the line end that follows it."""
    text = heldout_texts()[HAYSTACKS[language]].read().decode()
    ends = [match.end() for match in SENTENCES.finditer(text)]
    starts = [0, *ends]
    return tokenizer.encode_all([text[a:b] for a, b in zip(starts, [*ends, len(text)], strict=True) if a < b])


def _with_needles(sentences: Sequence[Sequence[int]], room: int, needles: Sequence[Sequence[int]]) -> list[int]:
    """`room` ids of a text, and a needle after the sentence that ends next behind each of even distances."""
    ids: list[int] = []
    waiting = list(needles)
    read = 0
    for sentence in _repeated(sentences):
        words = sentence[: room - read]
        ids += words
        read += len(words)
        while waiting and (read >= room or read * len(needles) > room * (len(needles) - len(waiting))):
            ids += waiting.pop(0)
        if read >= room:
            return ids
    raise AssertionError("a text without an end")


def _repeated(sentences: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
    """The text, and again from its beginning where a context is longer than it."""
    while True:
        yield from sentences


# Questions.


def _questions(writer: PromptWriter, rows: Sequence[Mapping[str, Any]]) -> Iterator[OpenQuestion]:
    for row in rows:
        if row["task"] in LENGTHS:
            task: Task = row["task"]
            messages = row["messages"][:-1]
            prompt = tuple(writer.prompt(messages, OPENINGS[task]))
            calls = tuple(row.get("calls", ()))
            yield OpenQuestion(task, prompt, messages[-1]["content"], row.get("function", ""), calls, not writer.chat)


def _talk(writer: PromptWriter) -> Iterator[OpenQuestion]:
    """First questions of the held-out chats; a request to translate is none."""
    for name in CHATS:
        for line in heldout_texts()[name].read().splitlines():
            first, *others = json.loads(line)["messages"]
            if first["role"] == "user" and script(first["content"]) == script(others[0]["content"]) != "":
                yield OpenQuestion("talk", tuple(writer.prompt([first], OPENINGS["talk"])), first["content"])


def script(text: str) -> str:
    """The script of most letters of a text: a name of `SCRIPTS`; "" for a text without letters. Japanese is Chinese with kana."""
    counts = {name: len(re.findall(f"[{letters}]", text)) for name, letters in SCRIPTS.items()}
    if counts["Japanese"] * 10 > counts["Chinese"]:
        counts["Japanese"] += counts.pop("Chinese")
    name = max(counts, key=lambda name: counts[name])
    return name if counts[name] else ""


def letters_of(text: str) -> int:
    """How many letters of any of the scripts a text has."""
    return len(re.findall(f"[{''.join(SCRIPTS.values())}]", text))


def _calls(writer: PromptWriter, rows: Sequence[Mapping[str, Any]], positions: int) -> RightCalls:
    """The right calls of `rows` that fit into the context."""
    calls: list[tuple[list[int], list[bool]]] = []
    for row in rows:
        ids = writer.prompt(row["messages"][:-1], OPENINGS["tools"])
        marks = [False] * len(ids)
        for index, piece in enumerate(row["pieces"]):
            more = writer.tokenizer.encode(piece, special=False)
            ids, marks = ids + more, marks + [index % 2 == 0] * len(more)
        if len(ids) <= positions:
            calls.append((ids, marks))
    longest = max((len(ids) for ids, _ in calls), default=0)
    windows = np.zeros((len(calls), longest), np.int32)
    structure = np.zeros((len(calls), longest), bool)
    for index, (ids, marks) in enumerate(calls):
        windows[index, : len(ids)], structure[index, : len(ids)] = ids, marks
    return RightCalls(windows, structure)
