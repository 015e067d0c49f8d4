"""What reads a draft's files back while the rest is written: each from its beginning on, as far as it is journalled.

A file is hashed, and its tensors are compared with what was written. One piece of work is under way at a time, and goes on with what was
journalled meanwhile, so nobody waits for it. What it did not come to is done when everything is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from qquant.artifact.journal import JournalUnit
from qquant.disk.digest import piece_of
from qquant.formats import ReadBack
from qquant.formats.planned import PlannedFile
from qquant.report.solved import checksums


@dataclass
class Beginning:
    """The first bytes of a file that was read back, and the tensors in them that are as they were written."""

    digest: Any = field(default_factory=hashlib.sha256)
    bytes: int = 0
    compared: set[str] = field(default_factory=set)

    def read(self, path: Path, stop: int) -> None:
        """Go on to byte `stop`, or the end of the file."""
        buffer = piece_of(stop - self.bytes)
        with path.open("rb", buffering=0) as source:
            source.seek(self.bytes)
            while count := source.readinto(buffer[: max(0, stop - self.bytes)]):
                self.digest.update(buffer[:count])
                self.bytes += count


@dataclass
class Behind:
    """The beginnings of a draft's files."""

    folder: Path
    files: Sequence[PlannedFile]
    ahead: dict[str, Beginning] = field(default_factory=dict)  # by name of the file
    again: set[str] = field(
        default_factory=set
    )  # files of which something was written once more after it was journalled
    asked: Sequence[JournalUnit] | None = None  # units that were journalled and not come to
    busy: bool = False
    turn: Lock = field(default_factory=Lock)

    def look(
        self, submit: Callable[[Callable[[], None]], None], back: ReadBack, units: Mapping[str, JournalUnit]
    ) -> None:
        """Have `submit` read up to the first tensor of each file that none of `units` holds; nothing more where they hold all."""
        journalled = {name for unit in units.values() for name in unit.checksums}
        if all(tensor.name in journalled for file in self.files for tensor in file.tensors):
            return
        with self.turn:
            self.asked, busy, self.busy = list(units.values()), self.busy, True
        if not busy:
            submit(partial(self._go_on, back))

    def _go_on(self, back: ReadBack) -> None:
        while True:
            with self.turn:
                units, self.asked = self.asked, None
                if units is None:
                    self.busy = False
                    return
            try:
                self._read(units, back)
            except BaseException:  # told to who asks next
                self.busy = False
                raise

    def _read(self, units: Sequence[JournalUnit], back: ReadBack) -> None:
        written = {name: value for unit in units for name, value in unit.checksums.items()}
        values = checksums(entry for unit in units for entry in unit.record)
        for file in self.files:
            if not file.tensors or file.name in self.again:
                continue
            beginning = self.ahead.setdefault(file.name, Beginning())
            stop = min((tensor.offset for tensor in file.tensors if tensor.name not in written), default=file.size)
            beginning.read(self.folder / file.name, stop)
            passed = {tensor.name for tensor in file.tensors if tensor.offset + tensor.nbytes <= stop}
            fresh = {name: written[name] for name in passed - beginning.compared}
            for compare in back.tensors(fresh, values):
                compare()
            beginning.compared |= passed

    def compared(self) -> set[str]:
        """Tensors that need not be compared again; beginnings that were written again are forgotten."""
        for name in self.again:
            self.ahead.pop(name, None)
        return {name for beginning in self.ahead.values() for name in beginning.compared}

    def sha256(self, name: str) -> str:
        """That of a file, of which the rest is read now."""
        path, beginning = self.folder / name, self.ahead.pop(name, Beginning())
        beginning.read(path, path.stat().st_size)
        return str(beginning.digest.hexdigest())
