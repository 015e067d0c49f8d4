"""Where a build would write: names that cannot be folders, and folders that are read."""

from __future__ import annotations

from pathlib import Path

from qquant.disk.output import OURS
from qquant.errors import UsageError

LONGEST = 180  # bytes of a model's name: folders and files add theirs


def require_model_name(name: str) -> None:
    """Raise UsageError unless `name` can be part of a folder's and a file's name."""
    if (
        not name
        or name.startswith(".")
        or name in OURS
        or any(character in "/\\" or not character.isprintable() for character in name)
        or len(name.encode("utf-8", "surrogatepass")) > LONGEST
    ):
        raise UsageError(
            f"model name {name[:80]!r}: stands in names of folders and files; give --name NAME, without / and \\, not beginning with a dot, "
            f"at most {LONGEST} bytes of UTF-8"
        )


def require_outside(out: Path, *inputs: Path | None) -> None:
    """Raise UsageError if `out` lies in a folder that is read."""
    real = out.resolve()
    for folder in inputs:
        if folder is not None and folder.is_dir() and real.is_relative_to(folder.resolve()):
            raise UsageError(f"{out}: lies in {folder}, which is read. Choose an --out beside it")
