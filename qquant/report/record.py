"""The record of a build or a check: report.json is the record; report.md, report.html and the table on the screen are views."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qquant.disk.writes import finite
from qquant.errors import InputError
from qquant.resources import lazy

if TYPE_CHECKING:
    import pandas

    from qquant.report import notebook
else:
    notebook = lazy("qquant.report.notebook")

SCHEMA = "qquant-report-1"
FLOAT16 = 65504  # its largest number


@dataclass(frozen=True)
class GateReport:
    """One gate: what was measured, what is allowed, and what is proven."""

    name: str
    outcome: str  # pass, fail or inconclusive
    value: float
    limit: float
    low: float  # 95 % interval of the value
    high: float
    p_within: float  # small: proven within the limit
    p_beyond: float  # small: proven beyond it; before correction for several gates
    detectable: float  # distance from the limit that is proven in 80 % of runs with this much text
    windows: int


@dataclass(frozen=True)
class Verdict:
    """pass, fail, inconclusive or waived, and why."""

    outcome: str
    reasons: tuple[str, ...] = ()
    gates: tuple[GateReport, ...] = ()
    waiver: str = ""  # who waived the fail, until when, why


@dataclass(frozen=True)
class TextReport:
    """Fidelity on one text, or on one stretch of positions in its windows."""

    name: str
    tokens: int
    perplexity: float
    perplexity_baseline: float
    perplexity_ratio: float
    kl_divergence: float
    top1_agreement: float


@dataclass(frozen=True)
class WorstToken:
    """A token on which the artifact is far from its checkpoint."""

    before: str
    token: str
    kl: float
    nll: float
    nll_baseline: float


@dataclass(frozen=True)
class Pace:
    """Tokens per second in one setting, artifact and 16-bit model taking turns in one process."""

    phase: str  # prefill or decode
    batch: int
    tokens: int  # in the cache when it begins: prefill 0, decode the prompt's
    rate: float  # tokens per second of the whole batch, median
    rate_baseline: float
    ratio: float  # artifact over baseline, median over pairs
    low: float  # 95 % interval of the ratio
    high: float
    noise: float  # half the width of that interval for the baseline against itself
    ceiling: float  # the ratio that bytes and arithmetic allow


@dataclass(frozen=True)
class SpeedReport:
    """How fast an artifact runs and what memory it takes, against the same modules with 16-bit linears."""

    outcome: str  # pass, fail or inconclusive
    device: str
    runtime: str  # what ran: kernels, graph or eager, dtype of the activations
    definition: str  # what is counted and timed, for a reader who compares with other numbers
    paces: tuple[Pace, ...]
    weights: int  # bytes in memory
    weights_baseline: int
    cache: int  # bytes of keys and values at the longest setting; the same for both
    peak: int  # bytes at the worst moment
    peak_baseline: int
    reasons: tuple[str, ...] = ()  # why it failed, or could not be decided

    def pace(self, phase: str) -> Pace | None:
        """The first setting of a phase: what stands in tables and pictures."""
        return next((pace for pace in self.paces if pace.phase == phase), None)


@dataclass(frozen=True)
class ArtifactReport:
    """One row of the table, and what is behind it."""

    name: str
    path: str
    size: int  # bytes of all files
    bits_per_weight: float
    perplexity: float
    perplexity_ratio: float
    kl_divergence: float
    kl_99: float
    top1_agreement: float
    verdict: Verdict
    fallbacks: tuple[str, ...] = ()
    layers: tuple[Mapping[str, Any], ...] = ()  # per linear: error, error after each step, damping, fallback
    kl_percentiles: Mapping[str, float] = field(default_factory=dict)  # "50", "90", "99", "99.9"
    delta_p: Mapping[str, float] = field(default_factory=dict)  # of the right token: mean, rms, percentiles
    kl_histogram: tuple[int, ...] = ()  # tokens per bin of KL_BINS, below and above them at the ends
    texts: tuple[TextReport, ...] = ()  # further texts
    positions: tuple[TextReport, ...] = ()  # stretches of long windows
    worst: tuple[WorstToken, ...] = ()
    answers: Mapping[str, Any] = field(default_factory=dict)  # generated answers against the checkpoint's
    headroom: tuple[float, ...] = ()  # by block: largest |activation| as a share of what fp16 holds
    speed: SpeedReport | None = None  # null: not measured


@dataclass(frozen=True, repr=False)
class Report:
    """Everything a reader needs to judge and to repeat the build."""

    model: str
    recipe: str
    baseline_bits: float
    conditions: Mapping[str, Any]
    baseline_perplexity: float
    artifacts: tuple[ArtifactReport, ...]
    warnings: tuple[str, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """The worst verdict: fail, inconclusive, waived or pass."""
        outcomes = {artifact.verdict.outcome for artifact in self.artifacts}
        return next((worst for worst in ("fail", "inconclusive", "waived") if worst in outcomes), "pass")

    @property
    def passed(self) -> bool:
        """Whether every artifact passed, or its fail was waived."""
        return self.outcome in ("pass", "waived")

    def to_json(self) -> str:
        """The record."""
        content = {
            "schema": SCHEMA,
            "model": self.model,
            "recipe": self.recipe,
            "verdict": self.outcome,
            "baseline": {"bits_per_weight": self.baseline_bits, "perplexity": self.baseline_perplexity},
            "artifacts": [_artifact(artifact) for artifact in self.artifacts],
            "warnings": list(self.warnings),
            "calibration": dict(self.calibration),
            "conditions": dict(self.conditions),
        }
        return json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Report:
        """The report of a record that this version wrote.

        Raises:
            InputError: it is of another kind.
        """
        if content.get("schema") != SCHEMA:
            raise InputError(
                f"report.json: schema {content.get('schema')!r} is not {SCHEMA}. Check the artifacts again"
            )
        try:
            return cls(
                model=content["model"],
                recipe=content["recipe"],
                baseline_bits=content["baseline"]["bits_per_weight"],
                conditions=content["conditions"],
                baseline_perplexity=_number(content["baseline"]["perplexity"]),
                artifacts=tuple(_read(entry) for entry in content["artifacts"]),
                warnings=tuple(content["warnings"]),
                calibration=content["calibration"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"report.json: damaged: {error}") from None

    def to_markdown(self) -> str:
        """For people and model cards."""
        lines = [f"# {self.model}: {TITLES[self.outcome]}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 2) + "|---|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows()]
        for title, outcome in HEADINGS.items():
            entries = [
                f"- **{artifact.name}**: {reason}"
                for artifact in self.artifacts
                if artifact.verdict.outcome == outcome
                for reason in (artifact.verdict.waiver, *artifact.verdict.reasons)
                if reason
            ]
            lines += ["", f"## {title}", "", *entries] if entries else []
        if self.warnings:
            lines += ["", "## Warnings", "", *(f"- {warning}" for warning in self.warnings)]
        lines += ["", "## Conditions", "", *(f"- {line}" for line in self.condition_lines())]
        return "\n".join(lines) + "\n"

    def condition_lines(self) -> list[str]:
        """What the numbers depend on, one fact a line."""
        text = self.conditions.get("text", {})
        scored = "every token scored" if text.get("protocol") == "sliding" else "second half scored"
        lines = [f"text: {text.get('name')}, {text.get('windows')} windows of {text.get('length')} tokens, {scored}"]
        for artifact, gates in self.conditions.get("detectable", {}).items():
            told = ", ".join(f"{gate} {value:.2g}" for gate, value in gates.items())
            lines += [f"detectable by plan, {artifact}: {told}"] if told else []
        lines += [f"{key}: {value}" for key, value in self.conditions.items() if key not in ("text", "detectable")]
        if self.calibration:
            made = self.calibration
            lines += [
                f"calibration: {made.get('samples')} samples, {made.get('tokens')} tokens, sha256 {made.get('sha256')}"
            ]
        return lines

    def __repr__(self) -> str:
        return notebook.as_text(self)

    def _repr_html_(self) -> str:
        return notebook.as_html(self)

    def to_frame(self) -> pandas.DataFrame:
        """As `notebook.as_frame`."""
        return notebook.as_frame(self)

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, the 16-bit baseline first."""
        first = (
            "baseline (16 bit)",
            "",
            f"{self.baseline_bits:.2f}",
            f"{self.baseline_perplexity:.3f}",
            "1",
            "0",
            "100.00 %",
            "",
        )
        return [first, *(_row(artifact) for artifact in self.artifacts)]


