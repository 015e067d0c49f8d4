"""Names, places and values in words: what a field takes, how a value is shown, which known name is near.

What a field takes is read from its JSON schema: messages, `schema()` and the tables of recipes/README.md cannot disagree.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable
from typing import Any

Location = tuple[str | int, ...]  # keys and indices from the root, e.g. ("artifacts", 0, "bits")
Shape = dict[str, Any]  # one node of the JSON schema

UNREADABLE: Any = object()  # stands for a value whose fault is reported already


def options(shape: Shape) -> list[Shape]:
    """The shapes any of which a value may have."""
    return list(shape.get("anyOf", [shape]))


def choices(shape: Shape) -> list[Any]:
    """The values of a field that takes one of a few; else none."""
    return [
        choice
        for option in options(shape)
        for choice in option.get("enum", [option["const"]] if "const" in option else [])
    ]


def allowed(shape: Shape) -> str:
    """What a field takes, in words."""
    return " or ".join(_allowed_one(option) for option in options(shape))


def _allowed_one(shape: Shape) -> str:
    if literals := choices(shape):
        return ", ".join(choice if isinstance(choice, str) else shown(choice) for choice in literals)
    match shape.get("type"):
        case "integer":
            return "whole number" + _range(shape)
        case "number":
            return "number" + _range(shape)
        case "string" if "pattern" in shape:
            return f"1 to {shape['maxLength']} of a-z 0-9 . _ - that begin with a letter or digit"
        case "string":
            return f"text of {shape.get('minLength', 0)} to {shape['maxLength']} characters"
        case "boolean":
            return "true, false"
        case "array":
            return f"list of {shape['minItems']} to {shape['maxItems']} mappings"
        case "null":
            return "null"
    return "mapping"


def _range(shape: Shape) -> str:
    match shape:
        case {"minimum": low, "maximum": high}:
            return f" from {low} to {high}"
        case {"minimum": low, "exclusiveMaximum": high}:
            return f" from {low} to below {high}"
        case {"exclusiveMinimum": low, "maximum": high}:
            return f" above {low} to {high}"
        case {"exclusiveMinimum": low, "exclusiveMaximum": high}:
            return f" above {low} and below {high}"
        case {"minimum": low}:
            return f", {low} or more"
    return ""


def nearest(value: object, known: Iterable[str]) -> str | None:
    """The known name most like `value`, if any is."""
    if not isinstance(value, str) or len(value) > 100:
        return None
    wanted, names = value.strip().lower(), list(known)
    begun = [name for name in names if len(wanted) > 1 and name.startswith(wanted)]
    return next(iter(difflib.get_close_matches(wanted, names, n=1, cutoff=0.65)), begun[0] if len(begun) == 1 else None)


def hint(name: str | None) -> str:
    """The end of a message, where a known name is near."""
    return f"; did you mean '{name}'?" if name else ""


def shown(value: object) -> str:
    """A value as the file could have it, cut to one short line."""
    match value:
        case None:
            return "null"
        case _ if value is UNREADABLE:
            return "something unreadable"
        case dict():
            return "a mapping"
        case tuple() | list():
            return "a list"
        case float() if not math.isfinite(value):
            return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    text = json.dumps(value, ensure_ascii=isinstance(value, str) and not value.isprintable())
    return text if len(text) <= 80 else text[:76] + " ..."


def key_path(location: Location) -> str:
    """`artifacts[0].bits`; keys that are no plain word are quoted."""
    text = ""
    for step in location:
        plain = isinstance(step, str) and re.fullmatch(r"[\w-]+", step) and len(step) <= 80
        text += f"[{step}]" if isinstance(step, int) else f".{step if plain else shown(step)}"
    return text.removeprefix(".") or "recipe"


def table(title: str, shape: Shape) -> str:
    """One model as a Markdown table."""
    lines = [f"### {title}", "", shape["description"], "", "| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in shape["properties"].items():
        default = "required" if name in shape.get("required", ()) else f"`{shown(field['default'])}`"
        if isinstance(field.get("default"), dict):
            default = "its own defaults"
        lines.append(f"| `{name}` | {_type(field)} | {default} | {field['description']} |")
    return "\n".join(lines) + "\n"


def _type(field: Shape) -> str:
    """What a field takes, with links to the tables of the mappings in it."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "items" in field:
        items = field["items"].get("oneOf", [field["items"]])
        return f"list of {field['minItems']} to {field['maxItems']} " + " or ".join(_type(item) for item in items)
    return allowed(field)
