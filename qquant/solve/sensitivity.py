"""What each tensor is expected to lose as each type: the numbers by which a size is divided among tensors.

    loss(tensor, type) = 1/2 mean_t (g_t' E x_t)^2  =~  |g|^2 / (2 T)  sum_r G_rr e_r H e_r' / sum_r G_rr

in nats of KL divergence per token, with E the error of the tensor as that type, H and G as in `qquant.solve.curvature`, |g|^2 the mean over
the tokens. E is that of the artifact's own solver: GPTQ where it feeds errors back, to which LEFT stands in for the sweeps that follow,
else the format's quantizer. ROWS rows of a linear are tried, the same for every type, and of a table of words the WORDS that count most.
Errors of rows are taken as independent, so the diagonal of G is enough. (To the total of linears, this and all rows with all of G
differ by 1 to 3 % on the demo, and choose maps of the same loss.)

One backward pass, whose result the build takes up again, one forward pass over the same samples, and no trial of a whole model. The
numbers are kept in the output folder with a key of everything that they depend on: a build that goes on, or is made again, chooses the
same types. Reference: K-FAC, as in `qquant.solve.curvature`; SignRoundV2's DeltaLoss (arXiv 2512.04746) is first order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qquant.algorithms.gram import Gram
from qquant.algorithms.problem import Problem, solve
from qquant.disk.digest import sha256_of_data
from qquant.disk.records import to_plain, typed
from qquant.disk.writes import write_synced
from qquant.errors import InputError
from qquant.formats import FORMATS, by_size
from qquant.formats.planned import Losses, PlannedArtifact
from qquant.plan.plan import Plan
from qquant.progress import Progress
from qquant.recipe import Recipe
from qquant.solve.block import View
from qquant.solve.curvature import Curvature, Tables, measure, spread
from qquant.solve.layers import Layers
from qquant.solve.moments import Moments
from qquant.solve.outside import kinds_of
from qquant.solve.solver import padded_gram
from qquant.solve.stream import STREAM_DTYPES, Piece, Stream
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import without_padding, zero_padded
from qquant.source.untrusted import read_json

PHASE = "types"
SCHEMA = "qquant-losses-1"
ROWS = 256  # of a linear that are tried
WORDS = 2048  # of a table that are tried
FORESEEN = 2  # steps of a solver: to nearest, GPTQ
LEFT = 0.65  # of GPTQ's loss after sweeps: whole files of the demo had 0.61 (q3_k_m), 0.63 (q2_k) and 0.68 (q4_k_m)

ByTensor = dict[str, dict[str, float]]  # loss by type, by tensor of the checkpoint
Trials = Mapping[str, Mapping[str, PlannedArtifact]]  # plans by type, by artifact


@dataclass(frozen=True)
class Recorded:
    """The file with what was measured."""

    schema: str
    key: str  # of everything that the losses depend on
    losses: dict[str, ByTensor]  # by artifact
    sha256: str  # of the losses


@dataclass(frozen=True)
class LossQuestion:
    """A plan with artifacts whose types are to be chosen, and what it was made from."""

    recipe: Recipe
    checkpoint: Checkpoint
    plan: Plan
    inputs: Mapping[str, str]  # what the bytes of artifacts depend on

    def trials(self) -> Trials:
        """Every type of every tensor, as plans."""
        specs = {spec.name: spec for spec in self.recipe.artifacts if spec.name in self.plan.unsettled}
        return {
            name: by_size(spec).trials(self.checkpoint, spec, self.recipe, self.plan.model)
            for name, spec in specs.items()
        }

    def settled(self, losses: Mapping[str, Mapping[str, Losses]]) -> Plan:
        """The plan with types chosen by `losses`."""
        names = [artifact.name for artifact in self.plan.artifacts]
        return Plan.of(self.recipe, self.checkpoint, names, self.plan.model, self.plan.imatrix, losses)


def settle(
    question: LossQuestion,
    samples: Sequence[Tensor],
    record: Path,
    moments: Moments,
    device: torch.device,
    progress: Progress,
) -> Plan:
    """The plan with its types chosen, by the losses in file `record` if they are those of this question; else they are measured.

    Of several ranks the first measures; the others find its record, and choose the same.
    """
    if not question.plan.unsettled:
        return question.plan

    def settled() -> Plan:
        trials = question.trials()
        asked = {name: {kind: _asked(one) for kind, one in some.items()} for name, some in trials.items()}
        key = sha256_of_data({"inputs": dict(question.inputs), "asked": asked})
        losses = _recorded(record, key)
        if losses is None:
            tokens = question.recipe.calibration.gradient_tokens
            losses = measured(question.checkpoint, samples, trials, moments, device, progress, tokens)
            recorded = Recorded(SCHEMA, key, losses, sha256_of_data(losses))
            write_synced(record, (json.dumps(to_plain(recorded), indent=1) + "\n").encode())
        return question.settled(losses)

    return moments.ranks.after_first(settled)


def _asked(planned: PlannedArtifact) -> dict[str, object]:
    """What of an entry the losses depend on, besides the types of its plan."""
    return planned.spec.model_dump(mode="json", exclude={"name", "gates"})


def _recorded(path: Path, key: str) -> dict[str, ByTensor] | None:
    """The losses that a file holds, if they are whole and have this key."""
    with suppress(InputError):
        if path.is_file():
            recorded = typed(Recorded, read_json(path), str(path))
            if recorded.key == key and recorded.sha256 == sha256_of_data(recorded.losses):
                return recorded.losses
    return None


def measured(
    checkpoint: Checkpoint,
    samples: Sequence[Tensor],
    trials: Trials,
    moments: Moments,
    device: torch.device,
    progress: Progress,
    tokens: int,
) -> dict[str, ByTensor]:
    """The losses of all trials, measured on so many `tokens` of the samples.

    Raises:
        NumericalError: an activation or a gradient is not finite.
        EnvironmentMissingError: there is not enough memory for one sample.
        StoppedError: `progress` was asked to stop.
    """
    source, blocks = without_padding(checkpoint), Layers.of(without_padding(checkpoint), device)
    dtype = STREAM_DTYPES[checkpoint.dtype]
    measured = {place: samples[place] for place in spread([len(sample) for sample in samples], tokens)}
    curvature = measure(source, measured, moments.folder / "curvature", dtype, device, progress, blocks)
    layers, pass_ = checkpoint.config.layers, _Trying(trials)
    progress.advance(PHASE, 0, layers + 1)
    for table in _tables(checkpoint, curvature.tables(device), device):
        pass_.take(table)
    progress.advance(PHASE, 1, layers + 1)
    for layer, view, grams in _forward(checkpoint, measured, blocks, curvature):
        for stage in checkpoint.family.stages:
            for linear in stage.linears:
                pass_.take(_linear(view, linear, grams[stage.name], moments))
        progress.advance(PHASE, layer + 2, layers + 1)
        progress.check_stop()
    return pass_.losses


def _forward(
    checkpoint: Checkpoint, samples: Mapping[int, Tensor], blocks: Layers, curvature: Curvature
) -> Iterator[tuple[int, View, dict[str, Gram]]]:
    """Every block with the statistics of its stages' inputs."""
    dtype, device, places = STREAM_DTYPES[checkpoint.dtype], blocks.device, list(samples)
    stream = Stream.start(checkpoint, list(samples.values()), dtype, device)
    layers = checkpoint.config.layers
    with blocks.walk(range(layers)) as forth:
        for layer in range(layers):
            view = View(checkpoint, layer, next(forth), dtype, curvature.block(layer, device))
            grams = view.grams(device)

            def add(gram: Gram, stage: str, x: Tensor, piece: Piece, view: View = view) -> None:
                view.add(gram, stage, x, tuple(places[index] for index in piece))

            stream.advance(layer, view.block(), grams, add)
            yield layer, view, grams


