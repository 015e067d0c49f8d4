"""Everything that is measured on a set of artifacts, and the verdict on each: what `build` ends with and `check` is.

All candidates and the checkpoint read the text together, on a GPU while other processes try to load the artifacts. Of several
ranks each reads some of the windows, and loads and asks some of the artifacts (`spreading`); all judge alike.
Where a gate is inconclusive, they read on, twice as much at each look, up to `max_windows`; a verdict that was reached stays.
"""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qquant import background, calibration, devices
from qquant.artifact.opening import open_weights
from qquant.calibration import CalibrationSet, Tokenizer
from qquant.calibration.behaviour import BehaviourText, behaviour_text
from qquant.calibration.slices import Sliced, sliced
from qquant.checks import (
    behaviour,
    evidence,
    figures,
    gate,
    loading,
    reading,
    sanity,
    slice_changes,
    slices,
    spreading,
    structure,
)
from qquant.checks.behaviour import AnswerPairs
from qquant.checks.comparable import require_same_shape
from qquant.checks.evidence import Evidence, SliceMeans
from qquant.checks.fidelity import Fidelity, Peaks, Scored, first_scored, measure
from qquant.checks.means import Means
from qquant.checks.reading import Stretches
from qquant.checks.slices import SliceReading
from qquant.checks.structure import CachedWeights, InspectedWeights
from qquant.errors import InputError, UsageError
from qquant.families.weights import WeightSource
from qquant.formats import claims_of
from qquant.progress import Progress, Quiet, waited_for
from qquant.ranks import ALONE, Ranks
from qquant.recipe import Checks, Gates
from qquant.recipe.limits import LOSSY, SLICES
from qquant.report.conditions import TextFacts, TokensRead
from qquant.report.record import Answers, ArtifactReport, SpeedReport, Verdict, fallback_note
from qquant.report.solved import FLOAT16_MAX, Solved, warnings_of
from qquant.source.checkpoint import Checkpoint

LOUD = 0.5  # share of it that is worth a warning: sums inside a kernel are larger than what goes in


@dataclass(frozen=True)
class Candidate:
    """An artifact to be judged."""

    name: str
    path: Path
    size: int  # bytes of all files
    bits_per_weight: float
    gates: Gates
    fallbacks: tuple[str, ...] = ()
    layers: tuple[Solved, ...] = ()
    eight_bit: bool = False  # or more: perplexity resolves nothing
    earlier: Evidence | None = None  # of the release before
    sha256: str = ""  # of its files, where a manifest says it
    question: str = ""  # see `kept`
    record: str = ""  # of its making, as `artifact.manifest.records`


@dataclass(frozen=True)
class HeldOut:
    """The text that judges: windows int64 [W, L], as many as there may be looks for; and further texts by name."""

    windows: torch.Tensor
    looks: tuple[int, ...]  # windows read at each look, ascending
    further: Mapping[str, torch.Tensor]
    first: int  # position from which the next token is scored
    tokenizer: Tokenizer
    facts: TextFacts
    answers: int = 0  # tokens per answer to the bundled prompts
    sliced: Sliced | None = None  # by language, kind and position, if the profile asks for it
    stretches: Stretches = field(default_factory=dict)  # of all texts, calibration too, for transformers' tokenizer
    asked: BehaviourText | None = None  # as far as the profile does

    def scored(self, windows: torch.Tensor) -> Scored:
        """Some windows, with what surrounds them."""
        return Scored(windows, self.first, self.tokenizer.size)


@dataclass(frozen=True)
class Review:
    """The rows of the report, and what is to be said of all of them."""

    baseline_perplexity: float
    artifacts: tuple[ArtifactReport, ...]
    remarks: tuple[str, ...] = ()  # on no artifact in particular
    tokenizer: TokensRead | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """All that a reader is told, by artifact."""
        return (*(f"{row.name}: {line}" for row in self.artifacts for line in row.warnings), *self.remarks)


@dataclass(frozen=True)
class Measured:
    """The numbers behind a review, by artifact."""

    main: Mapping[str, Fidelity]
    further: Mapping[str, Mapping[str, Fidelity]]  # by text
    verdicts: Mapping[str, Verdict]
    headroom: Mapping[str, tuple[float, ...]]  # shares of the largest fp16 number by block; "" is the checkpoint
    slices: Mapping[str, Mapping[str, SliceMeans]] = field(default_factory=dict)  # of each slice, for a later release