TITLES = {"pass": "passed", "fail": "FAILED", "inconclusive": "INCONCLUSIVE", "waived": "passed with a waiver"}
HEADINGS = {"Why it failed": "fail", "What could not be decided": "inconclusive", "Waived": "waived"}
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
        f"{artifact.perplexity:.3f}",
        f"{artifact.perplexity_ratio:.4f}",
        f"{artifact.kl_divergence:.5f}",
        f"{artifact.top1_agreement:.2%}".replace("%", " %"),
        artifact.verdict.outcome,
    )


def _artifact(artifact: ArtifactReport) -> dict[str, Any]:
    return dataclasses.asdict(artifact)


def _number(value: Any) -> Any:
    """The reverse of `finite` for one value."""
    return float(value) if value in ("inf", "-inf", "nan") else value


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _number(value) if isinstance(value, str) else value for key, value in entry.items()}


def _read(entry: Mapping[str, Any]) -> ArtifactReport:
    names = {item.name for item in dataclasses.fields(ArtifactReport)}
    fields = {key: value for key, value in _numbers(entry).items() if key in names}
    verdict = entry["verdict"]
    gates = tuple(GateReport(**_numbers(gate)) for gate in verdict["gates"])
    fields["verdict"] = Verdict(verdict["outcome"], tuple(verdict["reasons"]), gates, verdict["waiver"])
    for key, kind in (("texts", TextReport), ("positions", TextReport), ("worst", WorstToken)):
        fields[key] = tuple(kind(**_numbers(item)) for item in entry[key])
    for key in ("fallbacks", "layers", "kl_histogram"):
        fields[key] = tuple(entry[key])
    fields["headroom"] = tuple(_number(share) for share in entry["headroom"])
    for key in ("kl_percentiles", "delta_p"):
        fields[key] = _numbers(entry[key])
    fields["speed"] = _speed(entry["speed"])
    return ArtifactReport(**fields)