@dataclass(frozen=True)
class _Rows:
    """Rows of a matrix that are tried."""

    name: str
    weight: Tensor  # float32 [n, K]
    gram: Gram  # with which they are solved
    importance: Tensor | None  # float32 [K]
    costs: Sequence[
        tuple[Tensor, Tensor, float]
    ]  # (H [K, K], weights of the rows [n], what a mean of e H e' of 1 costs)

    def loss(self, error: Tensor) -> float:
        """The loss of the whole matrix, where these rows have `error` [n, K]."""
        total = 0.0
        for matrix, rows, cost in self.costs:
            each = ((error @ matrix) * error).sum(1).double()
            total += cost * float((rows * each).sum() / rows.sum().clamp(min=1e-30))
        return total


def _linear(view: View, linear: str, gram: Gram, moments: Moments) -> _Rows:
    """Some rows of a linear, evenly over all."""
    assert view.curvature is not None
    checkpoint, weight = view.checkpoint, view.weights[f"{linear}.weight"]
    name = f"{checkpoint.family.block.format(view.layer)}{linear}.weight"
    places = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight)), device=weight.device).round().long()
    curved = torch.cat([part.diagonal() for part in view.curvature.rows[linear]])[places]
    columns = checkpoint.family.linear_shapes(checkpoint.config, view.layer)[linear][1]
    importance = moments.importance(checkpoint.family.gguf_name(name), gram)
    gram = padded_gram(gram, columns)
    cost = view.curvature.scales[linear] / (2 * max(1, gram.tokens))
    rows = zero_padded(weight[places].float(), (len(places), columns))
    return _Rows(name, rows, gram, zero_padded(importance, (columns,)), [(gram.matrix, curved.double(), cost)])


