"""What an artifact keeps of every language, kind of text and stretch of positions, and one verdict on the worst of them.

calibration/slices.py says which windows are read and what each slice stands beside. A slice's loss there is how many times its KL divergence
is that of English, or, for a stretch of positions, that of the same tokens in short windows (`ratios`). One gate holds them all:

    fail          the ratio of any slice is proven beyond the limit: Holm over the slices, at `SLICES`
    pass          every ratio is proven within it: an intersection, each at `ASKED`
    inconclusive  neither

`ASKED`, `SLICES` and `BEHAVIOUR` together are `LEVEL`, so the chance that a harmless artifact fails, here or at another gate, is that. A language that the
checkpoint itself does not know is measured and not judged; where English is such a language, there is nothing to stand beside, and no gate.

Memory: one block of each model, and the residual streams of the windows that `fidelity` takes at a time. A document of 32,768 tokens is one
window; attention over it is tiled by torch, so the largest temporary values are those of the feed-forward layer, 3 T x intermediate. Where
streams of all artifacts do not fit beside each other, artifacts take turns, each time beside the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from qquant.calibration import Tokenizer
from qquant.calibration.slices import FAMILIAR, FIRST, LENGTH, REFERENCE, Group, Sliced, frequencies
from qquant.checks import statistics
from qquant.checks.fidelity import Fidelity, Scored, measure
from qquant.checks.ratios import Ratio, ratio
from qquant.checks.spreading import windows as spread
from qquant.devices import free_memory
from qquant.families.weights import WeightSource
from qquant.plan.room import CHECK, HELD
from qquant.progress import Progress
from qquant.ranks import ALONE, Ranks
from qquant.recipe.limits import ASKED, POWER, RESOLVED, SLICES, normal_quantile
from qquant.report.record import GateReport, Verdict
from qquant.report.slices import Estimate, SliceReport, Standing, comparison, worst

GATE = "worst slice"
MEASURED: Standing = "measured"


@dataclass(frozen=True)
class NamedPhase:
    """Shows the work of a reading under the name of its phase."""

    shown: Progress
    name: str

    def advance(self, phase: str, done: int, of: int) -> None:
        """`done` of `of` blocks."""
        self.shown.advance(self.name, done, of)

    def at(self, what: str) -> None:
        """Show it as it is."""
        self.shown.at(what)

    def check_stop(self) -> None:
        """Raise StoppedError where the progress of the whole says so."""
        self.shown.check_stop()


@dataclass(frozen=True)
class SliceReading:
    """A slice as one artifact reads it."""

    name: str
    group: Group
    fidelity: Fidelity  # [windows, scored]
    beside: Fidelity | None = None  # the same tokens in short windows; None: English stands beside it
    bits: float = 0.0  # a character, of the checkpoint
    frequencies: float = 0.0  # bits a character of the text's own frequencies

    @property
    def familiar(self) -> bool:
        """Whether the checkpoint knows what it reads."""
        return self.bits <= FAMILIAR * self.frequencies


def readings(
    baseline: WeightSource,
    artifacts: Mapping[str, WeightSource],
    text: Sliced,
    tokenizer: Tokenizer,
    device: torch.device,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> dict[str, list[SliceReading]]:
    """Artifact -> every slice, in the order of `text`, then the stretches of positions.

    Raises NumericalError as `measure`.
    """
    rows = torch.as_tensor(np.concatenate([text.short, text.again]), dtype=torch.int64)
    phase = NamedPhase(progress, "slices")
    windows = Scored(rows, FIRST, tokenizer.size)
    read = partial(measure, baseline, artifacts, device=device, progress=phase)
    short = spread(read, windows, list(artifacts), ranks)
    letters = [tokenizer.decode(row[FIRST + 1 :].tolist()) for row in rows]
    by_artifact = {name: list(_short(text, every_token, letters)) for name, every_token in short.items()}
    if len(text.long):
        documents = Scored(torch.as_tensor(text.long, dtype=torch.int64), 0, tokenizer.size)
        phase, room = NamedPhase(progress, "long documents"), min(ranks.gather(CHECK * free_memory(device)))
        for group in turns(artifacts, documents.windows.shape[1] * baseline.config.hidden, device, room):
            read = partial(measure, baseline, group, device=device, progress=phase)
            for name, every_token in spread(read, documents, list(group), ranks).items():
                by_artifact[name] += _stretches(
                    text, short[name].part(slice(len(text.short), None)), every_token, letters[len(text.short) :]
                )
    return by_artifact


def turns(
    artifacts: Mapping[str, WeightSource], values: int, device: torch.device, memory: float | None = None
) -> Iterator[dict[str, WeightSource]]:
    """Artifacts in groups of as many as may hold `values` activations each beside the checkpoint, at least one."""
    room = CHECK * free_memory(device) if memory is None else memory
    together = max(1, int(room / (4 * HELD * values)) - 1)
    names = list(artifacts)
    for start in range(0, len(names), together):
        yield {name: artifacts[name] for name in names[start : start + together]}


def _short(text: Sliced, every_token: Fidelity, letters: Sequence[str]) -> Iterator[SliceReading]:
    start = 0
    for one in text.slices:
        rows = slice(start, start + one.windows)
        start += one.windows
        yield _described(SliceReading(one.name, one.group, every_token.part(rows)), letters[rows])


def _stretches(text: Sliced, short: Fidelity, every_token: Fidelity, letters: Sequence[str]) -> Iterator[SliceReading]:
    """The tokens that were scored in short windows, at their places in those documents whose language the checkpoint knows, or in all."""
    documents, length = text.long.shape
    count = length // LENGTH
    columns = {
        name: torch.nn.functional.pad(column, (0, 1)).view(documents, count, LENGTH)[..., FIRST:-1]
        for name, column in vars(every_token).items()
    }
    again = {name: column.view(documents, count, -1) for name, column in vars(short).items()}
    said = [letters[row * count : (row + 1) * count] for row in range(documents)]
    whole_documents = [
        _described(
            SliceReading("", "position", Fidelity(**{key: column[row] for key, column in again.items()})), said[row]
        )
        for row in range(documents)
    ]
    documents_read = [row for row, reading in enumerate(whole_documents) if reading.familiar] or list(range(documents))
    for name, start, stop in text.stretches():
        ours, beside = (
            Fidelity(**{key: column[documents_read, start:stop].flatten(0, 1) for key, column in values.items()})
            for values in (columns, again)
        )
        yield _described(
            SliceReading(name, "position", ours, beside),
            [one for row in documents_read for one in said[row][start:stop]],
        )


def _described(reading: SliceReading, letters: Sequence[str]) -> SliceReading:
    """The reading with the bits that the checkpoint, and frequencies alone, need for a character."""
    said = "".join(letters)
    needed = float(reading.fidelity.nll_baseline.sum()) / math.log(2)
    return replace(reading, bits=needed / max(1, len(said)), frequencies=frequencies(said))


# The verdict.


def judge(
    readings: Sequence[SliceReading], limit: float | None, level: float = SLICES
) -> tuple[tuple[SliceReport, ...], Verdict | None]:
    """Every slice with what is proven of it, and the verdict of the gate on the worst; None: there is none. `limit`: None asks nothing."""
    english = next((reading for reading in readings if reading.name == REFERENCE and reading.familiar), None)
    asked: dict[int, tuple[Ratio, float]] = {}
    for index, reading in enumerate(readings):
        beside = reading.beside or (english.fidelity if english else None)
        if beside is None or reading is english or not reading.familiar:
            continue
        own = math.inf if limit is None else limit if reading.beside is None else math.sqrt(limit)
        asked[index] = (_ratio(reading, beside), own)
    proven: dict[int, Standing] = standings(asked, level) if limit is not None else dict.fromkeys(asked, MEASURED)
    rows = tuple(
        _row(reading, asked.get(index), proven.get(index, _unasked(reading, english)))
        for index, reading in enumerate(readings)
    )
    return rows, _verdict(rows, asked) if limit is not None and asked else None


def _ratio(reading: SliceReading, beside: Fidelity) -> Ratio:
    ours, theirs = reading.fidelity.window_means()["kl"], beside.window_means()["kl"]
    return ratio(ours, theirs, paired=reading.beside is not None, floor=RESOLVED)


def _unasked(reading: SliceReading, english: SliceReading | None) -> Standing:
    if not reading.familiar:
        return "unknown"
    return "reference" if reading is english else "measured"


def standings(asked: Mapping[int, tuple[Ratio, float]], level: float = SLICES) -> dict[int, Standing]:
    """What is proven of each ratio against its limit, by slice; `level`: chance of a wrong fail, over all of them."""
    beyond = statistics.holm([multiple.p_beyond(limit) for multiple, limit in asked.values()])
    proofs: dict[int, Standing] = {}
    for (index, (multiple, limit)), p in zip(asked.items(), beyond, strict=True):
        within = multiple.p_within(limit) <= ASKED
        proofs[index] = "fail" if p <= level else "pass" if within else "inconclusive"
    return proofs


def _row(reading: SliceReading, asked: tuple[Ratio, float] | None, standing: Standing) -> SliceReport:
    means = reading.fidelity.window_means()
    log_ratio, disagreement = means["nll"], means["top1"]
    ends = [math.exp(end) if end < 700 else math.inf for end in statistics.interval(log_ratio)]
    low, high = (min(1.0, max(0.0, 1 - end)) for end in reversed(statistics.interval(disagreement)))
    low_kl, high_kl = statistics.interval(means["kl"])
    row = SliceReport(
        name=reading.name,
        group=reading.group,
        windows=len(reading.fidelity.kl),
        tokens=reading.fidelity.kl.numel(),
        kl_divergence=Estimate(reading.fidelity.mean_kl, max(0.0, low_kl), high_kl),
        perplexity_ratio=Estimate(reading.fidelity.perplexity_ratio, *ends),
        top1_agreement=Estimate(reading.fidelity.top1, low, high),
        perplexity_baseline=reading.fidelity.perplexity_baseline,
        bits=reading.bits,
        frequencies=reading.frequencies,
        standing=standing,
    )
    if asked is None:
        return row
    multiple, limit = asked
    row = replace(row, relative=Estimate(multiple.times, *multiple.interval()))
    if not math.isfinite(limit):
        return row
    reach = (normal_quantile(1 - ASKED) + normal_quantile(POWER)) * multiple.error
    return replace(row, limit=limit, detectable=limit * math.expm1(min(reach, 700.0)))


def _verdict(rows: Sequence[SliceReport], asked: Mapping[int, tuple[Ratio, float]]) -> Verdict:
    outcome = statistics.worst([row.standing for row in rows])
    shown = worst(rows)
    assert shown is not None
    assert shown.relative is not None
    multiple, limit = asked[rows.index(shown)]
    estimate = shown.relative
    report = GateReport(
        GATE, outcome, estimate.value, limit, estimate.low, estimate.high, multiple.p_within(limit), multiple.p_beyond(limit),
        shown.detectable or 0.0, shown.windows,
    )  # fmt: skip
    return Verdict(outcome, _reasons(shown, rows, report), (report,))


def _reasons(shown: SliceReport, rows: Sequence[SliceReport], report: GateReport) -> tuple[str, ...]:
    if report.outcome == "pass":
        return ()
    others = [row.name for row in rows if row.standing == report.outcome and row is not shown]
    also = f"; so {'do' if len(others) > 1 else 'does'} {', '.join(others)}" if others else ""
    word = "above" if report.outcome == "fail" else "which cannot be told from"
    return (
        f"{GATE}: {shown.name} has {comparison(shown)}, {word} the limit {shown.limit:.3g} ({report.between()}){also}",
    )
