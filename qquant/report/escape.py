r"""Texts of strangers, made harmless for the place where they are shown: one function a sink, and nowhere else.

    visible    characters that steer a terminal (C0, DEL, C1), turn the order of text (U+202A to U+202E, U+2066 to U+2069) or are half of one,
               as \x1b, \u202e
    in_line    the same, on one line: a terminal's table, a warning, a workflow's log, where a line that begins with :: is a command
    in_lines   the same for a message of several lines; none of them begins with ::
    in_json    the same in a JSON text, which stays that
    markdown   a cell or a line of GitHub's Markdown: no tag, no link, no image, no code, no new column
    xml        what XML 1.0 can hold
    command    the message of a workflow command (::error title=...::MESSAGE)
    command_property    a property of one (title), which colons and commas would end; in a message they are shown as they are

HTML is escaped by its template (`qquant.report.html`), which takes texts through `visible` first.
"""

from __future__ import annotations

import re

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
COMMAND = re.compile(r"(?m)^(\s*):(?=:)")
MARKS = re.compile(r"([\\`*\[\]|~])")
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _named(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def visible(text: str) -> str:
    """The text with steering characters by their names; line ends and tabs stay."""
    return STEERING.sub(_named, text)


def in_line(text: str) -> str:
    """The text on one line, without steering characters."""
    return COMMAND.sub(r"\1: ", visible(text).replace("\n", "\\n").replace("\t", " "))


def in_lines(text: str) -> str:
    """A message of several lines, none of which steers a terminal or a workflow."""
    return COMMAND.sub(r"\1: ", visible(text))


def in_json(content: str) -> str:
    """A JSON text whose strings spell steering characters as JSON does."""
    return STEERING.sub(lambda match: f"\\u{ord(match[0]):04x}", content)


def markdown(text: str) -> str:
    """The text in a cell or a line of Markdown, as it reads."""
    plain = MARKS.sub(r"\\\1", in_line(text))
    return plain.replace("&", "&amp;").replace("<", "&lt;")


def xml(text: str) -> str:
    """The text as XML can hold it; marks of XML are escaped by what writes it."""
    return NOT_XML.sub(_named, text)


def command(text: str) -> str:
    """The text as the message of a workflow command: the runner undoes these three, and nothing else."""
    return visible(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def command_property(text: str) -> str:
    """The text as a property of a workflow command."""
    return command(text).replace(":", "%3A").replace(",", "%2C")
