"""The record of a build or a check: report.json is the record; report.md, report.html and the table on the screen are views."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qquant.disk.records import Count, Number, shortened, to_plain, typed
from qquant.disk.writes import finite
from qquant.errors import InputError
from qquant.report import behaviour, slices, tasks
from qquant.report.behaviour import BehaviourReport
from qquant.report.conditions import CalibrationFacts, Conditions, background
from qquant.report.escape import markdown
from qquant.report.facts import in_short
from qquant.report.slices import SliceReport
from qquant.report.solved import Solved
from qquant.report.tasks import TaskScore
from qquant.resources import lazy

if TYPE_CHECKING:
    import pandas

    from qquant.report import notebook
else:
    notebook = lazy("qquant.report.notebook")

SCHEMA = "qquant-report-1"
Proof = Literal["pass", "fail", "inconclusive"]
Outcome = Literal["pass", "fail", "inconclusive", "waived"]


@dataclass(frozen=True)
class GateReport:
    """One gate: what was measured, what is allowed, and what is proven."""

    name: str
    outcome: Proof
    value: Number
    limit: Number
    low: Number  # 95 % interval of the value
    high: Number
    p_within: Number  # small: proven within the limit
    p_beyond: Number  # small: proven beyond it; before correction for several gates
    detectable: Number  # distance from the limit that is proven in 80 % of runs with this much text
    windows: Count

    def between(self, digits: int = 3) -> str:
        """Where the value lies, and how much text says so."""
        counted = f"{self.windows} window{'' if self.windows == 1 else 's'}"
        return f"95 % interval {self.low:.{digits}g} to {self.high:.{digits}g}, {counted}"


@dataclass(frozen=True)
class Verdict:
    """pass, fail, inconclusive or waived, and why."""

    outcome: Outcome
    reasons: tuple[str, ...] = ()  # all of them, faults first
    gates: tuple[GateReport, ...] = ()
    waiver: str = ""  # who waived the fail, until when, why
    faults: tuple[str, ...] = ()  # of the reasons, those that are no matter of degree: structure, answers

    @property
    def lines(self) -> tuple[str, ...]:
        """What there is to say: the waiver first, if there is one, then every reason."""
        return (self.waiver, *self.reasons) if self.waiver else self.reasons


@dataclass(frozen=True)
class TextReport:
    """Fidelity on one text, or on one stretch of positions in its windows."""

    name: str
    tokens: Count
    perplexity: Number
    perplexity_baseline: Number
    perplexity_ratio: Number
    kl_divergence: Number
    top1_agreement: Number


@dataclass(frozen=True)
class WorstToken:
    """A token on which the artifact is far from its checkpoint."""

    before: str
    token: str
    kl: Number
    nll: Number
    nll_baseline: Number


@dataclass(frozen=True)
class Pace:
    """Tokens per second in one setting, artifact and 16-bit model taking turns in one process."""

    phase: str  # prefill or decode
    batch: Count
    tokens: Count  # in the cache when it begins: prefill 0, decode the prompt's
    rate: Number  # tokens per second of the whole batch, median
    rate_baseline: Number
    ratio: Number  # artifact over baseline, median over pairs
    low: Number  # 95 % interval of the ratio
    high: Number
    noise: Number  # half the width of that interval for the baseline against itself
    ceiling: Number  # the ratio that bytes and arithmetic allow

    @property
    def share(self) -> float:
        """Share of the ceiling that was reached, 0 to 1."""
        return self.ratio / self.ceiling if self.ceiling else math.nan


@dataclass(frozen=True)
class SpeedReport:
    """How fast an artifact runs and what memory it takes, against the same modules with 16-bit linears."""

    outcome: Proof
    device: str
    runtime: str  # what ran: kernels, graph or eager, dtype of the activations
    definition: str  # what is counted and timed, for a reader who compares with other numbers
    paces: tuple[Pace, ...]
    weights: Count  # bytes in memory
    weights_baseline: Count
    cache: Count  # bytes of keys and values at the longest setting; the same for both
    peak: Count  # bytes at the worst moment
    peak_baseline: Count
    reasons: tuple[str, ...] = ()  # why it failed, or could not be decided

    def pace(self, phase: str) -> Pace | None:
        """The first setting of a phase: what stands in tables and pictures."""
        return next((pace for pace in self.paces if pace.phase == phase), None)


@dataclass(frozen=True)
class AnswerCounts:
    """How many answers of one model in one dtype did what."""

    answers: Count
    stopped: Number  # share of them
    runs: Count
    repetitive: Count
    invalid: Count
    script: Count
    nan: Count


@dataclass(frozen=True)
class AnswerRun(AnswerCounts):
    """The artifact's answers in one dtype, beside the checkpoint's."""

    dtype: str
    worse: tuple[str, ...]  # what is proven worse
    baseline: AnswerCounts


@dataclass(frozen=True)
class Answers:
    """Generated answers; no run: none were generated."""

    runs: tuple[AnswerRun, ...] = ()


@dataclass(frozen=True)
class ArtifactReport:
    """One row of the table, and what is behind it."""

    name: str
    path: str
    size: Count  # bytes of all files
    bits_per_weight: Number
    perplexity: Number
    perplexity_ratio: Number
    kl_divergence: Number
    kl_99: Number
    top1_agreement: Number
    verdict: Verdict
    fallbacks: tuple[str, ...] = ()
    layers: tuple[Solved, ...] = ()
    kl_percentiles: Mapping[str, Number] = field(default_factory=dict)  # "50", "90", "99", "99.9"
    delta_p: Mapping[str, Number] = field(default_factory=dict)  # of the right token: mean, rms, percentiles
    kl_histogram: tuple[Count, ...] = ()  # tokens per bin of KL_BINS, below and above them at the ends
    texts: tuple[TextReport, ...] = ()  # further texts
    positions: tuple[TextReport, ...] = ()  # stretches of long windows
    worst: tuple[WorstToken, ...] = ()
    answers: Answers = Answers()  # generated answers against the checkpoint's
    headroom: tuple[Number, ...] = ()  # by block: largest |activation| as a share of what fp16 holds
    speed: SpeedReport | None = None  # null: not measured
    slices: tuple[SliceReport, ...] = ()  # languages, kinds of text, positions: `checks.profile: release`
    tasks: tuple[TaskScore, ...] = ()  # benchmarks: `qquant tasks --suite`
    behaviour: tuple[BehaviourReport, ...] = ()  # retrieval, tool calls, code, loops, scripts: the same
    warnings: tuple[str, ...] = ()
    sha256: str = ""  # of its files, as `ArtifactEntry.digest`; empty: not an artifact of a build
    question: str = ""  # digest of everything else that the verdict depends on
    record: str = ""  # digest of what its manifest says of its making


@dataclass(frozen=True)
class Baseline:
    """The checkpoint on the same text."""

    bits_per_weight: Number
    perplexity: Number


@dataclass(frozen=True)
class File:
    """report.json as it lies on the disk, but for its schema and its verdict."""

    model: str
    recipe: str
    baseline: Baseline
    artifacts: tuple[ArtifactReport, ...]
    conditions: Conditions
    warnings: tuple[str, ...] = ()
    calibration: CalibrationFacts = field(default_factory=CalibrationFacts)


@dataclass(frozen=True, repr=False)
class Report:
    """Everything a reader needs to judge and to repeat the build."""

    model: str
    recipe: str
    baseline_bits: float
    conditions: Conditions
    baseline_perplexity: float
    artifacts: tuple[ArtifactReport, ...]
    warnings: tuple[str, ...] = ()
    calibration: CalibrationFacts = field(default_factory=CalibrationFacts)

    @property
    def outcome(self) -> Outcome:
        """The worst verdict: fail, inconclusive, waived or pass."""
        outcomes = {artifact.verdict.outcome for artifact in self.artifacts}
        return next((worst for worst in WORST_FIRST if worst in outcomes), "pass")

    @property
    def passed(self) -> bool:
        """Whether every artifact passed, or its fail was waived."""
        return self.outcome in ("pass", "waived")

    def to_json(self) -> str:
        """The bytes of report.json."""
        conditions = to_plain(self.conditions)
        content = {
            "schema": SCHEMA,
            "model": self.model,
            "recipe": self.recipe,
            "verdict": self.outcome,
            "baseline": {"bits_per_weight": self.baseline_bits, "perplexity": self.baseline_perplexity},
            "artifacts": [to_plain(artifact) for artifact in self.artifacts],
            "warnings": list(self.warnings),
            "calibration": dict(self.calibration),
            "conditions": conditions | conditions.pop("inputs"),
        }
        return json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = "report.json") -> Report:
        """The report of a record, of this version or an earlier one; `where` is the file, for messages.

        Raises:
            InputError: it is of another kind, or a field is not what it should be.
        """
        if content.get("schema") != SCHEMA:
            raise InputError(
                f"{where}: schema {shortened(content.get('schema'))} is not {SCHEMA}. Check the artifacts again"
            )
        conditions = content.get("conditions")
        if isinstance(conditions, Mapping):
            stated = {key: conditions[key] for key in Conditions.names() if key in conditions}
            inputs = {key: value for key, value in conditions.items() if key not in stated}
            content = {**content, "conditions": stated | {"inputs": inputs}}
        file = typed(File, content, where)
        values = {key: value for key, value in vars(file).items() if key != "baseline"}
        return cls(baseline_bits=file.baseline.bits_per_weight, baseline_perplexity=file.baseline.perplexity, **values)

    def to_markdown(self) -> str:
        """The report as Markdown, for people and model cards."""
        lines = [f"# {markdown(self.model)}: {TITLES[self.outcome]}", "", *in_short(self), ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 2) + "|---|"]
        lines += [f"| {' | '.join(map(markdown, row))} |" for row in self.rows()]
        for title, outcome in HEADINGS.items():
            entries = [
                f"- **{markdown(artifact.name)}**: {markdown(reason)}"
                for artifact in self.artifacts
                if artifact.verdict.outcome == outcome
                for reason in artifact.verdict.lines
            ]
            lines += ["", f"## {title}", "", *entries] if entries else []
        for view in (slices, behaviour, tasks):
            shown = view.table(self.artifacts)
            lines += ["", f"## {view.TITLE}", "", *shown] if shown else []
        for title, lines_of in (("Warnings", self.warnings), ("Conditions", self.condition_lines())):
            if lines_of:
                lines += ["", f"## {title}", "", *(f"- {markdown(line)}" for line in lines_of)]
        return "\n".join(lines) + "\n"

    def condition_lines(self) -> list[str]:
        """What the numbers depend on, one fact a line."""
        text = self.conditions.text
        scored = "every token scored" if text.every_token else "second half scored"
        lines = [f"text: {text.name}, {text.windows} windows of {text.length} tokens, {scored}"]
        for artifact, gates in self.conditions.detectable.items():
            limits = ", ".join(f"{gate} {value:.2g}" for gate, value in gates.items())
            lines += [f"detectable by plan, {artifact}: {limits}"] if limits else []
        elsewhere = {"calibration"} if self.calibration else set()
        lines += [f"{key}: {value}" for key, value in self.conditions.inputs.items() if key not in elsewhere]
        if self.calibration:
            made = self.calibration
            lines += [
                f"calibration: {made.get('samples')} samples, {made.get('tokens')} tokens, sha256 {made.get('sha256')}"
            ]
            beside = background(made)
            lines += [f"background: {beside}"] if beside else []
        return lines

    def __repr__(self) -> str:
        return notebook.as_text(self)

    def _repr_html_(self) -> str:
        return notebook.as_html(self)

    def to_frame(self) -> pandas.DataFrame:
        """A data frame of the report, see `notebook.as_frame`."""
        return notebook.as_frame(self)

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, the 16-bit baseline first."""
        first = (
            "baseline (16 bit)",
            "",
            f"{self.baseline_bits:.2f}",
            f"{self.baseline_perplexity:,.3f}",
            "1",
            "0",
            "100.00 %",
            "",
        )
        return [first, *(_row(artifact) for artifact in self.artifacts)]