def held_out(
    checks: Checks, tokenizer: Tokenizer, used: CalibrationSet | None = None, positions: int | None = None
) -> HeldOut:
    """The first windows of the held-out texts; slices and questions of `profile: release` for a context of `positions` tokens.

    Raises:
        InputError: one is shorter than a window, or shares text with the calibration tokens `used`.
    """
    most = checks.max_windows or checks.windows
    windows, facts = _windows(checks.text, checks.length, most, tokenizer, used)
    further: dict[str, torch.Tensor] = {}
    for name_or_path in checks.texts:
        rows, about = _windows(name_or_path, checks.length, checks.windows, tokenizer, used)
        name = about["name"]
        further[name if name not in further else f"{name} ({len(further) + 1})"] = rows
    looks = checks.looks(len(windows))
    digest = hashlib.sha256(windows[0].numpy().tobytes()).hexdigest()
    counts = {name: len(rows) for name, rows in further.items()}
    text = TextFacts(facts["name"], looks[0], checks.length, checks.protocol, facts["sha256"], digest, counts)
    first = first_scored(checks.protocol, checks.length)
    plain = HeldOut(windows, tuple(looks), further, first, tokenizer, text, checks.answer_length)
    parts, asked = None, None
    if checks.profile == "release" and positions is not None:
        parts, asked = sliced(tokenizer, positions), behaviour_text(tokenizer, positions)
        for ids in (parts.short, parts.long, asked.calls.windows):
            _require_apart(used, ids.ravel(), tokenizer)
    texts = reading.stretches(tokenizer, {facts["name"]: windows, **further}, parts, used)
    return replace(plain, sliced=parts, asked=asked, stretches=texts)


def _require_apart(used: CalibrationSet | None, ids: NDArray[np.int32], tokenizer: Tokenizer) -> None:
    if used is not None:
        calibration.require_apart(used, ids, tokenizer)


