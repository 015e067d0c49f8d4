"""How long a build takes, by phase: arithmetic counted from shapes, over rates that this machine shows in a second.

    generate    a token and the head for each that the checkpoint writes, WRITE times as slow as reading, with the weights in memory
    curvature   (1 + BACKWARD) forward passes of the tokens that curvature is measured on, and the head's gradient
    embedding and head    as for a linear [words, hidden], where they are codes of a solver
    quantize    one forward pass with Gram matrices; for an artifact with a stream of its own, another, and PAIRED Gram matrices;
                for each linear [N, K]: COLUMN small operations a column, SEARCH elementwise ones a weight, and products of N K K
    check       a forward pass and the head for checkpoint and artifacts, window by window
    slices      the same for the windows of `profile: release`; its long documents with attention over 2 T hidden a token and block
    retrieval   the same for its documents with hidden facts; behaviour: its answers, DECODE times as slow a token as reading
    answer      ANSWERS of checkpoint and artifacts in two dtypes, DECODE times as slow a token as reading

The counts of operations are fitted to builds of the demo checkpoint on one core, and hold within a factor of about two there; on a GPU,
whose kernels take whole columns, within about three; `plan.machine` has what `qquant doctor --calibrate` found of this machine. Reading, writing and hashing are left out: a disk is not probed. Needs torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qquant.calibration import behaviour
from qquant.calibration.slices import documents_length, most_tokens
from qquant.formats.planned import PlannedArtifact
from qquant.plan.plan import Plan
from qquant.ranks import dealt
from qquant.recipe import Checks, Recipe
from qquant.resources import lazy
from qquant.source.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

BACKWARD = 4  # forward passes that a backward pass with its factors costs
PAIRED = 1.5  # Gram matrices' worth of the pairs that an own stream adds
COLUMN = 62  # small operations for each column of a linear; a GPU's kernels take columns at once
SEARCH = 500  # elementwise operations a weight: scales and their refits
TABLE_ROWS = 4096  # as in `qquant.solve.outside`
SCALED = 0.5  # of everything else that an artifact takes: the search for scales to fold
SWEEP = 2  # products of N K K that a sweep costs
ANSWERS = 33  # to the bundled prompts, in each of two dtypes
DECODE = 16  # a token that is decoded in a batch, over one that is read
WRITE = 4  # a token that is written with up to 63 others, over one that is read
ENOUGH = 0.15  # seconds of each probe
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    forward: float  # multiplications and additions, in the dtype of the checkpoint
    exact: float  # the same in float32
    elements: float  # elementwise operations on large tensors
    small: float  # operations on small tensors: what a call costs


def probe(checkpoint: Checkpoint, device: torch.device) -> Rates:
    """Rates of products of the checkpoint's own shapes on `device`, measured in about a second."""
    shapes = checkpoint.family.matrices(checkpoint.config)
    rows, columns = max(
        (shape for name, shape in shapes.items() if name != checkpoint.family.embedding), key=lambda s: min(s)
    )
    dtype: torch.dtype = getattr(torch, DTYPES[checkpoint.dtype])
    flops = 2 * 512 * rows * columns
    rates = []
    for kind in (dtype, torch.float32):
        x = torch.randn(512, columns, device=device).to(kind)
        weight = torch.randn(rows, columns, device=device).to(kind)
        rates.append(flops * _a_second(lambda x=x, weight=weight: x @ weight.T, device))  # type: ignore[misc]
    large, few = torch.ones(1 << 18, device=device), torch.ones(64, device=device)
    elements = large.numel() * _a_second(lambda: large * 1.0, device)
    return Rates(rates[0], rates[1], elements, _a_second(lambda: few * 1.0, device))


def _a_second(step: Callable[[], object], device: torch.device) -> float:
    """How often `step` is done in a second."""
    step()
    count, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < ENOUGH:
        for _ in range(8):
            step()
        count += 8
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return count / took


def seconds(
    recipe: Recipe, checkpoint: Checkpoint, plan: Plan, rates: Rates, device: torch.device, world: int = 1
) -> dict[str, float]:
    """Seconds by phase, as `build` shows them; on `world` ranks those of the slowest in each."""
    family, config = checkpoint.family, checkpoint.config
    layers = range(config.layers)
    aim, checks = recipe.calibration, recipe.checks
    linears = [shape for layer in layers for shape in family.linear_shapes(config, layer).values()]
    forward = 2 * sum(map(math.prod, linears)) / rates.forward  # a token through all blocks
    gram = 2 * sum(k * k for layer in layers for k in family.inputs(config, layer).values()) / rates.exact
    head = 2 * config.vocab * config.hidden / rates.exact
    seen = min(plan.tokens, aim.gradient_tokens)
    hands = shares(checkpoint, plan, device, world)
    texts, models = 1 + len(checks.texts), 1 + len(plan.artifacts)
    most = 1 + max(map(len, hands))  # models that a rank asks
    read = plan.looks[0] * checks.length * texts

    def stream(hand: Sequence[PlannedArtifact]) -> float:
        """The blocks of one rank."""
        specs = [artifact.spec for artifact in hand]
        own = sum(spec.own_stream for spec in specs)
        shared = forward + (gram if hand is hands[0] or any(not s.own_stream or s.transforms for s in specs) else 0)
        solved = sum(_solving(linears, spec.sweeps, rates, device) for spec in specs if spec.feedback)
        return plan.tokens * (shared + own * (forward + PAIRED * gram)) + solved

    by_phase = {
        "generate": plan.writing.tokens * (forward + head) * WRITE if plan.writing else 0.0,
        "curvature": seen * ((1 + BACKWARD) * forward + 3 * head)
        if any(artifact.spec.feedback for artifact in plan.artifacts)
        else 0.0,
        "embedding and head": max(
            sum(_tables(artifact, checkpoint, rates, device) for artifact in hand) for hand in hands
        )
        if seen
        else 0.0,
        "quantize": max(map(stream, hands)),
        "check": models * read * (forward + head) / min(world, plan.looks[0] * texts),
        **{phase: took / world for phase, took in _slices(checks, checkpoint, models, forward + head, rates).items()},
        **_behaviour(checks, checkpoint, most, forward, rates),
        "answer": most * 2 * ANSWERS * checks.answer_length * forward * DECODE,
    }
    return {phase: took for phase, took in by_phase.items() if took}


