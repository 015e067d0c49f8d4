"""Reading a recipe file: YAML 1.2 to plain data, and where everything stands.

ruamel.yaml only parses. Its events, not its constructor: so the place of every key and value survives; anchors,
aliases, tags, keys that are no text and second documents are refused; line length, nesting and number of events are
bounded while they come; and a repeated key does not hide the problems after it. Plain scalars follow the core schema
of YAML 1.2 (section 10.3.2), where ruamel goes beyond it: `1e-3` is a number; `no`, `12:30`, `1_000`, `0b1` and
`2024-02-05` are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qquant.errors import UsageError
from qquant.recipe.words import UNREADABLE, Location, key_path, shown
from qquant.resources import lazy

if TYPE_CHECKING:
    import ruamel.yaml as ruamel
else:
    ruamel = lazy("ruamel.yaml")

MAX_DEPTH = 20
MAX_EVENTS = 20_000
MAX_LINE = 10_000
MAX_PROBLEMS = 100

Place = tuple[int, int]  # line, column; from 1
Event = Any  # an event of ruamel.yaml; which attributes it has depends on its kind


class Page:
    """A recipe file while it is read: where each key and value stands, and what is wrong so far."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.values: dict[Location, Place] = {}
        self.keys: dict[Location, Place] = {}
        self.renamed: dict[Location, Location] = {}  # where a mended key moved to -> where it stands
        self.unclear: set[Location] = set()  # reported already; what follows from it is noise
        self.problems: list[tuple[Place, str, str]] = []

    def origin(self, location: Location) -> Location:
        """Where `location` of the mended data stands in the file."""
        here: Location = ()
        for end in range(len(location)):
            here = self.renamed.get(location[: end + 1], (*here, location[end]))
        return here

    def report(self, location: Location, text: str, place: Place | None = None, *, unclear: bool = False) -> None:
        """Note a problem of the value at `location`; a value that is missing stands where its mapping does."""
        if any(location[:end] in self.unclear for end in range(len(location) + 1)):
            return
        if unclear:
            self.unclear.add(location)
        nearest = next(location[:end] for end in range(len(location), -1, -1) if location[:end] in self.values)
        self.problems.append((place or self.values[nearest], key_path(location), text))

    def fatal(self, place: Place, text: str) -> UsageError:
        """The error of a file that cannot be read further."""
        self.problems.append((place, key_path(()), text))
        return UsageError(self.message())

    def message(self) -> str:
        """Every problem, in the order of the file."""
        lines = [f"{self.file}:{line}:{column}: {path}: {text}" for (line, column), path, text in sorted(self.problems)]
        more = [f"{self.file}: and {len(lines) - MAX_PROBLEMS} more problems"] if len(lines) > MAX_PROBLEMS else []
        return "\n".join(lines[:MAX_PROBLEMS] + more)


