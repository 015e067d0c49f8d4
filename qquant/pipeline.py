"""A build from beginning to end, on one page; and a check of artifacts that are already there."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from qquant import __version__, background, calibration, devices
from qquant.artifact.draft import Draft
from qquant.artifact.finishing import finished, installed, restore
from qquant.artifact.manifest import RecipeCopy, read_manifest
from qquant.artifact.opening import open_weights
from qquant.calibration import Tokenizer
from qquant.checks import bisect as bisection
from qquant.checks import llama_cpp, speed, structure
from qquant.checks.evidence import Evidence
from qquant.checks.review import (
    Candidate,
    HeldOut,
    Review,
    earlier_release,
    held_out,
    record,
    require_same_numbers,
    review,
)
from qquant.checks.structure import Remembered
from qquant.disk.output import TIMINGS, claim
from qquant.disk.writes import write_synced
from qquant.families.weights import WeightSource
from qquant.formats import beside, format_of, kind_of_file, weight_files
from qquant.formats.gguf.imatrix import Imatrix
from qquant.formats.planned import PlannedArtifact
from qquant.plan.plan import Plan
from qquant.plan.texts import shortfall
from qquant.progress import Progress
from qquant.recipe import Checks, Gates, Recipe, eight_bits, published
from qquant.recipe.limits import reach, resolved
from qquant.release.repository import SOURCE, SourceFacts
from qquant.report import html
from qquant.report.conditions import CalibrationFacts, Conditions
from qquant.report.record import Report, SpeedReport
from qquant.solve import walk
from qquant.solve.moments import Moments
from qquant.source.checkpoint import Checkpoint
from qquant.source.safetensors_file import SIZES
from qquant.source.untrusted import read_json


def build(
    recipe: Recipe, checkpoint: Checkpoint, plan: Plan, out: Path, device: torch.device, progress: Progress
) -> Report:
    """Make every planned artifact in `out`, check each against the checkpoint, and write the report.

    Artifacts of an earlier run with the same inputs are kept after their hashes were verified; an interrupted build continues.
    """
    plan.require_room(out)
    with claim(out) as partial:
        restore(out, partial)
        progress.advance("read", 0, 3)
        tokenizer = Tokenizer.open(checkpoint.path)
        tokens = calibration.load(recipe.calibration, tokenizer, template_expected=False)
        text = held_out(recipe.checks, tokenizer, tokens, checkpoint.config.positions)
        progress.advance("read", 1, 3)
        aim = recipe.calibration
        seen = aim.curvature_tokens if aim.objective == "kl" else 0
        inputs = {"checkpoint": checkpoint.content_hash(), "calibration": tokens.sha256} | versions(device)
        inputs["objective"] = f"{aim.objective} {seen}"
        if plan.imatrix:
            inputs["imatrix"] = hashlib.sha256(plan.imatrix.gguf_bytes()).hexdigest()
        progress.advance("read", 2, 3)
        earlier = {
            artifact.name: earlier_release(artifact.spec.gates, artifact.name, text) for artifact in plan.artifacts
        }
        drafts = [draft for artifact in plan.artifacts if (draft := _draft(artifact, plan.model, out, partial, inputs))]
        progress.advance("read", 3, 3)
        samples = [torch.as_tensor(sample, dtype=torch.int64) for sample in tokens.tokens]
        moments = Moments(partial / f"moments-{_key(inputs)[:16]}", plan.imatrix)
        walk.quantize(checkpoint, samples, drafts, moments, device, progress, seen)
        write_timings(drafts, out)
        _finish(drafts, out, recipe, inputs, device)
        tokens.save(out / "calibration")
        write_imatrix(moments.collect(checkpoint, f"qquant recipe {recipe.name}"), out / "calibration")
        candidates = [
            _candidate(artifact, plan.gates[artifact.name], out, earlier[artifact.name]) for artifact in plan.artifacts
        ]
        found, measured = review(checkpoint, candidates, text, device, progress)
        if recipe.checks.speed:
            speeds = speed.measure_all([candidate.path for candidate in candidates], checkpoint, device, progress)
            found = with_speed(found, speeds)
        remarks = [
            *(plan.imatrix.remarks() if plan.imatrix else ()),
            *_short(recipe, tokens, text),
            *beyond(recipe.checks.length, checkpoint),
        ]
        report = Report(
            model=plan.model,
            recipe=recipe.name,
            baseline_bits=8 * SIZES[checkpoint.dtype],
            conditions=Conditions(text.facts, _detectable(candidates, recipe.checks, text), inputs),
            calibration=cast(CalibrationFacts, tokens.provenance()),
            **vars(found) | {"warnings": (*remarks, *found.warnings)},
        )
        record(out, measured, text, checkpoint)
        _write(report, out)
    return report


def beyond(length: int, checkpoint: Checkpoint) -> list[str]:
    """A warning where windows are longer than what the model was made for."""
    most = checkpoint.config.positions
    if length <= most:
        return []
    return [f"windows of {length:,} tokens, and the model has {most:,} positions: what lies beyond says little of it"]


def _short(recipe: Recipe, tokens: calibration.CalibrationSet, text: HeldOut) -> list[str]:
    """Where texts held less than the recipe asks for."""
    found = list(shortfall(len(tokens.tokens), sum(map(len, tokens.tokens)), recipe.calibration))
    asked, read = recipe.checks.windows, text.looks[0]
    if read < asked:
        found.append(
            f"{text.facts.name}: {read} of {asked} windows of {recipe.checks.length} tokens: the text has no more"
        )
    return found


def with_speed(found: Review, speeds: Sequence[SpeedReport]) -> Review:
    """The review with what the clock said; a machine too noisy to tell is a warning, not a verdict on the artifact."""
    rows = tuple(replace(row, speed=timed) for row, timed in zip(found.artifacts, speeds, strict=True))
    doubts = tuple(f"{row.name}: {reason}" for row in rows if row.speed for reason in row.speed.reasons)
    return replace(found, artifacts=rows, warnings=(*found.warnings, *doubts))


def note_source(checkpoint: Checkpoint, reference: str, plan: Plan, out: Path) -> None:
    """Keep beside the report what `publish` needs to know of the checkpoint; `reference` is what the user called it."""
    write_synced(out / SOURCE, SourceFacts.of(checkpoint, reference, plan.parallel).to_json())


def check(
    paths: Sequence[Path],
    checkpoint: Checkpoint,
    checks: Checks,
    gates: Gates,
    device: torch.device,
    progress: Progress,
    out: Path | None = None,
) -> Report:
    """Measure artifacts made by any tool against the checkpoint they came from; the report is kept in `out`, if given."""
    text = held_out(checks, Tokenizer.open(checkpoint.path), positions=checkpoint.config.positions)
    parameters = checkpoint.family.parameters(checkpoint.config)
    candidates = []
    for path in paths:
        size = sum(file.stat().st_size for file in weight_files(path))
        earlier, kind = earlier_release(gates, str(path), text), kind_of_file(path)
        held = resolved(gates, kind, parameters)
        candidates.append(
            Candidate(
                str(path),
                path,
                size,
                8 * _tensor_bytes(path) / parameters,
                held,
                eight_bit=eight_bits(kind),
                earlier=earlier,
            )
        )
    found, measured = review(checkpoint, candidates, text, device, progress)
    report = Report(
        model=checkpoint.name,
        recipe="check",
        baseline_bits=8 * SIZES[checkpoint.dtype],
        conditions=Conditions(text.facts, _detectable(candidates, checks, text), versions(device)),
        **vars(found) | {"warnings": (*beyond(checks.length, checkpoint), *found.warnings)},
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        record(out, measured, text, checkpoint)
        _write(report, out)
    return report


def _tensor_bytes(path: Path) -> int:
    """Bytes of tensor data, without headers and metadata: what a build calls bits per weight."""
    known = format_of(path)
    return sum(tensor["bytes"] for tensor in (known.describe(path) if known else beside.describe(path))["tensors"])


def _detectable(candidates: Sequence[Candidate], checks: Checks, text: HeldOut) -> dict[str, dict[str, float]]:
    """By artifact and gate, what was expected of the text before it was read."""
    return {
        candidate.name: {
            found.gate: found.detectable
            for found in reach(candidate.gates, text.looks[0], checks.scored, len(text.looks))
        }
        for candidate in candidates
    }


def write_timings(drafts: Sequence[Draft], out: Path) -> None:
    """Leave the seconds of every stage and block beside the report; those of artifacts that were kept stay as they are."""
    path = out / TIMINGS
    known = read_json(path).get("artifacts") if path.is_file() else None
    found = known if isinstance(known, dict) else {}
    for draft in drafts:
        found[draft.plan.name] = {name: took for unit in draft.units.values() for name, took in unit.seconds.items()}
    write_synced(path, (json.dumps({"schema": "qquant-timings-1", "artifacts": found}, indent=2) + "\n").encode())


def write_imatrix(found: Imatrix | None, folder: Path) -> None:
    """Leave the importance matrix beside the calibration tokens, in both formats that other tools read."""
    if found is not None:
        write_synced(folder / "imatrix.gguf", found.gguf_bytes())
        write_synced(folder / "imatrix.dat", found.dat_bytes())


def _key(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def bisect(
    artifact: Path, checkpoint: Checkpoint, checks: Checks, limit: float, device: torch.device, progress: Progress
) -> bisection.Found:
    """Which linears of an artifact carry its loss, and a small set that would bring its mean KL divergence to `limit`."""
    text = held_out(checks, Tokenizer.open(checkpoint.path))
    source = open_weights(artifact)
    require_same_numbers(artifact, source, checkpoint)
    candidates = (
        bisection.whole_blocks(source) if structure.folds(source, Remembered(checkpoint)) else bisection.parts(source)
    )
    search = bisection.Search(checkpoint, source, text.scored(text.windows[: text.looks[0]]), device, progress)
    return bisection.bisect(search, candidates, limit)


def perplexity(
    paths: Sequence[Path],
    checkpoint: Checkpoint,
    checks: Checks,
    target: Path | None,
    device: torch.device,
    progress: Progress,
    rounded: bool,
) -> dict[str, dict[str, float]]:
    """llama-perplexity's statistics by path, on the text of `checks`; base logits are kept in `target`, if given."""
    run = llama_cpp.Run(held_out(checks, Tokenizer.open(checkpoint.path)).windows, device, progress, rounded)
    return llama_cpp.compare(checkpoint, _opened(paths, checkpoint), run, target)


