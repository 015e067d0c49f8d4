"""Text that is no recipe, damaged or hostile: a usage error with a place, soon."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qquant import recipe
from qquant.errors import UsageError
from tests.worlds.recipe_text import GOOD, problems


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "1:1: recipe: the file is empty; allowed: mapping"),
        ("# nothing\n", "1:1: recipe: the file is empty; allowed: mapping"),
        ("- a\n", "1:1: recipe: wrong type, got a list; allowed: mapping"),
        ("demo\n", '1:1: recipe: wrong type, got "demo"; allowed: mapping'),
        (
            "version: [\n",
            "2:1: recipe: not valid YAML: while parsing a flow node, expected the node content, but found '<stream end>'",
        ),
        ("version: 1\nname: a: b\n", "2:8: recipe: not valid YAML: mapping values are not allowed here"),
        ("a: |\n \n   b\n", "3:4: recipe: not valid YAML: more indented follow up line than first in a block scalar"),
        ("version: 1\nname: a\x00b\n", "2:8: recipe: not valid YAML: character U+0000"),
        ("version: 1\n---\nversion: 1\n", "2:1: recipe: a second document begins; allowed: one"),
        ("%YAML 1.1\n---\nversion: 1\n", "2:1: recipe: wrong version of YAML, got %YAML 1.1; allowed: 1.2"),
        ("[" * 5000, "1:21: recipe: nested too deep; allowed: 20 levels"),
        ("? " + "[" * 5000, "1:22: recipe: nested too deep; allowed: 20 levels"),
        ("a: [" + "b,\n" * 20_000 + "]", "19996:1: recipe: too long; allowed: 20000 keys, values and brackets"),
        ("a: " + "b" * 10_000, "1:10001: recipe: line too long; allowed: 10000 characters"),
    ],
)
def test_what_cannot_be_read_further(text, line):
    assert problems(text)[-1] == f"r.yaml:{line}"


def test_yaml_1_2_directive_is_fine():
    assert recipe.parse("%YAML 1.2\n---\n" + GOOD) == recipe.parse(GOOD)


def test_the_largest_file(tmp_path):
    file = tmp_path / "r.yaml"
    comment = "#" * 999 + "\n"
    file.write_text(GOOD + comment * 990)
    assert recipe.load(file).name == "good"
    file.write_text(GOOD + comment * 1001)
    with pytest.raises(UsageError, match="a recipe has at most 1000000 bytes, this file has more"):
        recipe.load(file)


def _messages(text):
    try:
        recipe.parse(text)
    except UsageError as error:
        return str(error).splitlines()
    return []


# Distrust.

FRAGMENTS = [
    "[", "]", "{", "}", ":", "- ", "? ", '"', "'", "|", ">", "&a ", "*a", "!x ", "!<", "%", "@", "#", "\n", "  ", "\t", "---\n", "...\n", "%YAML 9\n",
    "%TAG ! x\n", "\\", "\\ud800", "\0", "\u2028", "\ufeff", "<<: ", "1", ".nan", "null", "\x85", "\r", "|2\n", "0x", "-", ".", "\U0001f600", "format: awq",
    "bits", "calibration: 5", "artifacts: x", "sources: {}", ",", "\ud800",
]  # fmt: skip


@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 10), st.sampled_from(FRAGMENTS)), min_size=1, max_size=5
    )
)
@settings(max_examples=100, deadline=None)
def test_any_damage_is_a_usage_error_with_a_place(edits):
    text = GOOD
    for start, length, fragment in edits:
        text = text[:start] + fragment + text[start + length :]
    for line in _messages(text):
        assert re.match(r"<recipe>:\d+:\d+: \S", line)


@pytest.mark.parametrize(
    "text",
    [
        "[{" * 4990 + "\n" + "[{" * 4990, "[\n" + (" !" + "!" * 9000 + ",\n") * 100, "a: '" + "\n\n" * 400_000, "a: >\n" + " x\n\n" * 200_000,
        "{" + ",\n".join(f"k{index}: 1" for index in range(9990)) + "}", "? a\n" * 200_000, " " * 9999 + ("\n" + " " * 9999) * 90,
        "version: 1\nartifacts: [" + ",\n".join(["{format: x}"] * 3000) + "]", "%TAG !e! x\n" * 80_000,
    ],
    ids=["brackets", "tags", "quoted", "folded", "keys", "repeated", "spaces", "artifacts", "directives"],
)  # fmt: skip
def test_hostile_text_is_refused_soon(text):
    start = time.process_time()
    lines = problems(text)
    assert time.process_time() - start < 5
    assert sum(map(len, lines)) < 100_000
