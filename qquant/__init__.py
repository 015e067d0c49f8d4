"""qquant: quantize a Qwen1.5 checkpoint once into GPTQ, AWQ and GGUF, and check every artifact against it.

`qquant.load(path)` gives a model that answers with the packed weights; see `qquant.runtime.loading`, which it imports when asked for.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("qquant.runtime.loading").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
