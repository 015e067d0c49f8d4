"""Which rank makes which artifact, and how artifacts of several ranks get their names.

    apart       an artifact is made by one rank from its beginning to its end: nothing waits for anybody, as long as all have enough to do
    together    all ranks work on every artifact, which the first writes: where one of them would have most of the work to do

Drafts and journals do not say by whom they were made, nor how, so another number of ranks continues them. Owners read back what they wrote, at the same time; then one
artifact after another gets its name, in the order of the plan, since several may join one folder, whose manifest lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from qquant import background, devices
from qquant.artifact.draft import Draft
from qquant.artifact.finishing import finished
from qquant.artifact.journal import JournalUnit
from qquant.artifact.manifest import Origin
from qquant.disk.records import to_plain, typed
from qquant.formats.planned import PlannedArtifact
from qquant.ranks import Ranks, dealt, helps

Value = TypeVar("Value")


@dataclass(frozen=True)
class OwnedArtifacts:
    """What a rank does."""

    artifacts: Sequence[PlannedArtifact]
    together: bool  # with all others, or alone

    def written(self, drafts: Sequence[Draft], ranks: Ranks) -> Sequence[Draft]:
        """The drafts that this rank writes."""
        return drafts if ranks.first or not self.together else ()


def share(
    planned: Sequence[PlannedArtifact],
    keys: Mapping[str, str],
    out: Path,
    cost: Callable[[PlannedArtifact], float],
    ranks: Ranks,
) -> OwnedArtifacts:
    """What this rank makes of the artifacts that `out` does not hold; `cost` is about the seconds that one takes.

    Raises as `finished`.
    """

    def deal() -> list[list[str]]:
        lacking = [artifact for artifact in planned if not finished(out, artifact, keys[artifact.name])]
        costs = {artifact.name: cost(artifact) for artifact in lacking}
        hands = dealt(costs, ranks.world)
        return [list(costs)] if helps(costs, hands) else hands

    hands = ranks.once(deal)
    together = len(hands) < ranks.world
    mine = hands[0 if together else ranks.rank]
    return OwnedArtifacts([artifact for artifact in planned if artifact.name in mine], together)


def drafts(
    mine: OwnedArtifacts, folder: Path, keys: Mapping[str, str], device: torch.device, ranks: Ranks
) -> list[Draft]:
    """A draft in `folder` of each artifact, new or continued, whoever began it; where all work together, the first opens and writes them.

    A GPU build opens them side by side: to be given the room of eleven artifacts of 7B takes a memory disk six seconds, and what is continued is hashed.
    """
    begun = [Draft(artifact, folder, keys[artifact.name]) for artifact in mine.artifacts]
    if ranks.first or not mine.together:
        with _by_all_cores([lambda: [draft.open for draft in begun]], device) as opened:
            list(opened)
    if mine.together:
        known = ranks.once(lambda: [[to_plain(unit) for unit in draft.units.values()] for draft in begun])
        for draft, said in zip(begun, known, strict=True):
            units = [typed(JournalUnit, unit, str(draft.journal)) for unit in said]
            draft.units = {unit.unit: unit for unit in units}
    return begun


def _by_all_cores(
    groups: Iterable[background.Tasks[Value]], device: torch.device
) -> AbstractContextManager[Iterator[list[Value]]]:
    """`background.in_parallel` where threads help a build on `device`."""
    return background.in_parallel(groups, devices.cores() if devices.threads_help(device) else 1)


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
    with _by_all_cores(groups, device) as readings:
        read = zip(drafts, readings if ranks.world == 1 else list(readings), strict=True)
        mine = {draft.plan.name for draft in drafts}
        for artifact in planned:
            if artifact.name in mine:
                draft, values = next(read)
                draft.finish(out, origin, values)
            ranks.meet()


def seconds(drafts: Sequence[Draft], ranks: Ranks) -> dict[str, dict[str, float]]:
    """Artifact -> what took how many seconds, of all ranks."""
    mine = {
        draft.plan.name: {name: took for unit in draft.units.values() for name, took in unit.seconds.items()}
        for draft in drafts
    }
    return {name: took for theirs in ranks.gather(mine) for name, took in theirs.items()}
