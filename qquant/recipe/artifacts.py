"""The artifacts of a recipe: an entry for each format, what it must hold, and what the rest of the program asks of any entry.

An entry is a table of fields that differ by format, each under the name that people of that format know. Properties say the same thing of
all of them: `kind`, `group`, `feedback`, `own_stream`, `transforms`, `eight_bit`. Code outside `formats` asks for these, and for no format's
name. To add a format, give it an entry here (of `IntegerArtifact`, if it holds integer codes in groups), and name it in `ArtifactSpec` and `FormatName`.
"""

from __future__ import annotations

import datetime
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from qquant.recipe.fields import AtLeast0, AtLeast1, Conflict, Name, Share, Strict, Text, Truth, Whole
from qquant.recipe.solvers import SOLVERS
from qquant.recipe.tensors import UNITS, Keep, TypeChoice, bytes_of, unknown_types
from qquant.recipe.words import shown

SUPER_BLOCK = 256  # columns of a K-quant block; a row that they do not divide falls back to another type
BLOCK = 32  # columns of a block of the other GGUF types
NO_CODES = ("f16", "bf16")  # mixes without codes to solve for

GgufType = Literal[
    "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m",
    "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs",
]  # fmt: skip


def _known_solver(value: object) -> object:
    if not isinstance(value, str) or value not in SOLVERS:
        raise PydanticCustomError("literal_error", "not a solver")
    return value


SolverName = Annotated[str, BeforeValidator(_known_solver), WithJsonSchema({"enum": list(SOLVERS), "type": "string"})]
SOLVER = "; ".join(f"{name}: {solver.meaning}" for name, solver in SOLVERS.items())
Damping = Annotated[
    float, Field(gt=0, lt=1, description="added to the diagonal of H, as a share of its mean, for `solver: gptq`")
]
Sweeps = Annotated[
    int,
    Field(
        ge=0,
        le=20,
        description="passes of coordinate descent over the codes after GPTQ, each followed by a scale refit",
    ),
]
Propagate = Annotated[
    bool,
    Field(
        description="make up for the errors before a linear, for `solver: gptq` alone; 8 bits walk in float32 for it"
    ),
]
ScaleSearch = Annotated[
    Literal["minmax", "importance"],
    Field(description="minmax: from the extremes; importance: by weighted error, signed where symmetric"),
]
Bits = Annotated[float, Field(gt=0, le=32)]
TARGETS = ("type", "size", "bits_per_weight")
Transform = Annotated[
    Literal["none", "awq"], Field(description="awq: fold scales into the operator before; none: weights as they are")
]
Ratios = Annotated[int, Field(ge=1, le=100, description="grid points of the search for folded scales")]


class Waiver(Strict):
    """Why an artifact may be released although a gate failed; shown wherever the verdict is. Unset: no waiver."""

    reason: str = Field(default="", max_length=1024, description="what is known and accepted")
    who: str = Field(default="", max_length=1024, description="who answers for it")
    until: str = Field(default="", max_length=10, description="last day it holds, YYYY-MM-DD")

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> Iterator[Conflict]:
        if not all(isinstance(value, str) for value in values.values()):
            return
        if any(values.values()) and not all(values.values()):
            missing = ", ".join(key for key in values if not values[key])
            yield (), f"incomplete, got no {missing}; allowed: reason, who and until, or none of them"
        elif values["until"] and not _is_day(values["until"]):
            yield ("until",), f"not a day, got {shown(values['until'])}; allowed: YYYY-MM-DD"


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


class Gates(Strict):
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
        description="share by which KL divergence and top-1 disagreement may exceed those of `regression_vs`",
    )
    worst_slice: AtLeast1 | None = Field(
        default=None,
        description="with `profile: release`: at most this times the KL divergence of English in any language or kind of text; its square root for positions",
    )
    behaviour: Share | None = Field(
        default=None,
        description="with `profile: release`: at most this share of what the checkpoint answers rightly may be lost, in any kind of question",
    )
    defaults: bool = Field(
        default=True, description="false: what is null is measured and not gated, instead of held to the default"
    )
    waiver: Waiver = Field(default=Waiver(), description="turns a fail into a warning")


def eight_bits(kind: str) -> bool:
    """Whether artifacts of this kind have eight bits or more, which no perplexity resolves: they move it by less than a text can tell."""
    return kind in ("int8", "q8_0", "f16", "bf16", "f32")