def _speed(entry: Mapping[str, Any] | None) -> SpeedReport | None:
    if entry is None:
        return None
    paces = tuple(Pace(**_numbers(pace)) for pace in entry["paces"])
    return SpeedReport(**dict(entry) | {"paces": paces, "reasons": tuple(entry["reasons"])})


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of report.json; numbers that are not finite are text there."""
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    class Numbers(GenerateJsonSchema):
        def float_schema(self, schema: Any) -> dict[str, Any]:
            return {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}

    whole = TypeAdapter(Report).json_schema(schema_generator=Numbers)
    shapes = whole.pop("$defs")
    fields = whole["properties"]
    baseline = {"bits_per_weight": fields.pop("baseline_bits"), "perplexity": fields.pop("baseline_perplexity")}
    shapes["Baseline"] = {"type": "object", "properties": baseline}
    fields["schema"] = {"const": SCHEMA}
    fields["baseline"] = {"$ref": "#/$defs/Baseline"}
    fields["verdict"] = shapes["Verdict"]["properties"]["outcome"] = {"enum": list(TITLES)}
    for shape in (whole, *shapes.values()):
        shape |= {"required": list(shape["properties"]), "additionalProperties": False}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:{SCHEMA.replace('-', ':', 1)}"}
    return head | whole | {"$defs": shapes}


def fallback_note(fallbacks: Sequence[str]) -> list[str]:
    """One line on tensors that could not have the type of their mix; empty: all could."""
    return [f"{len(fallbacks)} tensors could not have the type of the mix, e.g. {fallbacks[0]}"] if fallbacks else []


def warnings_of(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader should know about the solve: fallbacks, raised damping, dead channels, too few tokens, range."""
    found = _too_few_tokens([layer for layer in layers if _above(layer.get("inputs"), layer.get("tokens"))])
    for layer in layers:
        name = layer["name"]
        if layer.get("fallback"):
            found.append(f"{name}: {layer['fallback']}")
        if layer.get("dead"):
            found.append(f"{name}: {layer['dead']} input channels were always zero during calibration")
        if _above(layer.get("damping"), layer.get("damping_asked")):
            found.append(f"{name}: damping was raised from {layer['damping_asked']:g} to {layer['damping']:g}")
        if _above(layer.get("largest"), FLOAT16):
            found.append(
                f"{name}: inputs up to {layer['largest']:.3g} do not fit float16 ({FLOAT16}); run it in bfloat16"
            )
        if layer.get("float32_samples"):
            found.append(f"{name}: {layer['float32_samples']} samples overflowed and were computed in float32")
    return found


def _too_few_tokens(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for all of these linears; empty where there is none."""
    if not layers:
        return []
    tokens, inputs = min(layer["tokens"] for layer in layers), max(layer["inputs"] for layer in layers)
    which = layers[0]["name"] if len(layers) == 1 else f"{len(layers)} linears, {layers[0]['name']} first"
    return [f"{which}: {tokens} calibration tokens for {inputs} inputs; give more samples"]


def _above(value: Any, limit: Any) -> bool:
    return isinstance(value, int | float) and isinstance(limit, int | float) and value > limit
