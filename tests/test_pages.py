"""Pages for users: each line of a block parses, and is run by a test that is named here or says that it is not; links and numbers lead somewhere."""

import re
import shlex

import click
import pytest

from qquant.cli import cli
from qquant.source.checkpoint import Checkpoint
from tests.bench import takes
from tests.bench.memory import SHAPES, write_hollow
from tests.worlds import ROOT

PAGES = ("README.md", "recipes/GUIDE.md", "recipes/README.md", "SECURITY.md", "calibration/README.md")
NOT_RUN = "# not run"  # on a line, or in the first two of a block: of all its lines
RUN = {  # what a line of a block begins with, or the block is in -> the test that runs it
    ("README.md", "make"): "Makefile::demo",
    ("README.md", "Three ways in"): "tests/test_three_ways.py::test_i_release_models",
    ("recipes/GUIDE.md", "Benchmarks"): "tests/checks/test_task_suites.py::test_command",
    ("recipes/GUIDE.md", "Publishing"): "tests/test_three_ways.py::test_i_have_a_laptop",
    ("recipes/GUIDE.md", "Several GPUs or machines"): "tests/test_three_ways.py::test_i_have_several_gpus",
    ("recipes/GUIDE.md", "From Python"): "tests/test_three_ways.py::test_i_write_python",
}


def blocks(page, languages):
    """(heading, lines) of every block of code in these languages."""
    heading = ""
    parts = re.split(r"^(#+ [^\n]+|```\w*\n(?:.*?\n)?```)$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for part in parts:
        if part.startswith("#"):
            heading = part.lstrip("# ")
        elif part.startswith("```") and part[3 : part.index("\n")] in languages:
            yield heading, part.splitlines()[1:-1]


def ours(line):
    """The words after `qquant` of a line, whoever launches it; None of other lines."""
    line = re.sub(r"^(srun )?torchrun .* -m qquant ", "qquant ", line.removeprefix(".venv/bin/"))
    return shlex.split(line, comments=True)[1:] if line.startswith("qquant ") else None


def leaf(words):
    """(command, its own words)."""
    command, context = cli, click.Context(cli, info_name="qquant")
    while words and isinstance(command, click.Group) and not words[0].startswith("-"):
        name, *words = words
        command = command.get_command(context, name)
        assert command is not None, f"no command {name}"
    return command, words


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_blocks_parse_as_they_stand(page, tmp_path, monkeypatch):
    """Values too: a choice, a number, a missing word."""
    monkeypatch.chdir(tmp_path)
    found = 0
    for _, lines in blocks(page, ("sh",)):
        for words in filter(None, map(ours, lines)):
            command, words = leaf([re.sub(r"\$\w+", "x", word) for word in words])
            for word in words:
                if (
                    word.startswith(("path/", "out/", "release", "sets", "rel/", "published/", "/"))
                    and "." not in word[-6:]
                ):
                    (tmp_path / word.lstrip("/")).mkdir(parents=True, exist_ok=True)
            command.make_context(command.name, list(words), parent=click.Context(cli, info_name="qquant"))
            found += 1
    assert found or page not in ("README.md", "recipes/GUIDE.md")


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences_exist_and_take_these_options(page):
    for span in re.findall(r"`([^`\n]+)`", (ROOT / page).read_text()):
        words = ours(span.strip()) if "|" not in span and "\\" not in span else None
        command, words = leaf(words or [])
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in known | {"--help"}, f"{page}: {span}: no option {word}"


@pytest.mark.parametrize("page", PAGES)
def test_each_line_of_a_block_is_run_by_a_test_or_says_that_it_is_not(page):
    for heading, lines in blocks(page, ("sh", "python")):
        if any(NOT_RUN in line for line in lines[:2] if line.startswith("#")):
            continue
        for line in lines:
            if line.strip() and not line.startswith(("#", "import")) and NOT_RUN not in line:
                test = RUN.get((page, line.split()[0])) or RUN.get((page, heading))
                assert test, f"{page}: {heading}: {line}: which test runs it?"
    for path, _, name in (test.partition("::") for test in RUN.values()):
        text = (ROOT / path).read_text()
        assert f"def {name}(" in text or f"\n{name}:" in text, f"{path}: no {name}"


def test_links_of_the_readme_lead_somewhere():
    for page in ("README.md", "recipes/GUIDE.md", "qquant/README.md", ".github/CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            if "://" not in target:
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_exit_codes_on_the_page_are_those_of_the_program():
    from qquant import errors

    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    listed = {
        int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "recipes" / "GUIDE.md").read_text(), re.MULTILINE)
    }
    assert listed == codes | {0}


def anchors(page):
    """Headings of a page, as its links name them, with the text below each."""
    parts = re.split(r"^#+ (.+)$", (ROOT / page).read_text(), flags=re.MULTILINE)
    titles = (re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in parts[1::2])
    return dict(zip(titles, parts[2::2], strict=True))


def test_each_number_of_the_comparison_leads_to_the_command_that_prints_it():
    text = (ROOT / "README.md").read_text()
    comparison = text[text.index("| format | against") : text.index("## Install")]
    places = dict(re.findall(r"^\[(\w+)\]: (\S+)$", comparison, re.MULTILINE))
    used = set(re.findall(r"\]\[(\w+)\]", comparison))
    first, second = comparison.split("| on one H200")
    cells = [row.rsplit("|", 2)[1] for row in re.findall(r"^\|.+\|$", first, re.MULTILINE)[2:]]
    cells += [row.split("|", 2)[2].replace("bf16", "") for row in re.findall(r"^\|.+\|$", second, re.MULTILINE)]
    assert len(cells) > 12
    for cell in cells:
        assert not re.search(r"\d", re.sub(r"\[[^\]]*\]\[\w+\]", "", cell)), f"a number without a link: {cell}"
    assert used == set(places)
    for place in places.values():
        page, _, anchor = place.partition("#")
        commands = re.findall(r"^    .*?python (?:-m )?(tests[\w./]+)", anchors(page)[anchor], re.MULTILINE)
        assert commands, f"{place}: no command"
        for program in commands:
            assert (ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")).is_file()


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize(
    "shape", [*SHAPES, *(pytest.param(f"{shape}, all", marks=pytest.mark.slow) for shape in SHAPES)]
)
def test_what_it_takes_is_what_the_cost_model_says(shape, tmp_path):
    """GPTQ-Int4 of every published shape; the eleven, whose headers of GGUF take seconds, where time is no object."""
    shape, _, every = shape.partition(", ")
    text = (ROOT / "README.md").read_text()
    head, told = takes.HEAD, next(line for line in text.splitlines() if line.startswith(f"| {shape} |"))
    assert head in text
    if every:
        assert told == takes.row(shape)
        return
    took, memory, disk = takes.alone(Checkpoint.open(write_hollow(tmp_path / "model", shape)))
    said = cells(told)
    assert (said[1:3], said[5:8], said[8].split(", ")[0]) == (took, list(memory), disk)
