"""Artifacts on disk: written in place, journalled, verified, then renamed; and read back, whoever made them.

    DIR/.partial/<name>/...        files preallocated to their planned size, filled tensor by tensor
    DIR/.partial/<name>.journal    one line per finished unit (a decoder block, or the tensors outside the blocks), appended and
                                   synced after the unit's bytes were synced (`journal`)
    DIR/<folder>/qquant-manifest.json   size and sha256 of every file, and the build's key; no times, so the same build, the same bytes

A folder with a manifest is complete: it gets its final name in one rename, after everything in it was read back. An artifact that
joins a folder of earlier ones does so in a copy of that folder (hard links), which then takes its place:

    DIR/.partial/joined/<folder>    the copy, with the new files and the new manifest
    DIR/.partial/replaced/<folder>  the folder as it was, until the copy has its name; a build that finds it puts it back

Where a thread writes, another reads each file back as far as it is journalled from its beginning on: it hashes the file, and compares its tensors
with what was written. The end of a file, and all values that are decoded on a GPU, are compared when everything is written.

After a kill the journal says which units are done; their bytes, and those of every head and small file, are checked before they are
trusted. The key binds a draft to its inputs (recipe entry, checkpoint bytes, calibration tokens, versions): another key starts over.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qquant import background, devices
from qquant.algorithms.checksum import as_bytes
from qquant.artifact.behind import Behind
from qquant.artifact.journal import Journal, JournalHead, JournalUnit
from qquant.artifact.manifest import ArtifactEntry, FileFacts, Manifest, Origin, read_manifest
from qquant.disk.digest import sha256_of
from qquant.disk.output import MANIFEST
from qquant.disk.writes import copy, crash_point, create, make_folder, put, rename, sync, write_synced
from qquant.errors import QQuantError
from qquant.formats import FORMATS, ReadBack
from qquant.formats.planned import PlannedArtifact, PlannedFile, PlannedTensor
from qquant.report.solved import Solved, checksums

CHUNK = 1 << 24
REPLACED = "replaced"


def in_place(work: Callable[[], None]) -> None:
    """Do `work` now: what `Draft.submit` is without a thread."""
    work()


@dataclass
class Draft:
    """An artifact under construction in `partial`."""

    plan: PlannedArtifact
    partial: Path
    key: str
    units: dict[str, JournalUnit] = field(default_factory=dict)  # journalled; not one that `submit` has
    submit: Callable[[Callable[[], None]], None] = in_place  # what takes pieces of work that write
    look: Callable[[Callable[[], None]], None] | None = None  # and that read back, while others write
    back: ReadBack | None = None

    def __post_init__(self) -> None:
        """Nothing is read back yet."""
        self.behind = Behind(self.folder, self.plan.files)

    @property
    def folder(self) -> Path:
        """The folder where the files are until they are complete."""
        return self.partial / self.plan.name

    @property
    def journal(self) -> Path:
        """The file that lists units that are done, one JSON object a line."""
        return self.partial / f"{self.plan.name}.journal"

    @property
    def places(self) -> dict[str, tuple[PlannedFile, PlannedTensor]]:
        """Stored tensor -> file and place."""
        return {tensor.name: (file, tensor) for file in self.plan.files for tensor in file.tensors}

    def open(self) -> None:
        """Continue a draft of the same key, or start one: small files written, tensor files preallocated, all of it synced."""
        if self._resume():
            return
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        for file in self.plan.files:
            path = self.folder / file.name
            make_folder(path.parent)
            if file.copy_of:
                copy(file.copy_of, path)
            else:
                create(path, file.size, file.head)
            sync(path.parent)
            crash_point("while a draft is prepared")
        Journal(self.journal).begin(self._head())

    def _head(self) -> JournalHead:
        digest = hashlib.sha256()
        for file in self.plan.files:
            digest.update(f"{file.name} {file.size} {hashlib.sha256(file.head).hexdigest()}".encode())
        return JournalHead(self.key, digest.hexdigest())

    def _resume(self) -> bool:
        """Read the journal; True if it belongs to this key. Units whose bytes do not match are forgotten."""
        head, units, whole = Journal(self.journal).read()
        if head is None or head != self._head() or not all(self._intact(file) for file in self.plan.files):
            return False
        for unit in units:
            if all(self._stored_sha256(name) == value for name, value in unit.checksums.items()):
                self.units[unit.unit] = unit
        if not whole or [*self.units.values()] != units:
            self.journal.unlink()
            crash_point("while a journal is written again")
            Journal(self.journal).begin(head, self.units.values())
        return True

    def _intact(self, file: PlannedFile) -> bool:
        """Whether a file has its size, and its head, or is the copy that it should be."""
        path = self.folder / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        if file.copy_of:
            return sha256_of(path) == sha256_of(file.copy_of)
        with path.open("rb") as content:
            return content.read(len(file.head)) == file.head

    def _stored_sha256(self, name: str) -> str | None:
        if name not in self.places:
            return None
        file, tensor = self.places[name]
        digest = hashlib.sha256()
        with (self.folder / file.name).open("rb") as source:
            source.seek(tensor.offset)
            left = tensor.nbytes
            while left:
                piece = source.read(min(CHUNK, left))
                if not piece:
                    return None
                digest.update(piece)
                left -= len(piece)
        return digest.hexdigest()

    @contextmanager
    def write_behind(self, device: torch.device) -> Iterator[None]:
        """Have a thread do what `submit` is given meanwhile, one piece of work in flight, and another read it back, if threads help a build on `device`; all of it at the end."""
        threaded = devices.threads_help(device)
        with background.write_behind(threaded) as look, background.write_behind(threaded) as submit:
            self.submit, self.look = submit, look if threaded else None
            self.back = self._read_back(device)
            try:
                yield
            finally:
                self.submit, self.look = in_place, None

    def _read_back(self, device: torch.device) -> ReadBack:
        paths = [self.folder / file.name for file in self.plan.files if file.tensors]
        return self.back or FORMATS[self.plan.format].read_back(paths, device)

    def write(
        self,
        unit: str,
        pieces: Iterable[tuple[str, int, Tensor]],
        record: Sequence[Solved],
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Write (stored name, byte offset inside the tensor, piece) and journal the unit, with what took how long.

        Raises:
            EnvironmentMissingError: the disk is full.
        """
        writer = UnitWriter(self, unit)
        for name, offset, piece in pieces:
            writer.put(name, offset, piece)
        writer.close(record, seconds)

    def journalled(self, unit: JournalUnit) -> None:
        """Note that the bytes of a unit are there, after they were synced."""
        crash_point("before a unit is journalled")
        Journal(self.journal).add(unit)
        self.units[unit.unit] = unit
        crash_point("after a unit is journalled")
        if self.look and self.back:
            self.behind.look(self.look, self.back, self.units)

    def readings(self, device: torch.device) -> Iterator[Callable[[], tuple[str, str]]]:
        """Read back what was written and compare it: pieces of work for `finish`, which threads may do; (file, sha256 or "") each.

        Weights of folders are dequantized on `device`. The pieces raise QQuantError where a tensor differs from what was written.

        Raises:
            QQuantError: a tensor is missing.
        """
        compared = self.behind.compared()
        written = {name: value for unit in self.units.values() for name, value in unit.checksums.items()}
        unwritten = self.places.keys() - written.keys()
        if unwritten:
            raise QQuantError(f"{self.plan.name}: {len(unwritten)} tensors were never written, first {min(unwritten)}")
        values = checksums(entry for unit in self.units.values() for entry in unit.record)
        for file in self.plan.files:
            yield partial(self._hashed, file.name)
        back, left = self._read_back(device), {name: written[name] for name in written.keys() - compared}
        for compare in chain(back.tensors(left, values), back.values(values)):
            yield partial(_nameless, compare)
        for file in self.plan.files:
            yield partial(_nameless, partial(self._settle, file))

    def _hashed(self, name: str) -> tuple[str, str]:
        """The sha256 of a file; that it is not there is told by what reads it."""
        return name, self.behind.sha256(name) if (self.folder / name).is_file() else ""

    def _settle(self, file: PlannedFile) -> None:
        if not self._intact(file):
            raise QQuantError(f"{self.folder / file.name}: is not what was written. Run the same command again")
        sync(self.folder / file.name)

    def finish(self, target: Path, origin: Origin, read: Iterable[tuple[str, str]] | None = None) -> Path:
        """Make the artifact visible in `target` with its manifest, which says its `origin`; the final folder.

        `read`: what the `readings` gave; None: they are done now, on the CPU.
        """
        if read is None:
            read = [work() for work in self.readings(torch.device("cpu"))]
        hashed = {name: sha256 for name, sha256 in read if name}
        files = {file.name: FileFacts(file.size, hashed[file.name]) for file in self.plan.files}
        layers = tuple(entry for unit in self.units.values() for entry in unit.record)
        entry = ArtifactEntry(
            self.key, self.plan.format, files, origin.recipe, dict(origin.inputs), layers, origin.adapter
        )
        final = target / self.plan.folder
        manifest = read_manifest(final) if final.exists() else Manifest()
        content = manifest.with_artifact(self.plan.name, entry).to_json()
        if final.exists():
            joined = self._joined(final)
            write_synced(joined / MANIFEST, content)
            crash_point("before a folder is replaced")
            replaced = self.partial / REPLACED / self.plan.folder
            make_folder(replaced.parent)
            rename(final, replaced)
            crash_point("while a folder is replaced")
            rename(joined, final)
            shutil.rmtree(replaced)
        else:
            write_synced(self.folder / MANIFEST, content)
            crash_point("before a folder gets its name")
            rename(self.folder, final)
        crash_point("after a folder got its name")
        self.journal.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.back = None
        return final

    def _joined(self, final: Path) -> Path:
        """A folder with the files of `final` and of this draft, by links where the file system has them."""
        joined = self.partial / "joined" / self.plan.folder
        shutil.rmtree(joined, ignore_errors=True)
        for folder in (final, self.folder):
            for path in sorted(folder.rglob("*")):
                if path.is_dir() or path.name == MANIFEST:
                    continue
                linked = joined / path.relative_to(folder)
                make_folder(linked.parent)
                try:
                    os.link(path, linked)
                except OSError:
                    shutil.copyfile(path, linked)
                    sync(linked)
                sync(linked.parent)
                crash_point("while a folder is joined")
        return joined