def _tables(checkpoint: Checkpoint, tables: Tables, device: torch.device) -> Iterator[_Rows]:
    """The words of the embedding and of the head that count most; of a tied table those that count most in either."""
    family, tokens = checkpoint.family, max(1, tables.tokens)
    lookup, head = (tables.lookup / tokens, tables.counts), (tables.head / tokens, tables.predicted)
    uses = [(family.embedding, [lookup, head] if checkpoint.config.tied else [lookup])]
    uses += [] if checkpoint.config.tied else [(family.head, [head])]
    for name, costs in uses:
        shares = [count.double() / count.sum().clamp(min=1) for _, count in costs]
        words = torch.stack(shares).sum(0).argsort(descending=True, stable=True)[:WORDS].sort().values
        kinds = kinds_of(checkpoint, name, tables)
        kind = max(kinds, key=lambda kind: int(kind.words.sum()))  # of a tied table, that of most words
        weight = torch.cat([checkpoint.rows(name, int(word), int(word) + 1) for word in words])
        parts = [(matrix, share[words].to(device), 0.5) for (matrix, _), share in zip(costs, shares, strict=True)]
        yield _Rows(name, weight.to(device).float(), kind.gram, None, parts)


@dataclass
class _Trying:
    """The losses so far; artifacts that differ in name alone are tried once."""

    trials: Trials
    losses: dict[str, ByTensor] = field(default_factory=dict)

    def take(self, rows: _Rows) -> None:
        """Try the rows as every type that their matrix may have."""
        tried: dict[tuple[str, str, float, object], float] = {}
        for artifact, trials in self.trials.items():
            losses = self.losses.setdefault(artifact, {}).setdefault(rows.name, {})
            for kind, planned in trials.items():
                if planned.stored[rows.name].type == kind:
                    spec = planned.spec
                    same = kind, spec.solver, spec.damping, spec.model_dump().get("imatrix")
                    if same not in tried:
                        tried[same] = self._loss(planned, rows)
                    losses[kind] = tried[same]

    def _loss(self, planned: PlannedArtifact, rows: _Rows) -> float:
        spec, layout = planned.spec, FORMATS[planned.format]
        grid = layout.grid_for(planned, rows.name, rows.weight.shape[1])
        if grid is None:
            stored = layout.store(planned, rows.name, rows.weight, rows.importance)
            return rows.loss(layout.restore(planned, rows.name, stored) - rows.weight)
        problem = Problem({rows.name: rows.weight}, rows.gram, grid, spec)
        value = solve(problem, spec.steps[:FORESEEN]).quantized(problem)[rows.name].dequantize()
        return rows.loss(value - rows.weight) * (LEFT if spec.feedback and spec.sweeps else 1.0)
