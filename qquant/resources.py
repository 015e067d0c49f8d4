"""What surrounds the code: the bundled data folders, heavy libraries that load on first use, and memory that is free.

`recipes/` and `calibration/` stand beside the package in a checkout and inside it (`qquant/_data/`) in a wheel.
`lazy` lets a file name torch at its head although `qquant plan` and `--help` never touch it (torch alone costs seconds).
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def data_dir(name: str) -> Path:
    """The bundled folder `name` ("recipes" or "calibration")."""
    package = Path(__file__).resolve().parent
    inside = package / "_data" / name
    return inside if inside.is_dir() else package.parent / name


class _Lazy(ModuleType):
    def __getattr__(self, attribute: str) -> Any:
        module = importlib.import_module(self.__name__)
        self.__dict__.update(module.__dict__)
        return getattr(module, attribute)


def lazy(name: str) -> ModuleType:
    """A stand-in for module `name` that imports it when an attribute is first read."""
    return _Lazy(name)


def free_memory(device: torch.device) -> int:
    """Bytes that may be taken on a device without taking them from anybody: of the CPU, what the kernel says is available."""
    if device.type == "cuda":
        free: int = lazy("torch").cuda.mem_get_info(device)[0]
        return free
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
