"""Which process this is, as other processes may tell: its machine, boot, number and start; and whether such a one still lives.

A pid alone is no name: it is given again. With the start time in ticks since boot, and the boot's id, it is. Containers on one machine may
number their processes apart, so a pid is looked up only where it was given in the same namespace.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _space() -> str:
    """The namespace in which processes are numbered; "" where there are none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_of(pid: int) -> str | None:
    """When a process began, in ticks since boot; "" if it lives and nobody says; None if there is none, or only its exit status."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        pass
    else:
        return None if state in "ZX" else rest[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return ""
    return ""


def identity() -> dict[str, Any]:
    """This process: host, boot, space (of pids), pid, start."""
    pid = os.getpid()
    return {"host": platform.node(), "boot": _boot(), "space": _space(), "pid": pid, "start": start_of(pid) or ""}


def dead(who: Mapping[str, Any]) -> bool:
    """Whether the process of an `identity` is gone for certain: it was on this machine, and is not."""
    us = identity()
    if any(who[key] != us[key] for key in ("host", "boot", "space")):
        return False
    return start_of(who["pid"]) not in (who["start"], "")
