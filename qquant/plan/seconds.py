"""How long a build takes, by phase: work counted from shapes (`plan.work`), over rates that this machine shows in a second.

    read        the checkpoint is hashed
    generate    a token and the head for each that the checkpoint writes, WRITE times as slow as reading, with the weights in memory
    curvature   of the tokens that curvature is measured on, a forward pass, the head's draws, and the way back with the sums of G
    embedding and head    as for a linear [words, hidden], where they are codes of a solver
    quantize    one forward pass with Gram matrices, or none where an artifact with a stream of its own takes it along; for each of these
                two more with sums of its drift, and targets; for each linear what its solver does
    write       files are hashed, and what they hold is dequantized again
    load        a clean process loads the artifacts
    check       the weights of checkpoint and artifacts in float32, a forward pass and the head for each, window by window
    slices      the same for the windows of `profile: release`; its long documents with attention over 2 T hidden a token and block
    retrieval   the same for its documents with hidden facts; behaviour: its answers, DECODE times as slow a token as reading
    answer      answers of checkpoint and artifacts in two dtypes, a step for every token of those that are answered together

On a CPU 14 to 30 % less than three builds took (tests/bench/README.md), not calibrated; on a
GPU, which does several of these at a time, `plan.machine` has what `qquant doctor --calibrate` found. Waiting for a disk is left out. Needs torch.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from qquant.calibration import Tokenizer, behaviour
from qquant.calibration.slices import documents_length, most_tokens
from qquant.devices import POLICIES
from qquant.formats.planned import PlannedArtifact
from qquant.plan import work
from qquant.plan.plan import Plan
from qquant.plan.work import Sizes, Work
from qquant.ranks import GAIN, dealt, helps
from qquant.recipe import ArtifactSpec, Checks, Recipe
from qquant.resources import lazy
from qquant.source.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

    from qquant.families import linear as products
    from qquant.kernels import gptq_block as column_loop
else:
    torch, column_loop, products = lazy("torch"), lazy("qquant.kernels.gptq_block"), lazy("qquant.families.linear")

TABLE_ROWS = 4096  # as in `qquant.solve.outside`
HEAD_TOKENS = 1024  # that take a slice of the head at a time, as in `qquant.devices`
HEAD_ROWS = 16384  # of a slice, as in `qquant.families.decoder`
DRAWN = 8  # passes over logits from which is drawn
COMPARED = 12  # and over those that are compared
INSPECTED = 12  # passes over an artifact's weights: dequantized, looked at; over what is only read PLAIN
PLAIN = 4
LOADER, LOADED = 1.3, 0.2  # starts of a clean process with the libraries that users load with, and of an artifact in it
OTHER = 0.1  # of a start: texts are tokenized, or a report is drawn
NAMED = 0.03  # of a start: an artifact's records are written, and it gets its name
PROMPTS = 2500  # tokens of the bundled prompts, about, that are read in each of two dtypes
# Prompts or batches of them that are answered word by word; steps of all others, which confirm a draft.
WRITTEN, CONFIRMED = 4, 16
STEP = 25  # steps of a column loop that a block's operators are for a token
DECODE = 16  # a token that is decoded in a batch, over one that is read
WRITE = 4  # a token that is written with up to 63 others, over one that is read
ENOUGH = 0.12  # seconds of each probe
SIDE = 1024  # of matrices that are probed
FACTORED = 256, 2048  # columns of one that is factored: the rate doubles in between; a wider one takes a second
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, by the kinds of `Work`."""

    forward: float
    exact: float
    factor: float
    elements: float
    large: float
    columns: float
    cells: float
    hashed: float
    starts: float = 0.2  # not probed: a process that imports torch takes about five seconds

    def seconds(self, todo: Work) -> float:
        """What it takes, one after the other."""
        rates = asdict(self)
        return sum(amount / rates[kind] for kind, amount in asdict(todo).items())


def probe(checkpoint: Checkpoint, device: torch.device) -> Rates:
    """Rates of products of the checkpoint's own shapes on `device`, and of the other kinds; measured in about a second."""
    return probe_of(typical(checkpoint), getattr(torch, DTYPES[checkpoint.dtype]), device)


def typical(checkpoint: Checkpoint) -> tuple[int, int]:
    """The [N, K] of the linear whose smaller side is the largest."""
    shapes = checkpoint.family.matrices(checkpoint.config)
    rows, columns = max(
        (shape for name, shape in shapes.items() if name != checkpoint.family.embedding), key=lambda s: min(s)
    )
    return rows, columns