@dataclass
class UnitWriter:
    """A unit that is being written, piece by piece: `put` for each tensor from its beginning to its end, then `close`."""

    draft: Draft
    unit: str
    digests: dict[str, Any] = field(default_factory=dict)
    filled: dict[str, int] = field(default_factory=dict)
    touched: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.places = self.draft.places

    def put(self, name: str, offset: int, piece: Tensor) -> None:
        """Write and hash a piece that begins at byte `offset` of stored tensor `name`."""
        file, tensor = self.places[name]
        data = as_bytes(piece)
        if offset != self.filled.get(name, 0) or offset + len(data) > tensor.nbytes:
            raise AssertionError(f"{name}: {len(data)} bytes at {offset} do not fit the plan ({tensor.nbytes})")
        self.filled[name] = offset + len(data)
        self.digests.setdefault(name, hashlib.sha256()).update(data)
        path = self.draft.folder / file.name
        self.touched.add(path)
        if any(name in unit.checksums for unit in self.draft.units.values()):
            self.draft.behind.again.add(file.name)
        put(path, tensor.offset + offset, data)

    def close(self, record: Sequence[Solved], seconds: Mapping[str, float] | None = None) -> None:
        """Sync what was written and journal the unit."""
        short = [name for name, count in self.filled.items() if count != self.places[name][1].nbytes]
        if short:
            raise AssertionError(
                f"{short[0]}: only {self.filled[short[0]]} of {self.places[short[0]][1].nbytes} bytes written"
            )
        crash_point("before a unit is synced")
        for path in sorted(self.touched):
            sync(path)
        checksums = {name: digest.hexdigest() for name, digest in self.digests.items()}
        self.draft.journalled(JournalUnit(self.unit, checksums, tuple(record), dict(seconds or {})))


def _nameless(work: Callable[[], None]) -> tuple[str, str]:
    """A piece of work that has nothing to say unless it fails."""
    work()
    return "", ""