def _windows(
    name: str, length: int, most: int, tokenizer: Tokenizer, used: CalibrationSet | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    ids, facts = calibration.heldout(name, tokenizer)
    count = min(most, len(ids) // length)
    if count == 0:
        raise InputError(f"{name}: {len(ids)} tokens are less than one window of {length}. Lower checks.length")
    ids = ids[: count * length]
    _require_apart(used, ids, tokenizer)
    return torch.as_tensor(ids, dtype=torch.int64).view(count, length), facts


def earlier_release(gates: Gates, name: str, text: HeldOut) -> Evidence | None:
    """The evidence that the recipe compares artifact `name` with, if it names any.

    Raises:
        UsageError: it is not there, or has no such artifact.
        InputError: it was measured on other tokens.
    """
    if gates.regression_vs is None:
        return None
    releases = evidence.of_report(Path(gates.regression_vs))
    if name not in releases:
        raise UsageError(
            f"gates.regression_vs: {gates.regression_vs} has no artifact {name}; it has {', '.join(releases)}"
        )
    evidence.require_comparable(text.facts, releases[name].facts, f"gates.regression_vs: {gates.regression_vs}")
    return releases[name]


def review(
    checkpoint: Checkpoint,
    candidates: Sequence[Candidate],
    text: HeldOut,
    means: Means,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> tuple[Review, Measured]:
    """Measure every candidate against the checkpoint, and judge it by its gates.

    Raises:
        InputError: a candidate was not made from a model of this shape.
    """
    device = means.device
    sources, baseline = {}, CachedWeights(checkpoint, device, means.blocks)
    for candidate in candidates:
        source = open_weights(candidate.path, device)
        require_same_shape(candidate.path, source, checkpoint)
        sources[candidate.name] = InspectedWeights(source, baseline, structure.folds(source, baseline))
    said = {candidate.name: claims_of(candidate.path, checkpoint) for candidate in candidates}
    faults = {name: measured.faults for name, measured in said.items()}
    plain, answers = {name: watched.source for name, watched in sources.items()}, dict[str, Answers]()
    mine = spreading.mine({candidate.name: candidate.size for candidate in candidates}, ranks)
    parts: dict[str, list[SliceReading]] = {}
    pairs: dict[str, list[AnswerPairs]] = {}
    paths, beside = [candidate.path for candidate in candidates if candidate.name in mine], devices.threads_help(device)
    children = loading.children(len(paths)) if beside else 1
    spoken = reading.asked(checkpoint.path, text.stretches) if ranks.first else None
    loads, waits = (Quiet(), progress) if beside else (progress, Quiet())
    with background.start_early(
        lambda stop: loading.examine(paths, spoken, stop, children, means.idle, device, progress=loads), beside
    ) as loaded:
        measured = _read(baseline, candidates, sources, text, device, progress, ranks)
        asked = {name: plain[name] for name in mine}
        if text.sliced:
            parts = slices.readings(baseline, plain, text.sliced, text.tokenizer, device, progress, ranks)
            kept = {name: slice_changes.means(readings, text.sliced) for name, readings in parts.items()}
            measured = replace(measured, slices=kept)
        if text.asked:
            asking = behaviour.Asking(checkpoint, asked, text.asked, text.tokenizer, device)
            here = behaviour.pairs(asking, progress) if asked else {}
            pairs = behaviour.of_all(here, ranks)
        if text.answers:
            answers = sanity.answer(checkpoint, asked, text.tokenizer, text.answers, device, progress) if asked else {}
            answers = spreading.answers(answers, bool(asked), ranks)
        problems, ids = waited_for(loaded, waits, "load")
        unloaded = spreading.problems({str(path): problem for path, problem in problems.items()}, ranks)
    for candidate in candidates:
        if str(candidate.path) in unloaded:
            faults[candidate.name] += (f"does not load in a clean process: {unloaded[str(candidate.path)]}",)
    for name, watched in sources.items():
        faults[name] += watched.told(watched.problems)
    for name, answer in answers.items():
        faults[name] += sanity.problems(answer.runs)
    unasked = bool(text.answers) and not answers
    rows = []
    for candidate in candidates:
        answered = answers.get(candidate.name, Answers())
        noticed = sources[candidate.name].told(sources[candidate.name].remarks)
        warnings = (*said[candidate.name].warnings, *noticed, *_warnings(candidate, measured, answered))
        row = _row(
            candidate,
            measured,
            faults[candidate.name],
            text,
            parts.get(candidate.name, []),
            pairs.get(candidate.name, []),
        )
        rows.append(replace(row, answers=answered, warnings=warnings))
    remarks = ("no answers were generated: the model in 16 bits does not fit in memory",) if unasked else ()
    read = reading.compare(text.tokenizer, text.stretches, ids)
    return Review(measured.main[candidates[0].name].perplexity_baseline, tuple(rows), remarks, read), measured


def with_speed(reviewed: Review, speeds: Sequence[SpeedReport]) -> Review:
    """The review with what the clock said; a machine too noisy to tell is a warning, not a verdict on the artifact."""
    rows = tuple(replace(row, speed=timed) for row, timed in zip(reviewed.artifacts, speeds, strict=True))
    rows = tuple(replace(row, warnings=(*row.warnings, *row.speed.reasons)) if row.speed else row for row in rows)
    return replace(reviewed, artifacts=rows)


def _warnings(candidate: Candidate, measured: Measured, answered: Answers) -> tuple[str, ...]:
    return (
        *fallback_note(candidate.fallbacks),
        *warnings_of(candidate.layers),
        *sanity.warnings(answered.runs),
        *_fp16_warnings(measured.headroom[candidate.name], measured.headroom[""]),
        *_lossy(candidate, measured.main[candidate.name].perplexity_ratio),
    )


def _fp16_warnings(shares: tuple[float, ...], checkpoint: tuple[float, ...]) -> list[str]:
    """A word on the block that comes nearest to the end of fp16."""
    block = max(range(len(shares)), key=lambda index: math.inf if math.isnan(shares[index]) else shares[index])
    if shares[block] < LOUD:
        return []
    theirs = f"the checkpoint's {checkpoint[block]:.0%}"
    return [f"block {block}: activations reach {shares[block]:.0%} of the largest fp16 number, {theirs}; use bf16"]


def _lossy(candidate: Candidate, ratio: float) -> list[str]:
    """A word on a loss that no gate speaks of."""
    gates = candidate.gates
    if gates.defaults and gates.perplexity_ratio is gates.kl_divergence is gates.top1_agreement is None:
        return ["no limits are known for what it is, so nothing limits its loss; give some"]
    ungated = candidate.gates.perplexity_ratio is None and not candidate.eight_bit
    return (
        [f"perplexity is {ratio:.2f} times the checkpoint's, and nothing limits it"]
        if ungated and ratio > LOSSY
        else []
    )


def _read(
    checkpoint: WeightSource,
    candidates: Sequence[Candidate],
    sources: Mapping[str, WeightSource],
    text: HeldOut,
    device: torch.device,
    progress: Progress,
    ranks: Ranks,
) -> Measured:
    """Look by look, until every verdict is reached or the budget is read."""
    peaks, names = Peaks(), list(sources)
    read = partial(measure, checkpoint, sources, device=device, progress=progress, peaks=peaks)
    pieces = [text.windows[: text.looks[0]], *text.further.values()]
    joined = spreading.windows(read, text.scored(torch.cat(pieces)), names, ranks)
    stops = np.cumsum([len(piece) for piece in pieces]).tolist()
    main = {name: losses.part(slice(0, stops[0])) for name, losses in joined.items()}
    further = {
        title: {name: losses.part(slice(start, stop)) for name, losses in joined.items()}
        for title, start, stop in zip(text.further, stops, stops[1:], strict=False)
    }
    verdicts = _judge(candidates, main, {}, len(text.looks))
    for start, stop in zip(text.looks, text.looks[1:], strict=False):
        if all(verdict.outcome != "inconclusive" for verdict in verdicts.values()):
            break
        more = spreading.windows(read, text.scored(text.windows[start:stop]), names, ranks)
        main = {name: Fidelity.joined([main[name], more[name]]) for name in main}
        verdicts = _judge(candidates, main, verdicts, len(text.looks))
    peaks = spreading.largest(peaks, ranks)
    headroom = {
        name: tuple(peak / FLOAT16_MAX for peak in peaks.of(index)) for index, name in enumerate(["", *sources])
    }
    return Measured(main, further, verdicts, headroom)


def _judge(
    candidates: Sequence[Candidate], main: Mapping[str, Fidelity], before: Mapping[str, Verdict], looks: int
) -> dict[str, Verdict]:
    verdicts = dict(before)
    for candidate in candidates:
        name = candidate.name
        if name not in before or before[name].outcome == "inconclusive":
            then = candidate.earlier.means if candidate.earlier else None
            means = main[name].window_means()
            verdicts[name] = gate.judge(candidate.gates, means, then, eight_bit=candidate.eight_bit, looks=looks)
    return verdicts


def _row(
    candidate: Candidate,
    measured: Measured,
    faults: tuple[str, ...],
    text: HeldOut,
    parts: Sequence[SliceReading],
    pairs: Sequence[AnswerPairs],
) -> ArtifactReport:
    fidelity = measured.main[candidate.name]
    then = candidate.earlier.slices if candidate.earlier else {}
    grown = slice_changes.judge(then, measured.slices.get(candidate.name, {}), candidate.gates.regression_tolerance)
    kept, worst = slices.judge(parts, candidate.gates.worst_slice, SLICES / 2 if grown else SLICES)
    asked, lost = behaviour.judge(pairs, candidate.gates.behaviour)
    verdict = gate.with_gates(measured.verdicts[candidate.name], worst, grown, lost)
    verdict = gate.with_faults(verdict, faults)
    return ArtifactReport(
        name=candidate.name,
        path=str(candidate.path),
        size=candidate.size,
        bits_per_weight=candidate.bits_per_weight,
        perplexity=fidelity.perplexity,
        perplexity_ratio=fidelity.perplexity_ratio,
        kl_divergence=fidelity.mean_kl,
        kl_99=float(np.quantile(fidelity.kl.numpy(), 0.99)),
        top1_agreement=fidelity.top1,
        verdict=gate.waived(verdict, candidate.gates, datetime.date.today()),
        fallbacks=candidate.fallbacks,
        sha256=candidate.sha256,
        question=candidate.question,
        record=candidate.record,
        layers=candidate.layers,
        kl_percentiles=figures.percentiles(fidelity.kl, (50, 90, 99, 99.9)),
        delta_p=figures.delta_p(fidelity),
        kl_histogram=figures.histogram(fidelity.kl),
        texts=tuple(figures.text(title, by_name[candidate.name]) for title, by_name in measured.further.items()),
        positions=figures.positions(fidelity, text.first),
        headroom=measured.headroom[candidate.name],
        worst=figures.worst_tokens(fidelity, text.windows, text.first, text.tokenizer),
        slices=kept,
        behaviour=asked,
    )
