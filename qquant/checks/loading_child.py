"""The child of `loading`: what a clean process reads of artifacts, a part after the other, and what it says of each on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.checks.loading import COPIES, size_of
from qquant.families import FAMILIES, family_of
from qquant.source.checkpoint import read_config

if TYPE_CHECKING:
    import torch

TOKENS = 32  # of the forward pass, from all over the vocabulary
TEXT = "The 3 quick brown foxes — 你好，世界 def f(x):\n    return x**2"
TOKENIZERS = ("tokenizer.json", "vocab.json")


def metadata(path: Path) -> dict[str, Any]:
    """What transformers reads besides the weights; whatever goes wrong is raised. What was read, for people."""
    import transformers

    if path.is_dir() and family_of(read_config(path), str(path / "config.json")).transformers is None:
        return {"tokens": 0}  # no program but ours reads it
    folder, where = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **where)
    ids: list[int] = []
    if where or any((folder / name).is_file() for name in TOKENIZERS):
        ids = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **where)(TEXT).input_ids
        if not ids or max(ids) >= config.vocab_size:
            raise ValueError(f"the tokenizer makes {ids} of {TEXT!r}, the vocabulary has {config.vocab_size}")
    if (folder / "generation_config.json").is_file():
        transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return {"tokens": len(ids)}


def weights(path: Path, children: int = 1, device: str = "cpu") -> dict[str, Any]:
    """A forward pass of the model, or the part of it that fits; whatever goes wrong is raised. What was loaded, for people.

    `children`: that load artifacts at this time, each of which may take its part of the free memory. `device`: where; on the CPU
    instead where a GPU cannot be had, or is short of memory.
    """
    import torch

    if device != "cpu":
        with contextlib.suppress(torch.OutOfMemoryError):
            if _there(device):
                return _whole(path, device)
        torch.cuda.empty_cache()
    if COPIES * children * size_of(path) > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return _first_block(path)
    return _whole(path, "cpu")


def _there(device: str) -> bool:
    """Whether a GPU takes another process, which a driver may refuse."""
    import torch

    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        return False
    return True


def _whole(path: Path, device: str) -> dict[str, Any]:
    """A forward pass on `device`."""
    import torch

    from qquant.runtime import loading

    began = time.monotonic()
    model = loading.load(path, device)
    loaded, vocabulary = time.monotonic() - began, int(model.config.vocab_size)
    ids = torch.linspace(0, vocabulary - 1, TOKENS).long()[None].to(device)
    with torch.no_grad():
        logits = model(ids).logits[0, -1].float().cpu()
    if len(logits) < vocabulary:
        raise ValueError(f"{len(logits)} logits, the vocabulary has {vocabulary}")
    _require_finite(logits, "whole model")
    answered = time.monotonic() - began - loaded
    return {"loaded": "whole model", "on": device, "load": round(loaded, 2), "answer": round(answered, 2)}


def _first_block(path: Path) -> dict[str, Any]:
    """Values of the first block and of some rows of the head, on the CPU."""
    import torch

    from qquant.artifact.opening import open_weights

    source = open_weights(path)
    tensors = [source.tensor(name) for name in source.family.block_shapes(source.config, 0)]
    values = [tensor.flatten().float() for tensor in (*tensors, source.rows(source.family.head, 0, 64))]
    _require_finite(torch.cat(values), "first block")
    return {"loaded": "first block"}


def _require_finite(values: torch.Tensor, what: str) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{what}: values that are not finite")


def tokens(path: Path) -> dict[str, Any]:
    """What transformers' tokenizer makes of the texts in the file `path`; nothing where it has none for the family."""
    import transformers

    asked = json.loads(path.read_text("utf-8"))
    folder = Path(asked["folder"])
    if family_of(read_config(folder), str(folder / "config.json")).transformers is None:
        return {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return {"ids": tokenizer(asked["texts"], add_special_tokens=False, verbose=False).input_ids}


def _waited() -> list[str]:
    """What a child is asked for that was started before; it imports meanwhile what it will need."""
    with contextlib.suppress(ImportError):  # who needs it says so
        import torch
        import torch._dynamo  # which operators import when they are called first
        import transformers

        from qquant.runtime import loading  # noqa: F401

        for name in ("AutoConfig", "AutoTokenizer", "GenerationConfig", *_models()):
            getattr(transformers, name)
    threads, *words = json.loads(sys.stdin.readline() or "[null, 0, 0]")
    if threads:
        torch.set_num_threads(threads)
    return [str(word) for word in words]


def _models() -> list[str]:
    """The names of transformers' classes for our families."""
    return [family.transformers.model for family in FAMILIES.values() if family.transformers]


def main() -> None:
    """The child: a line for each part that loads; the first that does not ends it."""
    children, device, *words = sys.argv[1:] if sys.argv[1:] != ["-"] else _waited()
    load = {"metadata": metadata, "weights": lambda path: weights(path, int(children), device), "tokens": tokens}
    for what, path in zip(words[::2], words[1::2], strict=True):
        said = load[what](Path(path))
        sys.stdout.write(json.dumps({"path": path} | said) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
