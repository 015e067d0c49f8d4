"""What surrounds the code: the bundled data folders, and heavy libraries that load on first use.

`recipes/` and `calibration/` stand beside the package in a checkout and inside it (`qquant/_data/`) in a wheel.
`lazy` lets a file name torch at its head although `qquant plan` and `--help` never touch it (torch alone costs seconds).
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any


def data_dir(name: str) -> Path:
    """The bundled folder `name` ("recipes" or "calibration")."""
    package = Path(__file__).resolve().parent
    inside = package / "_data" / name
    return inside if inside.is_dir() else package.parent / name


def cache_dir() -> Path:
    """The folder of this user for what can be measured again: `$XDG_CACHE_HOME/qquant`, or `~/.cache/qquant`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qquant"


class _Lazy(ModuleType):
    def __getattr__(self, attribute: str) -> Any:
        module = importlib.import_module(self.__name__)
        self.__dict__.update(module.__dict__)
        return getattr(module, attribute)


def lazy(name: str) -> ModuleType:
    """A stand-in for module `name` that imports it when an attribute is first read."""
    return _Lazy(name)
