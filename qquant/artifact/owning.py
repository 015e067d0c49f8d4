"""Which rank makes which artifact, and how artifacts of several ranks get their names.

An artifact is made by one rank from its beginning to its end, since its own stream waits for nothing but its own linears; drafts and
journals do not say by whom, so another number of ranks continues them. Owners read back what they wrote, at the same time; then one
artifact after another gets its name, in the order of the plan, since several may join one folder, whose manifest lists them.
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


def finish(
    drafts: Sequence[Draft],
    planned: Sequence[PlannedArtifact],
    out: Path,
    origin: Origin,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Read this rank's artifacts back, on a GPU build by all cores and one ahead; all ranks' become visible in the order of the plan."""
    groups = [partial(draft.readings, device) for draft in drafts]
    with background.in_parallel(groups, background.cores() if devices.threads_help(device) else 1) as found:
        read = zip(drafts, found if ranks.world == 1 else list(found), strict=True)
        mine = {draft.plan.name for draft in drafts}
        for artifact in planned:
            if artifact.name in mine:
                draft, values = next(read)
                draft.finish(out, origin, values)
            ranks.meet()


def seconds(drafts: Sequence[Draft], ranks: Ranks) -> dict[str, dict[str, float]]:
    """By artifact, of all ranks, what took how long."""
    mine = {
        draft.plan.name: {name: took for unit in draft.units.values() for name, took in unit.seconds.items()}
        for draft in drafts
    }
    return {name: took for theirs in ranks.gather(mine) for name, took in theirs.items()}
