"""The files around the weights of a model folder: what of them is not the checkpoint's, which are missing, and what they hold.

What differs counts, whatever made it: stop tokens, vocabulary, chat template. Left out: files that loaders ignore.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.resources import lazy
from qquant.source.checkpoint import Checkpoint, read_tensors
from qquant.source.untrusted import read_json

if TYPE_CHECKING:
    from qquant.calibration import tokenizer
    from qquant.calibration.tokenizer import Tokenizer
else:
    tokenizer = lazy("qquant.calibration.tokenizer")

IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
STOPS = ("generation_config.json", "config.json")


def differences(path: Path, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What of the files in folder `path` is not the checkpoint's, each with the file's name; missing ones are `missing`'s matter.

    Raises:
        InputError: a file is damaged.
    """
    found = _stops(path, checkpoint.path)
    if any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        found += _tokenizer(tokenizer.Tokenizer.open(path), tokenizer.Tokenizer.open(checkpoint.path))
    return tuple(found)


def missing(path: Path, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Files beside the checkpoint's weights that are not in folder `path`."""
    return tuple(f"{file.name}: missing" for file in checkpoint.side_files if not (path / file.name).exists())


def describe(path: Path) -> dict[str, Any]:
    """`facts` (name -> value) and `tensors` (name, shape, type, bytes) of a model folder, from headers alone."""
    config = read_json(path / "config.json")
    tensors, _ = read_tensors(path)
    facts: dict[str, Any] = {"folder": str(path), "bytes": sum(info.nbytes for info in tensors.values())}
    facts |= {
        key: value
        for key, value in config.items()
        if not isinstance(value, dict | list) or key == "quantization_config"
    }
    rows = [{"name": i.name, "shape": list(i.shape), "type": i.dtype, "bytes": i.nbytes} for i in tensors.values()]
    return {"facts": facts, "tensors": rows}


def _stops(path: Path, source: Path) -> list[str]:
    found = []
    for name in STOPS:
        if (path / name).is_file() and (source / name).is_file():
            mine, theirs = read_json(path / name), read_json(source / name)
            found += [
                f"{name}: {key} is {json.dumps(mine.get(key))}, the checkpoint's is {json.dumps(theirs.get(key))}"
                for key in IDS
                if mine.get(key) != theirs.get(key)
            ]
    return found


def _tokenizer(mine: Tokenizer, theirs: Tokenizer) -> list[str]:
    found = []
    probe = "The 3 quick brown foxes — 你好，世界 def f(x):\n    return x**2 <|im_end|>"
    same = mine.size == theirs.size and mine.special == theirs.special and mine.encode(probe) == theirs.encode(probe)
    if not same or mine.decode(range(mine.size)) != theirs.decode(range(theirs.size)):
        found.append("tokenizer: is not the checkpoint's; the same text gets other tokens")
    if mine.template is not None and mine.template != theirs.template:  # none at all is `missing`'s matter
        found.append("chat template: is not the checkpoint's")
    if set(mine.eos) != set(theirs.eos):
        found.append(f"stop tokens: {sorted(mine.eos)}, the checkpoint's are {sorted(theirs.eos)}")
    return found
