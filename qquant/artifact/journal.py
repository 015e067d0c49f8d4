"""The journal of a draft: which units are done, and what the solver said of them; a line each, added when its bytes were synced.

    {"key": ..., "plan": ...}                                   what the draft is of: its inputs, its files and their heads
    {"unit", "checksums", "record", "seconds", "sha256"}        one unit; `sha256` is that of the rest of the line, as JSON with sorted keys

A line that is not whole, or was changed, ends what is read of a journal: the units from there on are made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qquant.disk.digest import sha256_of_data
from qquant.disk.records import to_plain, typed
from qquant.disk.writes import put, sync, write_synced
from qquant.errors import InputError
from qquant.report.solved import Solved


@dataclass
class JournalUnit:
    """One journalled piece of an artifact; a line of the journal."""

    unit: str  # "block 3" or "rest"
    checksums: dict[str, str]  # stored tensor -> sha256 of its bytes
    record: tuple[Solved, ...]  # what the solver says of it
    seconds: dict[str, float] = field(default_factory=dict)  # by stage and block; in no artifact

    def line(self) -> dict[str, Any]:
        """The line of this unit."""
        plain = to_plain(self)
        return plain | {"sha256": sha256_of_data(plain)}


@dataclass(frozen=True)
class JournalHead:
    """The first line of a journal."""

    key: str
    plan: str

    def line(self) -> dict[str, Any]:
        """The line."""
        return to_plain(self)


@dataclass(frozen=True)
class Journal:
    """The journal in the file `path`."""

    path: Path

    def begin(self, head: JournalHead, units: Iterable[JournalUnit] = ()) -> None:
        """Write it whole, all lines at once."""
        write_synced(self.path, b"".join(map(_encoded, [head.line(), *(unit.line() for unit in units)])))

    def add(self, unit: JournalUnit) -> None:
        """Add the line of a unit."""
        put(self.path, self.path.stat().st_size, _encoded(unit.line()))
        sync(self.path)

    def read(self) -> tuple[JournalHead | None, list[JournalUnit], bool]:
        """(head, units of the lines up to the first that is damaged, whether that is all there is); no head: it is of no use."""
        pieces = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
        head: JournalHead | None = None
        units: list[JournalUnit] = []
        for piece in pieces[:-1]:
            try:
                content = json.loads(piece)
                kind: type[JournalHead | JournalUnit] = JournalUnit if head else JournalHead
                line = typed(kind, content, str(self.path))
            except (ValueError, RecursionError, InputError):
                break
            if line.line() != content:
                break
            if isinstance(line, JournalHead):
                head = line
            else:
                units.append(line)
        return head, units, pieces[1 + len(units) :] == [b""]


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"
