"""A conversation on a terminal: stopped answers stay part of it, and an empty line ends it."""

import importlib

import pytest

from qquant.runtime.answering import Answer, AnswerSettings

command = importlib.import_module("qquant.cli.run")  # `qquant.cli.run` is the command of that name


class Parrot:
    """Answers with the last question in two pieces; stops between them where it is told to be interrupted."""

    load_seconds = 0.1

    def __init__(self, interrupted=()):
        self.interrupted, self.seen = interrupted, []

    def encode_chat(self, turns):
        self.seen.append([dict(turn) for turn in turns])
        return [1] * len(turns)

    def answer(self, ids, settings, write):
        text = self.seen[-1][-1]["content"]
        write(text[:2])
        if text in self.interrupted:
            raise KeyboardInterrupt
        write(text[2:])
        return Answer(text, 2, True, 0.1, 0.2)


@pytest.fixture
def talk(monkeypatch):
    def converse(parrot, *lines):
        waiting = iter([*lines, ""])
        monkeypatch.setattr("click.prompt", lambda *_, **__: next(waiting))
        command._talk(parrot, [], AnswerSettings(8, True, None, None, None, None, None))
        return parrot.seen[-1]

    return converse


def test_an_interrupted_answer_ends_the_answer_and_not_the_conversation(talk, capsys):
    last = talk(Parrot(interrupted=["first"]), "first", "second")
    assert [turn["content"] for turn in last] == ["first", "fi", "second"]
    told = capsys.readouterr()
    assert told.err.splitlines()[0] == "An empty line or Ctrl-D ends the conversation, Ctrl-C stops an answer."
    assert "(stopped)" in told.err
    assert told.out == "fisecond\n"


def test_lines_are_edited_where_python_can(talk):
    import sys

    sys.modules.pop("readline", None)
    talk(Parrot(), "a question")
    assert "readline" in sys.modules
