"""A recipe: what to build from a checkpoint, with which calibration, and how far each artifact may fall behind.

Closed and literal: unknown keys, duplicate keys and wrong types are errors, nothing is corrected, no value is computed from another.
YAML 1.2 (ruamel.yaml: `1e-3` is a number, `no` is a string, a repeated key is an error).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

GgufType = Literal[
    "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m",
    "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs",
]  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(_Strict):
    """One origin of calibration text. Exactly one of `bundled`, `dataset`, `path`."""

    bundled: str | None = None  # a corpus of calibration/corpora, e.g. "chat-en"
    dataset: str | None = None  # a `datasets` id on the hub
    path: str | None = None  # a local .jsonl, .parquet or .txt file
    config: str | None = None  # `datasets` configuration name
    split: str = "train"
    revision: str | None = None
    field: str | None = None  # column holding the text or the messages; default: "messages", "conversations" or "text"
    kind: Literal["chat", "text"] = "text"
    weight: Annotated[float, Field(gt=0)] = 1.0  # share of the samples


class Calibration(_Strict):
    """Which tokens the model sees while it is measured."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    samples: Annotated[int, Field(ge=1, le=65536)] = 128
    length: Annotated[int, Field(ge=16, le=131072)] = 2048  # tokens per sample
    seed: Annotated[int, Field(ge=0)] = 0
    default_system_share: Annotated[float, Field(ge=0, le=1)] = 0.25  # of the chats: rendered with the template's default system turn


class Gates(_Strict):
    """How far an artifact may fall behind the 16-bit model on held-out text; None: not gated."""

    perplexity_ratio: Annotated[float, Field(ge=1)] | None = None
    kl_divergence: Annotated[float, Field(ge=0)] | None = None  # mean, nats per token
    top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = None


class _Artifact(_Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    gates: Gates = Gates()


class GptqArtifact(_Artifact):
    """AutoGPTQ v1 layout, read by transformers, vLLM, SGLang."""

    format: Literal["gptq"]
    bits: Literal[4, 8]
    group_size: Literal[32, 64, 128, -1] = 128  # -1: one group per row
    symmetric: Literal[True] = True
    desc_act: Literal[False] = False
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01  # of the mean of diag(H)
    rounding: Literal["rtn", "gptq"] = "gptq"
    scale_search: Literal["minmax", "importance"] = "importance"  # importance: weighted with diag(H), signed
    propagate: bool = False  # calibrate on the artifact's own quantized stream


class AwqArtifact(_Artifact):
    """AutoAWQ GEMM layout: 4 bit, asymmetric, scales folded into the previous operator."""

    format: Literal["awq"]
    bits: Literal[4] = 4
    group_size: Literal[32, 64, 128] = 128
    zero_point: Literal[True] = True
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    rounding: Literal["rtn", "gptq"] = "gptq"
    scale_search: Literal["minmax", "importance"] = "importance"
    ratios: Annotated[int, Field(ge=1, le=100)] = 20  # grid points of the scaling search


class GgufArtifact(_Artifact):
    """One GGUF file of llama.cpp's type mix `type`."""

    format: Literal["gguf"]
    type: GgufType
    imatrix: bool = True  # weigh errors with the importance matrix diag(H), where the type can use it
    solver: Literal["ggml", "gptq"] = "ggml"  # ggml: byte-identical to llama-quantize; gptq: error-compensated codes
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01


ArtifactSpec = Annotated[GptqArtifact | AwqArtifact | GgufArtifact, Field(discriminator="format")]


class Checks(_Strict):
    """Held-out text on which every artifact is compared with the checkpoint."""

    text: str = "bundled:wikitext-2-test"  # bundled:NAME, or a path to a text file
    windows: Annotated[int, Field(ge=1)] = 40
    length: Annotated[int, Field(ge=16, le=131072)] = 512  # tokens per window; the second half is scored, as in llama-perplexity


class Recipe(_Strict):
    """Everything `qquant build` needs besides the checkpoint itself."""

    version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    description: str = ""
    checkpoint: str | None = None  # path, hub id, or bundled:NAME; the command line overrides it
    revision: str | None = None
    calibration: Calibration
    artifacts: Annotated[tuple[ArtifactSpec, ...], Field(min_length=1)]
    checks: Checks = Checks()
    shard_size: Annotated[int, Field(ge=1_000_000)] = 4_000_000_000  # bytes per safetensors file
    gguf_split_size: Annotated[int, Field(ge=1_000_000)] = 45_000_000_000
