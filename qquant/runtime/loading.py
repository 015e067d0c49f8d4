"""`qquant.load`: a transformers model whose linears keep packed weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from qquant import devices
from qquant.artifact.opening import open_weights
from qquant.disk.records import shortened
from qquant.errors import InputError, UsageError
from qquant.families.weights import WeightSource
from qquant.formats.gguf.source import GgufSource
from qquant.runtime import drawing
from qquant.runtime.attention import with_rotation
from qquant.runtime.generating import Quick
from qquant.runtime.layers import GatedMLP, RMSNorm
from qquant.runtime.linears import FusedSlice, QuantEmbedding, RuntimeLinear
from qquant.runtime.parts import Loader
from qquant.runtime.skeleton import skeleton
from qquant.source.checkpoint import Checkpoint
from qquant.source.untrusted import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


QUICK = ("cuda", "cpu")  # devices where `generate` takes the quick way
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(owner), leaf, module)


def load(
    path: str | Path, device: str | torch.device = "auto", dtype: torch.dtype | str | None = None
) -> PreTrainedModel:
    """A causal language model (transformers' class, if it has one for the family) that computes with the packed weights of an artifact, made by any tool.

    path: a GPTQ or AWQ folder, a GGUF file, or a 16-bit checkpoint (which also may be a hub id).
    device: cpu, cuda, cuda:1; auto is CUDA if there is one.
    dtype: of the activations: bfloat16, float16 or float32; by default the checkpoint's, bfloat16 for GGUF.

    Raises:
        InputError: it is no artifact or checkpoint, or is damaged.
        UsageError: another dtype.
        EnvironmentMissingError: the device is not there.
    """
    where = devices.named(device, "device")
    source = _open(path)
    raw = {} if isinstance(source, GgufSource) else _raw_config(source)
    number = _dtype(dtype or dtype_of(raw, Path(path)))
    with ThreadPoolExecutor(devices.readers(where)) as pool:
        try:
            return cast("PreTrainedModel", _assembled(source, raw, Loader(source, where, number), pool))
        finally:
            pool.shutdown(cancel_futures=True)


def _assembled(source: WeightSource, raw: dict[str, Any], loader: Loader, pool: Executor) -> Any:
    """The model, of parts that are read and repacked in `pool` while transformers is imported."""
    config, family = source.config, source.family
    raw, drawn = _drawn(source, raw)
    outside = pool.submit(loader.embedding_and_head)
    blocks = [pool.submit(_block, source, layer, loader) for layer in range(config.layers)]
    model = skeleton(family, config, raw, loader.dtype, loader.device)
    for layer, block in enumerate(blocks):
        _fill(model, source, layer, *block.result())
    for name, module in zip((family.embedding, family.head), outside.result(), strict=True):
        _place(model, name.removesuffix(".weight"), module)
    _norm(model, family.final_norm, loader.vector(family.final_norm), config.epsilon)
    model.generation_config = drawn.made()
    model._quick = Quick(family, config, loader.dtype, QUICK)
    return model.eval()


def _drawn(source: WeightSource, raw: dict[str, Any]) -> tuple[dict[str, Any], drawing.Drawn]:
    """(the token ids of config.json, how answers are drawn)."""
    if isinstance(source, GgufSource):
        return {}, drawing.of_gguf(source)
    folder, vocabulary = source.path, source.config.vocab  # type: ignore[attr-defined] # every source of a folder has it
    return drawing.ids_of(raw, folder, vocabulary), drawing.of_folder(folder, raw, vocabulary)


def _block(
    source: WeightSource, layer: int, loader: Loader
) -> tuple[dict[str, Tensor], Mapping[str, Sequence[nn.Module]]]:
    """Norms and other vectors of a block by name, and its linears by stage."""
    prefix = source.family.block.format(layer)
    vectors = {name: loader.vector(prefix + name) for name in source.family.vectors}
    return vectors, loader.linears(layer)


def _give(model: nn.Module, name: str, weight: Tensor) -> None:
    """The module of that name its weight."""
    model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(weight, requires_grad=False)


def _norm(model: nn.Module, name: str, weight: Tensor, epsilon: float) -> None:
    """A norm in the place of the one whose weight has that name."""
    _place(model, name.removesuffix(".weight"), RMSNorm(weight, epsilon))


def _fill(
    model: nn.Module,
    source: WeightSource,
    layer: int,
    vectors: Mapping[str, Tensor],
    by_stage: Mapping[str, Sequence[nn.Module]],
) -> None:
    family, prefix = source.family, source.family.block.format(layer)
    shapes = family.linear_shapes(source.config, layer)
    norms = {stage.norm for stage in family.stages}
    for name, vector in vectors.items():
        if name in norms:
            _norm(model, prefix + name, vector, source.config.epsilon)
        else:
            _give(model, prefix + name, vector)
    for stage in family.stages:
        modules = by_stage[stage.name]
        if len(modules) == len(stage.linears):
            for linear, module in zip(stage.linears, modules, strict=True):
                _place(model, prefix + linear, module)
            continue
        sizes = [shapes[linear][0] for linear in stage.linears]
        pieces = [FusedSlice(cast(RuntimeLinear, modules[0]), sizes, index) for index in range(len(sizes))]
        for linear, piece in zip(stage.linears, pieces, strict=True):
            piece.first = [pieces[0]] if piece.index else []
            _place(model, prefix + linear, piece)
    theirs = family.transformers
    if theirs and theirs.attention:
        with_rotation(model.get_submodule(prefix + theirs.attention))
    if theirs and theirs.gated:
        _place(model, prefix + theirs.gated, GatedMLP(model.get_submodule(prefix + theirs.gated)))


def _open(path: str | Path) -> WeightSource:
    local = Path(path)
    return open_weights(local) if local.exists() else Checkpoint.open(path)


def dtype_of(raw: Mapping[str, Any], folder: Path) -> str:
    """The name of the dtype that a config.json gives; bfloat16 where it gives none.

    Raises:
        InputError: it is none that weights are stored in.
    """
    stated = [raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None]
    name = stated[0] if stated else "bfloat16"
    if not isinstance(name, str) or getattr(torch, name, None) not in DTYPES:
        raise InputError(f"{folder / 'config.json'}: dtype: {shortened(name)} is not bfloat16, float16 or float32")
    return name


def _dtype(wanted: torch.dtype | str) -> torch.dtype:
    dtype = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise UsageError(f"dtype {wanted!r}: activations are bfloat16, float16 or float32")
    return dtype


def _raw_config(source: Any) -> dict[str, Any]:
    return read_json(source.path / "config.json")


def paths(model: nn.Module) -> dict[str, str]:
    """Linear (or fused linears, or embedding) -> what the file holds and what runs, in words."""
    by_module = {}
    for name, module in model.named_modules():
        if isinstance(module, RuntimeLinear):
            by_module[name.removesuffix(".fused")] = module.extra_repr()
        elif isinstance(module, QuantEmbedding):
            by_module[name] = f"{module.bits} bit; rows dequantized when they are asked for"
    return by_module
