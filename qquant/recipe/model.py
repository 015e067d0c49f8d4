"""The models of a recipe: fields, types, ranges, defaults, and what is impossible across fields.

pydantic checks types and ranges, field by field. Its `Literal` compares with `==`, so `true` would pass as 1 and 4.0
as 4: `Whole` and `Truth` close that. What no single field shows (two origins of one text, a repeated name) stands in
`conflicts` of each model. It runs when a model is made, and before that on the plain data of a file, because pydantic
does not come to it where a field is wrong. The meaning of each field is its `description`: the JSON schema and the
tables of recipes/README.md come from there.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from qquant.recipe.words import Location, key_path, shown

if TYPE_CHECKING:
    from typing import Self

MAX_TOKENS = 2**31  # of one calibration or check

Conflict = tuple[Location, str]

GgufType = Literal[
    "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m",
    "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs",
]  # fmt: skip


# What no single field shows. Values may be of any type here: a file can have several faults at once.


def _entry(given: Any, key: str) -> Any:
    """The value of `key` in a mapping or a model; None where there is none."""
    return given.get(key) if isinstance(given, dict) else getattr(given, key, None)


def _listed(given: Any) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else ()


def _too_many_tokens(given: Mapping[str, Any], count: str) -> Iterator[Conflict]:
    pieces, length = given[count], given["length"]
    if type(pieces) is type(length) is int and pieces * length > MAX_TOKENS:
        yield (count,), f"too many tokens, got {shown(pieces)} x length {shown(length)}; allowed: {MAX_TOKENS} in all"


def _no_name_after_bundled(given: Mapping[str, Any], key: str) -> Iterator[Conflict]:
    if given[key] == "bundled:":
        yield (key,), 'no name, got "bundled:"; allowed: bundled:NAME'


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
        bundled, path = _entry(source, "bundled"), _entry(source, "path")
        origin = path if bundled is None else f"bundled:{bundled}"
        where = key_path(("calibration", "sources", index))
        for place, text in texts.items():
            if text is not None and text == origin:
                yield place, f"held-out text must not calibrate, got {shown(text)}, which is {where} too"


# The models.


def _whole(value: object) -> object:
    if type(value) is not int:
        raise PydanticCustomError("literal_error", "not a whole number")
    return value


def _truth(value: object) -> object:
    if type(value) is not bool:
        raise PydanticCustomError("literal_error", "not a truth value")
    return value


def _no_float(value: object) -> object:
    if type(value) not in (int, str):
        raise PydanticCustomError("literal_error", "neither a whole number nor a word")
    return value


Whole = BeforeValidator(_whole)
Truth = BeforeValidator(_truth)
Text = Annotated[str, Field(min_length=1, max_length=1024)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)]
AtLeast1 = Annotated[float, Field(ge=1)]
AtLeast0 = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Conflict]:  # noqa: ARG004 - for those that have some
        """What is impossible among the values `given` for every field."""
        yield from ()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for location, message in self.conflicts(self.model_dump()):
            raise ValueError(f"{key_path(location)}: {message}")
        return self


class Source(_Strict):
    """One origin of calibration text. Exactly one of `bundled`, `dataset`, `path`."""

    bundled: Text | None = Field(default=None, description="a corpus of calibration/corpora.yaml")
    dataset: Text | None = Field(default=None, description="a `datasets` id on the hub")
    path: Text | None = Field(default=None, description="a local .jsonl, .parquet or .txt file")
    config: Text | None = Field(default=None, description="configuration name of `dataset`")
    split: Text = Field(default="train", description="split of `dataset`")
    revision: Text | None = Field(default=None, description="commit, branch or tag of `dataset`")
    field: Text | None = Field(
        default=None, description="column of the text or the messages; null: the first of messages, conversations, text"
    )
    kind: Literal["chat", "text"] = Field(
        default="text", description="chat: turns, rendered with the checkpoint's template; text: as it is"
    )
    weight: float = Field(default=1.0, gt=0, le=1000, description="share of the samples, against the other sources")

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Conflict]:
        origins = [key for key in ("bundled", "dataset", "path") if given[key] is not None]
        if len(origins) != 1:
            got = " and ".join(origins) or "none"
            yield (), f"needs one origin, got {got}; allowed: exactly one of bundled, dataset, path"
        for key, unset in {"config": None, "revision": None, "split": "train"}.items():
            if "dataset" not in origins and given[key] != unset:
                yield (key,), f"belongs to a dataset, got {shown(given[key])}; allowed: {unset or 'null'}"
        if str(given["path"]).lower().endswith(".txt"):
            if given["kind"] == "chat":
                yield ("kind",), 'a .txt file has no turns, got "chat"; allowed: text'
            if given["field"] is not None:
                yield ("field",), f"a .txt file has no columns, got {shown(given['field'])}; allowed: null"


class Calibration(_Strict):
    """Which tokens the model sees while it is measured."""

    sources: tuple[Source, ...] = Field(min_length=1, max_length=100, description="where the samples come from")
    samples: int = Field(default=128, ge=1, le=65536, description="number of samples")
    length: int = Field(default=2048, ge=16, le=131072, description="tokens per sample")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the choice of samples")
    default_system_share: Share = Field(
        default=0.25, description="share of the chats rendered with the template's default system turn"
    )
    objective: Literal["kl", "output"] = Field(
        default="kl",
        description="what solvers minimise; kl: the KL divergence of the model, to second order; output: each linear's output error",
    )
    curvature_tokens: int = Field(
        default=65536, ge=256, le=2**30, description="of the samples, for `objective: kl`; they are all the solvers see"
    )

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Conflict]:
        yield from _too_many_tokens(given, "samples")
        sources, samples = len(_listed(given["sources"])), given["samples"]
        if type(samples) is int and 0 < samples < sources:
            yield ("samples",), f"fewer than sources, got {samples}; allowed: {sources} or more"


class Waiver(_Strict):
    """Why an artifact may be released although a gate failed; shown wherever the verdict is. Unset: no waiver."""

    reason: str = Field(default="", max_length=1024, description="what is known and accepted")
    who: str = Field(default="", max_length=1024, description="who answers for it")
    until: str = Field(default="", max_length=10, description="last day it holds, YYYY-MM-DD")

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Conflict]:
        if not all(isinstance(value, str) for value in given.values()):
            return
        if any(given.values()) and not all(given.values()):
            missing = ", ".join(key for key in given if not given[key])
            yield (), f"incomplete, got no {missing}; allowed: reason, who and until, or none of them"
        elif given["until"] and not _is_day(given["until"]):
            yield ("until",), f"not a day, got {shown(given['until'])}; allowed: YYYY-MM-DD"


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


class Gates(_Strict):
    """How far an artifact may fall behind the 16-bit model on held-out text; null: the default of its format and size."""

    perplexity_ratio: AtLeast1 | None = Field(default=None, description="at most this times the 16-bit perplexity")
    kl_divergence: AtLeast0 | None = Field(default=None, description="at most this, mean over tokens, in nats")
    top1_agreement: Share | None = Field(
        default=None, description="at least this share of tokens with the same most likely successor"
    )
    regression_vs: Text | None = Field(
        default=None,
        description="report.json (or its folder) of an earlier release: not worse than its artifact of this name",
    )
    regression_tolerance: Share = Field(
        default=0.05,
        description="how much more KL divergence and top-1 disagreement than then is no regression, as a share",
    )
    defaults: bool = Field(
        default=True, description="false: what is null is measured and not gated, instead of held to the default"
    )
    waiver: Waiver = Field(default=Waiver(), description="turns a fail into a warning")


class _Artifact(_Strict):
    name: Name = Field(description="its folder, and what `--only` takes; unique")
    gates: Gates = Field(default=Gates(), description="what it must hold")


class GptqArtifact(_Artifact):
    """AutoGPTQ v1 layout, read by transformers, vLLM, SGLang."""

    format: Literal["gptq"] = Field(description="chooses this table")
    bits: Annotated[Literal[4, 8], Whole] = Field(description="per weight")
    group_size: Annotated[Literal[32, 64, 128, -1], Whole] = Field(
        default=128, description="weights that share a scale; -1: a whole row"
    )
    symmetric: Annotated[Literal[True], Truth] = Field(default=True, description="no zero points")
    desc_act: Annotated[Literal[False], Truth] = Field(default=False, description="fast kernels need a trivial `g_idx`")
    damping: float = Field(default=0.01, gt=0, lt=1, description="added to the diagonal of H, as a share of its mean")
    rounding: Literal["rtn", "gptq"] = Field(
        default="gptq", description="rtn: to nearest; gptq: each column makes up for the errors before it"
    )
    scale_search: Literal["minmax", "importance"] = Field(
        default="importance", description="minmax: from the extremes; importance: by weighted error, signed"
    )
    sweeps: int = Field(
        default=2,
        ge=0,
        le=20,
        description="passes of coordinate descent over the codes after gptq, each followed by a scale refit",
    )
    transform: Literal["none", "awq"] = Field(default="none", description="awq: fold scales into the operator before")
    ratios: int = Field(default=20, ge=1, le=100, description="grid points of the search for folded scales")
    propagate: bool = Field(
        default=True,
        description="make up for the errors before a linear; not for `rounding: rtn`; 8 bits walk in float32 for it",
    )


class AwqArtifact(_Artifact):
    """AutoAWQ GEMM layout: 4 bit, asymmetric, scales folded into the previous operator."""

    format: Literal["awq"] = Field(description="chooses this table")
    bits: Annotated[Literal[4], Whole] = Field(default=4, description="per weight")
    group_size: Annotated[Literal[32, 64, 128], Whole] = Field(
        default=128, description="weights that share a scale and a zero point"
    )
    zero_point: Annotated[Literal[True], Truth] = Field(default=True, description="asymmetric")
    damping: float = Field(default=0.01, gt=0, lt=1, description="added to the diagonal of H, as a share of its mean")
    rounding: Literal["rtn", "gptq"] = Field(default="gptq", description="as for gptq, after the scales are folded")
    scale_search: Literal["minmax", "importance"] = Field(default="importance", description="as for gptq")
    sweeps: int = Field(default=2, ge=0, le=20, description="as for gptq")
    transform: Literal["none", "awq"] = Field(default="awq", description="none: the layout only")
    ratios: int = Field(default=20, ge=1, le=100, description="as for gptq")
    propagate: bool = Field(default=True, description="as for gptq")


class GgufArtifact(_Artifact):
    """One GGUF file of llama.cpp's type mix `type`."""

    format: Literal["gguf"] = Field(description="chooses this table")
    type: GgufType = Field(description="llama.cpp's name of the mix, in lower case")
    imatrix: bool = Field(default=True, description="weigh errors with diag(H), where the type can use it")
    solver: Literal["ggml", "gptq"] = Field(
        default="ggml", description="ggml: byte-identical to llama-quantize; gptq: error-compensated codes"
    )
    damping: float = Field(default=0.01, gt=0, lt=1, description="as for gptq; solver: ggml has no use for it")
    sweeps: int = Field(default=3, ge=0, le=20, description="as for gptq; solver: ggml has no use for it")
    propagate: bool = Field(default=False, description="as for gptq, with solver: gptq")

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Conflict]:
        if given["solver"] == "gptq" and given["type"] in ("f16", "bf16"):
            yield ("solver",), f'{given["type"]} has no codes to solve for, got "gptq"; allowed: ggml'
        if given["propagate"] is True and given["solver"] != "gptq":
            yield ("propagate",), "solver: ggml does not look at the stream, got true; allowed: false"


