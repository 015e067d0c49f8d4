"""A recipe changed by the command line, in the recipe's own words.

    --set calibration.samples=64             dotted keys; values as YAML reads them
    --set artifacts.awq.group_size=64        an artifact by its name, by its number from 0, or `*` for each
    --effort fast                            what the solvers take their time for, where the recipe says nothing
    --format gguf --type q4_k_m              other artifacts, with the settings that the recipe gives to one of that kind
    --calibration support.jsonl              other sources, and a background beside files of one's own

What comes out is validated like a file; problems name the key instead of a line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from qquant.errors import UsageError
from qquant.recipe import fit, forms
from qquant.recipe.artifacts import ENTRIES, NO_CODES
from qquant.recipe.efforts import EffortName
from qquant.recipe.model import Recipe
from qquant.recipe.page import Page, Place, Reader
from qquant.recipe.words import Location, hint, key_path, nearest

BACKGROUND = 0.05  # beside files of one's own: 2 % at home for 3 to 55 % elsewhere, tests/bench/LOG.md


@dataclass(frozen=True)
class Flags:
    """What `--format`, `--bits`, `--group-size`, `--type`, `--size`, `--set` and `--effort` say; as in a recipe."""

    format: str | None = None
    bits: int | None = None
    group_size: int | None = None
    types: tuple[str, ...] = ()
    sources: tuple[Mapping[str, Any], ...] = ()  # of the calibration
    settings: tuple[str, ...] = ()  # KEY=VALUE
    effort: EffortName | None = None
    size: str | None = None  # of a GGUF file

    @property
    def chooses(self) -> bool:
        """Whether they say which artifacts to build."""
        return bool(self.format or self.types) or (self.bits, self.group_size, self.size) != (None, None, None)


def changed(recipe: Recipe, flags: Flags) -> Recipe:
    """The recipe with what the flags say instead; the same object where they say nothing.

    Raises UsageError that lists every problem, by key.
    """
    if flags in (Flags(), Flags(effort=recipe.effort)):
        return recipe
    data = _plain(forms.literal(recipe))
    only = flags == Flags(effort=flags.effort)
    data["name"] = f"{recipe.name[:90]}-{flags.effort if only else 'changed'}"
    data["effort"] = flags.effort or recipe.effort
    if flags.chooses:
        data["artifacts"] = list(_artifacts(data["artifacts"], flags))
    if flags.sources:
        data["calibration"]["sources"] = [dict(source) for source in flags.sources]
        data["calibration"]["default_system_share"] = 1.0  # no system turns are invented for a user's own chats
        if any("path" in source for source in flags.sources):
            data["calibration"]["background"] = BACKGROUND
    for setting in flags.settings:
        _set(data, setting)
    return fit.fitted(Unplaced(), frozen(data))


def _artifacts(artifacts: list[dict[str, Any]], flags: Flags) -> Iterator[dict[str, Any]]:
    entries = {get_args(entry.model_fields["format"].annotation)[0]: entry.model_fields for entry in ENTRIES}
    typed = next(name for name, fields in entries.items() if "type" in fields)
    kind = flags.format or (typed if flags.types or flags.size is not None else None)
    if kind is None:
        words = " or ".join(f"--format {name}" for name, fields in entries.items() if "bits" in fields)
        raise UsageError(f"--bits and --group-size need {words}")
    if kind == typed:
        yield from _typed(artifacts, flags, kind)
        return
    if flags.types or flags.size is not None:
        word = "--type" if flags.types else "--size"
        raise UsageError(f"{word} belongs to --format {typed}, got --format {kind}; give --bits")
    several = kind in entries and entries[kind]["bits"].is_required()  # widths of a weight, of which one is to be named
    if several and flags.bits is None:
        raise UsageError(f"--format {kind} needs --bits: 4 or 8")
    wanted = {"format": kind} | ({} if flags.bits is None else {"bits": flags.bits})
    group = {} if flags.group_size is None else {"group_size": flags.group_size}
    name = f"{kind}-int{flags.bits}" if several else kind
    yield (_like(artifacts, wanted) or {"name": name} | wanted) | group


def _typed(artifacts: list[dict[str, Any]], flags: Flags, kind: str) -> Iterator[dict[str, Any]]:
    if not (flags.types or flags.size is not None) or (flags.bits, flags.group_size) != (None, None):
        raise UsageError(
            f"--format {kind} takes --type (q4_k_m, q8_0, ...) or --size (4.4GB), not --bits or --group-size"
        )
    if flags.size is not None:
        name = f"{kind}-{flags.size.replace(' ', '').lower()}"
        yield {"name": name, "format": kind, "size": flags.size, "solver": "gptq", "propagate": True}
    for name in flags.types:
        yield _like(artifacts, {"format": kind, "type": name}) or {
            "name": f"{kind}-{name}", "format": kind, "type": name, "solver": "ggml" if name in NO_CODES else "gptq",
        }  # fmt: skip


def _like(artifacts: list[dict[str, Any]], wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first of the `artifacts` of which `wanted` is true."""
    return next(
        (dict(data) for data in artifacts if all(data.get(key) == value for key, value in wanted.items())), None
    )


