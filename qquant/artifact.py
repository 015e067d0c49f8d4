"""Artifacts on disk: written in place, journalled, verified, then renamed; and read back, whoever made them.

    DIR/.partial/<name>/...        files preallocated to their planned size, filled tensor by tensor
    DIR/.partial/<name>.journal    one JSON line per finished unit (a decoder block, or the tensors outside the blocks),
                                   appended and synced after the unit's bytes were synced: {unit, checksums, record}
    DIR/<folder>/qquant-manifest.json   size and sha256 of every file, and the build's key; the last file to be written

A folder with a manifest is complete: nothing is renamed to its final name before it was read back. After a kill the journal says
which units are done; their bytes are checked against the recorded checksums before they are trusted. The key binds a draft to
its inputs (recipe entry, checkpoint bytes, calibration tokens, versions): another key starts over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qquant.checkpoint import Checkpoint, WeightSource
from qquant.errors import InputError, QQuantError, UsageError
from qquant.formats import FORMATS, detect
from qquant.layout import PlannedArtifact, PlannedFile, PlannedTensor
from qquant.output import MANIFEST, sync, write_synced
from qquant.untrusted import read_json

CHUNK = 1 << 24


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes as the file stores them (little-endian, contiguous)."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Unit:
    """One journalled piece of an artifact."""

    name: str  # "block 3" or "rest"
    checksums: dict[str, str]  # stored tensor -> sha256 of its bytes
    record: list[dict[str, Any]]  # per linear: errors, damping, fallback


@dataclass
class Draft:
    """An artifact under construction in `partial`."""

    plan: PlannedArtifact
    partial: Path
    key: str
    units: dict[str, Unit] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the files are until they are complete."""
        return self.partial / self.plan.name

    @property
    def journal(self) -> Path:
        """Units that are done."""
        return self.partial / f"{self.plan.name}.journal"

    @property
    def places(self) -> dict[str, tuple[PlannedFile, PlannedTensor]]:
        """Stored tensor -> file and place."""
        return {tensor.name: (file, tensor) for file in self.plan.files for tensor in file.tensors}

    def open(self) -> None:
        """Continue a draft of the same key, or start one: small files written, tensor files preallocated."""
        if self._resume():
            return
        self.journal.unlink(missing_ok=True)
        for file in self.plan.files:
            path = self.folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if file.copy_of:
                shutil.copyfile(file.copy_of, path)
                continue
            with path.open("wb") as target:
                if file.size > len(file.head) and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(target.fileno(), 0, file.size)
                target.truncate(file.size)
                target.write(file.head)
        self._append({"key": self.key, "plan": self._plan_digest()})

    def _plan_digest(self) -> str:
        digest = hashlib.sha256()
        for file in self.plan.files:
            digest.update(f"{file.name} {file.size} {hashlib.sha256(file.head).hexdigest()}".encode())
        return digest.hexdigest()

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.journal.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _resume(self) -> bool:
        """Read the journal; True if it belongs to this key. Units whose bytes do not match are forgotten."""
        if not self.journal.is_file():
            return False
        lines = []
        for line in self.journal.read_bytes().split(b"\n")[:-1]:
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        if not lines or lines[0] != {"key": self.key, "plan": self._plan_digest()}:
            return False
        if any(
            not (self.folder / file.name).is_file() or (self.folder / file.name).stat().st_size != file.size
            for file in self.plan.files
        ):
            return False
        for line in lines[1:]:
            unit = Unit(line["unit"], line["checksums"], line["record"])
            if all(self._stored_sha256(name) == value for name, value in unit.checksums.items()):
                self.units[unit.name] = unit
        self.journal.unlink()
        self._append(lines[0])
        for unit in self.units.values():
            self._append({"unit": unit.name, "checksums": unit.checksums, "record": unit.record})
        return True

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

    def write(self, unit: str, pieces: Iterable[tuple[str, int, Tensor]], record: list[dict[str, Any]]) -> None:
        """Write (stored name, byte offset inside the tensor, piece) and journal the unit.

        Raises:
            EnvironmentMissingError: the disk is full.
        """
        digests: dict[str, Any] = {}
        filled: dict[str, int] = {}
        touched = set()
        for name, offset, piece in pieces:
            file, tensor = self.places[name]
            data = as_bytes(piece)
            if offset != filled.get(name, 0) or offset + len(data) > tensor.nbytes:
                raise AssertionError(f"{name}: {len(data)} bytes at {offset} do not fit the plan ({tensor.nbytes})")
            filled[name] = offset + len(data)
            digests.setdefault(name, hashlib.sha256()).update(data)
            path = self.folder / file.name
            touched.add(path)
            self._put(path, tensor.offset + offset, data)
        short = [name for name, count in filled.items() if count != self.places[name][1].nbytes]
        if short:
            raise AssertionError(
                f"{short[0]}: only {filled[short[0]]} of {self.places[short[0]][1].nbytes} bytes written"
            )
        for path in touched:
            sync(path)
        done = Unit(unit, {name: digest.hexdigest() for name, digest in digests.items()}, record)
        self._append({"unit": done.name, "checksums": done.checksums, "record": done.record})
        self.units[unit] = done

    @staticmethod
    def _put(path: Path, position: int, data: memoryview) -> None:
        descriptor = os.open(path, os.O_WRONLY)
        try:
            while data:
                count = os.pwrite(descriptor, data[: 1 << 30], position)
                position += count
                data = data[count:]
        finally:
            os.close(descriptor)

    def finish(self, target: Path, provenance: Mapping[str, Any]) -> Path:
        """Read back what was written, compare it, and make it visible in `target` with its manifest; the final folder.

        Raises:
            QQuantError: a tensor is missing or differs from what was written.
        """
        written = {name: value for unit in self.units.values() for name, value in unit.checksums.items()}
        missing = self.places.keys() - written.keys()
        if missing:
            raise QQuantError(f"{self.plan.name}: {len(missing)} tensors were never written, first {min(missing)}")
        values = {
            entry["name"]: entry["checksum"]
            for unit in self.units.values()
            for entry in unit.record
            if "checksum" in entry
        }
        paths = [self.folder / file.name for file in self.plan.files if file.tensors]
        FORMATS[self.plan.format].verify(paths, written, values)
        files = {}
        for file in self.plan.files:
            sync(self.folder / file.name)
            files[file.name] = {"bytes": file.size, "sha256": sha256_file(self.folder / file.name)}
        layers = [entry for unit in self.units.values() for entry in unit.record]
        entry = {"key": self.key, "format": self.plan.format, **provenance, "files": files, "layers": layers}
        final = target / self.plan.folder
        if final.exists():
            manifest = read_manifest(final)
            for name in files:
                (self.folder / name).rename(final / name)
            sync(final)
            self.folder.rmdir()
        else:
            manifest = {"schema": "qquant-manifest-1", "artifacts": {}}
        manifest["artifacts"][self.plan.name] = entry
        content = (json.dumps(manifest, indent=2) + "\n").encode()
        if final.exists():
            write_synced(final / MANIFEST, content)
        else:
            write_synced(self.folder / MANIFEST, content)
            self.folder.rename(final)
        sync(target)
        self.journal.unlink()
        return final


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder.

    Raises:
        UsageError: there is none, so the folder is not ours.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"{folder}: already exists and was not made by qquant (no {MANIFEST}). Choose another --out, or move it away"
        )
    manifest = read_json(path)
    if manifest.get("schema") != "qquant-manifest-1" or not isinstance(manifest.get("artifacts"), dict):
        raise InputError(f"{path}: not a manifest that this version of qquant understands")
    return manifest


