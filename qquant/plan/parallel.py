"""On how many tensor-parallel ranks an artifact can be served: whole heads and whole groups on each."""

from __future__ import annotations

from qquant.families import Family, ModelConfig
from qquant.recipe import ArtifactSpec
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import RANKS, without_padding


def rank_sizes(checkpoint: Checkpoint, spec: ArtifactSpec) -> dict[str, list[int]]:
    """Numbers of ranks that each server accepts, and what they would be without padding; both want whole heads and groups."""
    family = checkpoint.family
    after, before = (
        list(parallel_sizes(family, one.config, spec.group)) for one in (checkpoint, without_padding(checkpoint))
    )
    return {"vllm": after, "sglang": after, "without_padding": before}


def parallel_sizes(family: Family, config: ModelConfig, group: int) -> tuple[int, ...]:
    """Tensor-parallel sizes at which every rank holds whole heads, and whole groups of what is summed into the residual stream.

    Key-value heads are repeated where there are fewer than ranks, so only one number has to divide the other.
    """
    shared = {
        family.inputs(config, layer)[stage.name]
        for layer in range(config.layers)
        for stage in family.stages
        if stage.into_residual
    }
    return tuple(
        ranks
        for ranks in RANKS
        if config.heads % ranks == 0
        and (config.kv_heads % ranks == 0 or ranks % config.kv_heads == 0)
        and all(columns % (ranks * group) == 0 for columns in shared)
    )
