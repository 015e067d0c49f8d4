"""Files of strangers, read within bounds: JSON, text and paths that come with a checkpoint, an adapter or an artifact.

    require_regular  a file of the folder it stands in: no pipe, no device, no link out of the folder; links of a hub cache
                     (snapshots/REVISION/NAME -> ../../blobs/HASH) are the exception, since downloads are made of them
    read_json        at most JSON_LIMIT bytes, ITEM_LIMIT items, DEPTH_LIMIT levels; no repeated name, no NaN, no lone surrogate
    refuse_hooks     no key that makes a loader run code of the checkpoint or fetch it

Every refusal is one InputError that names the file. Left out: a folder that is changed by somebody else while it is read.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qquant.errors import InputError

JSON_LIMIT = 25_000_000  # bytes
TEXT_LIMIT = 25_000_000  # bytes
ITEM_LIMIT = 4_000_000  # commas and brackets of a JSON text, in strings too; Qwen's tokenizer.json has a million
DEPTH_LIMIT = 32
NAME_LIMIT = 255  # bytes of a file name
PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
HOOKS = {
    "auto_map", "auto_mapping", "custom_generate", "custom_object_save", "custom_pipelines", "trust_remote_code",
    "transformers_weights", "_attn_implementation_internal", "_experts_implementation_internal", "kernel_config",
}  # fmt: skip
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def require_regular(path: Path) -> Path:
    """`path`, if it is a regular file, or a hub cache's link to one.

    Raises:
        InputError: missing, a pipe or device, or a link that leaves the folder.
    """
    try:
        if stat.S_ISLNK(path.lstat().st_mode):
            folder, real = path.parent.resolve(), path.resolve(strict=True)
            blobs = folder.parent.parent / "blobs"
            cached = folder.parent.name == "snapshots" and real.parent == blobs
            if not cached and not real.is_relative_to(folder):
                raise InputError(f"{path}: is a link out of its folder, to {real}. Put the file itself there")
        kind = path.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise InputError(f"{path}: not found ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(kind):
        raise InputError(f"{path}: is not a regular file")
    return path


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` that refuses a repeated key."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"repeated name {name[:80]!r}")
            seen.add(name)
    return result


def _integer(text: str) -> int | float:
    """-0 is no integer to readers in other languages."""
    return -0.0 if text == "-0" else int(text)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def parse_json(data: bytes, items: int = ITEM_LIMIT) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: not JSON, or beyond the bounds above.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > items:
        raise ValueError(f"more than {items:,} items")
    text = data.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=_no_constant, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH_LIMIT} levels") from None
    if "\\u" in text and _holds_surrogate(value):
        raise ValueError("half of a surrogate pair in a string")
    _require_shallow(value)
    return value


def _holds_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        return True
    return False


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH_LIMIT):
        level = [
            item
            for inner in level
            if type(inner) in (dict, list)
            for item in (inner.values() if type(inner) is dict else inner)
            if type(item) in (dict, list)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {DEPTH_LIMIT} levels")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON mapping in a file.

    Raises:
        InputError: missing, not a regular file, beyond the bounds, malformed, or not a mapping.
    """
    try:
        value = parse_json(_read(path, JSON_LIMIT))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}. Copy the file again from where it came") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON mapping")
    return value


def read_text(path: Path) -> str:
    """The UTF-8 text in a file.

    Raises:
        InputError: missing, not a regular file, too large, or not UTF-8.
    """
    try:
        return _read(path, TEXT_LIMIT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: no UTF-8 text ({error})") from None


def _read(path: Path, limit: int) -> bytes:
    with require_regular(path).open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes; the limit is {limit:,}")
    return data


def refuse_hooks(content: Mapping[str, Any], where: str) -> None:
    """Raise InputError if a config, at any depth, asks its loader to run code or to fetch something."""
    rest: list[Any] = [content]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest += value
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                fetched = key in IMPLEMENTATIONS and isinstance(inner, str) and "/" in inner
                if (key in HOOKS and inner not in (None, False)) or fetched:
                    raise InputError(
                        f"{where}: {key} asks to run code of the checkpoint; qquant does not. Remove the key"
                    )
                rest.append(inner)
