"""LoRA adapters in PEFT's layout, merged tensor by tensor as the checkpoint is read.

    W' = round_to_dtype(W + scale * B @ A)      A float [r, in], B float [out, r], scale = alpha / r (or alpha / sqrt(r), rsLoRA)

The product and the sum are computed in float32 and rounded once. Tensors listed in `modules_to_save` replace the base's.
Reference: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), PEFT's adapter_config.json. Refused: DoRA, biases, dropout at
inference, convolutions, any key that does not name a tensor of the base model, and a module of `modules_to_save` whose tensors are not there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.disk.digest import digest_of
from qquant.errors import InputError
from qquant.source import safetensors_file
from qquant.source.safetensors_file import TensorInfo
from qquant.source.untrusted import read_json, refuse_hooks

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
FLOATS = ("BF16", "F16", "F32")
PATTERN_LIMIT = 200  # characters of a key of alpha_pattern, which is a regular expression
REPEATED = re.compile(r"\)\s*[*+{?]|\\[1-9]|\(\?")  # groups that repeat, back-references, extensions: can take forever
REPEAT = re.compile(r"[*+{?]")
REPEATS, ALTERNATIVES = 3, 8
PLAIN_STARTS = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
)  # values of init_lora_weights that leave the base as it is
OTHER_MODELS = (
    "lora_bias",
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
)


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates by the name of the weight they change."""

    path: Path
    updates: Mapping[str, tuple[TensorInfo, TensorInfo, float]]  # weight -> (A, B, scale)
    replaced: Mapping[str, TensorInfo]
    fan_in_fan_out: bool
    fingerprint: str
    base: str | None = None  # the model that its config says it was trained on

    @property
    def origin(self) -> tuple[str, str | None]:
        """(name, commit): of a hub cache the repository's id and its commit, of another folder its name."""
        real = self.path.resolve()
        if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
            return real.parent.parent.name.removeprefix("models--").replace("--", "/"), real.name
        return real.name, None

    @classmethod
    def open(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
        """Read and verify an adapter folder against the base model's tensor shapes.

        Raises:
            InputError: not a LoRA adapter, of an unsupported kind, or not made for this base.
        """
        file = path / "adapter_config.json"
        if not file.is_file():
            raise InputError(f"{path}: no adapter_config.json; --adapter takes a PEFT LoRA folder")
        config = read_json(file)
        refuse_hooks(config, str(file))
        _supported(file, config)
        weights = path / "adapter_model.safetensors"
        if not weights.is_file():
            raise InputError(f"{weights}: not found (a pickled adapter_model.bin is not read)")
        header, _ = safetensors_file.read_header(weights)
        pairs, replaced = _sorted_out(weights, header, shapes)
        _require_saved(file, config.get("modules_to_save"), replaced, shapes)
        updates = {target: _update(weights, target, pair, config, shapes[target]) for target, pair in pairs.items()}
        digest = digest_of(weights)
        digest.update(json.dumps(config, sort_keys=True).encode())
        base = config.get("base_model_name_or_path")
        named = base.rstrip("/") if isinstance(base, str) else None
        if named and (named.startswith((".", "/", "~")) or named.count("/") > 1):
            named = named.rpartition("/")[2]  # a folder of the machine that trained it
        return cls(path, updates, replaced, bool(config.get("fan_in_fan_out")), digest.hexdigest(), named)

    def merge(self, name: str, value: Tensor, rows: slice) -> Tensor:
        """`value` (rows `rows` of tensor `name`) with the adapter applied, in the dtype it came in."""
        if name in self.replaced:
            return safetensors_file.read_tensor(self.replaced[name], rows if value.dim() > 1 else None).to(value.dtype)
        if name not in self.updates:
            return value
        first, second, scale = self.updates[name]
        delta = safetensors_file.read_tensor(second).float() @ safetensors_file.read_tensor(first).float()
        if self.fan_in_fan_out:
            delta = delta.T
        return (value.float() + scale * delta[rows]).to(value.dtype)


def _sorted_out(
    weights: Path, header: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """(weight -> its A and B, tensor -> its replacement)."""
    pairs: dict[str, dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    for key, info in header.items():
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        target = f"{match[1]}.weight" if match else name
        if target not in shapes:
            raise InputError(f"{weights}: {key} does not belong to a tensor of the base model; is this its adapter?")
        if match:
            pairs.setdefault(target, {})[match[2]] = info
        elif info.shape != shapes[target]:
            raise InputError(f"{weights}: {key} is {list(info.shape)}, the base has {list(shapes[target])}")
        elif info.dtype not in FLOATS:
            raise InputError(f"{weights}: {key} is {info.dtype}; expected one of {', '.join(FLOATS)}")
        else:
            replaced[target] = info
    return pairs, replaced


def _require_saved(file: Path, saved: Any, replaced: Container[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError unless every tensor of the modules `saved` is replaced; PEFT names modules by the ends of their paths."""
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise InputError(f"{file}: modules_to_save is {str(saved)[:80]!r}; expected a list of names")
    for name in saved or ():
        tensors = [tensor for tensor in shapes if f".{name}." in f".{tensor}"]
        tensors = tensors or [tensor for tensor in shapes if f"{name}." in tensor]
        if not tensors:
            raise InputError(
                f"{file}: modules_to_save names {name[:80]}, which the base model does not have; is this its adapter?"
            )
        absent = next((tensor for tensor in tensors if tensor not in replaced), None)
        if absent:
            raise InputError(
                f"{file}: modules_to_save names {name[:80]}, and {absent} is not in the adapter's file: what was trained there is "
                "lost. Save the adapter again with PEFT, or take the name out if that module was not trained"
            )


def _update(
    weights: Path, target: str, pair: Mapping[str, TensorInfo], config: Mapping[str, Any], shape: tuple[int, ...]
) -> tuple[TensorInfo, TensorInfo, float]:
    if set(pair) != {"A", "B"}:
        raise InputError(f"{weights}: {target} has only lora_{next(iter(pair))}")
    if len(shape) != 2:
        raise InputError(f"{weights}: {target} is no matrix, and has no low-rank update. Is this its adapter?")
    if any(len(info.shape) != 2 or 0 in info.shape or info.dtype not in FLOATS for info in pair.values()):
        raise InputError(f"{weights}: {target}: A and B must be matrices of {', '.join(FLOATS)}")
    rank = pair["A"].shape[0]
    rows, columns = reversed(shape) if config.get("fan_in_fan_out") else shape
    if pair["A"].shape != (rank, columns) or pair["B"].shape != (rows, rank):
        raise InputError(
            f"{weights}: {target}: A {list(pair['A'].shape)} and B {list(pair['B'].shape)} do not give {list(shape)}"
        )
    return pair["A"], pair["B"], _scale(config, target.removesuffix(".weight"), rank)


def _supported(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type is {str(config.get('peft_type'))[:80]!r}; only 'LORA' can be merged")
    if config.get("use_dora"):
        raise InputError(f"{file}: use_dora is true; merge DoRA adapters with PEFT first (model.merge_and_unload())")
    if config.get("bias", "none") != "none":
        raise InputError(f"{file}: bias is {str(config['bias'])[:80]!r}; only 'none' can be merged")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise InputError(
            f"{file}: init_lora_weights is {str(config['init_lora_weights'])[:80]!r}, which changed the base's weights before training, so the "
            "adapter does not fit the base. Save it as a plain one with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(key, False), bool):
            raise InputError(f"{file}: {key} is {str(config[key])[:80]!r}; expected true or false")
    for key in OTHER_MODELS:
        if config.get(key):
            raise InputError(
                f"{file}: {key} is {str(config[key])[:80]}; merge it with PEFT first (model.merge_and_unload())"
            )


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    stated = _by_module(config, "rank_pattern", module, config.get("r"))
    if stated is not None and (stated != rank or isinstance(stated, bool)):
        raise InputError(
            f"adapter_config.json: r is {str(stated)[:80]} for {module}, whose lora_A has {rank} rows; the scale is lost. Is this its config?"
        )
    alpha = _by_module(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e6:
        raise InputError(f"adapter_config.json: lora_alpha {str(alpha)[:80]!r} is not a number that can be a scale")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_module(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the last pattern in `config[key]` that is the end of the name of `module`; `default` if none is."""
    patterns = config.get(key) or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        involved = (
            REPEATED.search(pattern) or len(REPEAT.findall(pattern)) > REPEATS or pattern.count("|") > ALTERNATIVES
        )
        if len(pattern) > PATTERN_LIMIT or involved:
            raise InputError(
                f"adapter_config.json: {key} {pattern[:80]!r} is too involved; write the names of the modules"
            )
        try:
            matches = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"adapter_config.json: {key} {pattern[:80]!r}: {error}") from None
        default = value if matches else default
    return default