WORST_FIRST: tuple[Outcome, ...] = ("fail", "inconclusive", "waived")
TITLES: Mapping[Outcome, str] = {
    "pass": "passed",
    "fail": "FAILED",
    "inconclusive": "INCONCLUSIVE",
    "waived": "passed with a waiver",
}
HEADINGS: Mapping[str, Outcome] = {
    "Why it failed": "fail",
    "What could not be decided": "inconclusive",
    "Waived": "waived",
}
KL_BINS = tuple(-8 + index / 4 for index in range(37))  # edges of the histogram, powers of ten: 1e-8 to 10 nats
COLUMNS = (
    "artifact",
    "bytes",
    "bits per weight",
    "perplexity",
    "ratio",
    "mean KL divergence",
    "top-1 agreement",
    "verdict",
)


def _row(artifact: ArtifactReport) -> tuple[str, ...]:
    return (
        artifact.name,
        f"{artifact.size:,}",
        f"{artifact.bits_per_weight:.2f}",
        f"{artifact.perplexity:,.3f}",
        f"{artifact.perplexity_ratio:,.4f}",
        f"{artifact.kl_divergence:.5f}",
        f"{artifact.top1_agreement:.2%}".replace("%", " %"),
        artifact.verdict.outcome,
    )


def fallback_note(fallbacks: Sequence[str]) -> list[str]:
    """One line on tensors that could not have the type of their mix; empty: all could."""
    return [f"{len(fallbacks)} tensors could not have the type of the mix, e.g. {fallbacks[0]}"] if fallbacks else []
