"""Whether texts share a run: 8 words, or 24 letters of a script that puts no spaces between words."""

import re
import unicodedata

RUN_WORDS, RUN_LETTERS = 8, 24
UNSPACED = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


def words(text: str) -> list[str]:
    """The words of a text: runs of letters, marks and digits, in small letters."""
    table = {ord(c): " " for c in set(text) if unicodedata.category(c)[0] not in "LMN"}
    return text.translate(table).lower().split()


def runs(text: str, of_words: int = RUN_WORDS, of_letters: int = RUN_LETTERS) -> set[int]:
    """Hashes of all runs of a text."""
    spaced = words(text)
    found = {hash(tuple(spaced[i : i + of_words])) for i in range(len(spaced) - of_words + 1)}
    letters = "".join(UNSPACED.findall(text))
    return found | {hash(letters[i : i + of_letters]) for i in range(len(letters) - of_letters + 1)}


class Runs:
    """The runs of many texts."""

    def __init__(self) -> None:
        self.found: set[int] = set()

    def add(self, text: str) -> None:
        """Add the runs of a text."""
        self.found |= runs(text)

    def shared(self, text: str) -> int:
        """How many runs of `text` are known."""
        return len(runs(text) & self.found)
