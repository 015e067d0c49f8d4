"""Tables of pages that are written from the code; `make map` (`python -m tests.worlds.house`) writes them again.

The rooms in `qquant/README.md`, from the first sentences of the files; the fields in `recipes/README.md`, from the models of a recipe.
"""

import ast
import re

from qquant import recipe
from tests.worlds import ROOT

README = ROOT / "qquant" / "README.md"
RECIPES = ROOT / "recipes" / "README.md"
FIELDS = "\n### Recipe\n"  # the first of the tables of fields, with which the page ends
BEGIN, END = "<!-- map: begin -->\n", "<!-- map: end -->"
ROOMS = (
    "cli", "checks", "release", "release/hub", "runtime", "solve", "artifact", "plan", "formats", "formats/gguf", "calibration", "source",
    "algorithms", "report", "families", "kernels", "recipe", "disk",
)  # fmt: skip


def charge(path):
    """What a file or folder is for: the first sentence of its head."""
    head = ast.get_docstring(ast.parse(path.read_text())) or ""
    sentence = re.split(r"\n\n|(?<=[.:])\s+(?=[A-Z\n])|\n    ", head, maxsplit=1)[0]
    return " ".join(sentence.split()).rstrip(".:").replace("|", "\\|")


def table():
    """Markdown: a line for every room and file."""
    package = ROOT / "qquant"
    lines = ["| room or file | charge |", "|---|---|"]
    for room in ROOMS:
        lines.append(f"| **`{room}/`** | **{charge(package / room / '__init__.py')}** |")
        files = sorted(path for path in (package / room).glob("*.py") if not path.name.startswith("__"))
        lines += [f"| `{path.name}` | {charge(path)} |" for path in files]
    lines.append("| **beside them** | |")
    files = sorted(path for path in package.glob("*.py") if not path.name.startswith("__"))
    lines += [f"| `{path.name}` | {charge(path)} |" for path in files]
    return "\n".join(lines) + "\n"


def written(text):
    """`text` with the table between its marks."""
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start] + table() + text[end:]


def with_fields(text):
    """`text` with the tables of fields at its end."""
    return text[: text.index(FIELDS) + 1] + recipe.reference()


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
    RECIPES.write_text(with_fields(RECIPES.read_text()))
