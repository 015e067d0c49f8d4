"""Whether an answer is right, by rules that need no reader and run nothing.

tools     the first call in it parses, has the name of a right one, and its arguments: ReAct (Action, Action Input) or JSON
code      it parses as Python (`ast.parse`; it is never executed) and defines the function that was asked for
loops     an answer that no stop token ended, whose last `TAIL` tokens repeat a period of at most `PERIOD`
script    most of its letters are of the question's script; an answer of less than `LETTERS` letters is in no script
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from qquant.calibration.behaviour import letters_of, script

TAIL, PERIOD = 48, 16
LETTERS = 8
REACT = re.compile(r"Action:[ \t]*([^\s]+)[ \t]*\n+Action Input:\s*")
NAMES, ARGUMENTS = ("function", "name"), ("parameters", "arguments")
FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def calls_right(answer: str, right: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the first call of an answer is one of `right`, each a name and the arguments that a question gives.

    Texts are compared without case, outer blanks and a leading "the"; arguments beyond the right ones are the model's own.
    """
    call = first_call(answer)
    return call is not None and any(_is(call, one) for one in right)


def first_call(answer: str) -> tuple[str, Mapping[str, Any]] | None:
    """(name, arguments) of the first call of an answer; None where there is none that parses."""
    react = REACT.search(answer)
    if react:
        arguments = _json_at(answer, react.end())
        return (react[1], arguments) if isinstance(arguments, dict) else None
    place = re.search(r"[\[{]", answer)
    call = _json_at(answer, place.start()) if place else None
    if isinstance(call, list) and call:
        call = call[0]
    if not isinstance(call, dict):
        return None
    name = next((call[key] for key in NAMES if key in call), None)
    arguments = next((call[key] for key in ARGUMENTS if key in call), None)
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _json_at(text: str, place: int) -> Any:
    try:
        return json.JSONDecoder().raw_decode(text, place)[0]
    except (ValueError, RecursionError):
        return None


def _is(call: tuple[str, Mapping[str, Any]], right: Mapping[str, Any]) -> bool:
    name, arguments = call
    wanted = right["arguments"]
    return name == right["name"] and all(
        key in arguments and _plain(arguments[key]) == _plain(value) for key, value in wanted.items()
    )


def _plain(value: Any) -> str:
    return str(value).strip().casefold().removeprefix("the ")


def compiles(answer: str, function: str) -> bool:
    """Whether the first block of code in an answer, or else all of it, parses and defines `function`."""
    block = FENCE.search(answer)
    code = block[1] if block else answer
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


def loops(ids: Sequence[int], stops: Sequence[int]) -> bool:
    """Whether an answer ran into the budget while it repeated itself."""
    if len(ids) < TAIL or ids[-1] in stops:
        return False
    tail = list(ids[-TAIL:])
    return any(tail[period:] == tail[:-period] for period in range(1, PERIOD + 1))


def in_script(answer: str, question: str) -> bool:
    """Whether an answer is written in the script of its question."""
    return letters_of(answer) < LETTERS or script(answer) == script(question)
