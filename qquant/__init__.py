"""qquant: quantize a Qwen1.5 checkpoint once into GPTQ, AWQ and GGUF, and check every artifact against it.

    qquant.build(checkpoint, recipe, out)      artifacts and their report        qquant.check(artifacts, checkpoint)   a report
    qquant.load(artifact)                      a model that answers with the packed weights, through transformers' API

See `qquant.api`; torch is imported by the first call, not by `import qquant`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qquant.api import build, check, load
    from qquant.report.record import Report

__version__ = "0.1.0"
__all__ = ["Report", "__version__", "build", "check", "load"]

_HOMES = {
    "Report": "qquant.report.record",
    "build": "qquant.api",
    "check": "qquant.api",
    "load": "qquant.runtime.loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
