"""The modules that `loading` fills: transformers' own class where it has one for the family, else a tree of the family's names."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from qquant.errors import UsageError
from qquant.families import Family, ModelConfig
from qquant.families.decoder import Block, rms_norm
from qquant.families.family import Transformers
from qquant.families.forward import through
from qquant.runtime.generating import answering_class

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def skeleton(
    family: Family, config: ModelConfig, raw: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> Any:
    """A model without weights; what it computes from its config alone is on `device`. `raw`: config.json, if there is one."""
    if family.transformers is None:
        return answering_class(FamilyModel)(family, config, dtype)
    import transformers  # the door to transformers; costs seconds

    names = family.transformers
    with torch.device("meta"):
        model = answering_class(getattr(transformers, names.model))(transformers_config(names, config, raw, dtype))
    for name in names.computed:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, type(model.get_submodule(name))(config=model.config).to(device))
    return model


def transformers_config(names: Transformers, config: ModelConfig, raw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The config of a model whose head is a module of its own, tied or not."""
    import transformers

    tokens = {key: raw[key] for key in TOKENS if key in raw}
    return getattr(transformers, names.config)(
        **names.settings(config), tie_word_embeddings=False, dtype=dtype, **tokens
    )


class Output(NamedTuple):
    """What a forward pass gives."""

    logits: Tensor


class FamilyModel(nn.Module):
    """A model of a family that transformers does not know: the family's names as modules, its forward pass, without a cache."""

    def __init__(self, family: Family, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.family, self.sizes, self.dtype = family, config, dtype
        self.config = SimpleNamespace(vocab_size=config.vocab, max_position_embeddings=config.positions)
        self.generation_config: Any = None
        for name in (*family.shapes(config), family.head):
            owner: nn.Module = self
            for word in name.split(".")[:-1]:
                if word not in owner._modules:
                    owner.add_module(word, nn.Module())
                owner = owner.get_submodule(word)

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self._module(self.family.final_norm).weight.device

    def _module(self, name: str) -> Any:
        return self.get_submodule(name.removesuffix(".weight"))

    def forward(self, input_ids: Tensor) -> Output:
        """Logits [B, T, vocab] of input_ids [B, T]."""
        return Output(torch.stack([self._sequence(ids) for ids in input_ids]))

    def _sequence(self, ids: Tensor) -> Tensor:
        x = self._module(self.family.embedding)(ids)
        for layer in range(self.sizes.layers):
            x = through(self.family.forward(_ModuleBlock(self, layer), x))
        return cast(
            Tensor,
            self._module(self.family.head)(
                rms_norm(x, self._module(self.family.final_norm).weight, self.sizes.epsilon)
            ),
        )

    def generate(self, *_: Any, **__: Any) -> Tensor:
        """Raise UsageError: what `generating` cannot do, transformers would."""
        raise UsageError(
            f"{self.family.model_type!r} is no family of transformers, and qquant's own loop answers greedy or sampled choice with "
            "max_new_tokens only. Leave out what else was asked for"
        )


class _ModuleBlock(Block):
    """A block whose linears are modules."""

    def __init__(self, model: FamilyModel, layer: int) -> None:
        family, prefix = model.family, model.family.block.format(layer)
        vectors = {name: model.get_submodule((prefix + name).removesuffix(".weight")).weight for name in family.vectors}
        super().__init__(family, model.sizes, cast(Mapping[str, Tensor], vectors), model.dtype)
        self.modules = {linear: model.get_submodule(prefix + linear) for linear in family.linears}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return cast(Tensor, self.modules[name](x))
