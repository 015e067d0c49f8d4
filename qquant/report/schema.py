"""The JSON schema of report.json, derived from the types of the record; `qquant recipe schema --report` prints it."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from qquant.report.record import SCHEMA, TITLES, File


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of report.json; numbers that are not finite are text there."""

    class Numbers(GenerateJsonSchema):
        def float_schema(self, schema: Any) -> dict[str, Any]:
            return {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}

    report = TypeAdapter(File).json_schema(schema_generator=Numbers)
    shapes = report.pop("$defs")
    shapes["Baseline"] = shapes.pop("Baseline")
    report["title"] = "Report"
    report["properties"] |= {
        "schema": {"const": SCHEMA}, "baseline": {"$ref": "#/$defs/Baseline"}, "verdict": {"enum": list(TITLES)}
    }  # fmt: skip
    shapes["Conditions"] |= {
        "additionalProperties": shapes["Conditions"]["properties"].pop("inputs")["additionalProperties"]
    }
    for shape in (report, *shapes.values()):
        if not shape.get("additionalProperties"):
            shape |= {"required": list(shape["properties"]), "additionalProperties": False}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:{SCHEMA.replace('-', ':', 1)}"}
    return head | report | {"$defs": shapes}
