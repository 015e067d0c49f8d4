"""The record of a build or a check: report.json is the record, report.md a view of it, the table on the screen another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "qquant-report-1"


@dataclass(frozen=True)
class Verdict:
    """pass or fail, and why."""

    outcome: str
    reasons: tuple[str, ...] = ()


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
    layers: tuple[Mapping[str, Any], ...] = ()  # per linear: errors before and after the solver, damping, fallback


@dataclass(frozen=True)
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
    def passed(self) -> bool:
        """Whether every artifact passed."""
        return all(artifact.verdict.outcome == "pass" for artifact in self.artifacts)

    def to_json(self) -> str:
        """The record."""
        content = {
            "schema": SCHEMA,
            "model": self.model,
            "recipe": self.recipe,
            "verdict": "pass" if self.passed else "fail",
            "baseline": {"bits_per_weight": self.baseline_bits, "perplexity": self.baseline_perplexity},
            "artifacts": [_artifact(artifact) for artifact in self.artifacts],
            "warnings": list(self.warnings),
            "calibration": dict(self.calibration),
            "conditions": dict(self.conditions),
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """For people and model cards."""
        text = self.conditions.get("text", {})
        lines = [f"# {self.model}: {'passed' if self.passed else 'FAILED'}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 2) + "|---|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows()]
        reasons = [
            f"- **{artifact.name}**: {reason}" for artifact in self.artifacts for reason in artifact.verdict.reasons
        ]
        if reasons:
            lines += ["", "## Why it failed", "", *reasons]
        if self.warnings:
            lines += ["", "## Warnings", "", *(f"- {warning}" for warning in self.warnings)]
        lines += ["", "## Conditions", ""]
        lines += [
            f"- text: {text.get('name')}, {text.get('windows')} windows of {text.get('length')} tokens, second half scored"
        ]
        lines += [f"- {key}: {value}" for key, value in self.conditions.items() if key != "text"]
        lines += [f"- calibration: {self.calibration.get('samples')} samples, {self.calibration.get('tokens')} tokens, sha256 {self.calibration.get('sha256')}"] if self.calibration else []  # fmt: skip
        return "\n".join(lines) + "\n"

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
    content = dict(vars(artifact))
    content["verdict"] = {"outcome": artifact.verdict.outcome, "reasons": list(artifact.verdict.reasons)}
    content["fallbacks"] = list(artifact.fallbacks)
    content["layers"] = [dict(layer) for layer in artifact.layers]
    return content


def warnings_of(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader should know about the solve: fallbacks, raised damping, dead channels, too few tokens."""
    found = []
    for layer in layers:
        name = layer["name"]
        if layer.get("fallback"):
            found.append(f"{name}: {layer['fallback']}")
        if layer.get("dead"):
            found.append(f"{name}: {layer['dead']} input channels were always zero during calibration")
    return found
