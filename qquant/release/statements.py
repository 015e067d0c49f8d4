"""What a release says of its making: a CycloneDX bill of materials, and an in-toto statement with a SLSA predicate.

qquant-bom.cdx.json      CycloneDX 1.6: model, base model, data, tools
qquant-provenance.json   sha256 of every file, recipe, inputs; no times, so the same build gives the same bytes
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from qquant.artifact.manifest import BOM, STATEMENT, AdapterFacts
from qquant.release.repository import Repository, as_json
from qquant.report.record import Report

BUILD_TYPE = "urn:qquant:build:1"


def with_statements(repository: Repository) -> Repository:
    """The repository with its bill of materials and its provenance statement, the last over all other files."""
    listed = repository.with_files({BOM: as_json(bill_of_materials(repository))})
    return listed.with_files({STATEMENT: as_json(statement(listed))})


def bill_of_materials(repository: Repository) -> dict[str, Any]:
    """CycloneDX 1.6: the model, what it is made from, and what made it."""
    release, report, inputs = repository.release, repository.report, repository.first.inputs
    reference = f"{release.namespace or 'local'}/{repository.name}"
    base = release.base_model or report.model
    sources = report.calibration.get("sources", ())
    model = {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": repository.name,
        "version": release.tag or "0",
        "licenses": _licences(release.card or {}),
        "modelCard": {"quantitativeAnalysis": {"performanceMetrics": list(_metrics(report))}},
        "components": [
            {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": payload.sha256}]}
            for name, payload in sorted(repository.files.items())
        ],
    }
    used: list[dict[str, Any]] = [
        {"type": "machine-learning-model", "bom-ref": f"base:{base}", "name": base, "version": release.revision or ""},
        *_adapter(repository.first.adapter),
        *(
            {
                "type": "data",
                "bom-ref": f"data:{source.get('name')}",
                "name": source.get("name"),
                "version": str(source.get("revision") or ""),
                "licenses": _licences({"license": source.get("licence") or ""}),
            }
            for source in sources
        ),
    ]
    tools = [
        {"type": "application", "name": name, "version": inputs[name]} for name in ("qquant", "torch") if name in inputs
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, repository.digest)}",
        "version": 1,
        "metadata": {"component": model, "tools": {"components": tools}},
        "components": used,
        "dependencies": [{"ref": reference, "dependsOn": [component["bom-ref"] for component in used]}],
    }


def statement(repository: Repository) -> dict[str, Any]:
    """in-toto statement v1 with a SLSA provenance v1 predicate."""
    release, inputs = repository.release, repository.first.inputs
    base = release.base_model or repository.report.model
    materials: list[dict[str, Any]] = [
        {
            "name": base,
            "uri": f"pkg:huggingface/{base}",
            "digest": {"sha256": inputs.get("base") or inputs.get("checkpoint", "")},
        }
    ]
    if release.revision:
        materials[0]["uri"] = f"pkg:huggingface/{base}@{release.revision}"
    adapter = repository.first.adapter
    if adapter:
        materials.append({"name": f"LoRA adapter {adapter.name}", "digest": {"sha256": adapter.sha256}})
    if "calibration" in inputs:
        materials.append({"name": "calibration tokens", "digest": {"sha256": inputs["calibration"]}})
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": name, "digest": {"sha256": payload.sha256}} for name, payload in sorted(repository.files.items())
        ],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "recipe": repository.first.recipe,
                    "artifacts": list(repository.manifest.artifacts),
                },
                "internalParameters": {
                    key: value for key, value in inputs.items() if key not in ("checkpoint", "calibration")
                },
                "resolvedDependencies": materials,
            },
            "runDetails": {"builder": {"id": "urn:qquant", "version": {"qquant": inputs.get("qquant", "")}}},
        },
    }


def _adapter(adapter: AdapterFacts | None) -> list[dict[str, Any]]:
    """The adapter as a component of the bill."""
    if adapter is None:
        return []
    return [
        {
            "type": "machine-learning-model",
            "bom-ref": f"adapter:{adapter.name}",
            "name": adapter.name,
            "version": adapter.revision or "",
            "description": f"LoRA adapter, merged; trained on {adapter.base or 'a base that it does not name'}",
            "hashes": [{"alg": "SHA-256", "content": adapter.sha256}],
        }
    ]


def _licences(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    name = card.get("license_name") or card.get("license")
    return [{"license": {"name": str(name)}}] if name else []


def _metrics(report: Report) -> Iterable[dict[str, str]]:
    for row in report.artifacts:
        for kind in ("perplexity", "kl_divergence", "top1_agreement"):
            yield {"type": kind, "value": str(getattr(row, kind)), "slice": row.name}
