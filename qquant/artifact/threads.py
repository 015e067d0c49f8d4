"""How many threads an artifact is made with on a CPU: bytes depend on that, so what was begun goes on with as many.

    DIR/.partial/threads.json    {"threads": n}, as long as there is unfinished work; not part of the key: a finished artifact is kept

The last bits of a product of matrices depend on how its terms are shared out. On a GPU nothing depends on the host's threads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from qquant.disk.writes import write_synced
from qquant.ranks import Ranks

RECORD = "threads.json"
MOST = 4096
LOG = logging.getLogger(__name__)


@contextmanager
def as_begun(folder: Path, device: torch.device, ranks: Ranks) -> Iterator[dict[str, str]]:
    """What ranks have to agree on; meanwhile this process computes with the threads that the work in `folder` was begun with."""
    if device.type != "cpu":
        yield {}
        return
    asked, begun = torch.get_num_threads(), ranks.once(lambda: _recorded(folder))
    if begun is None and ranks.first:
        write_synced(folder / RECORD, json.dumps({"threads": asked}).encode())
    if begun not in (None, asked):
        if ranks.first:
            LOG.warning(
                "%s was begun with %d thread(s) and goes on with as many, not %d: bytes depend on them. To begin anew, remove it",
                folder, begun, asked,
            )  # fmt: skip
        torch.set_num_threads(begun or asked)
    try:
        yield {"number of threads": str(begun or asked)}
    finally:
        torch.set_num_threads(asked)


def _recorded(folder: Path) -> int | None:
    """The number that is kept in `folder`; None where there is none that makes sense."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads((folder / RECORD).read_bytes())
        threads = content.get("threads") if isinstance(content, dict) else None
        if type(threads) is int and 0 < threads <= MOST:
            return threads
    return None
