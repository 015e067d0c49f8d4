"""On how many tensor-parallel ranks an artifact can be served: whole heads and whole groups on each."""

from __future__ import annotations

from qquant.families import ModelConfig
from qquant.recipe import ArtifactSpec
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import RANKS, narrow


def rank_sizes(checkpoint: Checkpoint, spec: ArtifactSpec) -> dict[str, list[int]]:
    """Numbers of ranks that each server accepts, and what they would be without padding; both want whole heads and groups."""
    after, before = (list(parallel_sizes(one.config, spec.group)) for one in (checkpoint, narrow(checkpoint)))
    return {"vllm": after, "sglang": after, "without_padding": before}


def parallel_sizes(config: ModelConfig, group: int) -> tuple[int, ...]:
    """Tensor-parallel sizes at which every rank holds whole heads and whole groups of the MLP.

    Key-value heads are repeated where there are fewer than ranks, so only one number has to divide the other.
    """
    return tuple(
        ranks
        for ranks in RANKS
        if config.heads % ranks == 0
        and (config.kv_heads % ranks == 0 or ranks % config.kv_heads == 0)
        and config.intermediate % (ranks * group) == 0
        and config.heads * config.head_dim % (ranks * group) == 0
    )
