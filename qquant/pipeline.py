"""A build from beginning to end, on one page; and a check of artifacts that are already there."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from qquant import __version__, calibration
from qquant.artifact import owning, timings
from qquant.artifact.finishing import installed, orphaned, remarks_on, restore, set_aside
from qquant.artifact.manifest import AdapterFacts, Origin, RecipeCopy, artifact_bytes, manifest_of, records
from qquant.artifact.opening import open_weights
from qquant.artifact.threads import as_begun
from qquant.calibration import Tokenizer
from qquant.checks import bisect as bisection
from qquant.checks import kept, llama_cpp, loading, speed, structure
from qquant.checks.comparable import merged_otherwise, require_same_numbers
from qquant.checks.evidence import Evidence
from qquant.checks.means import Means
from qquant.checks.review import Candidate, HeldOut, Review, earlier_release, held_out, review, with_speed
from qquant.checks.structure import CachedWeights
from qquant.disk.digest import sha256_of_data
from qquant.disk.output import LOSSES, claim
from qquant.disk.writes import told, write_synced
from qquant.errors import InputError
from qquant.families.weights import WeightSource
from qquant.formats import beside, format_of, kind_of_file
from qquant.formats.planned import PlannedArtifact
from qquant.kernels.early import first_uses
from qquant.plan import seconds
from qquant.plan.capacity import require_fit
from qquant.plan.places import require_outside
from qquant.plan.plan import Plan
from qquant.plan.texts import shortfall
from qquant.progress import Progress, waited_for
from qquant.ranks import ALONE, Ranks
from qquant.recipe import Checks, Gates, Recipe, eight_bits, published
from qquant.recipe.limits import reach, resolved
from qquant.release.repository import SOURCE, ReleaseSource, sizes_with_earlier
from qquant.report import views
from qquant.report.conditions import CalibrationFacts, Conditions
from qquant.report.record import Report
from qquant.solve import sensitivity, walk
from qquant.solve.layers import hashed_and_read
from qquant.solve.moments import Moments, write_imatrix
from qquant.solve.writing import Author
from qquant.source.checkpoint import Checkpoint
from qquant.source.safetensors_file import SIZES


def build(
    recipe: Recipe,
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    device: torch.device,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Report:
    """Make every planned artifact in `out`, check each against the checkpoint, and write the report.

    Artifacts of an earlier run with the same inputs are kept after their hashes were verified; an interrupted build continues. Several
    `ranks` share out the artifacts; the bytes are the same, and all return the report.
    """
    require_outside(out, checkpoint.path, checkpoint.adapter.path if checkpoint.adapter else None)
    require_fit(recipe, checkpoint, plan, out, device)
    with claim(out, ranks, orphaned(out, plan.artifacts)) as folder, first_uses(device), ExitStack() as meanwhile:
        ranks.once(partial(restore, out, folder))
        progress.advance("read", 0, 3)
        measures = recipe.calibration.objective == "kl"
        blocks, hashed = meanwhile.enter_context(hashed_and_read(checkpoint, device, measures))
        tokens, tokenizer = _calibration(recipe, checkpoint, out / "calibration", device, progress, ranks)
        text = held_out(recipe.checks, tokenizer, tokens, checkpoint.config.positions)
        progress.advance("read", 1, 3)
        hashed()
        inputs = _inputs(recipe, checkpoint, plan, tokens, device)
        threads = meanwhile.enter_context(as_begun(folder, device, ranks))
        ranks.agree(
            {"recipe": sha256_of_data(dict(published(recipe))), **inputs, **threads}
            | {"plan": sha256_of_data(plan.to_dict())}
        )
        progress.advance("read", 2, 3)
        aside = set_aside(out)
        earlier = {one.name: earlier_release(one.spec.gates, one.name, text) for one in plan.artifacts}
        progress.advance("read", 3, 3)
        samples = [torch.as_tensor(sample, dtype=torch.int64) for sample in tokens.tokens]
        moments = Moments(folder / f"moments-{sha256_of_data(inputs)[:16]}", plan.imatrix, ranks)
        plan = sensitivity.settle(
            sensitivity.LossQuestion(recipe, checkpoint, plan, inputs), samples, out / LOSSES, moments, device, progress
        )
        keys = {artifact.name: _key_of(artifact, plan, inputs) for artifact in plan.artifacts}
        mine = owning.share(plan.artifacts, keys, out, partial(seconds.solving, checkpoint, plan, device), ranks)
        drafts = owning.drafts(mine, folder, keys, device, ranks)
        idle = meanwhile.enter_context(loading.waiting(loading.early(len(plan.artifacts), device), gpu=True))
        walk.quantize(
            checkpoint, samples, drafts, moments, blocks, progress, recipe.calibration.gradient_tokens, mine.together
        )
        progress.advance("write", 0, 1)
        took = owning.seconds(mine.written(drafts, ranks), ranks)
        if ranks.first:
            timings.write(took, out)
            write_synced(out / SOURCE, ReleaseSource.of(checkpoint, sizes_with_earlier(plan.parallel, out)).to_json())
        owning.finish(
            mine.written(drafts, ranks),
            plan.artifacts,
            out,
            Origin(cast(RecipeCopy, published(recipe)), inputs, _adapter(checkpoint)),
            device,
            ranks,
        )
        if ranks.first:
            tokens.save(out / "calibration")
            write_imatrix(moments.collect(checkpoint, f"qquant recipe {recipe.name}"), out / "calibration")
        candidates = [
            _candidate(artifact, plan.gates[artifact.name], out, earlier[artifact.name]) for artifact in plan.artifacts
        ]
        asked = kept.CheckQuestion(recipe.checks, text, inputs)
        conditions = Conditions(text.facts, _detectable(candidates, recipe.checks, text), inputs)
        given = asked, conditions, Means(device, blocks.kept if blocks.source is checkpoint else {}, idle)
        reviewed, conditions = _judge(out, checkpoint, candidates, given, progress, ranks)
        remarks = [
            *(plan.imatrix.remarks() if plan.imatrix else ()),
            *_short(recipe, tokens, text),
            *beyond(recipe.checks.length, checkpoint),
            *filter(None, [str(conditions.tokenizer or "")]),
            *remarks_on(out, set_aside(out) - aside),
        ]
        report = Report(
            model=plan.model,
            recipe=recipe.name,
            baseline_bits=8 * SIZES[checkpoint.dtype],
            conditions=conditions,
            calibration=cast(CalibrationFacts, tokens.provenance()),
            baseline_perplexity=reviewed.baseline_perplexity,
            artifacts=reviewed.artifacts,
            warnings=(*remarks, *reviewed.warnings),
        )
        if ranks.first:
            views.write(report, out)
        return _heard(report, ranks)


def choose_types(
    recipe: Recipe, checkpoint: Checkpoint, plan: Plan, scratch: Path, device: torch.device, progress: Progress
) -> Plan:
    """The plan with types chosen for every artifact that asks for a size, as a build would choose them; `scratch` is a folder of its own."""
    tokens, _ = _calibration(recipe, checkpoint, scratch, device, progress)
    samples = [torch.as_tensor(sample, dtype=torch.int64) for sample in tokens.tokens]
    inputs = _inputs(recipe, checkpoint, plan, tokens, device)
    question = sensitivity.LossQuestion(recipe, checkpoint, plan, inputs)
    return sensitivity.settle(question, samples, scratch / LOSSES, Moments(scratch, plan.imatrix), device, progress)


def _calibration(
    recipe: Recipe,
    checkpoint: Checkpoint,
    scratch: Path,
    device: torch.device,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> tuple[calibration.CalibrationSet, Tokenizer]:
    author = Author(checkpoint, versions(device), scratch, device, progress)
    tokenizer = Tokenizer.open(checkpoint.path)
    return calibration.load(recipe.calibration, tokenizer, False, author.for_all(ranks)), tokenizer


def beyond(length: int, checkpoint: Checkpoint) -> list[str]:
    """A warning where windows are longer than what the model was made for."""
    most = checkpoint.config.positions
    if length <= most:
        return []
    return [f"windows of {length:,} tokens, and the model has {most:,} positions: what lies beyond says little of it"]


def _judge(
    out: Path,
    checkpoint: Checkpoint,
    candidates: Sequence[Candidate],
    question: tuple[kept.CheckQuestion, Conditions, Means],
    progress: Progress,
    ranks: Ranks,
) -> tuple[Review, Conditions]:
    """Rows for all candidates, measured now unless their verdicts still hold, and for artifacts that were left alone."""
    asked, conditions, means = question
    progress.advance("write", 1, 1)
    before, candidates = kept.earlier(out), [asked.to(candidate) for candidate in candidates]
    answered = kept.answered(out, before, candidates)
    fresh = [candidate for candidate in candidates if candidate.name not in answered]
    ranks.agree({"list of what is to be judged": ", ".join(candidate.name for candidate in fresh)})
    reviewed = Review(before.baseline_perplexity if before else 0.0, ())
    if fresh:
        reviewed, measured = review(checkpoint, fresh, asked.text, means, progress, ranks)
        if asked.checks.speed and ranks.first:
            speeds = speed.measure_all([candidate.path for candidate in fresh], checkpoint, means.device, progress)
            reviewed = with_speed(reviewed, speeds)
        if ranks.first:
            kept.record(out, measured, asked.text, checkpoint)
    names = [candidate.name for candidate in candidates]
    left, lost = kept.others(out, before, conditions, names)
    text = {row.name: before.conditions.detectable.get(row.name, {}) for row in left} if before else {}
    read = reviewed.tokenizer or (before.conditions.tokenizer if before else None)
    conditions = replace(conditions, detectable={**text, **conditions.detectable}, tokenizer=read)
    return kept.together(answered, replace(reviewed, remarks=(*reviewed.remarks, *lost)), left, names), conditions


def _short(recipe: Recipe, tokens: calibration.CalibrationSet, text: HeldOut) -> list[str]:
    """Warnings where texts held less than the recipe asks for."""
    warnings = list(shortfall(*tokens.from_sources(), recipe.calibration))
    asked, read = recipe.checks.windows, text.looks[0]
    if read < asked:
        warnings.append(
            f"{text.facts.name}: {read} of {asked} windows of {recipe.checks.length} tokens: the text has no more"
        )
    return warnings


def check(  # noqa: PLR0913  each is the user's
    paths: Sequence[Path],
    checkpoint: Checkpoint,
    checks: Checks,
    gates: Gates,
    device: torch.device,
    progress: Progress,
    out: Path | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """Measure artifacts made by any tool against the checkpoint they came from; the report is kept in `out`, if given."""
    tokenizer, positions = Tokenizer.open(checkpoint.path), checkpoint.config.positions
    text = waited_for(partial(held_out, checks, tokenizer, positions=positions), progress, "read")
    parameters = checkpoint.family.parameters(checkpoint.config)
    candidates = []
    for path in paths:
        size = artifact_bytes(path)
        earlier, kind = earlier_release(gates, str(path), text), kind_of_file(path)
        held = resolved(gates, kind, parameters)
        bits = 8 * _tensor_bytes(path) / parameters
        candidates.append(Candidate(str(path), path, size, bits, held, eight_bit=eight_bits(kind), earlier=earlier))
    ranks.agree(versions(device) | {"checkpoint": checkpoint.fingerprint, "text": text.facts.sha256})
    reviewed, measured = review(checkpoint, candidates, text, Means(device), progress, ranks)
    report = Report(
        model=checkpoint.name,
        recipe="check",
        baseline_bits=8 * SIZES[checkpoint.dtype],
        conditions=Conditions(text.facts, _detectable(candidates, checks, text), versions(device), reviewed.tokenizer),
        baseline_perplexity=reviewed.baseline_perplexity,
        artifacts=reviewed.artifacts,
        warnings=(
            *beyond(checks.length, checkpoint),
            *merged_otherwise(paths, checkpoint),
            *filter(None, [str(reviewed.tokenizer or "")]),
            *reviewed.warnings,
        ),
    )
    if out is not None and ranks.first:
        with told(out):
            out.mkdir(parents=True, exist_ok=True)
            kept.record(out, measured, text, checkpoint)
            views.write(report, out)
    return _heard(report, ranks)


def _tensor_bytes(path: Path) -> int:
    """Bytes of tensor data, without headers and metadata: what a build calls bits per weight."""
    artifact_format = format_of(path)
    return sum(
        tensor["bytes"]
        for tensor in (artifact_format.describe(path) if artifact_format else beside.describe(path))["tensors"]
    )


def _detectable(candidates: Sequence[Candidate], checks: Checks, text: HeldOut) -> dict[str, dict[str, float]]:
    """Artifact -> gate -> the loss that was expected to be told before the text was read."""
    return {
        candidate.name: {
            loss.gate: loss.detectable for loss in reach(candidate.gates, text.looks[0], checks.scored, len(text.looks))
        }
        for candidate in candidates
    }


def bisect(
    artifact: Path, checkpoint: Checkpoint, checks: Checks, limit: float, device: torch.device, progress: Progress
) -> bisection.Bisection:
    """Which linears of an artifact carry its loss, and a small set that would bring its mean KL divergence to `limit`."""
    text = held_out(checks, Tokenizer.open(checkpoint.path))
    source = open_weights(artifact)
    require_same_numbers(artifact, source, checkpoint)
    candidates = (
        bisection.whole_blocks(source)
        if structure.folds(source, CachedWeights(checkpoint))
        else [*bisection.stages(source), *bisection.tables(source)]
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
    sources = {str(path): open_weights(path) for path in paths}
    for path, source in sources.items():
        require_same_numbers(Path(path), source, checkpoint)
    return sources


def _heard(report: Report, ranks: Ranks) -> Report:
    """The first rank's report, on every rank."""
    if ranks.world == 1:
        return report
    said = ranks.once(report.to_json)
    return report if ranks.first else Report.from_json(json.loads(said))


