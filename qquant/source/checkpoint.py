"""A source checkpoint: config, headers, and tensors read one at a time.

`Checkpoint.open` reads config.json, the index and every safetensors header, and compares names, shapes and dtypes with what
the config implies, so that a wrong number in the config or a missing shard is one error before any work. Nothing is unpickled,
no code of the checkpoint runs, no path of an index leaves the folder. A LoRA adapter (PEFT) is merged as tensors are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from qquant.algorithms.grid import finite
from qquant.background import start_early
from qquant.disk.digest import sha256_apart, sha256_until
from qquant.errors import InputError
from qquant.families import Family, ModelConfig, family_of, parse_config
from qquant.source import safetensors_file, vocabulary
from qquant.source.adapter import Adapter
from qquant.source.hub import require_model_folder, resolve
from qquant.source.safetensors_file import TensorInfo
from qquant.source.untrusted import NAME_LIMIT, PLAIN_NAME, read_json, refuse_hooks, require_regular
from qquant.source.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor


FLOATS = ("BF16", "F16", "F32")
ALIGNED = 64  # bytes: where tensors that are read into one memory begin
SHA256 = re.compile(r"[0-9a-f]{64}")
SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "special_tokens_map.json", "added_tokens.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip
CONFIGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")  # beside config.json

Kind = TypeVar("Kind", bound="Checkpoint")


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        InputError: it, or another config beside it, is malformed, or asks to run code.
    """
    require_model_folder(path)
    for name in CONFIGS:
        if os.path.lexists(path / name):
            refuse_hooks(read_json(path / name), str(path / name))
    raw = read_json(path / "config.json")
    refuse_hooks(raw, str(path / "config.json"))
    return raw


