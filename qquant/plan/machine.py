"""What a machine took for a small build whose arithmetic is known, so that it is foreseen what it takes for others.

`qquant doctor --calibrate` builds and checks a few artifacts of the bundled checkpoint in about a minute and keeps, in the user's cache, by device,

    rates     of each kind of work, probed before the build and after it, of products by the width of the matrices
    factor    of each phase = seconds that it took / seconds that were counted (`plan.seconds`) over these rates

`plan` divides what it counts by the rates and multiplies by the factors, and `build` leaves what was foreseen beside what it took: a second probe would
be of another second, and on a busy machine half as fast or twice. Phases that the small build does not have take the factor of one that is like them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qquant.disk.records import to_plain, typed
from qquant.disk.writes import make_folder, write_synced
from qquant.errors import InputError
from qquant.plan.seconds import Rates, typical
from qquant.resources import cache_dir, lazy
from qquant.source.checkpoint import Checkpoint
from qquant.source.untrusted import read_json

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

SCHEMA = "qquant-machine-3"
LIKE = {"slices": "check", "long documents": "check", "retrieval": "check", "behaviour": "answer"}


@dataclass(frozen=True)
class Machine:
    """What was measured on a device."""

    schema: str
    device: str
    threads: int  # of torch on the CPU
    factors: Mapping[str, float]  # by phase
    rates: Mapping[str, Rates]  # by the width of the matrices that were multiplied

    def rates_for(self, checkpoint: Checkpoint) -> Rates:
        """The rates of products as wide as the checkpoint's: between those that were measured, by the logarithms of width and rate."""
        width = min(typical(checkpoint))
        known = sorted((int(name), rates) for name, rates in self.rates.items())
        lower = max((pair for pair in known if pair[0] <= width), key=lambda pair: pair[0], default=known[0])
        upper = min((pair for pair in known if pair[0] >= width), key=lambda pair: pair[0], default=known[-1])
        apart = math.log(upper[0] / lower[0])
        rates = between(lower[1], upper[1], math.log(width / lower[0]) / apart if apart else 0.0)
        return rates if checkpoint.dtype == "BF16" else replace(rates, forward=rates.exact)

    def foreseen(self, counted: Mapping[str, float]) -> dict[str, float]:
        """Seconds by phase, from those that were counted."""
        return {phase: took * self.factors.get(LIKE.get(phase, phase), 1.0) for phase, took in counted.items()}


def between(first: Rates, second: Rates, share: float) -> Rates:
    """Rates between two, by their logarithms: the first where `share` is 0, the second where it is 1."""
    pairs = zip(asdict(first).values(), asdict(second).values(), strict=True)
    return Rates(*(one ** (1 - share) * other**share for one, other in pairs))


def device_name(device: torch.device) -> str:
    """What a device is called where it is remembered: the GPU's name, or "cpu"."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"


def path_of(device: torch.device) -> Path:
    """The file that holds what was measured on a device with so many threads."""
    key = hashlib.sha256(f"{device_name(device)} {torch.get_num_threads()}".encode()).hexdigest()[:16]
    return cache_dir() / f"machine-{key}.json"


def measured(device: torch.device) -> Machine | None:
    """What was measured on a device; None if nothing was, or it cannot be read."""
    path = path_of(device)
    try:
        kept = typed(Machine, read_json(path), str(path)) if path.is_file() else None
    except InputError:
        return None
    return kept if kept is not None and kept.schema == SCHEMA else None


def keep(machine: Machine, device: torch.device) -> Path:
    """The file in which `machine` is kept from now on."""
    path = path_of(device)
    make_folder(path.parent)
    write_synced(path, (json.dumps(to_plain(machine), indent=1) + "\n").encode())
    return path