class _Artifact(Strict):
    """What every entry of `artifacts` says of itself, whatever its format."""

    name: Name = Field(
        description="what tables and `--only` call it; unique. Its folder is named by model, format and bits"
    )
    gates: Gates = Field(default=Gates(), description="what it must hold")

    if TYPE_CHECKING:  # fields of every format, each in its own place, with its own default
        solver: str
        damping: float
        sweeps: int

    @property
    @abstractmethod
    def kind(self) -> str:
        """The row of `limits.LIMITS`: "int4", "q4_k_m"."""

    @property
    def variant(self) -> str:
        """What stands in the names of its files besides the model and the format: two artifacts that share it cannot lie in one folder."""
        return self.kind

    @property
    def sized(self) -> bool:
        """Whether what its tensors are is to be chosen by how many bytes it may have."""
        return False

    @property
    @abstractmethod
    def group(self) -> int:
        """Columns that share parameters, which no tensor-parallel rank can divide; 1 where a whole row does."""

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps that find its codes, in order; none: the format's own quantizer does."""
        return SOLVERS[self.solver].steps

    @property
    def feedback(self) -> bool:
        """Whether each column makes up for the errors before it, so a Gram matrix decides the codes."""
        return len(self.steps) > 1

    @property
    @abstractmethod
    def propagates(self) -> bool:
        """Whether the entry asks that linears make up for the errors of those before them."""

    @property
    @abstractmethod
    def fold_points(self) -> int:
        """Grid points of the search for scales that are folded into the operator before; 0: none are folded."""

    @property
    def transforms(self) -> bool:
        """Whether weights change before they are solved, so that an artifact's are not the checkpoint's."""
        return self.fold_points > 0

    @property
    def own_stream(self) -> bool:
        """Whether it is calibrated on activations that passed through its own quantized linears."""
        return self.propagates and self.feedback

    @property
    def eight_bit(self) -> bool:
        """Whether it has eight bits or more."""
        return eight_bits(self.kind)

    @property
    def unknowns(self) -> int:
        """Numbers of a group that are solved for together, at most: its scale."""
        return 1


class IntegerArtifact(_Artifact):
    """A folder of integer codes in groups: the settings that its layouts share, as their fields spell them."""

    keep: Keep = ()

    if TYPE_CHECKING:  # fields of the layouts, each in its own order, with its own defaults and meanings
        bits: int
        group_size: int
        transform: str
        ratios: int
        propagate: bool

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> Iterator[Conflict]:
        if values["solver"] == "ggml":
            words = ", ".join(name for name, solver in SOLVERS.items() if solver.steps)
            yield ("solver",), f'llama-quantize has no such layout, got "ggml"; allowed: {words}'

    @property
    def kind(self) -> str:
        """The row of `limits.LIMITS`, by bits alone: layouts of the same codes lose the same."""
        return f"int{self.bits}"

    @property
    def group(self) -> int:
        """A group; 1 for whole rows."""
        return max(self.group_size, 1)

    @property
    def propagates(self) -> bool:
        """Whether linears make up for the errors of those before them, as `propagate` says."""
        return self.propagate

    @property
    def fold_points(self) -> int:
        """Grid points of the search for scales that are folded, as `transform` and `ratios` say."""
        return 0 if self.transform == "none" else self.ratios


class GptqArtifact(IntegerArtifact):
    """AutoGPTQ v1 layout, read by transformers, vLLM, SGLang. A head that is tied to the embedding is stored once; auto-gptq 0.7.1 reads zeros then."""

    format: Literal["gptq"] = Field(description="the kind of artifact, whose fields this table has")
    bits: Annotated[Literal[4, 8], Whole] = Field(description="bits per weight")
    group_size: Annotated[Literal[32, 64, 128, -1], Whole] = Field(
        default=128,
        description="weights that share a scale; -1: a whole row, which at 4 bits crashes in transformers with gptqmodel on a CPU",
    )
    symmetric: Annotated[Literal[True], Truth] = Field(default=True, description="groups have no zero points")
    desc_act: Annotated[Literal[False], Truth] = Field(
        default=False, description="columns stay in their order, as fast kernels need it"
    )
    damping: Damping = 0.01
    solver: SolverName = Field(default="gptq", description=SOLVER)
    scale_search: ScaleSearch = "importance"
    sweeps: Sweeps = 2
    transform: Transform = "none"
    ratios: Ratios = 20
    propagate: Propagate = True


