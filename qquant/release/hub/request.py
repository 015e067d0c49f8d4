"""What every destination of a release has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qquant.release.repository import Repository

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """A release that is to be published, and how."""

    namespace: str
    tag: str = "v1"
    private: bool = False
    pull_request: bool = False
    merge: bool = True
    collection: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Published:
    """A repository as it is visible after publishing."""

    repository: str
    revision: str | None  # commit of main; None where nothing was done
    uploaded: tuple[str, ...] = ()
    state: str = "published"  # or "unchanged", "planned", "waiting"


class Destination(Protocol):
    """A place where a release goes: a hub, or a folder."""

    def publish(self, repositories: Sequence[Repository], request: Request) -> list[Published]:
        """Make them visible, all or none of each.

        Raises:
            PublishError: the message says what is visible.
        """
        ...
