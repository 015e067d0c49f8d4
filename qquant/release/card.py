"""The model card of a repository, a pure function of its manifest and its report; and the check that a card still is that.

    README.md = YAML head  +  <!-- qquant: begin -->  text of card.md.jinja  <!-- qquant: end -->

A number on the card is printed from report.json by one of the `FORMS` below and nowhere else, so `problems` can render the
card again and compare. People may add text after the end mark and keys to the head; a decimal number in added text must stand in
the generated part too.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qquant.artifact.manifest import (
    CARD,
    REPORT,
    CalibrationSourceCopy,
    Manifest,
    ReleaseEntry,
    SpecCopy,
    manifest_of,
    read_report,
    require_judged,
)
from qquant.disk.output import MANIFEST
from qquant.errors import InputError
from qquant.formats import FORMATS
from qquant.formats.planned import ModelFile
from qquant.release.repository import Repository
from qquant.report import behaviour, slices, tasks
from qquant.report.conditions import background
from qquant.report.escape import in_line, markdown
from qquant.report.facts import in_short
from qquant.report.record import ArtifactReport, GateReport, Report, fallback_note

BEGIN, END = "<!-- qquant: begin, generated from report.json -->", "<!-- qquant: end -->"
DECIMAL = re.compile(r"(?<![\w.])\d[\d,]*\.\d+(?![\w.]*\w)")
NOT_PLAIN = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
DATASETS = {
    "bundled:wikitext-2-test": {
        "name": "WikiText-2 raw, test",
        "type": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "test",
    }
}  # bundled texts that are whole datasets of the hub
FORMS = {
    "size": "{:,}",
    "bits_per_weight": "{:.2f}",
    "perplexity": "{:,.3f}",
    "perplexity_ratio": "{:,.4f}",
    "kl_divergence": "{:.5f}",
    "top1_agreement": "{:.2%}",
}


def shown(key: str, value: float) -> str:
    """A measurement as every card prints it; a dash where there is none."""
    return "-" if math.isnan(value) else FORMS[key].format(value).replace("%", " %")


def with_card(repository: Repository) -> Repository:
    """The repository with its README.md."""
    return repository.with_files({CARD: render(repository.manifest, repository.report).encode()})


def render(manifest: Manifest, report: Report) -> str:
    """The whole card."""
    return f"---\n{yaml(head(manifest, report))}---\n\n{BEGIN}\n{body(manifest, report)}\n{END}\n"


# The head.


def head(manifest: Manifest, report: Report) -> dict[str, Any]:
    """The metadata of the card; licence and language are those of the base card."""
    release = _release(manifest)
    inherited: dict[str, Any] = {
        key: list(_texts(value)) if isinstance(value, tuple) else value for key, value in (release.card or {}).items()
    }
    kinds = _formats(manifest)
    folders = all(FORMATS[kind].is_folder for kind in kinds)
    tags = [*_texts(inherited.pop("tags", ())), *kinds, *(_bits(manifest) if folders else ()), "qquant"]
    content = {
        "base_model": release.base_model,
        "base_model_relation": "quantized" if release.base_model else None,
        "quantized_by": release.namespace,
        "library_name": next((FORMATS[kind].library for kind in kinds), None),
        "pipeline_tag": "text-generation",
        **inherited,
        "tags": list(dict.fromkeys(tags)),
        "datasets": _datasets(manifest),
        "model-index": [{"name": release.repository, "results": [_result(row, report) for row in report.artifacts]}],
    }
    return {key: value for key, value in content.items() if value not in (None, [], "")}


def unknown(manifest: Manifest) -> list[str]:
    """What readers look for in the head of a card and the build did not know, each with how to say it."""
    release = _release(manifest)
    remedies = {
        "base model": (release.base_model, "--base-model"),
        "licence": ((release.card or {}).get("license"), "`license:` in the head of a README.md beside the checkpoint"),
    }
    return [f"{what} ({remedy})" for what, (value, remedy) in remedies.items() if not value]


def _release(manifest: Manifest) -> ReleaseEntry:
    if manifest.release is None:
        raise AssertionError("a card is of a release")
    return manifest.release


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(item) for item in value or ()]


def _formats(manifest: Manifest) -> list[str]:
    formats = list(dict.fromkeys(entry.format for entry in manifest.artifacts.values()))
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"{MANIFEST}: names the format {name[:40]!r}; this version knows {', '.join(FORMATS)}")
    return formats


def _models(kind: str, manifest: Manifest) -> list[ModelFile]:
    """The models of format `kind` that a reader can name by a file, in the order of the manifest."""
    entries = [entry for entry in manifest.artifacts.values() if entry.format == kind]
    return [model for entry in entries for model in FORMATS[kind].models(list(entry.files))]


def _specs(manifest: Manifest) -> Iterator[SpecCopy]:
    """The recipe's entry of every artifact."""
    specs = (entry.spec(name) for name, entry in manifest.artifacts.items())
    yield from (spec for spec in specs if spec)


