"""Fitting plain data to the models; what does not fit is put into our words and its place.

data --mend--> known keys, misspelt ones under the name that was meant --pydantic--> Recipe, or errors --explain--> lines
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from qquant.errors import UsageError
from qquant.recipe.fields import Conflict, Strict
from qquant.recipe.model import MODELS, Recipe
from qquant.recipe.page import Page, plain
from qquant.recipe.words import Location, Shape, allowed, choices, hint, nearest, options, shown

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Part = TypeVar("Part", bound=Strict)

FORMER = {"rounding": "solver"}  # words of earlier versions


@functools.cache
def _schema() -> Shape:
    return Recipe.model_json_schema()


def _resolve(shape: Shape) -> Shape:
    return _schema()["$defs"][shape["$ref"].rpartition("/")[2]] if "$ref" in shape else shape


def fitted(page: Page, data: Any) -> Recipe:
    """The recipe that `data` is, mappings and tuples as a file has them. Raises UsageError with every problem, as `page` places them."""
    mended = mend(page, data)
    try:
        recipe = Recipe.model_validate(mended)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            explain(page, detail)
        raise UsageError(page.message()) from None
    if page.problems:
        raise UsageError(page.message())
    return recipe


def mend(page: Page, data: Any) -> Any:
    """`data` without unknown keys, and misspelt keys and formats corrected; reports these and all conflicts.

    So one misspelt word does not hide what is wrong below it; a file that needed it is refused all the same.
    """
    return _mend(page, data, _schema(), (), ())


def _mend(page: Page, data: Any, shape: Shape, location: Location, mended: Location) -> Any:
    """`location` is in the file, `mended` in the result."""
    shape = _resolve(shape)
    if isinstance(data, tuple) and "items" in shape:
        items = enumerate(data)
        return tuple(_mend(page, item, shape["items"], (*location, index), (*mended, index)) for index, item in items)
    if not isinstance(data, dict) or not {"properties", "discriminator"} & shape.keys():
        return data
    if "discriminator" in shape:
        data, shape = _pick(page, data, shape, location)
    known = shape["properties"]
    result: dict[str, Any] = {}
    for key, value in data.items():
        former = key in FORMER and FORMER[key] in known
        name = key if key in known else FORMER[key] if former else nearest(key, known)
        if name != key:
            what = f"is called {name} now" if former else "unknown key"
            text = f"{what}; allowed: {', '.join(known)}{hint(name)}"
            page.report((*location, key), text, page.keys[*location, key])
        if name == key or (name and name not in data and name not in result):
            page.renamed[*mended, name] = (*location, key)
            result[name] = _mend(page, value, known[name], (*location, key), (*mended, name))
    if "title" in shape:
        _report_conflicts(page, shape["title"], result, mended)
    else:
        page.unclear.add(location)  # of an unknown format: pydantic cannot tell what belongs in it
    return result


def _pick(page: Page, data: dict[str, Any], shape: Shape, location: Location) -> tuple[dict[str, Any], Shape]:
    """An artifact with its format as it was meant, and the shape of that format, or of any where none is near."""
    tag, formats = shape["discriminator"]["propertyName"], shape["discriminator"]["mapping"]
    shapes = {name: _resolve({"$ref": target}) for name, target in formats.items()}
    fields = {key: field for variant in shapes.values() for key, field in variant["properties"].items()}
    misspelt = (key for key in data if key not in fields and nearest(key, fields) == tag)
    key = tag if tag in data else next(misspelt, None)
    if key is None:
        page.report((*location, tag), f"missing key; allowed: {', '.join(shapes)}")
        return data, {"properties": fields}
    value = data[key]
    name = value if isinstance(value, str) and value in shapes else nearest(value, shapes)
    if name != value:
        what = "unknown format" if isinstance(value, str) else "wrong type"
        page.report((*location, key), f"{what}, got {shown(value)}; allowed: {', '.join(shapes)}{hint(name)}")
    return (data | {key: name}, shapes[name]) if name else (data, {"properties": fields})


def _report_conflicts(page: Page, title: str, values: dict[str, Any], mended: Location) -> None:
    model = MODELS[title]
    blank = {name: None if field.is_required() else field.default for name, field in model.model_fields.items()}
    for location, text in model.conflicts(blank | values):
        page.report(page.origin((*mended, *location)), text)


def explain(page: Page, detail: ErrorDetails) -> None:
    """Report one error that pydantic found in mended data.

    Not conflicts, which `mend` reports, nor a list as too short where it is only the valid items that are too few.
    """
    shape, location = _follow(detail["loc"], _schema())
    kind, value = detail["type"], detail["input"]
    if kind == "value_error" or (kind == "too_short" and len(value) >= shape["minItems"]):
        return
    page.report(page.origin(location), _fault(kind, value, shape))


def _fault(kind: str, value: object, shape: Shape) -> str:
    if kind == "missing":
        return f"missing key; allowed: {allowed(shape)}"
    wrong_type = kind.endswith("_type") or (kind == "literal_error" and _is_other_type(value, choices(shape)))
    what = "wrong type" if wrong_type else _FAULTS.get(kind, "not allowed")
    return f"{what}, got {shown(value)}; allowed: {allowed(shape)}{_meant(value, shape)}"


def part(kind: type[Part], data: Mapping[str, object], names: Mapping[str, str]) -> Part:
    """The part of a recipe that options say, each of which sets one key; `names` has those that are called otherwise than their key.

    Raises UsageError with every problem, by the option that said it.
    """
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        found = error.errors(include_url=False)
    whole = _resolve({"$ref": f"/{kind.__name__}"})
    problems: list[Conflict] = []
    for detail in found:
        shape, _ = _follow(detail["loc"], whole)
        given = {"anyOf": [option for option in options(shape) if option.get("type") != "null"]}  # null: not given
        if detail["type"] != "value_error":
            problems.append((detail["loc"], _fault(detail["type"], detail["input"], given)))
    problems += kind.conflicts({name: field.default for name, field in kind.model_fields.items()} | dict(data))
    lines = [
        f"--{names.get(str(location[0]), str(location[0]).replace('_', '-'))}: {text}" for location, text in problems
    ]
    raise UsageError("\n".join(lines))


def _is_other_type(value: object, literals: list[Any]) -> bool:
    return type(value) not in map(type, literals)


def _follow(steps: Location, shape: Shape) -> tuple[Shape, Location]:
    """The schema at a `loc` of pydantic below that of `shape`, and that location without the names of formats that pydantic puts in."""
    location: Location = ()
    for step in steps:
        shape = _resolve(shape)
        if "discriminator" in shape:
            shape = {"$ref": shape["discriminator"]["mapping"][step]}
            continue
        location = (*location, step)
        shape = shape["items"] if isinstance(step, int) else shape["properties"][step]
    return _resolve(shape), location


_FAULTS = {
    "literal_error": "not an allowed value",
    "string_pattern_mismatch": "not a name",
    "string_too_short": "empty text",
    "string_too_long": "text too long",
    "too_short": "empty list",
    "too_long": "list too long",
    "greater_than": "out of range",
    "greater_than_equal": "out of range",
    "less_than": "out of range",
    "less_than_equal": "out of range",
    "finite_number": "out of range",
}
_TRUTH = {"yes": True, "on": True, "y": True, "no": False, "off": False, "n": False}


def _meant(value: object, shape: Shape) -> str:
    """The hint for a wrong value: the same thing in the right type, or the nearest choice."""
    guess = value
    if isinstance(value, str):
        guess = _TRUTH.get(value.lower(), plain(value.strip().replace("_", "")))
    elif isinstance(value, float) and value.is_integer():
        guess = int(value)
    if not isinstance(guess, str) and any(_fits(guess, option) for option in options(shape)):
        return f"; did you mean {shown(guess)}?"
    words = [choice for choice in choices(shape) if isinstance(choice, str)]
    if (
        isinstance(value, (int, float))
        and not words
        and any(option.get("type") == "string" for option in options(shape))
    ):
        return "; did you mean it in quotes?"
    return hint(nearest(value, words))


def _fits(value: object, shape: Shape) -> bool:
    literals = choices(shape)
    if literals:
        return not _is_other_type(value, literals) and value in literals
    match shape.get("type"), value:
        case "boolean", bool():
            return True
        case "integer", bool() | float():
            return False
        case "integer" | "number", int() | float():
            above = shape.get("minimum", -math.inf) <= value and shape.get("exclusiveMinimum", -math.inf) < value
            below = value <= shape.get("maximum", math.inf) and value < shape.get("exclusiveMaximum", math.inf)
            return above and below
    return False
