"""A rank of several that build a recipe after another: torchrun ... -m tests.worlds.ranks_at_work CHECKPOINT RECIPES [STOP].

Each RECIPES/<name>.yaml is built into RECIPES/<name>-<ranks>, without its check. With STOP a rank, the last, ends itself when so many
units are journalled.
"""

import os
import signal
import sys
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


def main():
    """Build all of them."""
    torch.set_num_threads(1)
    checkpoint, folder = Checkpoint.open(Path(sys.argv[1])), Path(sys.argv[2])
    pipeline._judge = unchecked
    with together.joined(os.environ, ["build"]) as ranks:
        if len(sys.argv) > 3:
            end_early(ranks, int(sys.argv[3]))
        for path in sorted(folder.glob("*.yaml")):
            loaded, out = recipe.load(str(path)), folder / f"{path.stem}-{ranks.world}"
            plan = Plan.of(loaded, checkpoint)
            try:
                pipeline.build(loaded, checkpoint, plan, out, torch.device("cpu"), Quiet(), ranks)
            except QQuantError as error:
                sys.exit(together.told(error, str(error), ranks))


if __name__ == "__main__":
    main()
