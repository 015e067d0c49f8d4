"""The model card of a repository, a pure function of its manifest and its report; and the check that a card still is that.

    README.md = YAML head  +  <!-- qquant: begin -->  text of card.md.jinja  <!-- qquant: end -->

A number on the card is printed from report.json by one of the `FORMS` below and nowhere else, so `problems` can render the
card again and compare. People may add text after the end mark and keys to the head; a decimal number in added text must stand in
the generated part too.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from qquant.artifact.manifest import REPORT
from qquant.disk.output import MANIFEST
from qquant.errors import InputError
from qquant.formats import FORMATS
from qquant.formats.planned import ModelFile
from qquant.release.repository import Repository, read_report
from qquant.report.record import fallback_note
from qquant.source.untrusted import read_json

CARD = "README.md"
BEGIN, END = "<!-- qquant: begin, generated from report.json -->", "<!-- qquant: end -->"
DECIMAL = re.compile(r"(?<![\w.])\d[\d,]*\.\d+(?![\w.]*\w)")
NOT_PLAIN = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
FORMS = {
    "size": "{:,}",
    "bits_per_weight": "{:.2f}",
    "perplexity": "{:.3f}",
    "perplexity_ratio": "{:.4f}",
    "kl_divergence": "{:.5f}",
    "top1_agreement": "{:.2%}",
}


def shown(key: str, value: float | None) -> str:
    """A measurement as every card prints it; a dash where there is none (report.json writes NaN as null)."""
    return "-" if value is None else FORMS[key].format(value).replace("%", " %")


def with_card(repository: Repository) -> Repository:
    """The repository with its README.md."""
    return repository.with_files({CARD: render(repository.manifest, repository.report).encode()})


def render(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The whole card."""
    return f"---\n{yaml(head(manifest, report))}---\n\n{BEGIN}\n{body(manifest, report)}\n{END}\n"


# The head.


