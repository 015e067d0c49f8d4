"""What one calibration pass saves: four artifacts built together against the four built alone, in one run.

    python tests/bench/sharing.py [CHECKPOINT] [--recipe demo]

Each build runs once for warm-up order's sake in the sequence alone, together, alone, together; the smaller time of each counts. The
check is reduced to one short window, since it is not what is measured. Also counts linear layers run per calibration token.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from qquant import pipeline, recipe
from qquant.families import decoder
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.recipe import AwqArtifact, Checks, GgufArtifact, GptqArtifact
from qquant.source.checkpoint import Checkpoint

ARTIFACTS = (
    GptqArtifact(name="gptq-int4", format="gptq", bits=4),
    GptqArtifact(name="gptq-int8", format="gptq", bits=8),
    AwqArtifact(name="awq", format="awq"),
    GgufArtifact(name="gguf-q8_0", format="gguf", type="q8_0"),
)


def seconds(base, checkpoint, artifacts):
    """(seconds, calibration tokens that went through a linear) of one build into a fresh folder."""
    loaded = base.model_copy(
        update={"artifacts": artifacts, "checks": Checks(text="bundled:zh-test", windows=1, length=32)}
    )
    counted, linear = [0], decoder.Block.linear

    def counting(self, name, x):
        counted[0] += len(x)
        return linear(self, name, x)

    decoder.Block.linear = counting
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        pipeline.build(
            loaded, checkpoint, Plan.of(loaded, checkpoint), Path(folder) / "out", torch.device("cpu"), Quiet()
        )
        took = time.monotonic() - began
    decoder.Block.linear = linear
    return took, counted[0]


def main():
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="bundled:tiny-qwen1.5")
    parser.add_argument("--recipe", default="demo")
    options = parser.parse_args()
    base, checkpoint = recipe.load(options.recipe), Checkpoint.open(options.checkpoint)
    alone, together = [], []
    for _ in range(2):
        alone.append([seconds(base, checkpoint, (artifact,)) for artifact in ARTIFACTS])
        together.append(seconds(base, checkpoint, ARTIFACTS))
    single = [min(run[index][0] for run in alone) for index in range(len(ARTIFACTS))]
    joint = min(run[0] for run in together)
    for artifact, took in zip(ARTIFACTS, single, strict=True):
        print(f"{artifact.name:<10} alone {took:6.1f} s")
    print(f"together {joint:.1f} s, sum of the four {sum(single):.1f} s, ratio {joint / sum(single):.2f}")
    print(f"tokens through linears: together {together[0][1]:,}, alone {', '.join(f'{run[1]:,}' for run in alone[0])}")


if __name__ == "__main__":
    main()
