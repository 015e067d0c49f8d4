"""What a GGUF file holds besides weights: its metadata against the checkpoint's files, and all of it for people."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.formats.gguf import types
from qquant.formats.gguf.container import Header, nbytes, read_header
from qquant.formats.gguf.shards import parts, read_model
from qquant.resources import lazy
from qquant.source.checkpoint import Checkpoint
from qquant.source.vocabulary import read

if TYPE_CHECKING:
    from qquant.calibration import tokenizer
else:
    tokenizer = lazy("qquant.calibration.tokenizer")

LONG = 8  # array values shown


def differences(path: Path, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What of a file's metadata is not the checkpoint's, each with its key.

    Raises:
        InputError: the file is damaged.
    """
    ours, theirs = tokenizer.Tokenizer.open(checkpoint.path), read(checkpoint.path)
    fields: dict[str, Any] = {entry.key: entry.value for entry in read_model(path).fields.values()}
    found = []
    eos = fields.get("tokenizer.ggml.eos_token_id")
    if eos is not None and eos not in ours.eos:
        found.append(f"tokenizer.ggml.eos_token_id is {eos}, the checkpoint stops on {sorted(ours.eos)}")
    tokens, merges = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.merges")
    known = dict(theirs.tokens) | {token.content: token.id for token in theirs.added}
    if tokens is not None and any(index >= len(tokens) or tokens[index] != token for token, index in known.items()):
        found.append("tokenizer.ggml.tokens: is not the checkpoint's vocabulary")
    if merges is not None and list(merges) != [" ".join(pair) for pair in theirs.merges]:
        found.append("tokenizer.ggml.merges: are not the checkpoint's; the same text gets other tokens")
    template = fields.get("tokenizer.chat_template")
    if template is not None and ours.template is not None and template != ours.template:
        found.append("tokenizer.chat_template: is not the checkpoint's")
    return tuple(found)


def describe(path: Path) -> dict[str, Any]:
    """`facts` (name -> value) and `tensors` (name, shape, type, bytes) of the whole model, if all of its parts are there; else of this file."""
    files = parts(path)
    whole = all(file.is_file() for file in files)
    header = read_model(path) if whole else read_header(path)
    if not whole:
        files = (path,)
    facts: dict[str, Any] = {"file": str(files[0])} | ({"parts": len(files)} if len(files) > 1 else {})
    facts["bytes"] = sum(file.stat().st_size for file in files)
    for field in header.fields.values():
        array = field.kind.startswith("[")
        facts[field.key] = f"{field.kind} of {len(field.value)}: {field.value[:LONG]}" if array else field.value
    tensors = [row for file in files for row in _rows(file, header)]
    weights = sum(math.prod(row["shape"]) for row in tensors)
    if weights:
        facts["bits per weight"] = round(8 * sum(row["bytes"] for row in tensors) / weights, 3)
    return {"facts": facts, "tensors": tensors}


def _rows(file: Path, header: Header) -> list[dict[str, Any]]:
    """The tensors of `file` in the order of their data."""
    kinds = {kind.ggml_id: kind.name for kind in types.TYPES.values()}
    ordered = sorted((t for t in header.tensors.values() if t.path == file), key=lambda tensor: tensor.offset)
    return [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "type": kinds.get(tensor.type_id, f"type {tensor.type_id}"),
            "bytes": nbytes(tensor),
        }
        for tensor in ordered
    ]