def probe_of(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Rates:
    """Rates of products with weights [N, K] in `dtype` and in float32, and of the other kinds."""
    rows, columns = shape

    def multiplied(kind: torch.dtype) -> float:
        x = torch.randn(512, columns, device=device).to(kind)
        weight = torch.randn(rows, columns, device=device).to(kind)
        return 2 * 512 * rows * columns * _a_second(lambda: products.linear(x, weight), device)

    least, most = FACTORED
    side = min(max(least, min(shape)), most)
    one = torch.eye(side, device=device)
    damped = one * side + torch.ones_like(one)

    def factored() -> torch.Tensor:
        return torch.linalg.solve_triangular(torch.linalg.cholesky(damped), one, upper=False)

    cached, fresh = (torch.ones(1 << size, device=device) for size in (work.CACHED - 2, work.FRESH + 1))
    few, many = (_looped(count, device) for count in (64, SIDE))
    content = bytes(1 << 22)
    return Rates(
        multiplied(dtype),
        multiplied(torch.float32),
        4 / 3 * side**3 * _a_second(factored, device),
        cached.numel() * _a_second(lambda: cached * 1.0, device),
        fresh.numel() * _a_second(lambda: fresh * 1.0, device),
        1 / few,
        (SIDE - 64) / max(many - few, few / 64),
        len(content) * _a_second(lambda: hashlib.sha256(content), device),
    )


def _looped(rows: int, device: torch.device) -> float:
    """Seconds for a column of so many rows."""
    weight = torch.zeros(rows, SIDE, device=device)
    step, upper = torch.ones_like(weight), torch.eye(SIDE, device=device)
    # The operator's first call imports torch's compiler, which takes seconds.
    loop = column_loop.gptq_block if device.type == "cuda" else column_loop.reference
    return 1 / (SIDE * _a_second(lambda: loop(weight, upper, step, weight, 16), device))


def _a_second(step: Callable[[], object], device: torch.device) -> float:
    """How often `step` is done in a second."""
    step()
    count, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < ENOUGH:
        step()
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return count / took


def seconds(
    recipe: Recipe, checkpoint: Checkpoint, plan: Plan, rates: Rates, device: torch.device, world: int = 1
) -> dict[str, float]:
    """Seconds by phase, as `build` shows them; on `world` ranks those of the slowest in each."""
    took = {phase: rates.seconds(todo) for phase, todo in counted(recipe, checkpoint, plan, device, world).items()}
    return {phase: each for phase, each in took.items() if each}


def counted(
    recipe: Recipe, checkpoint: Checkpoint, plan: Plan, device: torch.device, world: int = 1
) -> dict[str, Work]:
    """The work of each phase; on `world` ranks that of the one which has most of it."""
    model, checks = _Model.of(recipe, checkpoint), recipe.checks
    length = recipe.calibration.length
    seen = min(plan.tokens, recipe.calibration.gradient_tokens)
    hands = shares(checkpoint, plan, device, world)
    together = world > 1 and len(hands) == 1
    each = GAIN * world if together else 1.0
    asked = 1 + (math.ceil(len(plan.artifacts) / world) if together else max(map(len, hands)))
    curved = seen > 0 and any(artifact.spec.feedback for artifact in plan.artifacts)
    bytes_read = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    sizes = [artifact.size for artifact in plan.artifacts]
    kept = work.passes(sum(sizes) / 2, model.table)  # values of 16 bits that artifacts hold
    by_phase = {
        "read": Work(hashed=bytes_read, starts=OTHER),
        "generate": (model.token(length) + model.logits) * (plan.writing.tokens * WRITE if plan.writing else 0.0),
        "curvature": (model.curvature(length, seen) * (1 / world) + Work(starts=1)) * curved,
        "embedding and head": _largest(
            [Work.of(model.tables(artifact, curved, device) for artifact in hand) for hand in hands], device
        )
        * curved,
        "quantize": _largest([model.stream(hand, plan.tokens, length, curved, device) for hand in hands], device)
        * (1 / each),
        "write": (
            Work(hashed=sum(sizes), starts=NAMED * len(sizes))
            + kept
            + work.passes(PLAIN * model.weights * len(sizes), model.largest)
        )
        * (1 / world),
        "load": Work(starts=LOADER + LOADED * len(sizes)) + kept * PLAIN,
        "check": model.check(checks, plan.looks[0], len(plan.artifacts), world),
        **model.slices(checks, 1 + len(plan.artifacts), world),
        **model.behaviour(checks, asked),
        "answer": model.answers(checks.answer_length) * asked,
    }
    return {phase: todo for phase, todo in by_phase.items() if todo != Work()}


def _largest(todo: Sequence[Work], device: torch.device) -> Work:
    return max(todo, key=NOMINAL[device.type].seconds)


@dataclass(frozen=True)
class _Model:
    """What of a model the counts depend on: the linears [N, K] of every block, their stages, and the table of words."""

    checkpoint: Checkpoint
    blocks: Mapping[tuple[tuple[tuple[tuple[int, int], ...], bool], ...], int]  # a block's stages -> how often
    weights: int
    table: int  # values of the head
    words: int  # of the tokenizer: what a check reads of the head
    heads: int
    wide: int
    scored: float  # of the tokens of a window

    @classmethod
    def of(cls, recipe: Recipe | None, checkpoint: Checkpoint) -> _Model:
        """The sizes of a checkpoint."""
        family, config = checkpoint.family, checkpoint.config
        blocks: dict[tuple[tuple[tuple[tuple[int, int], ...], bool], ...], int] = {}
        for layer in range(config.layers):
            shapes = family.linear_shapes(config, layer)
            block = tuple(
                (tuple((shapes[name][0], shapes[name][1]) for name in stage.linears), stage.into_residual)
                for stage in family.stages
            )
            blocks[block] = blocks.get(block, 0) + 1
        weights = sum(count * n * k for block, count in blocks.items() for stage, _ in block for n, k in stage)
        scored = recipe.checks.scored / recipe.checks.length if recipe else 1.0
        words = min(config.vocab, Tokenizer.open(checkpoint.path).size) if recipe else config.vocab
        table = config.vocab * config.hidden
        return cls(checkpoint, blocks, weights, table, words, config.heads, config.head_dim, scored)

    @property
    def largest(self) -> int:
        """Values of the largest matrix of a block."""
        return max(n * k for block in self.blocks for stage, _ in block for n, k in stage)

    @property
    def logits(self) -> Work:
        """The logits of a token in float32."""
        return Work(exact=2 * self.table)

    def _each(self, of: Callable[[list[tuple[int, int]], int], Work]) -> Work:
        """The sum over all blocks of what `of` says of the linears of one and of the inputs of its stages."""
        return Work.of(
            of([linear for stage, _ in block for linear in stage], sum(stage[0][1] for stage, _ in block)) * count
            for block, count in self.blocks.items()
        )

    def token(self, length: float, exact: bool = False) -> Work:
        """The work of a token through all blocks."""
        heads = self.heads * self.wide
        return self._each(lambda linears, inputs: work.passed(linears, inputs, heads, length, exact))

    def curvature(self, length: int, tokens: float) -> Work:
        """The work of measuring curvature: forth, the head, and back."""
        heads, wide, vocab = self.heads, self.wide, self.checkpoint.config.vocab
        back = self._each(lambda linears, inputs: work.way_back(linears, inputs, heads, wide, length))
        slice_size = min(HEAD_TOKENS, tokens) * min(HEAD_ROWS, vocab)
        draws = Work(forward=2 * self.table) + work.passes(DRAWN * vocab, slice_size)
        reads = work.passes(
            PLAIN * self.table * math.ceil(tokens / HEAD_TOKENS), HEAD_ROWS * self.checkpoint.config.hidden
        )
        return (self.token(length) + back + draws) * tokens + reads * bool(tokens)

    def stream(
        self, hand: Sequence[PlannedArtifact], tokens: float, length: int, curved: bool, device: torch.device
    ) -> Work:
        """The work of a rank in all blocks."""
        specs = [artifact.spec for artifact in hand]
        own, scaled = [spec for spec in specs if spec.own_stream], any(spec.transforms for spec in specs)
        carried = len(own) == len(specs) > 0 and not scaled and not all(spec.eight_bit for spec in own)
        stays = POLICIES[device.type].apart  # 16-bit activations are widened on a CPU, see `solve.drift`
        gram = Work.of(
            Work(exact=2 * stage[0][1] ** 2) * count for block, count in self.blocks.items() for stage, _ in block
        )
        gram = gram.in_16_bit() if stays else gram
        matrices = gram if scaled or any(not spec.own_stream and spec.feedback for spec in specs) else Work()
        shared = Work() if carried else self.token(length) + matrices
        drift = Work.of(
            work.drifted((sum(n for n, _ in stage), stage[0][1], residual) for stage, residual in block) * count
            for block, count in self.blocks.items()
        )
        targets = Work.of(
            work.targeted(sum(n for n, _ in stage), stage[0][1]) * count
            for block, count in self.blocks.items()
            for stage, _ in block
        )
        near = drift.in_16_bit() if stays else drift
        wide = [spec.eight_bit and not stays for spec in own]  # a card multiplies float32 streams in 16 bits
        streams = Work.of(
            (self.token(length, exact) * 2 + (drift if exact else near)) * tokens + targets for exact in wide
        )
        return shared * tokens + streams + Work.of(self.solved(spec, curved, device) for spec in specs)

    def solved(self, spec: ArtifactSpec, curved: bool, device: torch.device) -> Work:
        """The work of an artifact's solver in all linears."""

        def of_stage(stage: tuple[tuple[int, int], ...]) -> Work:
            if not spec.feedback:
                return work.passes(2 * work.FIT * sum(n * k for n, k in stage), 0)
            return work.solving(stage, spec.sweeps, curved, _sizes(device))

        ratios = spec.fold_points
        return Work.of(
            (of_stage(stage) + (work.scaling(stage, ratios) if ratios else Work())) * count
            for block, count in self.blocks.items()
            for stage, _ in block
        )

    def tables(self, artifact: PlannedArtifact, curved: bool, device: torch.device) -> Work:
        """The work of embedding and head, TABLE_ROWS words at a time, where the artifact holds them as codes and solves them."""
        family, config = self.checkpoint.family, self.checkpoint.config
        if not artifact.spec.feedback:
            return Work()
        names = [family.embedding, *([] if config.tied else [family.head])]
        coded = sum(not artifact.stored[name].numbers for name in names)
        slices = coded * math.ceil(config.vocab / TABLE_ROWS)
        return work.solving([(TABLE_ROWS, config.hidden)], artifact.spec.sweeps, False, _sizes(device)) * slices

    def check(self, checks: Checks, windows: int, artifacts: int, world: int) -> Work:
        """The work of reading the windows of the texts with all models."""
        texts, models = 1 + len(checks.texts), 1 + artifacts
        read = windows * checks.length * texts
        kept = work.passes((PLAIN + INSPECTED * artifacts) * self.weights, self.largest)
        kept += work.passes(PLAIN * models * self.words * self.checkpoint.config.hidden, 1 << work.CACHED)
        compared = Work(exact=2 * self.words * self.checkpoint.config.hidden)
        compared += work.passes(COMPARED * self.words, 1 << work.CACHED)
        share = 1 / min(world, windows * texts)
        return (
            Work(starts=OTHER)
            + kept
            + (self.token(checks.length, True) + compared * self.scored) * (models * read * share)
        )

    def slices(self, checks: Checks, models: int, world: int) -> dict[str, Work]:
        """The work of `profile: release` by phase."""
        if checks.profile != "release":
            return {}
        config = self.checkpoint.config
        short, long = most_tokens(config.positions)
        far = self.token(documents_length(config.positions), True) + self.logits
        near = self.token(checks.length, True) + self.logits
        return {"slices": near * (models * short / world), "long documents": far * (models * long / world)}

    def behaviour(self, checks: Checks, models: int) -> dict[str, Work]:
        """The work of the questions of `profile: release` by phase."""
        if checks.profile != "release":
            return {}
        config = self.checkpoint.config
        _, answers = behaviour.most_tokens(config.positions)
        read = Work.of(
            self.token(length) * (length * len(behaviour.HAYSTACKS)) for length in behaviour.depths(config.positions)
        )
        return {"retrieval": read * models, "behaviour": self.token(checks.length) * (models * answers * DECODE)}

    def answers(self, length: int) -> Work:
        """The work of one model's answers to the bundled prompts: every step reads all weights, which are float16 once, and made float32 again."""
        steps = 2 * (WRITTEN * length + CONFIRMED)
        weights = work.passes(2 * self.weights + self.table, 1 << work.CACHED)
        written = (Work(columns=STEP * self.checkpoint.config.layers) + weights) * steps
        return (written + self.token(PROMPTS / WRITTEN) * (2 * PROMPTS)) * bool(length)


def _sizes(device: torch.device) -> Sizes:
    policy = POLICIES[device.type]
    return Sizes(policy.swept, policy.refitted)


def shares(checkpoint: Checkpoint, plan: Plan, device: torch.device, world: int) -> list[list[PlannedArtifact]]:
    """The artifacts of each rank, as a build deals them; one hand where all ranks work on all of them."""
    costs = {artifact.name: solving(checkpoint, plan, device, artifact) for artifact in plan.artifacts}
    hands = dealt(costs, world)
    if helps(costs, hands):
        return [list(plan.artifacts)]
    by_name = {artifact.name: artifact for artifact in plan.artifacts}
    return [[by_name[name] for name in hand] for hand in hands]


NOMINAL = {  # rates of no machine in particular: good for comparing artifacts with each other
    "cpu": Rates(4e11, 1e11, 3e10, 2e9, 4e8, 3e4, 2e7, 1e9),
    "cuda": Rates(4e14, 1e14, 2e13, 2e12, 1e12, 2e6, 2e10, 1e9),
}


def solving(checkpoint: Checkpoint, plan: Plan, device: torch.device, artifact: PlannedArtifact) -> float:
    """About the seconds that an artifact takes besides what all share, by nominal rates."""
    model, spec = _Model.of(None, checkpoint), artifact.spec
    alone = (
        model.stream([artifact], plan.tokens, 0, True, device) if spec.own_stream else model.solved(spec, True, device)
    )
    return NOMINAL[device.type].seconds(alone + model.tables(artifact, True, device))
