"""How the threads of a product wait for each other: as OpenMP comes, or asleep after a moment where other programs want the cores.

A thread that has done its part spins for the next one, some milliseconds. Alone on a machine that is the quickest: answers of a small model
take 1.4 times as long where threads sleep, builds as long. Beside another program the core on which one thread spins is what the thread that
all wait for would need: with one busy loop on two cores a build takes 0.6 to 0.74 of the time with SPINS turns, and half the processor's
(`python -m tests.bench.beside`). So the cores are looked at, once, before torch loads GNU's runtime, which reads the variable then; who has set one
of OWN is left alone. Not on Linux, and not where another runtime comes with torch. Results do not depend on it.
"""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from pathlib import Path
from statistics import median

OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPINS = 1000  # turns of a loop; 300,000 by default
LOOKS, BETWEEN = 5, 0.004  # seconds
SHARE = 1 / 8  # of the cores that others have to want
LOAD = Path("/proc/loadavg")


def give_way(environment: MutableMapping[str, str]) -> None:
    """Have threads sleep soon, by a variable of `environment`, where others want cores and nobody has said how threads wait."""
    if not environment.keys() & set(OWN) and _others() >= SHARE * (os.cpu_count() or 1):
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def _others() -> float:
    """Threads of other programs that run or want to, in the middle of some looks; 0 where the system does not say."""
    looks = []
    for look in range(LOOKS):
        if look:
            time.sleep(BETWEEN)
        try:
            running, _ = LOAD.read_text("ascii").split()[3].split("/")
            looks.append(int(running) - 1)  # this one runs
        except (OSError, ValueError, IndexError):
            return 0
    return median(looks)
