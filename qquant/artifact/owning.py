"""Which rank makes which artifact, and how artifacts of several ranks get their names.

An artifact is made by one rank from its beginning to its end, since its own stream waits for nothing but its own linears; drafts and
journals do not say by whom, so another number of ranks continues them. Owners read back what they wrote, at the same time; then one rank
after another gives names, since several artifacts may join one folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from qquant import background, devices
from qquant.artifact.draft import Draft
from qquant.artifact.finishing import finished
from qquant.artifact.manifest import Origin
from qquant.formats.planned import PlannedArtifact
from qquant.ranks import Ranks, dealt


def share(
    planned: Sequence[PlannedArtifact],
    keys: Mapping[str, str],
    out: Path,
    cost: Callable[[PlannedArtifact], float],
    ranks: Ranks,
) -> list[PlannedArtifact]:
    """What this rank makes of the artifacts that `out` does not hold; `cost` is about the seconds that one takes.

    Raises as `finished`.
    """

    def deal() -> list[list[str]]:
        lacking = [artifact for artifact in planned if not finished(out, artifact, keys[artifact.name])]
        return dealt({artifact.name: cost(artifact) for artifact in lacking}, ranks.world)

    mine = ranks.once(deal)[ranks.rank]
    return [artifact for artifact in planned if artifact.name in mine]


def draft(artifact: PlannedArtifact, folder: Path, key: str) -> Draft:
    """A draft in `folder`, new or continued, whoever began it."""
    begun = Draft(artifact, folder, key)
    begun.open()
    return begun


def finish(drafts: Sequence[Draft], out: Path, origin: Origin, device: torch.device, ranks: Ranks) -> None:
    """Read the artifacts back, on a GPU build by all cores and one artifact ahead, and make them visible one after another."""
    groups = [partial(draft.readings, device) for draft in drafts]
    with background.in_parallel(groups, background.cores() if devices.threads_help(device) else 1) as results:
        read = results if ranks.world == 1 else list(results)
        with ranks.in_turn():
            for draft, values in zip(drafts, read, strict=True):
                draft.finish(out, origin, values)


def seconds(drafts: Sequence[Draft], ranks: Ranks) -> dict[str, dict[str, float]]:
    """By artifact, of all ranks, what took how long."""
    mine = {
        draft.plan.name: {name: took for unit in draft.units.values() for name, took in unit.seconds.items()}
        for draft in drafts
    }
    return {name: took for theirs in ranks.gather(mine) for name, took in theirs.items()}