@dataclass(eq=False)  # one is itself only, so that what was read from it can be kept by it
class Checkpoint:
    """A verified checkpoint on disk, of a family that qquant knows."""

    path: Path
    name: str  # of the model: the folder's, or the hub repository's
    revision: str | None
    raw_config: Mapping[str, Any]
    family: Family
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    fingerprint: str  # sha256 of config, headers and file sizes
    adapter: Adapter | None = None
    reference: str = ""  # what it was opened as: a folder, or a hub id
    base: str = ""  # the fingerprint without the adapter
    as_dtype: str = ""  # safetensors name of the dtype that every tensor is rounded to as it is read; empty: its own

    @classmethod
    def open(cls, reference: str | Path, revision: str | None = None, adapter: Path | None = None) -> Checkpoint:
        """Read and verify config and headers; no tensor data.

        Raises:
            InputError: anything that does not fit; the message names file, value and remedy.
            UsageError, EnvironmentMissingError: see `resolve`.
        """
        path, commit = resolve(str(reference), revision)
        name = str(reference).rsplit("/", 1)[-1] if commit else path.resolve().name
        raw = read_config(path)
        quantized = [raw[key] for key in ("quantization_config", "compression_config") if key in raw]
        if quantized:
            method = quantized[0].get("quant_method", "?") if isinstance(quantized[0], dict) else "?"
            raise InputError(f"{path}: is already quantized ({method}); give the 16-bit checkpoint")
        family = family_of(raw, str(path / "config.json"))
        config = parse_config(raw, str(path / "config.json"))
        present, digest = read_tensors(path)
        tensors = _verify(path, family, config, present)
        digest.update(json.dumps(raw, sort_keys=True).encode())
        base = digest.hexdigest()
        lora = Adapter.open(adapter, {name: info.shape for name, info in tensors.items()}) if adapter else None
        if lora:
            digest.update(lora.fingerprint.encode())
        print_ = digest.hexdigest()
        return cls(path, name, commit, raw, family, config, tensors, print_, lora, str(reference), base)

    def become(self, kind: type[Kind], **changes: Any) -> Kind:
        """The same checkpoint as another class of checkpoints, with other values of some fields."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(Checkpoint)} | changes)

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype of the linear weights: BF16, F16 or F32."""
        linear = next(iter(self.family.linear_shapes(self.config, 0)))
        return self.dtype_of(f"{self.family.block.format(0)}{linear}.weight")

    def dtype_of(self, name: str) -> str:
        """Safetensors name of the dtype in which tensor `name` is read."""
        return self.as_dtype or self.tensors[name].dtype

    @property
    def side_files(self) -> list[Path]:
        """Tokenizer, template, generation config and licence files, to be copied byte for byte."""
        return [require_regular(self.path / name) for name in SIDE_FILES if os.path.lexists(self.path / name)]

    def content_hash(self) -> str:
        """sha256 over the config and every byte of the weights (and of the adapter).

        Raises:
            InputError: a file in a hub cache is not what the hub said it is.
        """
        return self._over_weights(self.fingerprint)

    def base_hash(self) -> str:
        """The content hash without the adapter: what the checkpoint's own name stands for."""
        return self._over_weights(self.base or self.fingerprint)

    def _over_weights(self, head: str) -> str:
        return hashlib.sha256(b"".join((head.encode(), *self._weights))).hexdigest()

    def hash_weights(self, stop: Event) -> None:
        """Hash the weights now, for `content_hash` and `base_hash`; not to the end where `stop` is set meanwhile."""
        digests = self._digests(stop, sha256_apart)
        if not stop.is_set():
            vars(self)["_weights"] = digests  # where the property keeps what it was once

    def hashed_beside(self, threaded: bool) -> AbstractContextManager[Callable[[], None]]:
        """A function that waits until a thread has hashed the weights; not `threaded`, they are when their hash is asked for."""
        return start_early(self.hash_weights, True) if threaded else nullcontext(lambda: None)

    def is_hashed(self) -> bool:
        """Whether its weights were hashed already."""
        return "_weights" in vars(self)

    @cached_property
    def _weights(self) -> tuple[bytes, ...]:
        return self._digests(Event())

    def _digests(self, stop: Event, of: Callable[[Path, Event], str] = sha256_until) -> tuple[bytes, ...]:
        files = sorted({info.file for info in self.tensors.values()})
        with ThreadPoolExecutor(min(8, len(files), os.cpu_count() or 1)) as pool:  # hashing lets other threads run
            return tuple(pool.map(partial(_sha256, stop=stop, of=of), files))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Tokens and merges of its tokenizer files. Raises InputError if there are none, or they are malformed."""
        return vocabulary.read(self.path)

    def require_tokenizer(self) -> None:
        """Raise InputError unless there is a tokenizer whose tokens all have an embedding."""
        largest = self.vocabulary.largest
        if largest >= self.config.vocab:
            tokens = {number: token for token, number in self.vocabulary.tokens.items()}
            tokens |= {token.id: token.content for token in self.vocabulary.added}
            raise InputError(
                f"{self.path}: token {largest} ({tokens[largest][:40]!r}) lies beyond vocab_size {self.config.vocab}; is this its tokenizer?"
            )

    def tensor(self, name: str, into: Tensor | None = None) -> Tensor:
        """The tensor in its own dtype, adapter merged, checked to be finite; what is read goes `into` uint8 [its bytes], if that is given.

        Raises:
            InputError: it holds NaN or infinity, or the file ends early.
        """
        return self._finish(name, safetensors_file.read_tensor(self._info(name), into=into), slice(None))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of matrix `name`; like `tensor`."""
        rows = slice(start, stop)
        return self._finish(name, safetensors_file.read_tensor(self._info(name), rows), rows)

    def block_bytes(self, layer: int) -> int:
        """Memory that `block` takes for what it reads."""
        names = self.family.block_shapes(self.config, layer)
        return sum(_aligned(self._info(name).nbytes) for name in names)

    def block(self, layer: int, threads: int = 1, room: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors of decoder block `layer`, by their names inside the block, read by so many threads.

        `room`: uint8 [`block_bytes` or more] that they are read into.
        """
        prefix, start = self.family.block.format(layer), 0
        places: dict[str, Tensor | None] = {}
        for name in self.family.block_shapes(self.config, layer):
            size = self._info(name).nbytes
            places[name] = None if room is None else room[start : start + size]
            start += _aligned(size)
        inside = [name.removeprefix(prefix) for name in places]
        if threads == 1:
            return dict(zip(inside, map(self.tensor, places, places.values()), strict=True))
        with ThreadPoolExecutor(threads) as pool:
            return dict(zip(inside, pool.map(self.tensor, places, places.values()), strict=True))

    def _info(self, name: str) -> TensorInfo:
        return self.tensors[self.family.embedding if name == self.family.head and self.config.tied else name]

    def _finish(self, name: str, value: Tensor, rows: slice) -> Tensor:
        if self.adapter:
            value = self.adapter.merge(name, value, rows)
        if not finite(value):
            raise InputError(f"{self._info(name).file}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
        if self.as_dtype:
            value = value.to(safetensors_file.torch_dtype(self.as_dtype))
            if not finite(value):
                raise InputError(
                    f"{self._info(name).file}: tensor {name} does not fit {value.dtype}; use dtype: bfloat16"
                )
        return value


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def read_tensors(path: Path) -> tuple[dict[str, TensorInfo], Any]:
    """Every tensor of a folder of safetensors (by its index, else its only file), and a sha256 over headers and sizes.

    Raises:
        InputError: a pickle checkpoint, a missing shard, an index that points elsewhere or disagrees with the shards.
    """
    digest = hashlib.sha256()
    index = path / "model.safetensors.index.json"
    files = _indexed(path, read_json(index)) if os.path.lexists(index) else _single(path)
    tensors: dict[str, TensorInfo] = {}
    for file, expected in files.items():
        header, _ = safetensors_file.read_header(file)
        digest.update(
            f"{file.name} {file.stat().st_size} {[(i.name, i.dtype, i.shape) for i in header.values()]}".encode()
        )
        for name, info in header.items():
            if len(tensors) >= safetensors_file.TENSOR_LIMIT:
                raise InputError(f"{file}: more than {safetensors_file.TENSOR_LIMIT:,} tensors in all shards")
            if name in tensors:
                raise InputError(f"{file}: tensor {name} is also in {tensors[name].file.name}")
            tensors[name] = info
        absent = expected - header.keys()
        if absent:
            raise InputError(
                f"{index}: puts {min(absent)} into {file.name}, which does not hold it ({len(absent)} such tensors)"
            )
    return tensors, digest


def _sha256(path: Path, stop: Event, of: Callable[[Path, Event], str]) -> bytes:
    """The sha256 `of` a file, or nothing where `stop` is set meanwhile; raises InputError where a hub cache, which keeps large files under their sha256, has another one."""
    found = of(path, stop)
    if stop.is_set():
        return b""
    named = path.resolve().name
    if path.is_symlink() and SHA256.fullmatch(named) and named != found:
        raise InputError(f"{path}: its sha256 is {found}, the hub's is {named}. Download it again")
    return bytes.fromhex(found)


def _indexed(path: Path, index: Mapping[str, Any]) -> dict[Path, set[str]]:
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{path / 'model.safetensors.index.json'}: weight_map is missing or empty")
    files: dict[Path, set[str]] = {}
    for name, file in weights.items():
        if (
            not isinstance(file, str)
            or len(file) > NAME_LIMIT
            or not PLAIN_NAME.fullmatch(file)
            or not file.endswith(".safetensors")
        ):
            raise InputError(
                f"{path / 'model.safetensors.index.json'}: {name[:80]} -> {str(file)[:80]!r} is not the plain name of a .safetensors file"
            )
        files.setdefault(path / file, set()).add(name)
    for file in sorted(files):
        if not file.is_file():
            raise InputError(f"{file}: missing shard ({len(files[file])} tensors). Download it again")
    return files


def _single(path: Path) -> dict[Path, set[str]]:
    files = sorted(path.glob("*.safetensors"))
    model = path / "model.safetensors"
    if model in files:
        return {model: set()}
    if len(files) == 1 and "-of-" not in files[0].name:
        return {files[0]: set()}
    if files:
        raise InputError(
            f"{path}: {len(files)} safetensors files without model.safetensors.index.json. Download the index"
        )
    pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles:
        raise InputError(
            f"{pickles[0]}: is a pickle, which can run code when loaded; qquant reads safetensors only. "
            "`qquant build --allow-pickle` converts it once, in a process without a network"
        )
    raise InputError(f"{path}: holds no .safetensors file")


def _verify(
    path: Path, family: Family, config: ModelConfig, present: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """The tensors of the model, and a copy of the tied head, which is not read."""
    expected = family.shapes(config)
    problems = []
    for name, shape in expected.items():
        if name not in present:
            problems.append(f"{name} is missing; the config implies {list(shape)}")
        elif present[name].shape != shape:
            problems.append(
                f"{name} in {present[name].file.name} is {list(present[name].shape)}; the config implies {list(shape)}"
            )
        elif present[name].dtype not in FLOATS:
            problems.append(
                f"{name} in {present[name].file.name} is {present[name].dtype}; expected one of {', '.join(FLOATS)}"
            )
    extra = sorted(name for name in present if name not in expected and not name.endswith(family.ignored))
    tied_copy = [
        name
        for name in extra
        if name == family.head and config.tied and present[name].shape == expected[family.embedding]
    ]
    unknown = [name for name in extra if name not in tied_copy]
    problems += [f"{name} in {present[name].file.name} is not a tensor of this model" for name in unknown]
    dtypes = {present[name].dtype for name in family.matrices(config) if name in present}
    if len(dtypes & set(FLOATS)) > 1:
        problems.append(f"linear weights have several dtypes: {', '.join(sorted(dtypes))}")
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(
            f"{path}: tensors and config.json disagree ({len(problems)}):{shown}{more}\nCheck the numbers in config.json"
        )
    return {name: present[name] for name in expected} | {name: present[name] for name in tied_copy}