ArtifactSpec = Annotated[GptqArtifact | AwqArtifact | GgufArtifact, Field(discriminator="format")]


class Checks(_Strict):
    """Held-out text on which every artifact is compared with the checkpoint."""

    text: Text = Field(
        default="bundled:wikitext-2-test", description="bundled:NAME, or a text file; not a source of the calibration"
    )
    texts: tuple[Text, ...] = Field(
        default=(), min_length=0, max_length=20, description="further texts, by language or domain: measured, not gated"
    )
    windows: int = Field(default=40, ge=1, le=65536, description="stretches of each text that are read")
    max_windows: int | None = Field(
        default=None, ge=1, le=65536, description="as many of `text` where a gate is inconclusive; null: no more"
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
        description="time every artifact against the checkpoint; both are in memory, as `qquant speed` has them",
    )

    @property
    def scored(self) -> int:
        """Tokens of a window that are scored."""
        return self.length - 1 - (self.length // 2 if self.protocol == "llama.cpp" else 0)

    def looks(self, available: int) -> list[int]:
        """Windows read at each look, twice as many every time, where a text has `available` of them."""
        most = min(self.max_windows or self.windows, available)
        found = [min(self.windows, most)]
        while found[-1] < most:
            found.append(min(2 * found[-1], most))
        return found

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Conflict]:
        yield from _too_many_tokens(given, "windows")
        yield from _no_name_after_bundled(given, "text")
        windows, most = given["windows"], given["max_windows"]
        if type(windows) is type(most) is int and most < windows:
            yield ("max_windows",), f"less than windows, got {most}; allowed: {windows} or more"
        for index, text in enumerate(_listed(given["texts"])):
            if text == given["text"] or text in given["texts"][:index]:
                yield ("texts", index), f"repeated text, got {shown(text)}; allowed: each text once"


class Recipe(_Strict):
    """Everything `qquant build` needs besides the checkpoint itself."""

    version: Annotated[Literal[1], Whole] = Field(description="of the recipe language")
    name: Name = Field(description="stands in reports")
    description: str = Field(default="", max_length=4000, description="for people")
    checkpoint: Text | None = Field(
        default=None, description="path, hub id, or bundled:NAME; the command line overrides it"
    )
    revision: Text | None = Field(default=None, description="commit, branch or tag of a hub id")
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

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Conflict]:
        yield from _no_name_after_bundled(given, "checkpoint")
        if str(given["checkpoint"]).startswith("bundled:") and given["revision"] is not None:
            yield ("revision",), f"a bundled checkpoint has none, got {shown(given['revision'])}; allowed: null"
        yield from _repeated_names(given["artifacts"])
        yield from _held_out_in_calibration(given["calibration"], given["checks"])


MODELS: dict[str, type[_Strict]] = {
    model.__name__: model
    for model in (Recipe, Calibration, Source, GptqArtifact, AwqArtifact, GgufArtifact, Gates, Waiver, Checks)
}