class AwqArtifact(IntegerArtifact):
    """AutoAWQ GEMM layout: 4 bit, asymmetric, scales folded into the previous operator."""

    format: Literal["awq"] = Field(description="the kind of artifact, whose fields this table has")
    bits: Annotated[Literal[4], Whole] = Field(default=4, description="bits per weight")
    group_size: Annotated[Literal[32, 64, 128], Whole] = Field(
        default=128, description="weights that share a scale and a zero point"
    )
    zero_point: Annotated[Literal[True], Truth] = Field(
        default=True, description="every group has a zero point: codes are asymmetric"
    )
    damping: Damping = 0.01
    solver: SolverName = Field(default="gptq", description=SOLVER)
    scale_search: ScaleSearch = "importance"
    sweeps: Sweeps = 2
    transform: Transform = "awq"
    ratios: Ratios = 20
    propagate: Propagate = True


class GgufArtifact(_Artifact):
    """One GGUF file: of llama.cpp's type mix `type`, or of the types with the least expected loss in a size."""

    format: Literal["gguf"] = Field(description="the kind of artifact, whose fields this table has")
    type: GgufType | None = Field(default=None, description="llama.cpp's name of the mix, in lower case")
    size: Text | None = Field(
        default=None,
        description="instead of `type`: at most so many bytes of files, as `4.4GB` or `4300MiB`; each tensor's type is chosen by what it is expected to lose",
    )
    bits_per_weight: Bits | None = Field(
        default=None, description="instead of `type` and `size`: at most so many bits of tensors per parameter"
    )
    types: dict[str, TypeChoice] = Field(
        default={},
        description='types of single tensors, by name or pattern (`"blk.*.attn_v": q6_k`), the longest that fits counts; beside `size` or `bits_per_weight` also lists of those to choose from',
    )
    imatrix: bool = Field(default=True, description="weigh errors with diag(H), where the type can use it")
    solver: SolverName = Field(default="ggml", description=SOLVER)
    damping: Damping = 0.01
    sweeps: Sweeps = 3
    propagate: Propagate = False

    @property
    def kind(self) -> str:
        """The mix; "" while types are still to be chosen by size."""
        return self.type or ""

    @property
    def label(self) -> str:
        """What its files are called after the model: the mix, or where types were asked for its own name."""
        plain = self.type is not None and not self.types
        return self.kind if plain else re.sub("[^a-z0-9]+", "_", self.name.removeprefix("gguf-"))

    @property
    def variant(self) -> str:
        """The label."""
        return self.label

    @property
    def sized(self) -> bool:
        """Whether types are chosen by size."""
        return self.type is None

    @property
    def most(self) -> int | None:
        """The most bytes that the file may have, from `size`."""
        return bytes_of(self.size or "")

    @property
    def group(self) -> int:
        """A block of the types that the mix uses."""
        return SUPER_BLOCK if self.sized or "_k" in self.kind or self.kind == "iq4_xs" else BLOCK

    @property
    def propagates(self) -> bool:
        """Whether linears make up for the errors of those before them, as `propagate` says."""
        return self.propagate

    @property
    def unknowns(self) -> int:
        """The number 2: the scale and the minimum of a super-block."""
        return 2

    @property
    def fold_points(self) -> int:
        """Zero: no GGUF file has folded scales."""
        return 0

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> Iterator[Conflict]:
        solver = values["solver"]
        steps = SOLVERS[solver].steps if isinstance(solver, str) and solver in SOLVERS else None
        if steps and values["type"] in NO_CODES:
            yield ("solver",), f"{values['type']} has no codes to solve for, got {shown(solver)}; allowed: ggml"
        if values["propagate"] is True and steps is not None and len(steps) < 2:
            yield ("propagate",), f"solver: {solver} does not look at the stream, got true; allowed: false"
        targets = [key for key in TARGETS if values[key] is not None]
        if len(targets) != 1:
            got = " and ".join(targets) or "none"
            yield (), f"needs a type or a size, got {got}; allowed: exactly one of {', '.join(TARGETS)}"
        if isinstance(values["size"], str) and values["size"] and bytes_of(values["size"]) is None:
            units = ", ".join(UNITS)
            yield ("size",), f"not a size, got {shown(values['size'])}; allowed: a number and one of {units}"
        if isinstance(values["types"], dict):
            yield from unknown_types(values["types"], lists=values["type"] is None)


# A new entry stands in both: what a recipe takes, and the words of `--format` and `qquant.build(format=...)`.
ArtifactSpec = Annotated[GptqArtifact | AwqArtifact | GgufArtifact, Field(discriminator="format")]
FormatName = Literal["gptq", "awq", "gguf"]
ENTRIES: tuple[type[Strict], ...] = get_args(get_args(ArtifactSpec)[0])
