"""What lies outside the blocks: the final norm, and the two tables of words, the embedding and the head.

Numbers are copied. Codes are found by the format's own quantizer or, where the artifact's solver feeds errors back, like those of a
linear, a table being a matrix [words, hidden]. Word v stands in the text n_v times, and is predicted with the sum p_v of probabilities;
an error e of its row costs, with sums and means over the calibration tokens (`qquant.solve.curvature.Tables`),

    embedding   n_v e' G e       G = mean of g g', g the gradient at the embedding's output: the curvature of block 0's input
    head        p_v e' H e       H = mean of s h h' over the weights s, h the normed states after the last block
    tied        e' (n_v G + p_v H) e

Rows do not depend on each other, so n_v and p_v alone change nothing, and one matrix serves every word, also those that calibration never
saw. Of a tied table it is n_v / p_v that counts; SLACK sightings more keep words that are rare in both from mattering, and words whose
ratio lies in the same octave share a matrix. Rows are solved ROWS at a time: memory does not grow with the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Event

import torch
from torch import Tensor

from qquant import background, devices
from qquant.algorithms.checksum import Checksum
from qquant.algorithms.gram import Gram
from qquant.algorithms.grid import Grid
from qquant.algorithms.problem import Problem, Solution, solve
from qquant.artifact.draft import Draft, UnitWriter
from qquant.errors import QQuantError, StoppedError
from qquant.families.decoder import HEAD_ROWS
from qquant.formats import FORMATS
from qquant.progress import Progress
from qquant.report.solved import LinearRecord
from qquant.solve.curvature import Tables
from qquant.source.checkpoint import Checkpoint

UNSOLVED = "rest"  # the unit of what is not solved
PHASE = "embedding and head"
ROWS = 4096  # of a table that are solved at a time
SLACK = 1.0  # times that every word counts as seen besides those that it was
OCTAVES = 3  # of n_v / p_v to either side that are told apart


def solved_tables(checkpoint: Checkpoint, draft: Draft) -> dict[str, Grid]:
    """The tables that an artifact's solver takes, where curvature is measured, each on its grid."""
    family, config = checkpoint.family, checkpoint.config
    if not draft.plan.spec.feedback:
        return {}
    names = [family.embedding, *([] if config.tied else [family.head])]
    grids = {name: FORMATS[draft.plan.format].grid_for(draft.plan, name, config.hidden) for name in names}
    return {name: grid for name, grid in grids.items() if grid is not None}


def write_unsolved(
    checkpoint: Checkpoint, drafts: Sequence[Draft], solved: bool, device: torch.device, together: bool, stop: Event
) -> None:
    """Write what no solver takes of every draft that does not have it; with `solved` they are not asked for tables that one does.

    `together`: all along, every slice of a table read once, ahead; else one after another, so that a kill costs one draft's work.

    Raises:
        StoppedError: `stop` was set meanwhile.
    """
    todo = [draft for draft in drafts if UNSOLVED not in draft.units]
    groups = [todo] if together else [[draft] for draft in todo]
    for group in filter(None, groups):
        unsolved = [_Unsolved(checkpoint, draft, solved) for draft in group]
        with background.prefetch(partial(_read, checkpoint), _slices(unsolved, checkpoint), together) as values:
            _write_group(unsolved, values, device, stop)


Slice = tuple[str, slice]  # rows of a tensor


def _slices(group: Sequence[_Unsolved], checkpoint: Checkpoint) -> list[Slice]:
    """The tensors that some of a group want, in slices of rows."""
    family, slices = checkpoint.family, list[Slice]()
    for name in [family.embedding, family.final_norm, *([] if checkpoint.config.tied else [family.head])]:
        if any(name in one.names for one in group):
            rows = checkpoint.tensors[name].shape[0]
            step = rows if name == family.final_norm else HEAD_ROWS
            slices += [(name, slice(start, min(start + step, rows))) for start in range(0, rows, step)]
    return slices


