"""Verdicts of an earlier report that still hold: on bytes that are still there, by the same text, asked in the same way.

A row of the report holds two digests: `sha256` of its artifact's files, and `question` of everything else that its verdict depends on
(limits, the waiver's day, text and protocol, checkpoint, versions, device, the release it is compared with). Where both are what a build would
ask now, nothing is measured again. Artifacts that a build leaves alone keep their rows while the conditions of the report are theirs.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qquant.artifact.manifest import REPORT, artifacts_below, read_report
from qquant.checks import evidence
from qquant.checks.review import Candidate, HeldOut, Measured, Review
from qquant.disk.digest import sha256_of_data
from qquant.errors import InputError
from qquant.recipe import Checks, Gates
from qquant.report.conditions import Conditions
from qquant.report.record import ArtifactReport, Report
from qquant.source.checkpoint import Checkpoint


@dataclass(frozen=True)
class CheckQuestion:
    """How artifacts are judged."""

    checks: Checks
    text: HeldOut
    inputs: Mapping[str, str]  # hashes, versions, device

    def to(self, candidate: Candidate) -> Candidate:
        """The candidate with the digest of the question."""
        content = {
            "checks": self.checks.model_dump(mode="json"),
            "gates": candidate.gates.model_dump(mode="json"),
            "waiver ended": _ended(candidate.gates),
            "text": _tokens(self.text),
            "inputs": dict(self.inputs),
            "earlier": candidate.earlier.digest if candidate.earlier else None,
        }
        return replace(candidate, question=sha256_of_data(content))


def _ended(gates: Gates) -> bool:
    waiver = gates.waiver
    return bool(waiver.reason) and datetime.date.today() > datetime.date.fromisoformat(waiver.until)


def _tokens(text: HeldOut) -> list[str]:
    asked = [text.asked.digest] if text.asked else []
    arrays = [rows.numpy() for rows in (text.windows, *text.further.values())]
    arrays += [text.sliced.short, text.sliced.long] if text.sliced else []
    return [*(hashlib.sha256(rows.tobytes()).hexdigest() for rows in arrays), *asked]


def earlier(out: Path) -> Report | None:
    """The report of an earlier build in `out`, if one is there that can be read."""
    try:
        return read_report(out / REPORT) if (out / REPORT).is_file() else None
    except InputError:
        return None


def answered(out: Path, before: Report | None, candidates: Sequence[Candidate]) -> dict[str, ArtifactReport]:
    """Rows, by name, of candidates whose bytes were judged by this very question, and whose evidence is there."""
    rows = {row.name: row for row in before.artifacts} if before else {}
    answered_rows = {}
    for candidate in candidates:
        row = rows.get(candidate.name)
        proof = out / evidence.FOLDER / f"{evidence.file_name(candidate.name)}.safetensors"
        if row and (row.sha256, row.question) == (candidate.sha256, candidate.question) and proof.is_file():
            answered_rows[candidate.name] = replace(row, path=str(candidate.path), record=candidate.record)
    return answered_rows


def others(
    out: Path, before: Report | None, conditions: Conditions, names: Collection[str]
) -> tuple[list[ArtifactReport], list[str]]:
    """(rows of artifacts that this build leaves alone, a remark for each that is there and has no row any more)."""
    if before is None:
        return [], []
    there = {(name, entry.digest) for _, name, entry in artifacts_below(out)}
    left = [row for row in before.artifacts if row.name not in names and (row.name, row.sha256) in there]
    same = before.conditions.text == conditions.text and before.conditions.inputs == conditions.inputs
    if same:
        return left, []
    why = "was judged under other conditions than this report's; build it again for a verdict"
    return [], [f"{row.name}: {why}" for row in left]


def together(
    answered: Mapping[str, ArtifactReport], review: Review, left: Sequence[ArtifactReport], order: Sequence[str]
) -> Review:
    """The review with kept rows in their places."""
    rows = {row.name: row for row in left} | dict(answered) | {row.name: row for row in review.artifacts}
    names = [name for name in order if name in rows] + [name for name in rows if name not in order]
    return replace(review, artifacts=tuple(rows[name] for name in names))


def record(out: Path, measured: Measured, text: HeldOut, checkpoint: Checkpoint) -> None:
    """Write the evidence of every artifact below `out`."""
    facts = evidence.Facts.of(text.facts, checkpoint.fingerprint)
    for name, fidelity in measured.main.items():
        path = out / evidence.FOLDER / f"{evidence.file_name(name)}.safetensors"
        evidence.write(path, fidelity, facts, measured.slices.get(name))
