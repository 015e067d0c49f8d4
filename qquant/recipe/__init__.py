"""A recipe: what to build from a checkpoint, with which calibration, and how far each artifact may fall behind.

Closed and literal: unknown keys, duplicate keys and wrong types are errors, nothing is corrected, no value is computed
from another. All problems of a file are reported at once, one line each:

    FILE:LINE:COLUMN: path.to.key: what is wrong, got VALUE; allowed: ...; did you mean 'x'?

    model.py  the types   artifacts.py  an entry for each format   fields.py  rules of every field
    page.py  YAML to plain data with places   fit.py  plain data to a Recipe   words.py  wording

Left out: inheritance between recipes, variables, includes. A recipe is read as it is written.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.errors import UsageError
from qquant.recipe import efforts, fit
from qquant.recipe.artifacts import (
    ArtifactSpec,
    AwqArtifact,
    Gates,
    GgufArtifact,
    GgufType,
    GptqArtifact,
    IntegerArtifact,
    Waiver,
    eight_bits,
)
from qquant.recipe.forms import brief as shortest
from qquant.recipe.model import MODELS, Calibration, Checks, Recipe, Source
from qquant.recipe.page import Page, Reader
from qquant.recipe.words import Shape, hint, nearest, shown, table
from qquant.resources import data_dir, lazy

if TYPE_CHECKING:
    import ruamel.yaml as ruamel
else:
    ruamel = lazy("ruamel.yaml")

__all__ = [
    "ArtifactSpec",
    "AwqArtifact",
    "Calibration",
    "Checks",
    "Gates",
    "GgufArtifact",
    "GgufType",
    "GptqArtifact",
    "IntegerArtifact",
    "Recipe",
    "Source",
    "Waiver",
    "dump",
    "eight_bits",
    "lines_of",
    "load",
    "names",
    "parse",
    "published",
    "reference",
    "schema",
]

MAX_BYTES = 1_000_000


def load(name_or_path: str | Path) -> Recipe:
    """The recipe of a file, or of a bundled name: "demo" is recipes/demo.yaml; "./demo" and "demo.yaml" are files.

    Raises UsageError that lists every problem of the file.
    """
    file = _file(name_or_path)
    try:
        if file.is_fifo() and file.parts[:2] != ("/", "dev"):  # a shell's <(command) has its writer
            raise UsageError(f"{file}: cannot read the recipe: it is a pipe. Write it to a file")
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UsageError(f"{file}: cannot read the recipe: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"{file}: a recipe has at most {MAX_BYTES} bytes, this file has more")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        byte = content[error.start]
        raise UsageError(f"{file}:{line}:{column}: a recipe is UTF-8 text, got the byte 0x{byte:02x}") from error
    return parse(text, str(file))


def parse(text: str, file: str = "<recipe>") -> Recipe:
    """The recipe written in `text`; `file` is its name in messages. Raises UsageError that lists every problem."""
    page = Page(file)
    return fit.fitted(page, Reader(page).read(text))


def names() -> list[str]:
    """Names of the bundled recipes, sorted."""
    return sorted(path.stem for path in data_dir("recipes").glob("*.yaml"))


def dump(recipe: Recipe, *, brief: bool = False) -> str:
    """The recipe as YAML with every default visible, or `brief`, without them; `parse(dump(recipe)) == recipe`."""
    return _yaml(shortest(recipe) if brief else recipe.model_dump(mode="json"))


def lines_of(fields: dict[str, Any]) -> list[str]:
    """Some fields of a recipe as lines of YAML, to be pasted."""
    return _yaml(fields).splitlines()


def _yaml(data: Any) -> str:
    yaml = ruamel.YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    yaml.width = 120
    yaml.representer.add_representer(str, _represent_text)
    stream = io.StringIO()
    yaml.dump(_short_first(data), stream)
    return stream.getvalue()


def published(recipe: Recipe) -> dict[str, Any]:
    """The recipe as data for manifests and cards: files of this machine by their names, without the folders they lie in."""
    data = recipe.model_dump(mode="json")
    if (data["checkpoint"] or "").startswith((".", "/", "~")):
        data["checkpoint"] = Path(data["checkpoint"]).name
    for source in data["calibration"]["sources"]:
        source["path"] = source["path"] and Path(source["path"]).name
        openings = source.pop("openings")
        if source.pop("generated"):
            source |= {"generated": True, "openings": openings and Path(openings).name}
    checks = data["checks"]
    checks["text"], checks["texts"] = _named(checks["text"]), [_named(text) for text in checks["texts"]]
    for artifact in data["artifacts"]:
        earlier = artifact["gates"]["regression_vs"]
        artifact["gates"]["regression_vs"] = earlier and Path(earlier).name
    return data


def _named(text: str) -> str:
    return text if text.startswith("bundled:") else Path(text).name


def schema() -> Shape:
    """The JSON schema of a recipe file (draft 2020-12)."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:qquant:recipe:1"}
    return head | Recipe.model_json_schema()


def reference() -> str:
    """Markdown tables of every field with type, default and meaning, as in recipes/README.md."""
    shape = schema()
    shapes = {"Recipe": shape} | shape["$defs"]
    tables = [table(title, shapes[title]) for title in MODELS]
    return "\n".join(
        [*tables, f"### Efforts\n\nWhat `effort` fills in where a recipe says nothing.\n\n{efforts.table()}"]
    )


def _file(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith((".yaml", ".yml")) or "/" in text or os.sep in text:
        return Path(text)
    known = names()
    if text not in known:
        allowed = f"{', '.join(known)}, or the path of a .yaml file"
        meant = hint(nearest(text, known))
        raise UsageError(f"no bundled recipe has this name, got {shown(text)}; allowed: {allowed}{meant}")
    return data_dir("recipes") / f"{text}.yaml"


def _short_first(data: Any) -> Any:
    """The data with the values of one line before lists and mappings."""
    match data:
        case dict():
            return {
                key: _short_first(data[key])
                for key in sorted(data, key=lambda key: isinstance(data[key], (dict, list)))
            }
        case list():
            return [_short_first(item) for item in data]
    return data


def _represent_text(representer: Any, text: str) -> Any:
    """Plain where every YAML reader takes it for text, also those of YAML 1.1, for which `no` is false."""
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return representer.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_PLAIN = re.compile(r"(?=[A-Za-z])[\w./-]+(:[\w./-]+)*( [\w./-]+(:[\w./-]+)*)*", re.ASCII)
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