def _bits(manifest: Manifest) -> list[str]:
    return [f"{spec['bits']}-bit" for spec in _specs(manifest) if "bits" in spec]


def _datasets(manifest: Manifest) -> list[str]:
    return list(dict.fromkeys(name for source in _sources(manifest) if (name := source.get("dataset"))))


def _result(row: ArtifactReport, report: Report) -> dict[str, Any]:
    text = report.conditions.text.name
    value = round(row.perplexity, 3) if math.isfinite(row.perplexity) else str(row.perplexity)
    return {
        "task": {"type": "text-generation"},
        "dataset": DATASETS.get(text) or {"name": text, "type": "text"},
        "metrics": [{"type": "perplexity", "name": f"perplexity ({row.name})", "value": value}],
    }


def yaml(content: Any, indent: str = "") -> str:
    """Block YAML that every version reads alike; text is quoted unless it is plainly a word."""
    lines = []
    for key, value in content.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{key}:\n{yaml(value, indent + '  ')}")
        elif isinstance(value, list):
            lines.append(f"{indent}{key}:\n" + "".join(_item(item, indent) for item in value))
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}\n")
    return "".join(lines)


def _item(item: Any, indent: str) -> str:
    if isinstance(item, dict):
        return f"{indent}- {yaml(item, indent + '  ').lstrip(' ')}"
    return f"{indent}- {_scalar(item)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in NOT_PLAIN:
        return value
    return json.dumps(value, ensure_ascii=False)


# The body.


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        finalize=lambda value: markdown(value) if type(value) is str else value,
    )
    return environment.from_string((files("qquant.release") / "card.md.jinja").read_text("utf-8"))


def body(manifest: Manifest, report: Report) -> str:
    """The generated text."""
    release = _release(manifest)
    kinds = _formats(manifest)
    owner, text = release.namespace, report.conditions.text
    content = {
        "repository": release.repository,
        "id": f"{owner}/{release.repository}" if owner else release.repository,
        "base": release.base_model,
        "model": report.model,
        "formats": [_describe(kind, manifest) for kind in kinds],
        "folder": all(FORMATS[kind].is_folder for kind in kinds),
        "chat": _chats(manifest),
        "parallel": release.tensor_parallel,
        "files": [model for kind in kinds for model in _models(kind, manifest)],
        "rows": [_cells(_baseline(report)), *(_cells(_row(row)) for row in report.artifacts)],
        "text": text,
        "baseline_bits": f"{report.baseline_bits:g}",
        "fallbacks": [(row.name, note) for row in report.artifacts for note in fallback_note(row.fallbacks)],
        "gates": [_cells(_gate(row, gate)) for row in report.artifacts for gate in row.verdict.gates],
        "short": [Markup(line) for line in in_short(report, published=True)],
        "read": str(report.conditions.tokenizer or ""),
        "kept": slices.table(report.artifacts),
        "does": behaviour.table(report.artifacts),
        "benchmarks": tasks.table(report.artifacts),
        "waivers": [(row.name, row.verdict.waiver) for row in report.artifacts if row.verdict.waiver],
        "made": list(_made(manifest, report)),
        "manifest": MANIFEST,
        "report": REPORT,
    }
    return str(_template().render(content)).strip("\n")


def _chats(manifest: Manifest) -> bool:
    """Whether readers should chat with it: by its template, as the build noted; of an older build, by what it was calibrated on."""
    noted = _release(manifest).chat
    return any(source.get("kind") == "chat" for source in _sources(manifest)) if noted is None else noted


def _sources(manifest: Manifest) -> Iterator[CalibrationSourceCopy]:
    """Every calibration source of the recipes."""
    for entry in manifest.artifacts.values():
        yield from entry.recipe.get("calibration", {}).get("sources", ())


def _describe(kind: str, manifest: Manifest) -> str:
    models = _models(kind, manifest)
    if models:
        return f"{kind.upper()} ({', '.join(model.type for model in models)})"
    spec = next((spec for spec in _specs(manifest) if spec.get("format") == kind), SpecCopy())
    details = [f"{spec['bits']} bit"] if "bits" in spec else []
    if "group_size" in spec:
        details.append(f"groups of {spec['group_size']}" if spec["group_size"] > 0 else "one group per row")
    return f"{kind.upper()} ({', '.join(details)})" if details else kind.upper()


def _cells(row: Sequence[str]) -> Markup:
    return Markup(f"| {' | '.join(map(markdown, row))} |")


def _code(text: object) -> Markup:
    return Markup(f"`{in_line(str(text)).replace('`', '')}`")


