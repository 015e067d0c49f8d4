"""The schema of recipes: closed and complete, every field strict, the README generated from it."""

import json
import re
from typing import get_args

import pytest

from qquant import recipe
from qquant.errors import UsageError
from qquant.recipe import Calibration, Checks, Gates, Recipe, Source, Waiver
from qquant.recipe.artifacts import ENTRIES
from qquant.recipe.model import MODELS as BY_NAME
from qquant.resources import data_dir
from tests.worlds import house
from tests.worlds.every_format import SAMPLES
from tests.worlds.recipe_text import problems

MODELS = tuple(BY_NAME.values())

WRONG = {
    "integer": ['"4"', "4.5", "true", "null", "[]", "{}", "1e3", "4.0"],
    "number": ['"0.5"', "true", "null", "[]", "{}", ".nan", ".inf"],
    "boolean": ['"true"', "yes", "1", "0", "null", "[]", "{}"],
    "string": ["7", "true", "1e3", "null", "[]", "{}"],
    "array": ['"x"', "{}", "null", "[]"],
    "object": ['"x"', "[]", "null", "1"],
}


def fields():
    """(start of a recipe, title of the model, field, schema of the field) for every field of every model."""
    shapes = recipe.schema()
    for model in MODELS:
        shape = shapes if model is Recipe else shapes["$defs"][model.__name__]
        yield from ((model, name, field) for name, field in shape["properties"].items() if name != "format")


def entry_of(model):
    """The least that an entry of this format says, as the sample of the format has it."""
    (format,) = get_args(model.model_fields["format"].annotation)
    return {"name": format, "format": format} | dict(part.split(": ") for part in SAMPLES[format].entry.split(", "))


def example(model, name, value):
    """A recipe in flow style, right but for the field `name` of one `model`, which is the text `value`."""
    entries = {
        Recipe: {"version": "1", "name": "x"},
        Calibration: {},
        Source: {"dataset": "a/b"},
        **{entry: entry_of(entry) for entry in ENTRIES},
        Gates: {},
        Waiver: {"reason": "x", "who": "y", "until": '"2030-01-01"'},
        Checks: {},
    }
    if name in ("bundled", "dataset", "path", "generated"):
        entries[model] = {}  # a source has one origin
    if name in ("size", "bits_per_weight"):
        del entries[model]["type"]  # one of the three
    entries[model][name] = value

    def flow(kind, **nested):
        return "{" + ", ".join(f"{key}: {text}" for key, text in (nested | entries[kind]).items()) + "}"

    waiver = {"waiver": flow(Waiver)} if model is Waiver else {}
    first, *others = ENTRIES
    artifacts = f"[{', '.join([flow(first, gates=flow(Gates, **waiver)), *map(flow, others)])}]"
    calibration = flow(Calibration, sources=f"[{flow(Source)}]")
    return flow(Recipe, calibration=calibration, artifacts=artifacts, checks=flow(Checks))


@pytest.mark.parametrize(
    ("model", "name", "field"), [pytest.param(*case, id=f"{case[0].__name__}.{case[1]}") for case in fields()]
)
def test_every_field_is_strict(model, name, field):
    kinds = {option.get("type", "string" if "enum" in option else "object") for option in field.get("anyOf", [field])}
    (kind,) = kinds - {"null"}
    refused = [text for text in WRONG[kind] if not (text == "null" and "null" in kinds)]
    refused = [text for text in refused if not (text == "[]" and field.get("minItems") == 0)]
    for text in refused:
        lines = problems(example(model, name, text))
        assert len(lines) == 1, lines
        assert re.search(
            rf"[.\s]{name}: (wrong type|out of range|empty list|not an allowed value), got .*; allowed: ", lines[0]
        ), lines
        assert not re.search(r"[Ii]nput|should be|type=|valid ", lines[0]), "the words of pydantic"
    if (
        "default" in field
        and name not in ("bundled", "dataset", "path", "generated", "type", "size", "bits_per_weight")
        and model is not Waiver
    ):
        recipe.parse(example(model, name, json.dumps(field["default"])))


# The schema and the documentation.


def objects(shape):
    if isinstance(shape, dict):
        if shape.get("type") == "object":
            yield shape
        for value in shape.values():
            yield from objects(value)


def test_schema_is_closed_and_complete():
    schema = recipe.schema()
    assert schema["$id"] == "urn:qquant:recipe:1"
    assert schema["title"] == "Recipe"
    found = {shape["title"]: shape for shape in objects(schema) if "properties" in shape}
    assert found.keys() == {model.__name__ for model in MODELS}
    for model in MODELS:
        shape = found[model.__name__]
        assert shape["additionalProperties"] is False
        assert shape["properties"].keys() == model.model_fields.keys()
        assert set(shape.get("required", [])) == {
            name for name, field in model.model_fields.items() if field.is_required()
        }
        assert all(field["description"] for field in shape["properties"].values())
    json.dumps(schema)


def test_schema_is_a_fresh_copy():
    recipe.schema()["properties"].clear()
    assert recipe.schema()["properties"]
    assert problems("{}")  # the messages come from the schema too


def test_readme_documents_every_field():
    readme = (data_dir("recipes") / "README.md").read_text("utf-8")
    assert readme == house.with_fields(readme), "run `make map`"
    for model in MODELS:
        section = readme.split(f"\n### {model.__name__}\n")[1].split("\n### ")[0]
        for name, field in model.model_fields.items():
            (row,) = re.findall(rf"^\| `{name}` \|.*$", section, re.MULTILINE)
            assert row.endswith(f"| {field.description} |")
            assert "| required |" in row if field.is_required() else "| required |" not in row
    assert all(f"`{name}`" in readme for name in recipe.names())


def test_readme_example_and_its_messages_are_true():
    readme = (data_dir("recipes") / "README.md").read_text("utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert [artifact.name for artifact in recipe.parse(example).artifacts] == ["server", "laptop"]
    wrong = (
        example.replace("- bundled:", "- bundeld:")
        .replace("length: 1024", 'length: "1024"')
        .replace("q4_k_m", "Q4_K_M")
    )
    with pytest.raises(UsageError) as caught:
        recipe.parse(wrong, "support.yaml")
    assert f"```\n{caught.value}\n```" in readme
