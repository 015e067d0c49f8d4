"""How much memory and scratch disk a build takes, from shapes alone.

Memory where it computes is what every step holds, and the most that one of them adds:

    all        the process, a block as it is read, hidden states of every stream, one of them twice
    curvature  a block forth and back for a piece of the samples, what the allocator keeps of it, the curvature G of its rows; a piece of
               the head's scores
    shared     Gram matrices of all stages, where an artifact is solved on them
    solve      of the worst stage, weights [N, K]: matrices [K, K], the weights several times, rows that are swept together; on a stream
               of its own also the block as it is solved, and what the samples hold between two stages (`qquant.plan.room`)
    scales     the same where AWQ searches for scales: a block in float32, statistics before and after
    check      a block of two models in float32, on a GPU of a third, or as many rows of the head as are read at a time

It does not depend on the number of layers. Beside a GPU the host holds the process, CUDA's libraries, and the larger of two: blocks on
their way with what gives way there, or the stored tensors that are read back at a time, which are mapped: both tables of words, most of it
where a layer is wide. Scratch, for `objective: kl`: the inputs of all blocks for the tokens that curvature is measured on, which give way to the curvature itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from qquant.devices import POLICIES
from qquant.plan.room import passages_bytes
from qquant.plan.writing import writing_bytes
from qquant.recipe import ArtifactSpec, Recipe
from qquant.source.checkpoint import Checkpoint
from qquant.source.safetensors_file import SIZES

PROCESS = 600 << 20  # bytes: interpreter, torch, tokenizer
CONTEXT = 600 << 20  # bytes of a GPU that CUDA and its libraries take
LIBRARIES = 1650 << 20  # bytes of the host that they take
BLOCKS = 3  # in host memory: the last one's, one that is there and one that is read
HANDS = 16  # tensors that are read back at a time beside a GPU, at most
ROWS = 2048  # as in `qquant.solve.curvature`, which needs torch
HEAD_ROWS = 16384  # as in `qquant.families.decoder`
WIDE = 16384  # as in `qquant.algorithms.descent`
SYSTEM = 1 << 26  # as there
SWEPT = 28  # bytes of a GPU for a weight that is swept: steps, offsets, halves of the error, its product, codes
ARENAS = 320 << 20  # bytes that GNU's allocator keeps of what was freed in pieces below 32 MB, at most
CODES = 4.2  # bits that a weight takes in a stored tensor, scales included, where it is not 8


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a build."""

    device: int  # where it computes
    least: int  # the same, where all has given way that can
    host: int = 0  # of the host, beside a device with memory of its own
    step: str = ""  # that takes the most where it computes


@dataclass(frozen=True)
class _Stage:
    """Linears that are solved together."""

    rows: int  # N, of all
    columns: int  # K
    tallest: int  # rows of the largest
    linears: int

    @property
    def square(self) -> int:
        return 4 * self.columns**2

    @property
    def weights(self) -> int:
        """Bytes in float32."""
        return 4 * self.rows * self.columns


