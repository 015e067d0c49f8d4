"""The house is as its map says, and no room grew over its walls."""

import ast
import re
import subprocess
import tomllib

import pytest

from qquant.families import FAMILIES
from qquant.formats import FORMATS
from tests.worlds import ROOT, house

LIMIT = 400


@pytest.fixture(scope="module")
def sizes():
    return {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (ROOT / "qquant").rglob("*.py")}


@pytest.fixture(scope="module")
def allowed():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["qquant"]["longer"]


def test_the_map_is_what_the_files_say():
    text = house.README.read_text()
    assert text == house.written(text), "run `make map`"


def test_every_room_is_on_the_map():
    folders = {str(path.parent.relative_to(ROOT / "qquant")) for path in (ROOT / "qquant").rglob("__init__.py")} - {"."}
    assert folders == set(house.ROOMS)


def test_files_have_at_most_400_lines_or_a_reason(sizes, allowed):
    over = {name: lines for name, lines in sizes.items() if lines > LIMIT and name not in allowed}
    assert not over, f"split them, or give a reason under [tool.qquant.longer] in pyproject.toml: {over}"


def test_reasons_are_of_files_that_need_them(sizes, allowed):
    assert {name for name in allowed if sizes.get(name, 0) <= LIMIT} == set()
    assert all(len(reason) > 20 for reason in allowed.values())


def test_tests_mirror_the_package():
    rooms = {
        path.name for path in (ROOT / "qquant").iterdir() if path.is_dir() and not path.name.startswith(("_", "."))
    }
    there = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith(("_", "."))}
    assert there - rooms <= {"worlds", "golden", "oracles", "bench", "fuzz"}
    assert rooms - there <= {"plan", "disk"}, "their tests are those of builds"


def _texts(node):
    """The texts that a constant or a literal collection of them is."""
    parts = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def _asked(tree):
    """Texts that a file compares something with, or asks a name to end with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and not isinstance(node.left, ast.Constant):
            for operand in node.comparators:
                yield from _texts(operand)
        elif isinstance(node, ast.MatchValue):
            yield from _texts(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "endswith":
            yield from (text for argument in node.args for text in _texts(argument))


def test_nobody_but_formats_asks_for_a_format_by_its_name():
    """Entries and formats answer for themselves; names end in .gguf where the command line opens what somebody typed."""
    wanted = {*FORMATS, ".gguf"}
    found = {}
    for path in (ROOT / "qquant").rglob("*.py"):
        name = str(path.relative_to(ROOT / "qquant"))
        if not name.startswith("formats/") and (texts := wanted & set(_asked(ast.parse(path.read_text())))):
            found[name] = texts
    assert found == {"cli/speed.py": {".gguf"}, "cli/options.py": {".gguf"}}


def test_nobody_but_families_knows_a_tensor_by_its_name():
    """In texts without a space, which are no prose: what runtimes ask quantization_config is all that is left."""
    tensors = {name for one in FAMILIES.values() for name in (*one.linears, *one.vectors, one.embedding, one.head)}
    fused = {stage.fused for one in FAMILIES.values() for stage in one.stages}
    wanted = {word for name in tensors | fused for word in name.split(".")} - {
        "model",
        "weight",
        "bias",
        "self_attn",
        "mlp",
        "",
    }
    known = {}
    for path in (ROOT / "qquant").rglob("*.py"):
        name = str(path.relative_to(ROOT / "qquant"))
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        words = {word for text in texts if isinstance(text, str) and " " not in text for word in re.split(r"\W+", text)}
        if not name.startswith("families/") and words & wanted:
            known[name] = words & wanted
    assert known == {"formats/gptq.py": {"lm_head"}, "formats/awq.py": {"lm_head"}}


def test_commits_that_the_map_names_as_examples_are_in_the_history():
    """Where there is one: not in a source archive, nor in a shallow clone."""
    rows = re.findall(r"^\| an? [^|]*\|.*\| `([0-9a-f]{7,})` \|$", house.README.read_text(), re.MULTILINE)
    assert len(rows) >= 8

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    if git("rev-parse", "--is-shallow-repository").stdout.strip() == "false":
        assert [commit for commit in rows if git("merge-base", "--is-ancestor", commit, "HEAD").returncode] == []


NO_RESULT = {
    "Of",
    "By",
    "As",
    "For",
    "From",
    "Until",
    "Through",
    "Within",
    "No",
    "Never:",
    "They",
    "It",
    "Those",
    "Both",
    "At",
}


def test_docstrings_begin_with_what_the_result_is():
    """And stand without the line above them: not "Of the model.", "By phase.", "As what is shown."."""
    begun = []
    for path in (ROOT / "qquant").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
            if (
                text
                and (text.split()[0] in NO_RESULT or text.startswith("The same of"))
                and not text.startswith("At most ")
            ):
                begun.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text.splitlines()[0]}")
    assert begun == []
