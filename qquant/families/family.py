"""What a model family is to the rest of the program: a table of names, the shapes that a config implies, and a forward pass.

    Stage("o", (Linear("self_attn.o_proj", out="hidden", inn="heads"),), into_residual=True)

Sizes are names that `ModelConfig.sizes` answers, for each block on its own. What is particular about a linear or a stage stands in its
row, so that nobody asks for the third stage or the last linear. Stages stand in the order of computation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qquant.families.config import ModelConfig
from qquant.families.forward import Operators, Passage

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """A matrix [out, inn] of a block, without ".weight"; with `bias`, a vector [out] too."""

    name: str
    out: str
    inn: str
    bias: bool = False


@dataclass(frozen=True)
class Vector:
    """A tensor of a block that is no matrix, such as the weight of a norm on each head."""

    name: str
    size: str


@dataclass(frozen=True)
class Stage:
    """Linears of a block that share one input, hence one Gram matrix.

    `norm`: what the residual stream goes through on its way in. `into_residual`: their output is added to the residual stream. `fused`: what
    vLLM and SGLang call the one linear that they make of several.
    """

    name: str
    rows: tuple[Linear, ...]
    norm: str = ""
    vectors: tuple[Vector, ...] = ()  # used on the way out
    into_residual: bool = False
    fused: str = ""

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """The names of the linears."""
        return tuple(row.name for row in self.rows)

    @cached_property
    def inn(self) -> str:
        """The name of the size of their input."""
        (size,) = {row.inn for row in self.rows}
        return size


@dataclass(frozen=True)
class ScalePair:
    """Input channels of `stage` may be multiplied by s if the outputs of `producer` are divided by s."""

    producer: str  # a norm, or a linear whose rows and bias are divided
    stage: str
    tied_over_query_heads: bool = False  # the producer makes values, each of which several query heads may read


@dataclass(frozen=True)
class Transformers:
    """What a family is in transformers: names of classes, and the settings of its config class."""

    model: str
    config: str
    settings: Callable[[ModelConfig], Mapping[str, Any]]  # without dtype, tokens and tie
    computed: tuple[str, ...] = ()  # modules that hold no weights, made from the config
    attention: str = ""  # the module of a block that rotates queries and keys, where there is one
    gated: str = ""  # the module of a block that is down_proj(silu(gate_proj(x)) * up_proj(x)), where there is one


@dataclass(frozen=True)
class GgufNames:
    """What a family is in llama.cpp: its architecture, how it cuts text into words, names of modules in and outside the blocks.

    `numbers`: what its files say besides what all architectures have, as (key, kind of the value, attribute of `config`).
    """

    architecture: str
    pre: str
    names: Mapping[str, str]
    numbers: tuple[tuple[str, str, str], ...] = ()
    config: type[ModelConfig] = ModelConfig


@dataclass(frozen=True)
class Family:
    """Names of a decoder family; `{}` in `block` is the layer number."""

    model_type: str
    architecture: str
    parse: Callable[[Mapping[str, Any], str], ModelConfig]  # config.json, and where it lies
    forward: Callable[[Operators[Any], Any], Passage[Any]]  # of a block
    embedding: str
    final_norm: str
    head: str
    block: str
    stages: tuple[Stage, ...]
    scale_pairs: tuple[ScalePair, ...]
    ignored: tuple[str, ...] = ()  # how names end of tensors in old files that are computed from the config
    padded_by: str = ""  # the key of config.json with the width that may be padded with zeros; none: it may not
    transformers: Transformers | None = None
    gguf: GgufNames | None = None

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """The linears of a block, in stage order."""
        return tuple(linear for stage in self.stages for linear in stage.linears)

    @cached_property
    def vectors(self) -> tuple[str, ...]:
        """The norms and biases of a block, by name."""
        return tuple(
            name for stage in self.stages for name in (stage.norm, *(vector.name for vector in stage.vectors)) if name
        )

    @cached_property
    def last(self) -> Stage:
        """The stage after which a block ends."""
        return self.stages[-1]

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def linear_shapes(self, config: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
        """Linear of block `layer` -> (out features, in features)."""
        sizes = config.sizes(layer)
        return {row.name: (sizes[row.out], sizes[row.inn]) for stage in self.stages for row in stage.rows}

    def inputs(self, config: ModelConfig, layer: int) -> dict[str, int]:
        """Stage of block `layer` -> features of its input."""
        sizes = config.sizes(layer)
        return {stage.name: sizes[stage.inn] for stage in self.stages}

    def matrices(self, config: ModelConfig) -> dict[str, tuple[int, int]]:
        """Every linear weight of all blocks -> (out features, in features)."""
        return {
            f"{self.block.format(layer)}{linear}.weight": shape
            for layer in range(config.layers)
            for linear, shape in self.linear_shapes(config, layer).items()
        }

    def block_shapes(self, config: ModelConfig, layer: int) -> dict[str, Shape]:
        """Every tensor of one block, in the order of computation."""
        prefix, sizes = self.block.format(layer), config.sizes(layer)
        shapes: dict[str, Shape] = {}
        for stage in self.stages:
            if stage.norm:
                shapes[prefix + stage.norm] = (sizes[stage.inn],)
            for row in stage.rows:
                shapes[f"{prefix}{row.name}.weight"] = (sizes[row.out], sizes[row.inn])
                if row.bias:
                    shapes[f"{prefix}{row.name}.bias"] = (sizes[row.out],)
            for vector in stage.vectors:
                shapes[prefix + vector.name] = (sizes[vector.size],)
        return shapes

    def shapes(self, config: ModelConfig) -> dict[str, Shape]:
        """Every tensor that a checkpoint of `config` must hold; a tied head is not one."""
        shapes: dict[str, Shape] = {self.embedding: (config.vocab, config.hidden)}
        for layer in range(config.layers):
            shapes |= self.block_shapes(config, layer)
        shapes[self.final_norm] = (config.hidden,)
        if not config.tied:
            shapes[self.head] = (config.vocab, config.hidden)
        return shapes

    def parameters(self, config: ModelConfig) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.shapes(config).values())

    def layer_of(self, name: str) -> int | None:
        """The block that tensor `name` belongs to; None outside the blocks."""
        opening, closing = self.block.split("{}")
        layer = name.removeprefix(opening).split(closing, 1)[0]
        return int(layer) if name.startswith(opening) and layer.isdecimal() else None

    def inside(self, name: str) -> str:
        """The name of a tensor within its block; itself outside the blocks."""
        layer = self.layer_of(name)
        return name if layer is None else name.removeprefix(self.block.format(layer))

    @property
    def llama_cpp(self) -> GgufNames:
        """What llama.cpp calls it; only asked of a family that llama.cpp knows, since no other has GGUF files."""
        assert self.gguf is not None
        return self.gguf

    def gguf_name(self, name: str) -> str:
        """The GGUF name of checkpoint tensor `name`, e.g. `blk.3.attn_q.weight`."""
        module, kind = self.inside(name).rsplit(".", 1)
        layer = self.layer_of(name)
        return f"{'' if layer is None else f'blk.{layer}.'}{self.llama_cpp.names[module]}.{kind}"