def perplexity_from(
    logits: Path, paths: Sequence[Path], device: torch.device, progress: Progress, rounded: bool
) -> dict[str, dict[str, float]]:
    """llama-perplexity's statistics by path against a file of base logits, on the text that the file holds."""
    base = llama_cpp.BaseLogits.open(logits)
    return llama_cpp.compare_with_file(
        base, {str(path): open_weights(path) for path in paths}, device, progress, rounded
    )


def _opened(paths: Sequence[Path], checkpoint: Checkpoint) -> dict[str, WeightSource]:
    found = {str(path): open_weights(path) for path in paths}
    for path, source in found.items():
        require_same_numbers(Path(path), source, checkpoint)
    return found


def _write(report: Report, out: Path) -> None:
    """The views first, the record last: where there is a report.json, everything else is there."""
    write_synced(out / "report.md", report.to_markdown().encode())
    write_synced(out / "report.html", html.render(report).encode())
    write_synced(out / "report.json", report.to_json().encode())


def versions(device: torch.device) -> dict[str, str]:
    """What the bytes of an artifact depend on besides its inputs."""
    return {"qquant": __version__, "torch": torch.__version__, "device": device.type, "machine": platform.machine()}


def _draft(artifact: PlannedArtifact, model: str, out: Path, partial: Path, inputs: Mapping[str, str]) -> Draft | None:
    """A draft, new or continued; None if `out` holds the artifact already."""
    key = _key({"spec": artifact.spec.model_dump(mode="json", exclude={"gates"}), "model": model, **inputs})
    if finished(out, artifact, key):
        return None
    draft = Draft(artifact, partial, key)
    draft.open()
    return draft


def _finish(
    drafts: Sequence[Draft], out: Path, recipe: Recipe, inputs: Mapping[str, str], device: torch.device
) -> None:
    """Read the artifacts back, on a GPU build by all cores and one artifact ahead, and make them visible one after another."""
    groups = [partial(draft.readings, device) for draft in drafts]
    with background.in_parallel(groups, background.cores() if devices.threads_help(device) else 1) as found:
        for draft, read in zip(drafts, found, strict=True):
            draft.finish(out, cast(RecipeCopy, published(recipe)), inputs, read)


def _candidate(artifact: PlannedArtifact, gates: Gates, out: Path, earlier: Evidence | None) -> Candidate:
    return Candidate(
        name=artifact.name,
        path=installed(out, artifact),
        size=artifact.size,
        bits_per_weight=artifact.bits_per_weight,
        gates=gates,
        fallbacks=artifact.fallbacks,
        layers=read_manifest(out / artifact.folder).artifacts[artifact.name].layers,
        eight_bit=artifact.spec.eight_bit,
        earlier=earlier,
    )
