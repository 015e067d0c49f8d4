"""A checkpoint read in another dtype than its files have: a float32 one as bfloat16, so that what is not quantized takes two bytes a number.

    every tensor    as `tensor.to(dtype)` gives it, to nearest, after an adapter was merged in the dtype of the files
    config.json     says the dtype

What is built, and what it is compared with, is then the model that `save_pretrained` of the rounded weights would have given.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Literal

from qquant.source.checkpoint import Checkpoint

DTYPES = {"bfloat16": "BF16", "float16": "F16"}


def rounded(checkpoint: Checkpoint, dtype: Literal["bfloat16", "float16"] | None) -> Checkpoint:
    """`checkpoint` with every tensor in `dtype`; itself where that is its own, or None."""
    if dtype is None or DTYPES[dtype] == checkpoint.dtype:
        return checkpoint
    key = "torch_dtype" if "torch_dtype" in checkpoint.raw_config else "dtype"
    mark = f"{checkpoint.fingerprint} rounded to {dtype}"
    return replace(
        checkpoint,
        as_dtype=DTYPES[dtype],
        raw_config=dict(checkpoint.raw_config) | {key: dtype},
        fingerprint=hashlib.sha256(mark.encode()).hexdigest(),
    )
