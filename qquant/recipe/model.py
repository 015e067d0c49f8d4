"""The models of a recipe: fields, types, ranges, defaults, and what is impossible across fields.

What an artifact is, by its format, is in `artifacts`; the rules that every field obeys are in `fields`. The meaning of each field is its
`description`: the JSON schema and the tables of recipes/README.md come from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from qquant.recipe.artifacts import ENTRIES, ArtifactSpec, Gates, Waiver
from qquant.recipe.efforts import EFFORTS, EffortName, Settings
from qquant.recipe.fields import Conflict, Name, Share, Strict, Text, Whole
from qquant.recipe.words import Location, key_path, shown

if TYPE_CHECKING:
    from typing import Self

Model = TypeVar("Model", bound=Strict)

RESERVED = re.compile(
    r"lock(-\d+)?|threads\.json|joined|replaced|.*\.journal|moments-.*"
)  # what a build keeps beside unfinished artifacts
MAX_TOKENS = 2**31  # of one calibration or check

# What no single field shows. Values may be of any type here: a file can have several faults at once.


def _entry(values: Any, key: str) -> Any:
    """The value of `key` in a mapping or a model; None where there is none."""
    return values.get(key) if isinstance(values, dict) else getattr(values, key, None)


def _listed(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else ()


def _too_many_tokens(values: Mapping[str, Any], count: str) -> Iterator[Conflict]:
    pieces, length = values[count], values["length"]
    if type(pieces) is type(length) is int and pieces * length > MAX_TOKENS:
        yield (count,), f"too many tokens, got {shown(pieces)} x length {shown(length)}; allowed: {MAX_TOKENS} in all"


def _no_name_after_bundled(values: Mapping[str, Any], key: str) -> Iterator[Conflict]:
    if values[key] == "bundled:":
        yield (key,), 'no name, got "bundled:"; allowed: bundled:NAME'


def _reserved_names(artifacts: Any) -> Iterator[Conflict]:
    """Artifacts whose name a build needs for a file of its own beside them."""
    for index, artifact in enumerate(_listed(artifacts)):
        name = _entry(artifact, "name")
        if isinstance(name, str) and RESERVED.fullmatch(name):
            yield (
                ("artifacts", index, "name"),
                f"a build keeps a file of that name, got {shown(name)}; allowed: any other",
            )


def _sized_by_output(artifacts: Any, calibration: Any) -> Iterator[Conflict]:
    """Artifacts that ask for a size where nothing says what an error costs the model."""
    if _entry(calibration, "objective") == "output":
        for index, artifact in enumerate(_listed(artifacts)):
            for key in ("size", "bits_per_weight"):
                if _entry(artifact, key) is not None:
                    yield (
                        ("artifacts", index, key),
                        "types are chosen by what the model loses, which `objective: output` does not measure; allowed: null",
                    )


def _repeated_names(artifacts: Any) -> Iterator[Conflict]:
    first: dict[str, int] = {}
    for index, artifact in enumerate(_listed(artifacts)):
        name = _entry(artifact, "name")
        if isinstance(name, str) and first.setdefault(name, index) != index:
            where = key_path(("artifacts", first[name]))
            yield ("artifacts", index, "name"), f"repeated name, got {shown(name)}; allowed: any but that of {where}"


def _held_out_in_calibration(calibration: Any, checks: Any) -> Iterator[Conflict]:
    texts: dict[Location, Any] = {("checks", "text"): _entry(checks, "text")}
    texts |= {("checks", "texts", index): text for index, text in enumerate(_listed(_entry(checks, "texts")))}
    for index, source in enumerate(_listed(_entry(calibration, "sources"))):
        bundled, path = _entry(source, "bundled"), _entry(source, "path") or _entry(source, "openings")
        origin = path if bundled is None else f"bundled:{bundled}"
        where = key_path(("calibration", "sources", index))
        for field, text in texts.items():
            if text is not None and text == origin:
                yield field, f"held-out text must not calibrate, got {shown(text)}, which is {where} too"


def _wrong_columns(values: Mapping[str, Any], path: str) -> Iterator[Conflict]:
    if path.endswith(".txt"):
        if values["kind"] == "chat":
            yield ("kind",), 'a .txt file has no turns, got "chat"; allowed: text'
        if values["field"] is not None:
            yield ("field",), f"a .txt file has no columns, got {shown(values['field'])}; allowed: null"


def _wrong_openings(values: Mapping[str, Any], path: str) -> Iterator[Conflict]:
    if values["field"] is not None and not path.endswith((".jsonl", ".jsonl.gz")):
        yield ("field",), f"only openings in a .jsonl file have columns, got {shown(values['field'])}; allowed: null"
    if values["openings"] is not None and not path.removesuffix(".gz").endswith((".jsonl", ".txt")):
        yield ("openings",), f"not a .jsonl or .txt file, got {shown(values['openings'])}; allowed: one of these"


def _with(model: Model, settings: Settings) -> Model:
    """`model` with those settings that it has and that were not given; they do not count as given then."""
    fields = type(model).model_fields.keys() - model.model_fields_set
    left = {key: value for key, value in settings.items() if key in fields}
    return model.model_construct(_fields_set=set(model.model_fields_set), **(dict(model) | left))


# The models.


def _no_float(value: object) -> object:
    if type(value) not in (int, str):
        raise PydanticCustomError("literal_error", "neither a whole number nor a word")
    return value


class Source(Strict):
    """One origin of calibration text. Exactly one of `bundled`, `dataset`, `path`, `generated`."""

    bundled: Text | None = Field(default=None, description="a corpus of calibration/corpora.yaml")
    dataset: Text | None = Field(default=None, description="a `datasets` id on the hub")
    path: Text | None = Field(default=None, description="a local .jsonl, .parquet or .txt file")
    generated: bool = Field(
        default=False,
        description="true: the checkpoint writes the samples itself, at temperature 1, from short openings of the bundled texts, or as answers to the questions of the bundled chats (`kind: chat`)",
    )
    openings: Text | None = Field(
        default=None,
        description="your openings for `generated`: a .txt file, one a line, or a .jsonl file with a column of strings",
    )
    config: Text | None = Field(default=None, description="configuration name of `dataset`")
    split: Text = Field(default="train", description="split of `dataset`")
    revision: Text | None = Field(default=None, description="commit, branch or tag of `dataset`")
    field: Text | None = Field(
        default=None,
        description="column of the text, the messages or the openings; null: the first of messages, conversations, text",
    )
    kind: Literal["chat", "text"] = Field(
        default="text", description="chat: turns, rendered with the checkpoint's template; text: as it is"
    )
    weight: float = Field(default=1.0, gt=0, le=1000, description="share of the samples, against the other sources")

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> Iterator[Conflict]:
        origins = [key for key in ("bundled", "dataset", "path") if values[key] is not None]
        origins += ["generated"] if values["generated"] is not False else []
        if len(origins) != 1:
            got = " and ".join(origins) or "none"
            yield (), f"needs one origin, got {got}; allowed: exactly one of bundled, dataset, path, generated"
        for key, unset in {"config": None, "revision": None, "split": "train"}.items():
            if "dataset" not in origins and values[key] != unset:
                yield (key,), f"belongs to a dataset, got {shown(values[key])}; allowed: {unset or 'null'}"
        yield from _wrong_columns(values, str(values["path"]).lower())
        if "generated" in origins:
            yield from _wrong_openings(values, str(values["openings"]).lower())
        elif isinstance(values["openings"], str):
            yield ("openings",), f"belongs to `generated: true`, got {shown(values['openings'])}; allowed: null"


class Calibration(Strict):
    """Which tokens the model sees while it is measured."""

    sources: tuple[Source, ...] = Field(min_length=1, max_length=100, description="where the samples come from")
    samples: int = Field(default=128, ge=1, le=65536, description="number of samples")
    length: int = Field(default=2048, ge=16, le=131072, description="tokens per sample")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the choice of samples")
    default_system_share: Share = Field(
        default=0.25,
        description="share of the chats rendered with the template's default system turn; the others that come without one are given varied bundled ones: 1 for chats of your own as they are",
    )
    objective: Literal["kl", "output"] = Field(
        default="kl",
        description="what solvers minimise; kl: the KL divergence of the model, to second order; output: each linear's output error, and embedding and head of GGUF files stay llama-quantize's",
    )
    curvature_tokens: int = Field(
        default=65536,
        ge=256,
        le=2**30,
        description="tokens of the samples on which gradients are measured for `objective: kl`; the solvers see all samples",
    )
    background: Share = Field(
        default=0.0,
        description="tokens of other bundled texts (every language, code, chats and tools), as a share of those of the sources and beside them: 0.05 for text of one kind",
    )

    @property
    def beside(self) -> int:
        """Tokens of the background, at most."""
        return round(self.background * self.samples * self.length)

    @property
    def tokens(self) -> int:
        """Tokens of all samples and of the background, at most."""
        return self.samples * self.length + self.beside

    @property
    def gradient_tokens(self) -> int:
        """Tokens on which curvature is asked for; 0 where none is."""
        return self.curvature_tokens if self.objective == "kl" else 0

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> Iterator[Conflict]:
        yield from _too_many_tokens(values, "samples")
        sources, samples = len(_listed(values["sources"])), values["samples"]
        if type(samples) is int and 0 < samples < sources:
            yield ("samples",), f"fewer than sources, got {samples}; allowed: {sources} or more"


class Checks(Strict):
    """Held-out text on which every artifact is compared with the checkpoint."""

    profile: Literal["default", "release"] = Field(
        default="default",
        description="release: also by language, kind of text and position up to 32,768, with a gate on the worst of them",
    )
    text: Text = Field(
        default="bundled:wikitext-2-test", description="bundled:NAME, or a text file; not a source of the calibration"
    )
    texts: tuple[Text, ...] = Field(
        default=(), min_length=0, max_length=20, description="further texts, by language or domain: measured, not gated"
    )
    windows: int = Field(default=40, ge=1, le=65536, description="windows of each text that are scored")
    max_windows: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="most windows of `text` where a gate is inconclusive; null: no more than `windows`",
    )
    length: int = Field(default=512, ge=16, le=131072, description="tokens per window")
    protocol: Literal["llama.cpp", "sliding"] = Field(
        default="llama.cpp",
        description="llama.cpp: the second half of each window is scored; sliding: all of it, as in the GPTQ papers (length 2048)",
    )
    answer_length: int = Field(
        default=0, ge=0, le=4096, description="tokens per answer to the bundled prompts, greedy and sampled; 0: none"
    )
    speed: bool = Field(
        default=False,
        description="time every artifact against the checkpoint, with both in memory at once, as `qquant speed` does",
    )

    @property
    def scored(self) -> int:
        """Tokens of a window that are scored."""
        return self.length - 1 - (self.length // 2 if self.protocol == "llama.cpp" else 0)

    def looks(self, available: int) -> list[int]:
        """Windows read at each look, twice as many every time, where a text has `available` of them."""
        most = min(self.max_windows or self.windows, available)
        looks = [min(self.windows, most)]
        while looks[-1] < most:
            looks.append(min(2 * looks[-1], most))
        return looks

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> Iterator[Conflict]:
        yield from _too_many_tokens(values, "windows")
        yield from _no_name_after_bundled(values, "text")
        windows, most = values["windows"], values["max_windows"]
        if type(windows) is type(most) is int and most < windows:
            yield ("max_windows",), f"less than windows, got {most}; allowed: {windows} or more"
        for index, text in enumerate(_listed(values["texts"])):
            if text == values["text"] or text in values["texts"][:index]:
                yield ("texts", index), f"repeated text, got {shown(text)}; allowed: each text once"


class Recipe(Strict):
    """Everything `qquant build` needs besides the checkpoint itself."""

    version: Annotated[Literal[1], Whole] = Field(description="version of the recipe language")
    name: Name = Field(description="name of the recipe in reports")
    description: str = Field(default="", max_length=4000, description="what the recipe is for, in words")
    checkpoint: Text | None = Field(
        default=None, description="path, hub id, or bundled:NAME; the command line overrides it"
    )
    revision: Text | None = Field(default=None, description="commit, branch or tag of a hub id")
    effort: EffortName | None = Field(
        default=None,
        description="how long solvers may take: fills in what calibration and artifacts leave open, see [Efforts](#efforts); null: the defaults of these tables",
    )
    dtype: Literal["bfloat16", "float16"] | None = Field(
        default=None,
        description="the checkpoint is rounded to it as it is read, so that what is not quantized is stored in it; null: as the files are",
    )
    pad_intermediate: Annotated[Literal["none", "auto", 256, 512, 1024, 2048], BeforeValidator(_no_float)] = Field(
        default="none",
        description="zero-pads the MLP to a multiple; auto: until 8 tensor-parallel ranks hold whole groups of every artifact",
    )
    calibration: Calibration = Field(description="what the model reads while it is measured")
    artifacts: tuple[ArtifactSpec, ...] = Field(min_length=1, max_length=100, description="what is built, in order")
    checks: Checks = Field(default=Checks(), description="what the artifacts are compared on")
    shard_size: int = Field(default=4 * 10**9, ge=10**6, le=10**15, description="most bytes per safetensors file")
    gguf_split_size: int = Field(
        default=45 * 10**9, ge=10**6, le=10**15, description="most bytes of tensors per GGUF file"
    )

    @model_validator(mode="after")
    def _filled(self) -> Self:
        """What `effort` decides and nobody wrote down, as if it had been."""
        if self.effort is not None:
            decided = EFFORTS[self.effort]
            filled = tuple(_with(spec, decided.of(spec.kind)) if spec.feedback else spec for spec in self.artifacts)
            object.__setattr__(self, "artifacts", filled)
            object.__setattr__(self, "calibration", _with(self.calibration, decided.calibration))
        return self

    @property
    def clashes(self) -> tuple[str, ...]:
        """Pairs of artifacts that write the same files; `plan` and `build` take one of each with `--only`."""
        first: dict[tuple[str, str], str] = {}
        clashes = []
        for spec in self.artifacts:
            target = (spec.format, spec.variant)
            other = first.setdefault(target, spec.name)
            if other != spec.name:
                clashes.append(f"artifacts {other} and {spec.name} would both write the files of {' '.join(target)}")
        return tuple(clashes)

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> Iterator[Conflict]:
        yield from _no_name_after_bundled(values, "checkpoint")
        if str(values["checkpoint"]).startswith("bundled:") and values["revision"] is not None:
            yield ("revision",), f"a bundled checkpoint has none, got {shown(values['revision'])}; allowed: null"
        yield from _repeated_names(values["artifacts"])
        yield from _reserved_names(values["artifacts"])
        yield from _sized_by_output(values["artifacts"], values["calibration"])
        yield from _held_out_in_calibration(values["calibration"], values["checks"])


_ALL: tuple[type[Strict], ...] = (Recipe, Calibration, Source, *ENTRIES, Gates, Waiver, Checks)
MODELS: dict[str, type[Strict]] = {model.__name__: model for model in _ALL}
