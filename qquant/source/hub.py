"""A checkpoint by its name: a folder, a bundled one, or a model on the hub that is downloaded once."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qquant.errors import EnvironmentMissingError, InputError, UsageError
from qquant.recipe.page import Page, Reader
from qquant.resources import data_dir

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]
IMATRIX = "imatrix.gguf"  # an importance matrix beside models, and none itself
CARD_LIMIT = 1_000_000  # bytes of a model card that are looked at


def resolve(reference: str, revision: str | None = None) -> tuple[Path, str | None]:
    """A local folder for `reference` (a path, `bundled:NAME`, or a hub id), and the commit that it is.

    Raises:
        UsageError: it is none of the three.
        EnvironmentMissingError: the hub cannot be reached or does not have it.
    """
    if reference.startswith("bundled:"):
        folder = data_dir("recipes") / "demo" / reference.removeprefix("bundled:")
        if not folder.is_dir():
            names = ", ".join(sorted(f"bundled:{path.name}" for path in folder.parent.iterdir() if path.is_dir()))
            raise UsageError(f"{reference}: no such bundled checkpoint; there is {names}")
        return folder, None
    if Path(reference).is_dir():
        return Path(reference), None
    if Path(reference).is_file():
        raise UsageError(f"{reference}: is a file; a checkpoint is the folder of the 16-bit model, or a hub id")
    if not HUB_ID.match(reference) or reference.startswith((".", "/")):
        raise UsageError(
            f"{reference}: there is no such file or folder, and it is no hub id of the form ORGANISATION/NAME"
        )
    return _download(reference, revision)


def _download(repo: str, revision: str | None) -> tuple[Path, str]:
    import huggingface_hub  # the door to the hub; costs half a second
    from huggingface_hub import errors

    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
        commit = info.sha or ""
        _require_room(repo, info.siblings or [])
        folder = huggingface_hub.snapshot_download(repo, revision=commit, allow_patterns=HUB_FILES)
    except errors.HFValidationError as error:
        raise UsageError(f"{repo}: {error}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError, transport_error()) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentMissingError(
            f"{repo}: cannot be fetched from the hub ({reason}). Give a local folder instead"
        ) from None
    return Path(folder), commit


def transport_error() -> type[Exception]:
    """What the hub's client raises when a request fails, HTTP statuses among them; which library is below depends on its version."""
    from huggingface_hub.errors import HfHubHTTPError

    error: type[Exception] = HfHubHTTPError.__mro__[1]
    return error


def require_model_folder(path: Path) -> None:
    """Raise InputError, with what to name instead, for a folder that holds models but is none: of GGUF files, or of artifacts."""
    if (path / "config.json").exists() or not path.is_dir():
        return
    models = sorted(file.name for file in path.glob("*.gguf"))
    folders = sorted(f"{file.parent.name}/" for file in path.glob("*/config.json"))
    folders += sorted(f"{file.parent.name}/{file.name}" for file in path.glob("*/*.gguf") if file.name != IMATRIX)
    for names in (models, folders):
        if names:
            more = f", and {len(names) - 6} more" if len(names) > 6 else ""
            raise InputError(f"{path}: holds {', '.join(names[:6])}{more}; name one, e.g. {path / names[0]}")
    raise InputError(f"{path}: has no config.json, so it is no model folder. Copy it from the original checkpoint")


def card_head(path: Path) -> dict[str, Any]:
    """The YAML head of a model card; empty where there is no card, or no readable head."""
    if not path.is_file() or path.stat().st_size > CARD_LIMIT:
        return {}
    parts = path.read_text("utf-8", "replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    page = Page(str(path))
    try:
        head = Reader(page).read(parts[1])
    except UsageError:
        return {}
    if page.problems:
        return {}
    return head if isinstance(head, dict) else {}


def _require_room(repo: str, files: Sequence[Any]) -> None:
    """Raise EnvironmentMissingError if the hub's cache has no room for the files that would be fetched."""
    import fnmatch

    from huggingface_hub import constants

    nearest = Path(constants.HF_HUB_CACHE).absolute()
    blobs = nearest / f"models--{repo.replace('/', '--')}" / "blobs"
    there = {path.name for path in blobs.iterdir()} if blobs.is_dir() else set()
    wanted = [file for file in files if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in HUB_FILES)]
    need = sum(file.size or 0 for file in wanted if not (file.lfs and file.lfs.sha256 in there))
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    if free < need:
        raise EnvironmentMissingError(
            f"{repo}: takes {need:,} bytes in {nearest}, {free:,} are free; {need - free:,} bytes are missing. "
            "Free some space, or set HF_HOME to another disk"
        )
