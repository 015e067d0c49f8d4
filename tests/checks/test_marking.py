"""Marks: every right answer of the bundled questions is right, and what looks like one is not."""

import json

import pytest

from qquant.calibration import heldout_texts
from qquant.calibration.behaviour import script
from qquant.checks import marking

ROWS = [json.loads(line) for line in heldout_texts()["behaviour-test"].read().splitlines()]
CALLS = [row for row in ROWS if row["task"] == "tools"]
PROGRAMS = [row for row in ROWS if row["task"] == "code"]


def answer(row):
    return row["messages"][-1]["content"]


def test_the_bundled_answers_are_right_and_those_of_others_are_not():
    assert len(CALLS) == 64
    assert len(PROGRAMS) == 48
    for row, other in zip(CALLS, CALLS[1:] + CALLS[:1], strict=True):
        assert answer(row) == "".join(row["pieces"])
        assert marking.calls_right(answer(row), row["calls"]), answer(row)
        same = any(one in other["calls"] for one in row["calls"])
        assert marking.calls_right(answer(other), row["calls"]) == same
    for row, other in zip(PROGRAMS, PROGRAMS[2:] + PROGRAMS[:2], strict=True):
        assert marking.compiles(answer(row), row["function"])
        assert not marking.compiles(answer(other), row["function"])


def test_every_bundled_program_does_what_it_is_asked_for():
    """Ours are executed once, so that a question is not impossible."""
    known = {}
    for row in PROGRAMS:
        exec(compile(marking.FENCE.search(answer(row))[1], "ours", "exec"), known)  # noqa: S102
    assert known["count_vowels"]("Education") == 5
    assert known["running_total"]([1, 2, 3]) == [1, 3, 6]
    assert [known["is_leap_year"](year) for year in (1900, 2000, 2023, 2024)] == [False, True, False, True]
    assert list(known["neighbours"]([1, 2, 3], 2)) == [[1, 2], [2, 3]]
    assert known["merge_sorted"]([1, 4], [2, 3, 9]) == [1, 2, 3, 4, 9]
    assert known["binary_search"]([1, 3, 5], 5) == 2
    assert known["roman"](39) == "XXXIX"
    assert known["primes_below"](12) == [2, 3, 5, 7, 11]
    assert known["caesar"]("xyz!", 3) == "abc!"
    assert known["collatz_steps"](6) == 8
    assert known["second_largest"]([3, 3]) is None


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('Thought: x\nAction: route\nAction Input: {"begin": "Castle", "goal": "the Pier "}\nObservation: {"m": 3}', True),
        ('Action: route\nAction Input: {"begin": "castle", "goal": "pier", "unit": "m"}', True),
        ('Action: route\nAction Input: {"begin": "castle"}', False),
        ('Action: route\nAction Input: {"begin": "castle", "goal": "pier"', False),
        ('Action: walk\nAction Input: {"begin": "castle", "goal": "pier"}', False),
        ('Action: route\nAction Input: ["castle", "pier"]', False),
        ('[{"function": "route", "parameters": {"begin": "castle", "goal": "pier"}}]', True),
        ('Sure: {"name": "route", "arguments": {"begin": "castle", "goal": "pier"}}', True),
        ('{"name": 3, "arguments": {}}', False),
        ("[]", False),
        ("[" * 100_000, False),
        ("route(castle, pier)", False),
        ("", False),
    ],
)  # fmt: skip
def test_calls(text, right):
    assert marking.calls_right(text, [{"name": "route", "arguments": {"begin": "the castle", "goal": "pier"}}]) is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Here it is:\n```python\ndef f(x):\n    return x\n```\nIt returns x.", True),
        ("```\ndef f(x):\n    return x", True),  # the budget ended it
        ("def f(x):\n    return x\n", True),
        ("```python\ndef f(x)\n    return x\n```", False),
        ("```python\ndef g(x):\n    return x\n```", False),
        ("hello", False),
        ("def f(x):\n    return '\\d'", True),
        ("def f(x):\n" + "    return " + "(" * 5000, False),
        ("f = 1\0", False),
    ],
)
def test_programs(text, right):
    assert marking.compiles(text, "f") is right


def test_a_loop_is_a_tail_that_repeats_and_does_not_end():
    around = [7, 8, 9] * 30
    assert marking.loops(list(range(40)) + around, (2,))
    assert not marking.loops([*around, 2], (2,))
    assert not marking.loops(around, (9,))  # it ended, whatever came before
    assert not marking.loops(around[:40], (2,))  # too short to tell
    assert not marking.loops(list(range(200)), (2,))
    assert not marking.loops(around[:-1] + [1], (2,))
    assert not marking.loops(list(range(40, 40 + marking.PERIOD + 1)) * 6, (2,))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Guten Tag", "Latin"), ("Tiếng Việt", "Latin"), ("Добрый день", "Cyrillic"), ("مرحبا بك", "Arabic"), ("สวัสดี", "Thai"),
        ("안녕하세요", "Korean"), ("こんにちは", "Japanese"), ("観葉植物の葉先", "Japanese"), ("用两句话介绍", "Chinese"), ("12 + 3", ""),
    ],
)  # fmt: skip
def test_scripts(text, name):
    assert script(text) == name


def test_an_answer_is_in_the_script_of_its_question():
    assert marking.in_script("Das weiß ich leider nicht.", "Why is the sky blue?")
    assert not marking.in_script("因为光线在空气里散射。", "Why is the sky blue?")
    assert marking.in_script("42.", "為什麼?")
    assert not marking.in_script("It is because of scattering", "為什麼天空是藍色的?")
