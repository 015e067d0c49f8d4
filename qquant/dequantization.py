"""An artifact of any tool back to a 16-bit checkpoint that transformers loads, to be fine-tuned or built again.

    weights     W^ = what the artifact's codes and scales stand for, rounded to `dtype`; folded scales (AWQ) stay folded, which is the same
                function. Zero padding stays: the shapes are the artifact's
    config      that of the artifact's folder without quantization_config; of a GGUF file, from its metadata
    tokenizer   the files of the folder, byte for byte; of a GGUF file, tokenizer.json and chat template from its metadata
    card        README.md, which says what it is: not the original

What was lost by quantizing stays lost. Every file is planned, written beside `out` and synced; the folder then appears whole, by one
rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qquant.algorithms.checksum import as_bytes
from qquant.disk import writes
from qquant.disk.lock import hold
from qquant.errors import InputError, NumericalError, UsageError
from qquant.formats import FORMATS, ArtifactSource, detect
from qquant.formats.gguf.source import GgufSource
from qquant.formats.gguf.tokenizer import gguf_tokenizer
from qquant.formats.planned import PlannedFile, safetensors_files
from qquant.progress import Progress
from qquant.release.card import yaml
from qquant.runtime.loading import dtype_of
from qquant.runtime.skeleton import TOKENS, transformers_config
from qquant.source.checkpoint import SIDE_FILES
from qquant.source.hub import card_head
from qquant.source.untrusted import read_json, require_regular

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SHARD = 4 * 10**9  # bytes of a file
ROWS = 4096  # of a matrix that are dequantized at a time
KEPT = ("license", "license_name", "license_link", "language", "base_model")  # of the artifact's card


@dataclass(frozen=True)
class Dequantized:
    """What was written."""

    folder: Path
    size: int  # bytes
    tensors: int


def dequantize(artifact: Path, out: Path, dtype: str | None, device: torch.device, progress: Progress) -> Dequantized:
    """The checkpoint folder `out`, made from an artifact in `dtype` (None: that of its config; bfloat16 for GGUF).

    Raises:
        UsageError: `out` is there already, or the artifact is no quantized one.
        InputError: it is damaged, or its config names no dtype.
        NumericalError: a value does not fit float16.
    """
    kind = detect(artifact)
    if kind is None:
        raise UsageError(f"{artifact}: is not quantized; it is a checkpoint already")
    if out.exists():
        raise UsageError(f"{out}: exists; give a new folder")
    source = FORMATS[kind].read(artifact).on(device)
    raw, side = _described(artifact, source)
    name = dtype or dtype_of(raw, artifact)
    if name not in DTYPES:
        raise UsageError(f"--dtype {name}: allowed: {', '.join(DTYPES)}")
    config = raw | {"torch_dtype" if "torch_dtype" in raw else "dtype": name}
    files = {"config.json": _json(config), **side, "README.md": _card(artifact, source, name).encode()}
    shapes = source.family.shapes(source.config)
    planned = safetensors_files([(tensor, DTYPES[name], shape) for tensor, shape in shapes.items()], SHARD)
    partial, lock = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.lock")
    try:
        writes.make_folder(out.parent)
        with hold(lock, out):
            shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
            writes.make_folder(partial)
            try:
                _write(partial, planned, files, source, getattr(torch, name), progress)
                writes.rename(partial, out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise writes.failure(error, out) from error
    return Dequantized(out, sum(file.stat().st_size for file in out.iterdir()), len(shapes))


def _write(
    folder: Path,
    planned: list[PlannedFile],
    files: dict[str, bytes],
    source: ArtifactSource,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    total = sum(len(file.tensors) for file in planned)
    done = 0
    progress.advance("dequantize", 0, total)
    for file in planned:
        path = folder / file.name
        writes.create(path, file.size, file.head)
        for tensor in file.tensors:
            position = tensor.offset
            for rows in _rows(source, tensor.name, tensor.shape):
                value = rows.to(dtype).cpu().contiguous()
                if not bool(value.isfinite().all()):
                    raise NumericalError(f"{tensor.name}: holds values that {dtype} does not; give --dtype bfloat16")
                writes.put(path, position, as_bytes(value))
                position += value.nbytes
            done += 1
            progress.advance("dequantize", done, total)
            progress.check_stop()
        writes.sync(path)
    for name, content in files.items():
        writes.write_synced(folder / name, content)


def _rows(source: ArtifactSource, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A tensor; embedding and head in pieces that memory holds."""
    if len(shape) < 2 or source.family.layer_of(name) is not None:
        yield source.tensor(name)
        return
    for start in range(0, shape[0], ROWS):
        yield source.rows(name, start, min(start + ROWS, shape[0]))


def _described(artifact: Path, source: ArtifactSource) -> tuple[dict[str, Any], dict[str, bytes]]:
    """config.json without quantization, and the files beside it."""
    if isinstance(source, GgufSource):
        return _of_metadata(artifact, source)
    raw = dict(read_json(artifact / "config.json"))
    raw.pop("quantization_config", None)
    there = [name for name in SIDE_FILES if os.path.lexists(artifact / name)]
    return raw, {name: require_regular(artifact / name).read_bytes() for name in there}


def _of_metadata(artifact: Path, source: GgufSource) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Config, tokenizer and generation settings of a GGUF file, from its metadata."""
    family, value = source.family, source.header.value
    if family.transformers is None:
        raise InputError(f"{artifact}: transformers has no class for {family.model_type!r}")
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {key: value(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    ids = {key: number for key, number in ids.items() if key in TOKENS and isinstance(number, int)}
    made = transformers_config(family.transformers, source.config, ids, torch.bfloat16).to_dict()
    made |= {"architectures": [family.architecture], "tie_word_embeddings": source.config.tied, "dtype": "bfloat16"}
    tokenizer = gguf_tokenizer(artifact, source.header)
    tokens = value("tokenizer.ggml.tokens")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {key.removesuffix("_id"): tokens[number] for key, number in ids.items() if number < len(tokens)}
    side = {
        "tokenizer.json": tokenizer.to_json().encode(),
        "tokenizer_config.json": _json(settings),
        "generation_config.json": _json(ids),
    }
    if tokenizer.template is not None:
        side["chat_template.jinja"] = tokenizer.template.encode()
    return made, side


def _card(artifact: Path, source: ArtifactSource, dtype: str) -> str:
    """What a reader must know."""
    inherited = card_head((artifact if artifact.is_dir() else artifact.parent) / "README.md")
    head = {key: inherited[key] for key in KEPT if key in inherited} | {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dequantized", "qquant"],
    }
    linear = next(iter(source.family.matrices(source.config)))
    return f"""---
{yaml(head)}---

# {artifact.stem if artifact.is_file() else artifact.name}, dequantized

{dtype} weights that were computed from the quantized model `{artifact.name}` ({source.stored_as(linear)}). **They are not the original weights**: each is what
the quantized model's codes and scales stand for, so this model answers as that one does, and what quantizing lost is lost here too.

Use it where a runtime or a trainer reads no quantized weights, or to build other formats where the original is not at hand. Where it is,
start from the original.
"""


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
