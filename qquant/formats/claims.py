"""What an artifact says of itself that is not what our writer would have said of its checkpoint.

A fault is what some runtime reads and answers differently for: the artifact fails. A warning is what a runtime may read, takes from its
own defaults, or what nobody here knows. What changes no answer is in tables named HARMLESS, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Claims:
    """Each entry names the key, both values, and what follows."""

    faults: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __add__(self, other: Claims) -> Claims:
        """The claims of both."""
        return Claims(self.faults + other.faults, self.warnings + other.warnings)


def claims(faults: Sequence[str] = (), warnings: Sequence[str] = ()) -> Claims:
    """Claims of these faults and warnings."""
    return Claims(tuple(faults), tuple(warnings))


def differs(key: str, mine: Any, theirs: Any, consequence: str) -> str:
    """One sentence: `key` is `mine`, the checkpoint's is `theirs`, and what follows."""
    return f"{key} is {shown(mine)}, the checkpoint's is {shown(theirs)}: {consequence}"


def shown(value: Any) -> str:
    """A value on one line, cut."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