def head(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of the card; licence and language are those of the base card."""
    release = manifest["release"]
    inherited = dict(release.get("card") or {})
    kinds = _formats(manifest)
    folders = all(FORMATS[kind].is_folder for kind in kinds)
    tags = [*_texts(inherited.pop("tags", ())), *kinds, *(_bits(manifest) if folders else ()), "qquant"]
    content = {
        "base_model": release.get("base_model"),
        "base_model_relation": "quantized" if release.get("base_model") else None,
        "quantized_by": release.get("namespace"),
        "library_name": next((FORMATS[kind].library for kind in kinds), None),
        "pipeline_tag": "text-generation",
        **inherited,
        "tags": list(dict.fromkeys(tags)),
        "datasets": _datasets(manifest),
        "model-index": [
            {"name": release["repository"], "results": [_result(row, report) for row in report["artifacts"]]}
        ],
    }
    return {key: value for key, value in content.items() if value not in (None, [], "")}


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(item) for item in value or ()]


def _formats(manifest: Mapping[str, Any]) -> list[str]:
    found = list(dict.fromkeys(str(entry["format"]) for entry in manifest["artifacts"].values()))
    for name in found:
        if name not in FORMATS:
            raise InputError(f"{MANIFEST}: names the format {name[:40]!r}; this version knows {', '.join(FORMATS)}")
    return found


def _models(kind: str, manifest: Mapping[str, Any]) -> list[ModelFile]:
    """The models of format `kind` that a reader can name by a file, in the order of the manifest."""
    entries = [entry for entry in manifest["artifacts"].values() if entry["format"] == kind]
    return [model for entry in entries for model in FORMATS[kind].models(list(entry["files"]))]


def _specs(manifest: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The recipe's entry of every artifact."""
    for name, entry in manifest["artifacts"].items():
        yield from (spec for spec in entry["recipe"].get("artifacts", ()) if spec["name"] == name)


def _bits(manifest: Mapping[str, Any]) -> list[str]:
    return [f"{spec['bits']}-bit" for spec in _specs(manifest) if "bits" in spec]


def _datasets(manifest: Mapping[str, Any]) -> list[str]:
    entries = manifest["artifacts"].values()
    sources = (s for entry in entries for s in entry["recipe"].get("calibration", {}).get("sources", ()))
    return list(dict.fromkeys(source["dataset"] for source in sources if source.get("dataset")))


def _result(row: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    text = str(report["conditions"].get("text", {}).get("name", "held-out text"))
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": text, "type": text},
        "metrics": [{"type": "perplexity", "name": f"perplexity ({row['name']})", "value": row["perplexity"]}],
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
    )
    return environment.from_string((files("qquant.release") / "card.md.jinja").read_text("utf-8"))


def body(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The generated text."""
    release = manifest["release"]
    kinds = _formats(manifest)
    owner = release.get("namespace")
    text = report["conditions"].get("text", {})
    content = {
        "repository": release["repository"],
        "id": f"{owner}/{release['repository']}" if owner else release["repository"],
        "base": release.get("base_model"),
        "model": report["model"],
        "formats": [_describe(kind, manifest) for kind in kinds],
        "folder": all(FORMATS[kind].is_folder for kind in kinds),
        "chat": _chats(manifest),
        "parallel": release.get("tensor_parallel"),
        "files": [model for kind in kinds for model in _models(kind, manifest)],
        "rows": [_baseline(report), *(_row(artifact) for artifact in report["artifacts"])],
        "text": {key: text.get(key, "unknown") for key in ("name", "windows", "length")},
        "baseline_bits": f"{report['baseline']['bits_per_weight']:g}",
        "fallbacks": [(a["name"], note) for a in report["artifacts"] for note in fallback_note(a.get("fallbacks", ()))],
        "gates": [_gate(artifact, gate) for artifact in report["artifacts"] for gate in _gates(artifact)],
        "waivers": [(a["name"], a["verdict"]["waiver"]) for a in report["artifacts"] if a["verdict"].get("waiver")],
        "made": list(_made(manifest, report)),
        "manifest": MANIFEST,
        "report": REPORT,
    }
    return str(_template().render(content)).strip("\n")


def _chats(manifest: Mapping[str, Any]) -> bool:
    """Whether readers should chat with it: by its template, as the build noted; of an older build, by what it was calibrated on."""
    known = manifest["release"].get("chat")
    if isinstance(known, bool):
        return known
    recipes = [entry.get("recipe") or {} for entry in manifest["artifacts"].values()]
    return any(
        source.get("kind") == "chat"
        for recipe in recipes
        for source in (recipe.get("calibration") or {}).get("sources", ())
    )


def _describe(kind: str, manifest: Mapping[str, Any]) -> str:
    models = _models(kind, manifest)
    if models:
        return f"{kind.upper()} ({', '.join(model.type for model in models)})"
    spec = next((spec for spec in _specs(manifest) if spec["format"] == kind), {})
    details = [f"{spec['bits']} bit"] if "bits" in spec else []
    if "group_size" in spec:
        details.append(f"groups of {spec['group_size']}" if spec["group_size"] > 0 else "one group per row")
    return f"{kind.upper()} ({', '.join(details)})" if details else kind.upper()


def _baseline(report: Mapping[str, Any]) -> tuple[str, ...]:
    baseline = report["baseline"]
    return (
        "16-bit checkpoint",
        "",
        shown("bits_per_weight", baseline["bits_per_weight"]),
        shown("perplexity", baseline["perplexity"]),
        *[""] * 4,
    )


def _row(artifact: Mapping[str, Any]) -> tuple[str, ...]:
    return (artifact["name"], *(shown(key, artifact[key]) for key in FORMS), artifact["verdict"]["outcome"])


def _gates(artifact: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return [gate for gate in artifact["verdict"].get("gates", ()) if {"name", "value", "limit"} <= gate.keys()]


def _gate(artifact: Mapping[str, Any], gate: Mapping[str, Any]) -> tuple[str, ...]:
    def number(key: str) -> str:
        value = gate.get(key)
        return "-" if value is None else f"{value:.5g}"

    interval = f"{number('low')} to {number('high')}"
    return artifact["name"], gate["name"], number("value"), interval, number("limit"), str(gate.get("outcome", ""))


def _made(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    release = manifest["release"]
    entry = next(iter(manifest["artifacts"].values()))
    inputs, calibration = entry.get("inputs", {}), report.get("calibration", {})
    yield "recipe", f"`{report['recipe']}`"
    if release.get("revision"):
        yield "checkpoint", f"`{release['base_model']}` at `{release['revision']}`"
    if "checkpoint" in inputs:
        yield "sha256 of the checkpoint's config and weights", f"`{inputs['checkpoint']}`"
    if calibration:
        yield (
            "calibration",
            f"{calibration['samples']} samples, {calibration['tokens']} tokens, `{calibration['sha256']}`",
        )
    for source in calibration.get("sources", ()):
        yield "calibration text", f"{source.get('name')} ({source.get('licence') or 'licence unknown'})"
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
    manifest, report = read_json(folder / MANIFEST), read_report(folder / REPORT)
    if "release" not in manifest:
        raise InputError(f"{folder / MANIFEST}: has no release entry; check a folder that `qquant publish` made")
    text = path.read_text("utf-8")
    generated = body(manifest, report)
    parts = re.split(f"{re.escape(BEGIN)}\n|\n{re.escape(END)}", text)
    if len(parts) != 3:
        return [f"{path}: the marks around the generated part are missing or doubled"]
    found = _head_problems(path, parts[0], head(manifest, report))
    found += _body_problems(path, parts[0].count("\n") + 1, parts[1], generated)
    numbers = set(DECIMAL.findall(generated))
    for number in DECIMAL.findall(parts[2]):
        if number not in numbers:
            found.append(f"{path}: {number} in the added text is not a number of the generated part")
    return found


def _head_problems(path: Path, text: str, expected: Mapping[str, Any]) -> list[str]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        found = YAML(typ="safe", pure=True).load(match[1]) if match else None
    except YAMLError as error:
        return [f"{path}: the head is not valid YAML: {error}"]
    if not isinstance(found, dict):
        return [f"{path}: has no YAML head"]
    return [
        f"{path}: {key} is {json.dumps(found.get(key), default=str)}, {REPORT} and {MANIFEST} give {json.dumps(value)}"
        for key, value in expected.items()
        if found.get(key) != value
    ]


def _body_problems(path: Path, above: int, text: str, expected: str) -> list[str]:
    found = []
    have, want = text.split("\n"), expected.split("\n")
    for change, start, stop, first, last in difflib.SequenceMatcher(None, have, want, autojunk=False).get_opcodes():
        if change != "equal":
            is_text, should = " / ".join(have[start:stop]) or "nothing", " / ".join(want[first:last]) or "nothing"
            found.append(f"{path}:{above + start + 1}: is {is_text!r}, {REPORT} and {MANIFEST} give {should!r}")
    return found
