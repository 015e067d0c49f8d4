"""What a user asks to be built: a checkpoint, a recipe by name, file or flags, and what fits where nothing was said.

Where no recipe is named, the published one that fits the checkpoint is proposed: `qwen1.5-chat` if its chat template ends answers with
a token on which its generation stops, else `qwen1.5-base`. (The base models of Qwen1.5 carry the chat template too, and do not stop
on it.) Needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qquant import recipe as recipes
from qquant.calibration import Tokenizer
from qquant.errors import InputError, UsageError
from qquant.recipe import Recipe
from qquant.recipe.changes import Flags, changed
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import padded
from qquant.source.rounding import rounded

CHAT, BASE = "qwen1.5-chat", "qwen1.5-base"
TURNS = ("messages", "conversations")  # columns that hold chats
GENERATED = "generated"  # instead of a file: what the checkpoint writes itself
HEAD = 1 << 20  # bytes of a text that are looked at


@dataclass(frozen=True)
class Proposal:
    """A bundled recipe, and why it fits."""

    name: str
    reason: str


@dataclass(frozen=True)
class Asked:
    """A checkpoint and what is to be made of it."""

    checkpoint: str | None = None
    recipe: str | Path | Recipe | None = None
    revision: str | None = None
    adapter: Path | None = None
    flags: Flags = field(default_factory=Flags)
    calibration: tuple[Path, ...] = ()  # texts or chats of the user, instead of the recipe's

    @property
    def reference(self) -> str:
        """Path or hub id of the checkpoint, by the command or by the recipe.

        Raises UsageError where neither says one.
        """
        if self.checkpoint is not None:
            return self.checkpoint
        if self.recipe is None:
            raise UsageError("give a checkpoint: a folder, or a hub id such as Qwen/Qwen1.5-0.5B-Chat")
        recipe = _loaded(self.recipe)
        if recipe.checkpoint is None:
            raise UsageError(f"recipe {recipe.name} names no checkpoint; give one: a folder, or a hub id")
        return recipe.checkpoint

    def proposal(self) -> Proposal | None:
        """The recipe to use where none was named; None if one was."""
        if self.recipe is not None:
            return None
        return proposed(Checkpoint.open(self.reference, self.revision).path)

    def wanted(self) -> Recipe:
        """The recipe as the flags change it; where none was named, the one that fits the checkpoint.

        Raises UsageError where it is not valid.
        """
        proposal = self.proposal()
        base = recipes.load(proposal.name) if proposal else _loaded(self.recipe or BASE)
        sources = tuple(map(self._source, self.calibration))
        return changed(base, dataclasses.replace(self.flags, sources=sources) if sources else self.flags)

    def _source(self, path: Path) -> dict[str, Any]:
        """A file as a source of calibration, or the checkpoint itself."""
        if str(path) != GENERATED or path.exists():
            return {"path": str(path), "kind": kind_of_text(path)}
        folder = Checkpoint.open(self.reference, self.revision).path
        return {"generated": True, "kind": "chat" if proposed(folder).name == CHAT else "text"}

    def open(self) -> tuple[Recipe, Checkpoint]:
        """The recipe, and the checkpoint with its adapter, rounded and padded as the recipe says.

        Raises:
            UsageError: the recipe, or what the flags make of it, is not valid.
            InputError, EnvironmentMissingError: as `Checkpoint.open`.
        """
        wanted = self.wanted()
        checkpoint = Checkpoint.open(self.reference, self.revision or wanted.revision, self.adapter)
        return wanted, padded(rounded(checkpoint, wanted.dtype), wanted)


def _loaded(recipe: str | Path | Recipe) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else recipes.load(recipe)


def proposed(folder: Path) -> Proposal:
    """The published recipe that fits the checkpoint in `folder`."""
    tokenizer = Tokenizer.open(folder)
    if tokenizer.template is None:
        return Proposal(BASE, "it has no chat template")
    try:
        end = tokenizer.end_of_turn
    except InputError:
        return Proposal(BASE, "its chat template does not end answers with a token on which generation stops")
    return Proposal(CHAT, f"its chat template ends answers with {tokenizer.decode([end])}, on which generation stops")


def kind_of_text(path: Path) -> str:
    """`chat` for JSON lines whose first row has a list of messages, else `text`; what is wrong with the file is said when it is read."""
    if path.suffix != ".jsonl" or not path.is_file():
        return "text"
    with path.open("rb") as file:
        line = file.readline(HEAD)
    try:
        row: Any = json.loads(line)
    except ValueError:
        return "text"
    return "chat" if isinstance(row, dict) and any(isinstance(row.get(key), list) for key in TURNS) else "text"
