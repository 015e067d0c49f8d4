"""How long the solvers may take, by a word: what `effort: fast | default | best` fills in where a recipe says nothing.

    fast      one pass: GPTQ's feedback, and neither curvature, streams nor sweeps
    default   what the published recipes are built with
    best      more sweeps, a stream for every artifact, curvature of all tokens

A setting that the recipe writes down wins over the effort's. Entries whose solver feeds no errors back (`rtn`, `ggml`) have nothing that takes
long and are left alone. Left out: anything that changes what an artifact is (bits, groups, its solver).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

EffortName = Literal["fast", "default", "best"]
Settings = Mapping[str, Any]

NARROW = ("q2", "q3", "q4", "iq4")  # types of GGUF under five bits, whose errors are worth a stream of their own


@dataclass(frozen=True)
class Effort:
    """Settings of the calibration, of GPTQ and AWQ folders, and of solved GGUF files, `narrow` for types under five bits."""

    calibration: Settings
    folder: Settings
    gguf: Settings
    narrow: Settings

    def of(self, kind: str) -> Settings:
        """The settings of an artifact by its kind: "int4", "q4_k_m"."""
        if kind.startswith("int"):
            return self.folder
        return self.narrow if kind.startswith(NARROW) else self.gguf


EFFORTS: Mapping[EffortName, Effort] = {
    "fast": Effort(
        calibration={"objective": "output"},
        folder={"sweeps": 0, "propagate": False},
        gguf={"sweeps": 0, "propagate": False},
        narrow={"sweeps": 0, "propagate": False},
    ),
    "default": Effort(
        calibration={"objective": "kl", "curvature_tokens": 65536, "samples": 128},
        folder={"sweeps": 2, "propagate": True},
        gguf={"sweeps": 3, "propagate": False},
        narrow={"sweeps": 3, "propagate": True},
    ),
    "best": Effort(
        calibration={"objective": "kl", "curvature_tokens": 2**30, "samples": 256},
        folder={"sweeps": 6, "propagate": True},
        gguf={"sweeps": 8, "propagate": True},
        narrow={"sweeps": 8, "propagate": True},
    ),
}


CALIBRATING = frozenset(key for effort in EFFORTS.values() for key in effort.calibration)
SOLVING = frozenset(key for effort in EFFORTS.values() for part in (effort.folder, effort.gguf) for key in part)


def table() -> str:
    """A Markdown table of what each effort fills in."""
    titles = {
        "calibration": "calibration",
        "folder": "gptq, awq",
        "gguf": "gguf, `solver: gptq`",
        "narrow": "the same, under five bits",
    }
    lines = ["| effort | " + " | ".join(titles.values()) + " |", "|---" * (1 + len(titles)) + "|"]
    for name, effort in EFFORTS.items():
        cells = [", ".join(f"`{key}: {_shown(value)}`" for key, value in vars(effort)[part].items()) for part in titles]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
