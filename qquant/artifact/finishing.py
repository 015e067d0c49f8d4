"""What a build finds of an earlier one: finished artifacts, and folders that it had taken away."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Literal

from qquant.artifact.draft import REPLACED
from qquant.artifact.manifest import manifest_of, matches, read_manifest
from qquant.disk.output import DAMAGED, MANIFEST, empty
from qquant.disk.writes import crash_point, make_folder, rename, write_synced
from qquant.errors import UsageError
from qquant.formats import FORMATS
from qquant.formats.planned import PlannedArtifact


def restore(out: Path, partial: Path) -> None:
    """Put back folders that a killed build had taken away to replace them."""
    for folder in sorted((partial / REPLACED).glob("*")):
        if (out / folder.name).exists():
            shutil.rmtree(folder)
        else:
            rename(folder, out / folder.name)


def orphaned(target: Path, planned: Sequence[PlannedArtifact]) -> set[str]:
    """Folders that hold all files of a planned artifact, of its very sizes, and no manifest: somebody deleted it."""
    return {
        plan.folder
        for plan in planned
        if not os.path.lexists(target / plan.folder / MANIFEST)
        and all(_has_size(target / plan.folder / file.name, file.size) for file in plan.files)
    }


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def finished(target: Path, plan: PlannedArtifact, key: str) -> bool:
    """Whether `target` already holds this very artifact, every byte of it verified; one that was changed, or has no manifest, is set aside.

    Raises:
        UsageError: something else stands there.
        InputError: its manifest is malformed.
    """
    final = target / plan.folder
    if empty(final):
        final.rmdir()
    if not final.exists():
        return False
    if orphaned(target, [plan]):
        make_folder(target / DAMAGED)
        rename(final, _place_aside(target, plan))
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
    return all(matches(final / name, facts) for name, facts in entry.files.items()) or _set_aside(target, plan)


def _set_aside(target: Path, plan: PlannedArtifact) -> Literal[False]:
    """Move the files of an artifact that are not what its manifest says out of the way, so that it is built again."""
    final = target / plan.folder
    manifest = manifest_of(final)
    rest = {name: entry for name, entry in manifest.artifacts.items() if name != plan.name}
    shared = {name for entry in rest.values() for name in entry.files}
    make_folder(target / DAMAGED)
    aside = _place_aside(target, plan)
    if not rest:
        rename(final, aside)
        return False
    make_folder(aside)
    for name in manifest.artifacts[plan.name].files.keys() - shared:
        if os.path.lexists(final / name):
            make_folder((aside / name).parent)
            rename(final / name, aside / name)
    crash_point("while a damaged artifact is set aside")
    write_synced(final / MANIFEST, replace(manifest, artifacts=rest).to_json())
    return False


def _place_aside(target: Path, plan: PlannedArtifact) -> Path:
    return next(path for number in count(1) if not (path := target / DAMAGED / f"{plan.name}-{number}").exists())


def set_aside(target: Path) -> set[str]:
    """Names of the folders in which `finished` left what was changed."""
    return {path.name for path in (target / DAMAGED).glob("*")}


def installed(target: Path, plan: PlannedArtifact) -> Path:
    """The path of a finished artifact: a file, or a model folder."""
    return FORMATS[plan.format].path_of(target / plan.folder, [file.name for file in plan.files])


def remarks_on(out: Path, aside: set[str]) -> list[str]:
    """What a build says of artifacts that were no longer what their manifest said."""
    text = "was changed or damaged after it was built; what was there is in {} now, and it was built again"
    return [f"{name.rpartition('-')[0]}: {text.format(out / DAMAGED / name)}" for name in sorted(aside)]