def _baseline(report: Report) -> tuple[str, ...]:
    bits, perplexity = shown("bits_per_weight", report.baseline_bits), shown("perplexity", report.baseline_perplexity)
    return "16-bit checkpoint", "", bits, perplexity, *[""] * 4


def _row(row: ArtifactReport) -> tuple[str, ...]:
    return row.name, *(shown(key, getattr(row, key)) for key in FORMS), row.verdict.outcome


def _gate(row: ArtifactReport, gate: GateReport) -> tuple[str, ...]:
    interval = f"{gate.low:.5g} to {gate.high:.5g}"
    return row.name, gate.name, f"{gate.value:.5g}", interval, f"{gate.limit:.5g}", gate.outcome


def _made(manifest: Manifest, report: Report) -> Iterator[tuple[str, str | Markup]]:
    release = _release(manifest)
    inputs, calibration = next(iter(manifest.artifacts.values())).inputs, report.calibration
    yield "recipe", _code(report.recipe)
    if release.revision:
        yield "checkpoint", _code(release.base_model) + Markup(" at ") + _code(release.revision)
    adapter = next(iter(manifest.artifacts.values())).adapter
    if adapter:
        what = _code(adapter.name) + (Markup(" at ") + _code(adapter.revision) if adapter.revision else Markup(""))
        trained = Markup(", trained on ") + _code(adapter.base) if adapter.base else Markup("")
        yield "LoRA adapter, merged into the checkpoint", what + trained + Markup(", sha256 ") + _code(adapter.sha256)
    if "checkpoint" in inputs:
        what_of = "checkpoint with the adapter merged" if adapter else "checkpoint's config and weights"
        yield f"sha256 of the {what_of}", _code(inputs["checkpoint"])
    if calibration:
        counts = f"{calibration.get('samples')} samples, {calibration.get('tokens')} tokens"
        yield "calibration", Markup(f"{counts}, ") + _code(calibration.get("sha256"))
    for source in calibration.get("sources", ()):
        yield "calibration text", f"{source.get('name')} ({source.get('licence') or 'licence unknown'})"
    beside = background(calibration)
    if beside:
        yield "background of the calibration", beside
    versions = [f"{key} {inputs[key]}" for key in ("qquant", "torch", "device", "machine") if key in inputs]
    yield "made with", ", ".join(versions)


# The check.


def problems(folder: Path) -> list[str]:
    """What of the card in `folder` does not come from the report.json and the manifest beside it; empty if all does.

    Raises:
        InputError: one of the three is missing or malformed.
    """
    path = folder / CARD
    if not path.is_file():
        raise InputError(f"{path}: not found")
    manifest, report = manifest_of(folder), read_report(folder / REPORT)
    if manifest.release is None or not manifest.artifacts:
        raise InputError(f"{folder / MANIFEST}: has no release entry; check a folder that `qquant publish` made")
    require_judged(folder, report)
    text = path.read_text("utf-8")
    generated = body(manifest, report)
    parts = re.split(f"{re.escape(BEGIN)}\n|\n{re.escape(END)}", text)
    if len(parts) != 3:
        return [f"{path}: the marks around the generated part are missing or doubled"]
    mistakes = _head_problems(path, parts[0], head(manifest, report))
    mistakes += _body_problems(path, parts[0].count("\n") + 1, parts[1], generated)
    numbers = set(DECIMAL.findall(generated))
    for number in DECIMAL.findall(parts[2]):
        if number not in numbers:
            mistakes.append(f"{path}: {number} in the added text is not a number of the generated part")
    return mistakes


def _head_problems(path: Path, text: str, expected: Mapping[str, Any]) -> list[str]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        stated = YAML(typ="safe", pure=True).load(match[1]) if match else None
    except YAMLError as error:
        return [f"{path}: the head is not valid YAML: {error}"]
    if not isinstance(stated, dict):
        return [f"{path}: has no YAML head"]
    return [
        f"{path}: {key} is {json.dumps(stated.get(key), default=str)}, {REPORT} and {MANIFEST} give {json.dumps(value)}"
        for key, value in expected.items()
        if stated.get(key) != value
    ]


def _body_problems(path: Path, above: int, text: str, expected: str) -> list[str]:
    mistakes = []
    have, want = text.split("\n"), expected.split("\n")
    for change, start, stop, first, last in difflib.SequenceMatcher(None, have, want, autojunk=False).get_opcodes():
        if change != "equal":
            is_text, should = " / ".join(have[start:stop]) or "nothing", " / ".join(want[first:last]) or "nothing"
            mistakes.append(f"{path}:{above + start + 1}: is {is_text!r}, {REPORT} and {MANIFEST} give {should!r}")
    return mistakes