def _read(checkpoint: Checkpoint, at: Slice) -> tuple[str, Tensor]:
    name, rows = at
    if name == checkpoint.family.final_norm:
        return name, checkpoint.tensor(name)
    return name, checkpoint.rows(name, rows.start, rows.stop)


def _write_group(
    group: Sequence[_Unsolved], values: Iterator[tuple[str, Tensor]], device: torch.device, stop: Event
) -> None:
    """Write the unsolved tensors of some drafts side by side."""
    for name, value in values:
        if stop.is_set():
            raise StoppedError(f"{group[0].draft.plan.name}: {name} is not written to its end")
        there = value.to(device)
        for one in group:
            one.put(name, there)
    for one in group:
        one.draft.submit(partial(one.writer.close, []))


class _Unsolved:
    """What no solver takes of a draft, on its way into it."""

    def __init__(self, checkpoint: Checkpoint, draft: Draft, solved: bool) -> None:
        family, config = checkpoint.family, checkpoint.config
        taken = solved_tables(checkpoint, draft) if solved else {}
        tables = [family.embedding, family.final_norm, *([] if config.tied else [family.head])]
        self.draft, self.names = draft, [name for name in tables if name not in taken]
        self.writer, self.written = UnitWriter(draft, UNSOLVED), dict[str, int]()

    def put(self, name: str, value: Tensor) -> None:
        """Have the next rows of tensor `name` written, if the draft wants it."""
        if name not in self.names:
            return
        pieces = FORMATS[self.draft.plan.format].store(self.draft.plan, name, value, None)
        arrived = devices.to_host({stored: piece.contiguous() for stored, piece in pieces.items()})
        offsets = {stored: self.written.get(stored, 0) for stored in pieces}
        self.written |= {stored: offsets[stored] + piece.nbytes for stored, piece in pieces.items()}

        def write() -> None:
            for stored, piece in arrived().items():
                self.writer.put(stored, offsets[stored], piece)

        self.draft.submit(write)


def lacking(checkpoint: Checkpoint, draft: Draft) -> list[str]:
    """Tables that its solver takes, and that it does not have."""
    return [name for name in solved_tables(checkpoint, draft) if name not in draft.units]


