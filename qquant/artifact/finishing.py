"""What a build finds of an earlier one: finished artifacts, and folders that it had taken away."""

from __future__ import annotations

import shutil
from pathlib import Path

from qquant.artifact.draft import REPLACED
from qquant.artifact.manifest import matches, read_manifest
from qquant.disk.output import MANIFEST
from qquant.disk.writes import rename
from qquant.errors import InputError, UsageError
from qquant.formats import FORMATS
from qquant.formats.planned import PlannedArtifact


def restore(out: Path, partial: Path) -> None:
    """Put back folders that a killed build had taken away to replace them."""
    for folder in sorted((partial / REPLACED).glob("*")):
        if (out / folder.name).exists():
            shutil.rmtree(folder)
        else:
            rename(folder, out / folder.name)


def finished(target: Path, plan: PlannedArtifact, key: str) -> bool:
    """Whether `target` already holds this very artifact, every byte of it verified.

    Raises:
        UsageError: something else stands there.
        InputError: its bytes no longer match its manifest.
    """
    final = target / plan.folder
    if not final.exists():
        return False
    entry = read_manifest(final).artifacts.get(plan.name)
    if entry is None:
        taken = [file.name for file in plan.files if (final / file.name).exists()]
        if taken:
            raise UsageError(
                f"{final / taken[0]}: exists and is not in {MANIFEST}. Choose another --out, or move it away"
            )
        return False
    if entry.key != key:
        raise UsageError(
            f"{final}: holds {plan.name} built from another recipe, checkpoint or version (key {entry.key[:12]}, now {key[:12]}). "
            "Choose another --out, or remove the folder"
        )
    for name, facts in entry.files.items():
        path = final / name
        if not matches(path, facts):
            raise InputError(
                f"{path}: does not match {MANIFEST}; the file was changed or damaged. Remove the folder and build again"
            )
    return True


def installed(target: Path, plan: PlannedArtifact) -> Path:
    """Where a finished artifact is: a file, or a model folder."""
    return FORMATS[plan.format].path_of(target / plan.folder, [file.name for file in plan.files])