def _set(data: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {setting}: expected KEY=VALUE, e.g. --set calibration.samples=64")
    value = _plain(Reader(Page(f"--set {key}")).read(text)) if text.strip() else ""
    for holder, last in _places(data, key.strip(), setting):
        holder[last] = value


def _places(data: Any, key: str, setting: str) -> Iterator[tuple[Any, Any]]:
    """Every (mapping or list, its key) that a dotted key means."""
    if isinstance(data, list):
        for index, rest in _members(data, key, setting):
            if rest:
                yield from _places(data[index], rest, setting)
            else:
                yield data, index
        return
    if not isinstance(data, dict):
        raise UsageError(f"--set {setting}: nothing stands below a value; `{key}` is too far")
    first, _, rest = key.partition(".")
    if not rest:
        yield data, first
    elif first not in data:
        raise UsageError(
            f"--set {setting}: unknown key `{first}`; allowed: {', '.join(data)}{hint(nearest(first, data))}"
        )
    else:
        yield from _places(data[first], rest, setting)


def _members(items: list[Any], key: str, setting: str) -> Iterator[tuple[int, str]]:
    """(index, what follows) of the entries of a list that a key means: by name, number or `*`; names may hold dots."""
    names = [
        str(item.get("name", number)) if isinstance(item, dict) else str(number) for number, item in enumerate(items)
    ]
    first, _, rest = key.partition(".")
    if first == "*":
        yield from ((index, rest) for index in range(len(items)))
        return
    for index, name in enumerate(names):
        if key == name or key.startswith(name + "."):
            yield index, key[len(name) + 1 :]
            return
    if not first.isdigit() or int(first) >= len(items):
        raise UsageError(
            f"--set {setting}: no entry `{first}`; there are {', '.join(names)}{hint(nearest(first, names))}"
        )
    yield int(first), rest


class Unplaced(Page):
    """Problems by key alone: there is no file."""

    def __init__(self) -> None:
        super().__init__("")
        self.keys: dict[Location, Place] = defaultdict(lambda: (0, 0))

    def report(self, location: Location, text: str, place: Place | None = None, *, unclear: bool = False) -> None:
        if any(location[:end] in self.unclear for end in range(len(location) + 1)):
            return
        if unclear:
            self.unclear.add(location)
        self.problems.append(((len(self.problems), 0), key_path(location), text))

    def message(self) -> str:
        return "\n".join(f"the recipe as changed: {path}: {text}" for _, path, text in self.problems)


def _plain(value: Any) -> Any:
    """Lists for tuples, so that they can be changed."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def frozen(value: Any) -> Any:
    """Tuples for lists, as recipes hold them."""
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(frozen(item) for item in value)
    return value
