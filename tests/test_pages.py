"""Every `qquant` line on the pages for users parses: the command exists, and so does each of its options."""

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


def commands(page):
    """Lines in `sh` blocks, and code spans, that begin with qquant."""
    text = (ROOT / page).read_text()
    blocks = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", text)
    for line in [*blocks, *spans]:
        line = line.split(" #")[0].removeprefix(".venv/bin/").strip()
        line = re.sub(r"^(srun )?torchrun .* -m qquant ", "qquant ", line)
        if line.startswith("qquant ") and "|" not in line and "\\" not in line:
            yield line


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_the_pages_exist_and_take_these_options(page):
    lines = list(commands(page))
    assert lines or page not in ("README.md", "recipes/GUIDE.md", "recipes/README.md")
    for line in lines:
        _, *words = shlex.split(line)
        command, context = cli, click.Context(cli, info_name="qquant")
        while words and isinstance(command, click.Group):
            name = words.pop(0)
            if name.startswith("-"):
                break
            found = command.get_command(context, name)
            assert found is not None, f"{page}: {line}: no command {name}"
            command = found
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        known |= set(context.help_option_names) | {"--help"}
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in known, f"{page}: {line}: no option {word}"


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
