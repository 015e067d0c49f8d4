"""Seconds, memory and disk that builds of the published shapes take, by the cost model: the table in the README's section "What it takes".

    python -m tests.bench.takes [--shapes 0.5B 7B ...] [--work FOLDER]

Every number is predicted from headers without a byte of weights: GPTQ-Int4 alone with the quality that recipes have by default, 128 x 2048 tokens, and
all that `qwen1.5-chat` builds and checks. Seconds are the work that `qquant.plan.seconds` counts over the rates below, one GPU or one core of a CPU.
Rates of the GPU are from what one H200 took for a block of 7B (README.md beside this file: forward products 0.28 s, the column loop 0.10, all of it
1.6) and for hashing and loading; what a fresh machine compiles before and in the first block, and no plan counts, is added as STARTED.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from qquant import recipe as recipes
from qquant.plan import seconds
from qquant.plan.plan import Plan
from qquant.plan.seconds import NOMINAL, Rates
from qquant.source.checkpoint import Checkpoint
from tests.bench.memory import ENTRIES, RECIPE, SHAPES, write_hollow

SOLVED = Rates(7e14, 1.3e14, 3e13, 4e12, 1e12, 5e6, 2e10, 3.5e9, 0.16)  # an H200, where products are of halves
READ = Rates(7e14, 5.1e13, 3e13, 4e12, 1e12, 5e6, 2e10, 3.5e9, 0.16)  # and where they are torch's float32, as in checks
STARTED = 9  # seconds: kernels that are compiled; 87.3 s on a fresh machine where the next build took 78.5
BUILT = ("read", "generate", "curvature", "embedding and head", "quantize", "write")
HEAD = (
    "| model | GPTQ-Int4, one H200 | GPTQ-Int4, one CPU core | all eleven, one H200 | their check | GPU memory of GPTQ-Int4: with room, at the least "
    "| host beside it | RAM without a GPU: with room, at the least | disk: GPTQ-Int4, all eleven |"
)


def span(took):
    """Seconds as people say them."""
    if took < 120:
        return f"{took:.0f} s"
    return f"{took / 60:.0f} min" if took < 7200 else f"{took / 3600:.1f} h" if took < 36000 else f"{took / 3600:.0f} h"


def size(nbytes):
    """Bytes as people say them."""
    amount = nbytes / 1e9
    return f"{amount:.1f} GB" if amount < 10 else f"{amount:.0f} GB"


def on_card(recipe, checkpoint, plan):
    """Seconds of the build, and of its check, on one H200."""
    counted = seconds.counted(recipe, checkpoint, plan, torch.device("cuda"))
    built = sum(SOLVED.seconds(todo) for phase, todo in counted.items() if phase in BUILT)
    return STARTED + built, sum(READ.seconds(todo) for phase, todo in counted.items() if phase not in BUILT)


def alone(checkpoint):
    """What GPTQ-Int4 takes alone: seconds on a GPU and on a core, memory, disk."""
    recipe = recipes.parse(RECIPE.format(samples=128, length=2048) + f"  - {ENTRIES['gptq-int4']}\n")
    plan = Plan.of(recipe, checkpoint)
    core = seconds.seconds(recipe, checkpoint, plan, NOMINAL["cpu"], torch.device("cpu"))
    card, cpu = plan.needs["cuda"], plan.needs["cpu"]
    memory = f"{size(card.device)}, {size(card.least)}", size(card.host), f"{size(cpu.device)}, {size(cpu.least)}"
    return [span(sum(on_card(recipe, checkpoint, plan))), span(sum(core.values()))], memory, size(plan.disk)


def eleven(checkpoint):
    """What all artifacts of the published recipe take: seconds to build and to check, disk."""
    recipe = recipes.load("qwen1.5-chat")
    plan = Plan.of(recipe, checkpoint)
    return [*map(span, on_card(recipe, checkpoint, plan))], size(plan.disk)


def row(shape, work=None):
    """The table's row of a shape."""
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        checkpoint = Checkpoint.open(write_hollow(Path(temporary) / "model", shape))
        took, memory, disk = alone(checkpoint)
        took_all, disk_all = eleven(checkpoint)
    return f"| {' | '.join([shape, *took, *took_all, *memory, f'{disk}, {disk_all}'])} |"


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--work", type=Path, help="a folder for headers; files in it look as large as the checkpoints")
    options = parser.parse_args()
    print(f"{HEAD}\n|{'---|' * HEAD.count(' | ')}---|", flush=True)
    for shape in options.shapes:
        print(row(shape, options.work), flush=True)


if __name__ == "__main__":
    main()
