"""The tokenizer in the metadata of a GGUF file.

Tokens, their types and merges are the whole of a byte-level BPE, and Qwen's way to cut text into words before it is the one that llama.cpp
calls `qwen2`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qquant.calibration.tokenizer import Backend, Tokenizer, qwen, require_ids
from qquant.errors import InputError
from qquant.formats.gguf.container import Header
from qquant.formats.gguf.metadata import CONTROL, NORMAL, USER_DEFINED
from qquant.source.vocabulary import AddedToken, checked

KINDS = {"tokens": "[str]", "merges": "[str]", "token_type": "[i32]"}


def gguf_tokenizer(path: Path, header: Header) -> Tokenizer:
    """The tokenizer in the metadata of a GGUF file.

    Raises:
        InputError: it has none, another kind than Qwen's, or a malformed one.
    """
    kind = header.value("tokenizer.ggml.model"), header.value("tokenizer.ggml.pre")
    arrays = {key: _array(path, header, key) for key in KINDS}
    tokens, merges, kinds = arrays.values()
    if not tokens:
        raise InputError(f"{path}: has no tokens (tokenizer.ggml.tokens). Take a file with a tokenizer")
    if kind != ("gpt2", "qwen2"):
        raise InputError(f"{path}: its tokenizer is {kind[0]!r}/{kind[1]!r}; qquant runs 'gpt2'/'qwen2', Qwen1.5's")
    if len(kinds) != len(tokens):
        raise InputError(
            f"{path}: {len(tokens):,} tokens and {len(kinds):,} entries of tokenizer.ggml.token_type; expected one for each"
        )
    normal = {token: number for number, token in enumerate(tokens) if kinds[number] == NORMAL}
    if len(normal) != kinds.count(NORMAL):
        raise InputError(f"{path}: {kinds.count(NORMAL) - len(normal):,} tokens stand in tokenizer.ggml.tokens twice")
    added = [
        AddedToken(number, token, kinds[number] == CONTROL)
        for number, token in enumerate(tokens)
        if kinds[number] in (CONTROL, USER_DEFINED)
    ]
    vocab = checked(path, normal, merges, added)
    backend = Backend(qwen(vocab), str(path))
    require_ids(backend, vocab)
    eos, template = header.value("tokenizer.ggml.eos_token_id"), header.value("tokenizer.chat_template")
    config = {"chat_template": template}
    if isinstance(eos, int) and 0 <= eos < len(tokens):
        config["eos_token"] = tokens[eos]
    return Tokenizer(path, backend, config)


def _array(path: Path, header: Header, key: str) -> list[Any]:
    field = header.fields.get(f"tokenizer.ggml.{key}")
    if field is None:
        return []
    if field.kind != KINDS[key]:
        raise InputError(f"{path}: tokenizer.ggml.{key} is of kind {field.kind}; expected {KINDS[key]}")
    return list(field.value)