def shares(checkpoint: Checkpoint, plan: Plan, device: torch.device, world: int) -> list[list[PlannedArtifact]]:
    """The artifacts of each rank, as a build deals them."""
    costs = {artifact.name: solving(checkpoint, plan, device, artifact) for artifact in plan.artifacts}
    by_name = {artifact.name: artifact for artifact in plan.artifacts}
    return [[by_name[name] for name in hand] for hand in dealt(costs, world)]


NOMINAL = {  # rates of no machine in particular: good for comparing artifacts with each other
    "cpu": Rates(1e11, 5e10, 5e8, 3e5),
    "cuda": Rates(4e14, 1e14, 4e11, 1e5),
}


def solving(checkpoint: Checkpoint, plan: Plan, device: torch.device, artifact: PlannedArtifact) -> float:
    """About the seconds that an artifact takes besides what all share, by nominal rates."""
    family, config, spec = checkpoint.family, checkpoint.config, artifact.spec
    rates = NOMINAL[device.type]
    linears = [shape for layer in range(config.layers) for shape in family.linear_shapes(config, layer).values()]
    weights = sum(map(math.prod, linears))
    total = SEARCH * (weights + config.vocab * config.hidden) / rates.elements
    if spec.feedback:
        total += _solving(linears, spec.sweeps, rates, device) + _tables(artifact, checkpoint, rates, device)
    if spec.own_stream:
        squares = sum(k * k for layer in range(config.layers) for k in family.inputs(config, layer).values())
        total += plan.tokens * 2 * (weights / rates.forward + PAIRED * squares / rates.exact)
    return total * (1 + SCALED) if spec.transforms else total


def _tables(artifact: PlannedArtifact, checkpoint: Checkpoint, rates: Rates, device: torch.device) -> float:
    """Seconds of the embedding and the head, TABLE_ROWS words at a time, where the artifact holds them as codes and solves them."""
    family, config = checkpoint.family, checkpoint.config
    if not artifact.spec.feedback:
        return 0.0
    names = [family.embedding, *([] if config.tied else [family.head])]
    coded = sum(not artifact.stored[name].numbers for name in names)
    slices = coded * math.ceil(config.vocab / TABLE_ROWS)
    return _solving([(TABLE_ROWS, config.hidden)] * slices, artifact.spec.sweeps, rates, device)


def _slices(checks: Checks, checkpoint: Checkpoint, models: int, token: float, rates: Rates) -> dict[str, float]:
    """Seconds of `profile: release`; `token`: seconds of one through a model, without attention."""
    if checks.profile != "release":
        return {}
    config = checkpoint.config
    short, long = most_tokens(config.positions)
    attention = 2 * documents_length(config.positions) * config.heads * config.head_dim * config.layers / rates.exact
    return {"slices": models * short * token, "long documents": models * long * (token + attention)}


def _behaviour(checks: Checks, checkpoint: Checkpoint, models: int, forward: float, rates: Rates) -> dict[str, float]:
    """Seconds of the questions of `profile: release`, by phase; `forward`: seconds of a token through all blocks, without attention."""
    if checks.profile != "release":
        return {}
    config = checkpoint.config
    _, answers = behaviour.most_tokens(config.positions)
    attention = 2 * config.heads * config.head_dim * config.layers / rates.exact  # a token and one before it
    read = [
        length * (forward + length * attention) * len(behaviour.HAYSTACKS)
        for length in behaviour.depths(config.positions)
    ]
    return {"retrieval": models * sum(read), "behaviour": models * answers * forward * DECODE}


def _solving(linears: list[tuple[int, int]], sweeps: int, rates: Rates, device: torch.device) -> float:
    total = 0.0
    for rows, columns in linears:
        products = 2 * rows * columns * columns * (1 + SWEEP * sweeps) + columns**3
        calls = columns * (COLUMN if device.type == "cpu" else 1)
        total += products / rates.exact + calls / rates.small + SEARCH * rows * columns / rates.elements
    return total