def finished(target: Path, plan: PlannedArtifact, key: str) -> bool:
    """Whether `target` already holds this very artifact, every byte of it verified.

    Raises:
        UsageError: something else stands there.
        InputError: its bytes no longer match its manifest.
    """
    final = target / plan.folder
    if not final.exists():
        return False
    entry = read_manifest(final)["artifacts"].get(plan.name)
    if entry is None:
        taken = [file.name for file in plan.files if (final / file.name).exists()]
        if taken:
            raise UsageError(
                f"{final / taken[0]}: exists and is not in {MANIFEST}. Choose another --out, or move it away"
            )
        return False
    if entry["key"] != key:
        raise UsageError(
            f"{final}: holds {plan.name} built from another recipe, checkpoint or version (key {entry['key'][:12]}, now {key[:12]}). "
            "Choose another --out, or remove the folder"
        )
    for name, facts in entry["files"].items():
        path = final / name
        if not path.is_file() or path.stat().st_size != facts["bytes"] or sha256_file(path) != facts["sha256"]:
            raise InputError(
                f"{path}: does not match {MANIFEST}; the file was changed or damaged. Remove the folder and build again"
            )
    return True


def installed(target: Path, plan: PlannedArtifact) -> Path:
    """Where a finished artifact is: a .gguf file, or a model folder."""
    first = target / plan.folder / plan.files[0].name
    return first if first.suffix == ".gguf" else first.parent


def open_weights(path: Path) -> WeightSource:
    """The weights of any artifact or checkpoint that qquant reads.

    Raises:
        InputError: unknown, or damaged.
    """
    name = detect(path)
    return FORMATS[name].read(path) if name else Checkpoint.open(path)
