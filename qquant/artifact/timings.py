"""timings.json beside the report: how long everything took; the only file in which equal builds differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qquant.disk.output import TIMINGS
from qquant.disk.writes import write_synced
from qquant.source.untrusted import read_json


def write(took: Mapping[str, Mapping[str, float]], out: Path) -> None:
    """Leave the seconds of every stage and block beside the report; those of artifacts that were kept stay as they are."""
    path = out / TIMINGS
    kept = read_json(path).get("artifacts") if path.is_file() else None
    timings = kept if isinstance(kept, dict) else {}
    write_synced(
        path, (json.dumps({"schema": "qquant-timings-1", "artifacts": {**timings, **took}}, indent=2) + "\n").encode()
    )


@dataclass(frozen=True)
class Foretold:
    """A quantity of a whole build, and what was foreseen of it."""

    took: float
    foreseen: float | None


def foresee(out: Path, took: Mapping[str, float], foreseen: Mapping[str, float], whole: Mapping[str, Foretold]) -> None:
    """Leave what each phase of a build took, beside what was foreseen of it (nothing, where nobody asked the machine before), and `whole`: of all of it."""
    path = out / TIMINGS
    content = read_json(path) if path.is_file() else {"schema": "qquant-timings-1", "artifacts": {}}
    phases = {phase: _both(Foretold(seconds, foreseen.get(phase))) for phase, seconds in took.items()}
    told = {"phases": phases} | {name: _both(one) for name, one in whole.items()}
    write_synced(path, (json.dumps(content | told, indent=2) + "\n").encode())


def _both(one: Foretold) -> dict[str, float]:
    return {"took": round(one.took, 3)} | ({} if one.foreseen is None else {"foreseen": round(one.foreseen, 3)})