class _Needs:
    """What the steps of a build take on a kind of device."""

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint, kind: str, specs: Sequence[ArtifactSpec]) -> None:
        self.asked, self.kind, self.specs = recipe.calibration, kind, specs
        self.checkpoint, self.config, self.policy = checkpoint, checkpoint.config, POLICIES[kind]
        family, layers = checkpoint.family, range(checkpoint.config.layers)
        shapes = [family.linear_shapes(self.config, layer) for layer in layers]
        self.weights = [math.prod(shape) for one in shapes for shape in one.values()]  # of every linear
        self.block = max(sum(map(math.prod, one.values())) for one in shapes)  # weights
        self.stages = list(
            dict.fromkeys(
                _stage([one[linear] for linear in stage.linears]) for one in shapes for stage in family.stages
            )
        )
        self.curved = max(sum(rows * min(rows, ROWS) for rows, _ in one.values()) for one in shapes)  # values of G
        self.tokens = self.asked.tokens
        self.item = 2 if checkpoint.dtype == "BF16" else 4  # bytes of an activation
        self.stored = SIZES[checkpoint.dtype]  # of a weight
        together = max(1, self.policy.together // self.asked.length) if self.item == 2 else 1
        self.piece = min(self.tokens, together * self.asked.length)  # tokens that go through a block at a time
        self.own = [spec for spec in specs if spec.own_stream]
        self.in_float32 = [spec for spec in self.own if spec.eight_bit and self.item == 2]

    @cached_property
    def curves(self) -> bool:
        """Whether gradients are measured."""
        return self.asked.objective == "kl" and any(spec.feedback for spec in self.specs)

    @cached_property
    def states(self) -> int:
        """Hidden states of all streams."""
        wide, narrow = len(self.in_float32), 1 + len(self.own) - len(self.in_float32)
        each = [self.item] * narrow + [4] * (wide + bool(wide))
        return self.tokens * self.config.hidden * (sum(each) + max(each))

    @cached_property
    def passages(self) -> int:
        """What samples hold between two stages of the block, at most."""
        if not self.own:
            return 0
        alone = not any(spec.transforms or not spec.own_stream for spec in self.specs)
        narrow = passages_bytes(self.checkpoint.family, self.config, self.tokens, self.item, 1 + alone)
        wide = passages_bytes(self.checkpoint.family, self.config, self.tokens, 4, 2)
        return max(narrow if len(self.in_float32) < len(self.own) else 0, wide if self.in_float32 else 0)

    @cached_property
    def held(self) -> int:
        """Bytes of states and passages while a stage is solved: on a GPU, states move on together, when the block is done."""
        late = 2 * self.tokens * self.config.hidden * self.item if self.passages and self.policy.apart else 0
        return self.states + self.passages - late

    def through(self, item: int) -> int:
        """A piece of the samples in the middle of a block."""
        return self.piece * item * (4 * self.config.intermediate + 6 * self.config.hidden)

    def curvature(self) -> int:
        """The way back."""
        config = self.config
        attention = config.heads * self.asked.length * self.piece * (4 + 3 * self.item)
        if self.policy.apart and self.item == 2:
            attention = 0  # flash attention keeps none
        graph = self.piece * (self.item * (12 * config.intermediate + 24 * config.hidden) + 8 * config.intermediate)
        held = min(self.tokens, self.asked.gradient_tokens) * config.hidden * self.item
        block = self.block * (self.item if self.item != self.stored else 0)
        rows = 6 * self.curved + (4 * self.curved if self.policy.apart else 0)
        kept = 0 if self.policy.apart else min(ARENAS, (graph + attention) // 4)
        return 3 * held + max(graph + attention + kept + rows + block, self._head())

    def _head(self) -> int:
        tokens = min(self.tokens, self.policy.head_tokens)
        kept = self.config.vocab if self.policy.apart else HEAD_ROWS
        return 14 * tokens * HEAD_ROWS + self.item * self.config.hidden * (
            kept + 2 * HEAD_ROWS * (self.item != self.stored)
        )

    def shared(self) -> int:
        """Statistics of all stages."""
        solved = any(spec.feedback and (spec.transforms or not spec.own_stream) for spec in self.specs)
        return sum({stage.columns: stage.square for stage in self.stages}.values()) + self._repeated() if solved else 0

    def _repeated(self) -> int:
        squares = [stage.square for stage in self.stages[: len(self.checkpoint.family.stages)]]
        return sum(squares) - sum(set(squares))

    def solve(self, stage: _Stage, spec: ArtifactSpec) -> tuple[int, str]:
        """A stage of an artifact, and its greatest step."""
        if not spec.feedback:
            return 5 * stage.weights, "rounding"
        square, weights, codes = stage.square, stage.weights, stage.rows * stage.columns
        # linears of an own stream are made as rows of one matrix, others are copied into one
        held = weights * (1 if spec.own_stream else 1 + (stage.linears > 1)) + 2 * codes
        steps = {
            "factoring": 3 * square + held,
            "GPTQ": 2 * square + held + weights + 2 * codes,
            "packing": square + held + weights + 12 * stage.tallest * stage.columns,
        }
        if spec.own_stream:
            made_up = 3 * square + 2 * weights + weights // stage.linears
            summed = 2 * square + weights + self.piece * stage.columns * (2 * self.item + 8)
            steps["correction"] = max(made_up, summed)
        if spec.sweeps:
            steps["sweeps"] = self._swept(stage, spec) + held + codes
        step = max(steps, key=lambda name: steps[name])
        return steps[step], step

    def _swept(self, stage: _Stage, spec: ArtifactSpec) -> int:
        columns, policy = stage.columns, self.policy
        copies = 3 if policy.apart else 2
        together = max(1, policy.swept // (2 if policy.apart and columns > WIDE else 1) // columns)
        if self.curves:  # rows of one G are not taken apart
            together = max(together, min(stage.tallest, ROWS))
        swept = min(stage.rows, together) * columns * (SWEPT if policy.apart else 38)
        # at least one: a row narrower than a super-block gets a smaller type
        unknowns = max(1, spec.unknowns * columns // max(1, spec.group or columns))
        refitted = min(stage.rows, policy.refitted, max(1, SYSTEM // unknowns**2))
        systems = refitted * (12 * unknowns**2 + 24 * columns)
        curved = 6 * stage.tallest * min(stage.tallest, ROWS) if self.curves else 0
        if policy.apart and self.curves:
            curved = 4 * stage.rows * min(stage.tallest, ROWS)
        recorded = 0
        if policy.apart and self.curves and columns <= WIDE:
            recorded = 2 * stage.square + 20 * min(1024, columns) * columns + swept // 8
        factors = (28 if policy.apart else 20) * min(1024, columns) * columns
        return copies * stage.square + factors + 2 * recorded + max(swept + curved, systems)

    def artifact(self, spec: ArtifactSpec) -> tuple[int, str]:
        """All that one artifact takes beside statistics and hidden states, without passages."""
        most = max(self.solve(stage, spec) for stage in self.stages)
        if not spec.own_stream:
            return most[0] + 4 * self.block * spec.transforms + self._scaled(spec), most[1]
        item = 4 if spec in self.in_float32 else self.item
        block = self.block * (item if item != self.stored or spec.transforms else 0) + self.block * item
        return most[0] + block + 4 * self.block * spec.transforms + self._scaled(spec) // 2, most[1]

    def _scaled(self, spec: ArtifactSpec) -> int:
        """Statistics of scaled inputs."""
        return self.shared() if spec.transforms else 0

    def host(self) -> int:
        """What of it passes through the host of a GPU."""
        walked = self.block * self.stored * min(self.config.layers, BLOCKS) + self.states
        tables = (1 if self.config.tied else 2) * self.config.vocab * self.config.hidden
        largest = sorted(self.weights, reverse=True)[:HANDS]
        codes = 8 if any(spec.eight_bit for spec in self.specs) else CODES
        return max(walked, tables * self.stored + int(codes * sum(largest) / 8))

    def check(self) -> int:
        """Blocks in float32; on a GPU the next model's is read ahead."""
        return 4 * self.block * (2 + self.policy.threads) + 4 * HEAD_ROWS * self.config.hidden


def _stage(shapes: Sequence[tuple[int, ...]]) -> _Stage:
    return _Stage(sum(rows for rows, _ in shapes), shapes[0][1], max(rows for rows, _ in shapes), len(shapes))


def build_memory(
    recipe: Recipe, checkpoint: Checkpoint, kind: str = "cpu", specs: Sequence[ArtifactSpec] | None = None
) -> Memory:
    """What a build takes on a kind of device, of the artifacts in `specs` or of all."""
    needs = _Needs(recipe, checkpoint, kind, recipe.artifacts if specs is None else specs)
    walked = [(needs.through(needs.item), "walk"), *map(needs.artifact, needs.specs)]
    most, step = max(walked)
    steps = {step: needs.shared() + most, "check": needs.check(), "generate": writing_bytes(recipe, checkpoint)}
    kept = {name: taken + (needs.held if name == step else 0) for name, taken in steps.items()}
    if needs.curves:
        steps["curvature"] = kept["curvature"] = needs.curvature()
    apart = needs.policy.apart
    read = needs.block * needs.stored
    base = CONTEXT if apart else PROCESS
    least = {name: taken + (needs.states * (not apart) if name == step else 0) for name, taken in steps.items()}
    greatest = max(kept, key=lambda name: kept[name])
    host = PROCESS + LIBRARIES + needs.host() if apart else 0
    return Memory(base + read + kept[greatest], base + read + max(least.values()), host, greatest)


def scratch_bytes(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """Bytes on disk, while the build runs, of block inputs and of the curvature that is measured with them."""
    if recipe.calibration.objective != "kl":
        return 0
    config = checkpoint.config
    calibration = recipe.calibration
    tokens = max(calibration.length, min(calibration.curvature_tokens, calibration.tokens))
    rows = max(
        sum(2 * count * min(count, ROWS) for count, _ in checkpoint.family.linear_shapes(config, layer).values())
        for layer in range(config.layers)
    )
    states = tokens * config.hidden * (2 if checkpoint.dtype == "BF16" else 4)
    tables = 8 * config.hidden * config.hidden + 8 * config.vocab
    return config.layers * (max(states, rows) + 16 * tokens) + rows + tables