def versions(device: torch.device) -> dict[str, str]:
    """What the bytes of an artifact depend on besides its inputs."""
    return {"qquant": __version__, "torch": torch.__version__, "device": device.type, "machine": platform.machine()}


def _inputs(
    recipe: Recipe, checkpoint: Checkpoint, plan: Plan, tokens: calibration.CalibrationSet, device: torch.device
) -> dict[str, str]:
    """What the bytes of every artifact depend on besides its own entry."""
    asked = recipe.calibration
    inputs = {"checkpoint": checkpoint.content_hash(), "calibration": tokens.sha256} | versions(device)
    inputs["objective"] = f"{asked.objective} {asked.gradient_tokens}"
    if checkpoint.base_hash() != inputs["checkpoint"]:
        inputs["base"] = checkpoint.base_hash()
    if checkpoint.adapter:
        inputs["adapter"] = checkpoint.adapter.fingerprint
    if plan.imatrix:
        inputs["imatrix"] = hashlib.sha256(plan.imatrix.gguf_bytes()).hexdigest()
    return inputs


def _key_of(artifact: PlannedArtifact, plan: Plan, inputs: Mapping[str, str]) -> str:
    """What a draft or artifact is known by: everything its bytes depend on."""
    return sha256_of_data(
        {"spec": artifact.spec.model_dump(mode="json", exclude={"gates"}), "model": plan.model, **inputs}
    )


def _adapter(checkpoint: Checkpoint) -> AdapterFacts | None:
    """What the record says of the adapter that is merged as the checkpoint is read."""
    if checkpoint.adapter is None:
        return None
    name, revision = checkpoint.adapter.origin
    return AdapterFacts(name, checkpoint.adapter.fingerprint, checkpoint.adapter.base, revision)


def _candidate(artifact: PlannedArtifact, gates: Gates, out: Path, earlier: Evidence | None) -> Candidate:
    entry = manifest_of(out / artifact.folder).artifacts.get(artifact.name)
    if entry is None:
        raise InputError(
            f"{out / artifact.folder}: {artifact.name} was taken away meanwhile. Run the same command again"
        )
    return Candidate(
        name=artifact.name,
        path=installed(out, artifact),
        size=artifact.size,
        bits_per_weight=artifact.bits_per_weight,
        gates=gates,
        fallbacks=artifact.fallbacks,
        layers=entry.layers,
        sha256=entry.digest,
        record=records(out / artifact.folder)[artifact.name],
        eight_bit=artifact.spec.eight_bit,
        earlier=earlier,
    )