def solve_tables(
    checkpoint: Checkpoint, drafts: Sequence[Draft], tables: Tables, device: torch.device, progress: Progress
) -> None:
    """Solve the tables that drafts lack, each a unit of its own.

    Raises:
        StoppedError: `progress` was asked to stop.
    """
    todo = [(draft, name) for draft in drafts for name in lacking(checkpoint, draft)]
    if not todo:
        return
    steps = -(-checkpoint.config.vocab // ROWS)
    kinds = {name: kinds_of(checkpoint, name, tables) for name in dict.fromkeys(name for _, name in todo)}
    progress.advance(PHASE, 0, steps * len(todo))
    for done, (draft, name) in enumerate(todo):
        table = _Table(checkpoint, draft, name, solved_tables(checkpoint, draft)[name])
        for step in range(steps):
            progress.check_stop()
            table.solve(slice(step * ROWS, min((step + 1) * ROWS, checkpoint.config.vocab)), kinds[name], device)
            progress.advance(PHASE, steps * done + step + 1, steps * len(todo))
        table.finish(kinds[name])


@dataclass(frozen=True)
class Kind:
    """Words whose rows have the same statistics."""

    words: Tensor  # bool [vocab]
    gram: Gram


def kinds_of(checkpoint: Checkpoint, name: str, tables: Tables) -> list[Kind]:
    """The statistics of a table's rows, those of a tied one by octaves of n_v / p_v."""
    everything = torch.ones(checkpoint.config.vocab, dtype=torch.bool)
    if not checkpoint.config.tied:
        if name == checkpoint.family.embedding:
            return [Kind(everything, _gram(tables.lookup, tables.tokens))]
        return [Kind(everything, _gram(tables.head, tables.tokens, tables.largest))]
    lookup, head = tables.lookup / max(1, tables.tokens), tables.head / (tables.spread or 1.0)
    share = tables.spread / max(1, tables.tokens)  # of a sighting, in predictions
    octaves = ((tables.counts + SLACK) / (tables.predicted + SLACK * (share or 1.0))).log2()
    octaves = octaves.round().clamp(-OCTAVES, OCTAVES)
    return [
        Kind(octaves == octave, _gram(2.0 ** float(octave) * lookup + head, tables.tokens, tables.largest))
        for octave in octaves.unique(sorted=True)
    ]


def _gram(matrix: Tensor, tokens: int, largest: float = 0.0) -> Gram:
    """A matrix as statistics of inputs, its diagonal 1 in the mean."""
    mean = float(matrix.diagonal().mean()) or 1.0
    matrix = matrix / mean
    squares = matrix.diagonal().clamp(min=0) * tokens
    return Gram(matrix, torch.zeros_like(squares), squares, tokens, largest)


@dataclass
class _Table:
    """A table on its way into a draft, slice after slice."""

    checkpoint: Checkpoint
    draft: Draft
    name: str
    grid: Grid
    offsets: dict[str, int] = field(default_factory=dict)
    checksum: Checksum = field(default_factory=Checksum)
    energy: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)  # by step, times the energy
    damping: list[float | None] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.writer = UnitWriter(self.draft, self.name)
        self.format = FORMATS[self.draft.plan.format]

    def solve(self, rows: slice, kinds: Sequence[Kind], device: torch.device) -> None:
        """Solve some rows, and have them written."""
        weight = self.checkpoint.rows(self.name, rows.start, rows.stop).to(device).float()
        values, stored = torch.empty_like(weight), dict[str, Tensor]()
        for kind in kinds:
            places = kind.words[rows].nonzero()[:, 0].to(device)
            if not len(places):
                continue
            problem = Problem({self.name: weight[places]}, kind.gram, self.grid, self.draft.plan.spec)
            solution = solve(problem, self.draft.plan.spec.steps)
            self._note(problem, solution)
            quantized = solution.quantized(problem)[self.name]
            values[places] = quantized.dequantize()
            for name, piece in self.format.pack(self.draft.plan, self.name, quantized).items():
                tensor = stored.setdefault(name, piece.new_empty((len(weight), *piece.shape[1:])))
                tensor[places] = piece
        if not torch.equal(self.format.restore(self.draft.plan, self.name, stored), values):
            raise QQuantError(f"{self.name}: the packed rows dequantize to other values than their codes")
        self.checksum.add(values)
        for name, tensor in stored.items():
            offset = self.offsets.get(name, 0)
            self.draft.submit(partial(self.writer.put, name, offset, tensor.cpu()))
            self.offsets[name] = offset + tensor.nbytes

    def _note(self, problem: Problem, solution: Solution) -> None:
        energy = problem.energy[self.name]
        self.energy += energy
        for step, errors in solution.steps.items():
            self.errors[step] = self.errors.get(step, 0.0) + errors[self.name] * energy
        self.damping.append(solution.damping)
        self.fallbacks += solution.fallbacks.values()

    def finish(self, kinds: Sequence[Kind]) -> None:
        """Have the unit journalled, with what a record says of a linear; errors are means over the rows by their energy."""
        gram = kinds[0].gram
        steps = {step: error / self.energy for step, error in self.errors.items()}
        took = [damping for damping in self.damping if damping is not None]
        record = LinearRecord(
            name=self.name,
            checksum=self.checksum.hexdigest(),
            tokens=gram.tokens,
            inputs=len(gram.squares),
            dead=gram.dead,
            largest=gram.largest,
            error=list(steps.values())[-1],
            steps=steps,
            damping=max(took, default=None),
            fallback=self.fallbacks[0] if self.fallbacks else None,
            damping_asked=self.draft.plan.spec.damping,
        )
        seconds = {self.name: round(time.perf_counter() - self.began, 4)}
        self.draft.submit(partial(self.writer.close, [record], seconds))
