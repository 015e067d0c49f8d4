"""Where releases go: the Hugging Face hub, ModelScope, a folder; and one setting changed in all siblings (`patch`)."""

from __future__ import annotations

from pathlib import Path

from qquant.release.hub.failures import clean, pause
from qquant.release.hub.folder import Folder
from qquant.release.hub.huggingface import HuggingFace
from qquant.release.hub.modelscope import ModelScope
from qquant.release.hub.patch import RepositoryChange, Setting, patch
from qquant.release.hub.request import Destination, Published, Request, Say

__all__ = [
    "Destination",
    "Folder",
    "HuggingFace",
    "ModelScope",
    "Published",
    "RepositoryChange",
    "Request",
    "Setting",
    "clean",
    "destination",
    "patch",
    "pause",
]


def destination(kind: str, out: Path | None, endpoint: str | None, say: Say) -> Destination:
    """The destination of that name: "hf", "modelscope" or "dir" (below `out`)."""
    match kind:
        case "dir" if out is not None:
            return Folder(out)
        case "modelscope":
            return ModelScope.connect(say)
    return HuggingFace.connect(endpoint, say)
