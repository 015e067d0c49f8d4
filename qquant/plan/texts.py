"""What the texts of a recipe give, before any work: whether the user's files are there, and where they hold less than was asked for.

Files of the user up to READ bytes are read and tokenized; of larger ones, and of what is bundled, only the size is compared: a byte-level
tokenizer makes at most one token of a byte. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qquant import calibration
from qquant.calibration import Tokenizer
from qquant.calibration.sources import corpora, heldout_texts
from qquant.errors import InputError
from qquant.recipe import Calibration, Checks, Recipe, Source

READ = 2 << 20  # bytes of a user's file that are tokenized while planning
PACKED = (".gz", ".parquet", ".zst")  # files whose size says nothing of their text


@dataclass(frozen=True)
class PlannedTexts:
    """What was found: windows of the held-out text (None: not counted), and what a user should know."""

    windows: int | None
    warnings: tuple[str, ...] = ()
    refused: str = ""  # why a build will refuse its calibration; a warning of a plan, too
    tokens: int | None = None  # that the sources of the calibration have, at most; None: as many as were asked for

    def require(self) -> None:
        """Raise InputError if a build would refuse its calibration: what was found out is not tried again."""
        if self.refused:
            raise InputError(self.refused)

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with no more samples than its texts have."""
        asked = recipe.calibration
        if self.tokens is None:
            return recipe
        samples = min(asked.samples, max(1, -(-self.tokens // asked.length)))
        return recipe.model_copy(update={"calibration": asked.model_copy(update={"samples": samples})})


NOT_COUNTED = PlannedTexts(None)


def examine(recipe: Recipe, folder: Path) -> PlannedTexts:
    """What the recipe's texts give with the tokenizer in `folder`.

    Raises:
        InputError: a file of the recipe is not there, or cannot be read as what the recipe says.
    """
    for source in recipe.calibration.sources:
        _require_file(source.path or source.openings, "calibration.sources")
    for text in (recipe.checks.text, *recipe.checks.texts):
        _require_file(None if text.startswith("bundled:") else text, "checks")
    template, unfit = _template(recipe.calibration, folder)
    counted, refused, tokens = ((), unfit, None) if unfit else _calibration(recipe.calibration, folder)
    windows, short = _windows(recipe.checks, folder)
    return PlannedTexts(windows, (*template, *counted, *short), refused, tokens)


def shortfall(samples: int, tokens: int, asked: Calibration) -> tuple[str, ...]:
    """One line where a calibration gives fewer samples than were asked for; chats shorter than `length` alone are none."""
    if samples >= asked.samples:
        return ()
    wanted = asked.samples * asked.length
    counts = f"{samples:,} of {asked.samples:,} samples, {tokens:,} of {wanted:,} tokens"
    why = "the texts have no more, and nothing is repeated. Give more text, or lower calibration.samples"
    return (f"calibration: {counts}: {why}",)


def _require_file(path: str | None, key: str) -> None:
    if path is not None and not Path(path).is_file():
        raise InputError(
            f"{path}: not found, and {key} of the recipe names it; relative paths start in the working directory"
        )


def _template(asked: Calibration, folder: Path) -> tuple[tuple[str, ...], str]:
    """(what is wrong with the chat template, why a build will refuse it): chats cannot calibrate then, and no runtime knows where an answer ends."""
    tokenizer = Tokenizer.open(folder)
    if tokenizer.template is None:
        return (), ""
    try:
        _ = tokenizer.end_of_turn
    except InputError as error:
        chats = any(source.kind == "chat" for source in asked.sources)
        what = (
            "the build will refuse to calibrate on chats"
            if chats
            else "answers in chats will not end with their turn, and GGUF files get no template for Ollama"
        )
        return (f"{what}: {error}",), str(error) if chats else ""
    return (), ""


def _bytes(text: str | None, bundled: str | None) -> int | None:
    """Bytes of a text, if they say how much text it is."""
    if bundled is not None:
        bundled_text = {**corpora(), **heldout_texts()}.get(bundled)
        return bundled_text.size if bundled_text else None
    if text is None or Path(text).suffix.lower() in PACKED:
        return None
    return Path(text).stat().st_size


def _windows(checks: Checks, folder: Path) -> tuple[int | None, tuple[str, ...]]:
    name = checks.text
    bundled = name.removeprefix("bundled:") if name.startswith("bundled:") else None
    size = _bytes(name, bundled)
    if size is None:
        return None, ()
    tokens = size
    if bundled is None and size <= READ:
        tokens = len(calibration.heldout(name, Tokenizer.open(folder))[0])
    windows = tokens // checks.length
    if windows == 0:
        raise InputError(f"{name}: {tokens:,} tokens are less than one window of {checks.length}. Lower checks.length")
    if windows >= checks.windows:
        return (windows if bundled is None else None), ()
    return windows, (f"{name}: {windows} of {checks.windows} windows of {checks.length} tokens: the text has no more",)


def _calibration(asked: Calibration, folder: Path) -> tuple[tuple[str, ...], str, int | None]:
    """(what is short, why a build will refuse the calibration, tokens that the sources have where they are fewer than asked for)."""
    sizes = [_bytes(source.path, source.bundled) for source in asked.sources]
    if any(size is None for size in sizes):
        return (), "", None
    if all(_small(source, size) for source, size in zip(asked.sources, sizes, strict=True)):
        try:
            samples = calibration.load(asked, Tokenizer.open(folder), template_expected=False)
        except InputError as error:
            return (f"the build will refuse the calibration: {error}",), str(error), None
        count, tokens = samples.from_sources()
        return shortfall(count, tokens, asked), "", tokens
    total = sum(size or 0 for size in sizes)
    if total >= asked.samples * asked.length:
        return (), "", None
    return shortfall(min(asked.samples - 1, total // asked.length), total, asked), "", total


def _small(source: Source, size: int | None) -> bool:
    return source.path is not None and (size or 0) <= READ
