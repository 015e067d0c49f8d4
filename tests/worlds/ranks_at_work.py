"""Groups of ranks that build a recipe after another, by processes that imported before they are asked: python -m tests.worlds.ranks_at_work.

A line of stdin is [WORLD, CHECKPOINT, RECIPES, STOP, DEVICE]: so many ranks are forked, as a launcher would start them, and each
RECIPES/<name>.yaml is built into RECIPES/<name>-<ranks>, without its check. With STOP the last rank is killed when so many units are
journalled. A line of stdout is [statuses of the ranks in their order, stderr of all].
"""

import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from qquant import pipeline, recipe
from qquant.artifact.draft import Draft
from qquant.checks.review import Review
from qquant.cli import together
from qquant.errors import QQuantError
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.source.checkpoint import Checkpoint


def unchecked(out, checkpoint, candidates, question, *rest):
    """Verdicts of a build that nobody checks."""
    return Review(0.0, ()), question[1]


def end_early(ranks, units):
    """Have the last rank killed by the first once that has journalled so many units."""
    if not ranks.first:
        ranks.write(f"pid/{ranks.rank}", os.getpid())
        return
    journalled, left = Draft.journalled, [units]

    def counted(draft, unit):
        journalled(draft, unit)
        left[0] -= 1
        if left[0] == 0:
            os.kill(int(ranks.store.get(f"pid/{ranks.world - 1}")), signal.SIGKILL)

    Draft.journalled = counted


def build_all(checkpoint, folder, stop, device):
    """Build every recipe of `folder` as one rank of those that the environment says."""
    checkpoint, folder = Checkpoint.open(Path(checkpoint)), Path(folder)
    with together.joined(os.environ, ["build"]) as ranks:
        if stop:
            end_early(ranks, stop)
        for path in sorted(folder.glob("*.yaml")):
            loaded, out = recipe.load(str(path)), folder / f"{path.stem}-{ranks.world}"
            plan = Plan.of(loaded, checkpoint)
            try:
                place = together.device_of(device, ranks)
                pipeline.build(loaded, checkpoint, plan, out, place, Quiet(), ranks)
            except (QQuantError, RuntimeError) as error:  # as the command line
                return together.told(error, str(error), ranks)
    return 0


def rank(environment, said, *work):
    """Be a rank, and end; stderr goes to the file `said`."""
    status = 1
    try:
        os.environ.update(environment)
        os.dup2(said, 2)
        status = build_all(*work)
    finally:
        if sys.exc_info()[0]:
            traceback.print_exc()
        os._exit(status)


def group(world, *work):
    """Statuses and stderr of so many ranks that do `work`."""
    with socket.socket() as free, tempfile.TemporaryFile() as said:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        shared["MASTER_PORT"] = free.getsockname()[1]
        free.close()
        processes = {}
        for number in range(world):
            environment = {key: str(value) for key, value in (shared | {"RANK": number, "LOCAL_RANK": number}).items()}
            process = os.fork()
            if not process:
                rank(environment, said.fileno(), *work)
            processes[process] = number
        statuses = [0] * world
        for _ in range(world):  # whoever ends is taken away at once: others look whether it is there
            process, status = os.wait()
            statuses[processes[process]] = os.waitstatus_to_exitcode(status)
        said.seek(0)
        return statuses, said.read().decode()


def main():
    """Answer."""
    torch.set_num_threads(1)
    pipeline._judge = unchecked
    for line in sys.stdin:
        print(json.dumps(group(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
