"""Chat templates: Jinja from strangers, rendered in a process of its own (`source.confined`).

The settings are those that transformers gives templates (an immutable sandbox, `trim_blocks`, `lstrip_blocks`, loop controls, `tojson`
without HTML escapes, `raise_exception`, `{% generation %}`), with these differences:

    random        no `random`, no `lipsum`: the same recipe gives the same tokens
    time          `strftime_now` tells one day, so that they are the same on any day
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from qquant.errors import InputError
from qquant.source.confined import Confined, Refused

SIZE_LIMIT = 200_000  # characters of a template


class Template:
    """A chat template; it is compiled when it is first rendered."""

    def __init__(self, source: str, origin: str) -> None:
        """`origin` is where `source` stands. Raises InputError if it is too long."""
        if len(source) > SIZE_LIMIT:
            raise InputError(f"{origin}: a chat template of {len(source):,} characters; the limit is {SIZE_LIMIT:,}")
        self.confined, self.origin = Confined("template", source), origin

    def render(self, many: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> list[str]:
        """The text for each of `many` sets of variables, all with the `shared` ones.

        Raises:
            InputError: the template does not parse.
            Refused: it refuses, fails, or goes beyond what its process may take; `at` says for which.
        """
        try:
            said, content = self.confined.ask("render", many=list(map(dict, many)), shared=dict(shared))
        except Refused as error:
            if error.line is None:
                raise
            raise InputError(f"{self.origin}, line {error.line}: the chat template does not parse: {error}") from None
        ends = list(accumulate(said["sizes"]))
        return [
            content[end - size : end].decode("utf-8", "surrogatepass")
            for end, size in zip(ends, said["sizes"], strict=True)
        ]