class Reader:
    """Plain data from the events of one YAML document. Mappings are dicts, sequences tuples."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self._events: Iterator[Event] = iter(())
        self._count = 0
        self._depth = 0

    def read(self, text: str) -> Any:
        for line, content in enumerate(text.split("\n"), 1):
            if len(content) > MAX_LINE:  # ruamel takes the square of it to scan some lines
                raise self.page.fatal((line, MAX_LINE + 1), f"line too long; allowed: {MAX_LINE} characters")
        self._events = ruamel.YAML(typ="safe", pure=True).parse(text)
        try:
            return self._document()
        except ruamel.error.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            reason = ", ".join(part for part in (error.context, error.problem) if part)
            raise self.page.fatal(place, f"not valid YAML: {reason}") from error
        except ruamel.reader.ReaderError as error:
            before = text[: error.position]
            place = (before.count("\n") + 1, len(before) - before.rfind("\n"))
            raise self.page.fatal(place, f"not valid YAML: character U+{ord(text[error.position]):04X}") from error

    def _document(self) -> Any:
        self._next()  # the start of the stream
        event = self._next()
        if isinstance(event, ruamel.StreamEndEvent):
            raise self.page.fatal((1, 1), "the file is empty; allowed: mapping")
        if event.version not in (None, (1, 2)):
            version = ".".join(map(str, event.version))
            raise self.page.fatal(_place(event), f"wrong version of YAML, got %YAML {version}; allowed: 1.2")
        data = self._value(self._next(), ())
        self._next()  # the end of the document
        event = self._next()
        if not isinstance(event, ruamel.StreamEndEvent):
            raise self.page.fatal(_place(event), "a second document begins; allowed: one")
        return data

    def _next(self) -> Event:
        event = next(self._events)
        self._count += 1
        if self._count > MAX_EVENTS:
            raise self.page.fatal(_place(event), f"too long; allowed: {MAX_EVENTS} keys, values and brackets")
        self._depth += isinstance(event, ruamel.CollectionStartEvent) - isinstance(event, ruamel.CollectionEndEvent)
        if self._depth > MAX_DEPTH:
            raise self.page.fatal(_place(event), f"nested too deep; allowed: {MAX_DEPTH} levels")
        return event

    def _value(self, event: Event, location: Location) -> Any:
        is_empty = isinstance(event, ruamel.ScalarEvent) and event.start_mark.index == event.end_mark.index
        empty_at = self.page.keys.get(location, _place(event))  # the parser puts it where the next key stands
        self.page.values[location] = empty_at if is_empty else _place(event)
        readable = not self._refuse(event, location)
        match event:
            case ruamel.MappingStartEvent():
                return self._mapping(location)
            case ruamel.SequenceStartEvent():
                return self._sequence(location)
            case ruamel.ScalarEvent():
                return self._scalar(event, location) if readable else UNREADABLE
        return UNREADABLE

    def _refuse(self, event: Event, location: Location) -> bool:
        """Report an anchor, alias or tag."""
        if event.anchor is not None:
            what = f"anchors and aliases are not supported, got {shown(event.anchor)}; write the value out"
        elif not isinstance(event, ruamel.AliasEvent) and event.tag is not None:
            what = f"tags are not supported, got {shown(event.tag)}; write the value alone"
        else:
            return False
        self.page.report(location, what, unclear=True)
        return True

    def _mapping(self, location: Location) -> dict[str, Any]:
        data: dict[str, Any] = {}
        while not isinstance(event := self._next(), ruamel.MappingEndEvent):
            key = self._key(event, location)
            if key is None:
                self._skip(self._next())
            elif key in data:
                line = self.page.keys[*location, key][0]
                self.page.report((*location, key), f"repeated key, first on line {line}", _place(event))
                self._skip(self._next())
            else:
                self.page.keys[*location, key] = _place(event)
                data[key] = self._value(self._next(), (*location, key))
        return data

    def _key(self, event: Event, location: Location) -> str | None:
        """The key that begins with `event`; None where it is not text, which is then reported."""
        if isinstance(event, ruamel.ScalarEvent) and event.anchor is None and event.tag is None:
            key = _scalar(event)
            if isinstance(key, str) and not _CONTROL.search(key):
                return key
            got = shown(key)
        else:
            got = "something else"
        self.page.report(location, f"a key must be text, got {got}", _place(event))
        self._skip(event)
        return None

    def _sequence(self, location: Location) -> tuple[Any, ...]:
        data: list[Any] = []
        while not isinstance(event := self._next(), ruamel.SequenceEndEvent):
            data.append(self._value(event, (*location, len(data))))
        return tuple(data)

    def _scalar(self, event: Event, location: Location) -> Any:
        value = _scalar(event)
        if isinstance(value, str) and _CONTROL.search(value):
            self.page.report(location, f"control character in text, got {shown(value)}", unclear=True)
            return UNREADABLE
        return value

    def _skip(self, event: Event) -> None:
        """Read to the end of the node that begins with `event`."""
        outside = self._depth - isinstance(event, ruamel.CollectionStartEvent)
        while self._depth > outside:
            self._next()


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **{f"{sign}{word}": float(f"{sign}inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
}
_INTEGERS = ((re.compile(r"[-+]?[0-9]+"), 10), (re.compile(r"0o[0-7]+"), 8), (re.compile(r"0x[0-9a-fA-F]+"), 16))
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_MAX_DIGITS = 300  # a longer number is beyond every range and becomes infinite; Python refuses to read more than 4300


def _place(event: Event) -> Place:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _scalar(event: Event) -> Any:
    return plain(event.value) if event.implicit[0] else event.value


def plain(text: str) -> Any:
    """The value of an unquoted scalar in the core schema of YAML 1.2."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    for pattern, base in _INTEGERS:
        if pattern.fullmatch(text):
            return int(text, base) if len(text) <= _MAX_DIGITS else float("-inf" if text[0] == "-" else "inf")
    return float(text) + 0.0 if _FLOAT.fullmatch(text) else text  # + 0.0: -0.0 equals 0.0 and must have its fingerprint
