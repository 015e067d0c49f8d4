"""What somebody sees who knows nothing yet: the list of commands, their help, and what is proposed where nothing was said."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import click
import pytest
from click.testing import CliRunner

from qquant import recipe
from qquant.cli import cli, main
from qquant.errors import UsageError
from qquant.plan.asked import kind_of_text, proposed
from qquant.recipe.artifacts import FormatName
from qquant.report.record import Verdict
from tests.report.test_report import everything
from tests.source.test_checkpoint import edit_config


def every(command, name="qquant"):
    yield name, command
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from every(child, f"{name} {child.name}")


COMMANDS = dict(every(cli))
LEAVES = {name: command for name, command in COMMANDS.items() if not isinstance(command, click.Group)}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_alone_it_shows_every_command_by_stage(arguments):
    done = CliRunner().invoke(cli, arguments, prog_name="qquant")
    assert done.exit_code == 0
    text = done.stdout
    stages = [text.index(f"\n{stage}:\n") for stage in ("Make", "Judge", "Use", "Publish", "Look")]
    assert stages == sorted(stages)
    plain = " ".join(text.split())
    for name, command in cli.commands.items():
        assert f" {name} " in plain
        assert command.sentence in plain, "whole, not cut"
    assert "..." not in text.replace("[ARGS]...", "")
    assert text.count("$ qquant ") == len(stages)
    assert "_QQUANT_COMPLETE=bash_source" in text


@pytest.mark.parametrize("group", ["recipe"])
def test_commands_of_a_group_are_told_by_whole_sentences(group):
    """As in the list of all, and beside what zsh and fish complete: they were cut in the middle."""
    plain = " ".join(CliRunner().invoke(cli, [group, "--help"]).stdout.split())
    for command in cli.commands[group].commands.values():
        assert command.sentence in plain
        assert command.get_short_help_str() == command.sentence


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "qquant", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qquant, version ")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("qquant b", {"plain,build", "plain,bisect"}),
        ("qquant recipe show q", {"plain,qwen1.5-chat", "plain,qwen1.5-base", "file,q"}),
        ("qquant plan --recipe mine", {"file,mine"}),
        ("qquant recipe validate mine", {"file,mine"}),
        ("qquant build --type q4_k", {"plain,q4_k_m", "plain,q4_k_s"}),
        ("qquant build --format g", {"plain,gptq", "plain,gguf"}),
    ],
)
def test_completes_in_a_shell_what_was_typed(typed, offered, monkeypatch, capsys):
    monkeypatch.setenv("_QQUANT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    with pytest.raises(SystemExit):
        main([])
    assert set(capsys.readouterr().out.splitlines()) == offered


@pytest.mark.parametrize("name", LEAVES)
def test_every_option_says_its_default(name):
    for option in LEAVES[name].params:
        if not isinstance(option, click.Option) or option.required or option.is_flag or option.name == "help":
            continue
        stated = option.default is not None and option.default != () and option.default != ""
        assert stated or re.search(r"[Dd]efault|\bwithout it\b", option.help or ""), (name, option.opts)
    with click.Context(cli, info_name="qquant") as parent:
        text = LEAVES[name].get_help(click.Context(LEAVES[name], parent=parent, info_name=name, **cli.context_settings))
    for option in LEAVES[name].params:
        if isinstance(option, click.Option) and isinstance(option.default, int) and not option.is_flag:
            assert f"default: {option.default}" in " ".join(text.split()), (name, option.opts)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "qquant"])
def test_every_command_has_an_example_that_parses(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = COMMANDS[name]
    assert command.example.startswith(name.removeprefix("qquant "))
    shown = command.get_help(click.Context(command, info_name=name))
    assert f"  qquant {command.example}" in shown.splitlines(), "on one line, to be copied"
    words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", command.example)]
    for word in words[1:]:
        if "/" in word or word.endswith(".pem"):  # what has to exist
            (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / word).touch() if word.endswith(".pem") else (tmp_path / word).mkdir(exist_ok=True)
    context, parsed = click.Context(cli, info_name="qquant"), cli
    while isinstance(parsed, click.Group):
        parsed, words = parsed.commands[words[0]], words[1:]
    parsed.make_context(parsed.name, words, parent=context)


def test_a_wrong_word_is_answered_with_the_right_one():
    for words, meant in (
        (["buidl"], "'build'"),
        (["recipe", "shwo"], "'show'"),
        (["plan", "--recip", "demo"], "--recipe"),
    ):
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 2
        assert meant in done.stderr


# --- what is proposed ---------------------------------------------------------------------------------------------------


def test_the_published_recipe_is_proposed_by_how_answers_end(demo, tokenizer_folder):
    assert proposed(demo).name == "qwen1.5-chat"
    assert "<|im_end|>" in proposed(demo).reason
    stops_elsewhere = tokenizer_folder(generation_config__json={"eos_token_id": 0}, config__json={"eos_token_id": 0})
    settings = stops_elsewhere / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|im_end|>", "<|endoftext|>"))
    assert proposed(stops_elsewhere).name == "qwen1.5-base", "as the base models of Qwen1.5"
    (stops_elsewhere / "chat_template.jinja").unlink()
    assert proposed(stops_elsewhere).reason == "it has no chat template"


def test_build_asks_on_a_terminal_and_says_elsewhere_what_it_takes(make_checkpoint, tmp_path, monkeypatch):
    folder, out = make_checkpoint(), tmp_path / "out"
    text = tmp_path / "mine.txt"
    text.write_text("Nothing but this. " * 500)
    began = []
    monkeypatch.setattr("qquant.pipeline.build", lambda recipe, *_: began.append(recipe) or sys.exit(0))
    asking = ["build", str(folder), "--calibration", str(text), "--only", "gguf-q8_0", "--out", str(out)]
    done = CliRunner().invoke(cli, asking)
    assert done.exit_code == 0, done.exception
    assert done.stderr.startswith("recipe qwen1.5-chat: its chat template ends answers with <|im_end|>, on which")
    assert [source.path for source in began[0].calibration.sources] == [str(text)]
    monkeypatch.setattr("qquant.cli.options.somebody_is_there", lambda: True)
    asked = []
    monkeypatch.setattr("click.confirm", lambda text, **_: asked.append(text))
    done = CliRunner().invoke(cli, ["build", str(folder), "--out", str(out)])
    assert "nothing was built" in str(done.exception)
    assert "recipe qwen1.5-chat" in asked[0]
    assert not out.exists()


def test_plan_says_which_recipe_it_took(make_checkpoint):
    done = CliRunner().invoke(cli, ["plan", str(make_checkpoint()), "--only", "gguf-q8_0"])
    assert done.exit_code == 0, done.exception
    assert done.stderr.startswith("recipe qwen1.5-chat: its chat template ends answers with <|im_end|>")


def test_chats_and_texts_are_told_apart(tmp_path):
    for name, content, kind in (
        ("a.jsonl", '{"messages": [{"role": "user", "content": "?"}]}\n', "chat"),
        ("b.jsonl", '{"text": "plain"}\n', "text"),
        ("c.jsonl", "broken\n", "text"),
        ("d.txt", "plain", "text"),
    ):
        (tmp_path / name).write_text(content)
        assert kind_of_text(tmp_path / name) == kind
    assert kind_of_text(tmp_path / "missing.jsonl") == "text"


def test_recipe_init_writes_what_build_takes(make_checkpoint, tmp_path):
    folder, mine, chats = make_checkpoint(), tmp_path / "mine.yaml", tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    flags = ["--format", "gptq", "--bits", "4", "--group-size", "32", "--calibration", str(chats)]
    flags += ["--set", "calibration.samples=4", "--set", "checks.texts=[]", "--set", "name=mine"]
    done = CliRunner().invoke(cli, ["recipe", "init", str(folder), *flags, "--out", str(mine)])
    assert done.exit_code == 0, done.exception
    written = recipe.load(mine)
    (artifact,) = written.artifacts
    assert (written.name, artifact.name, artifact.bits, artifact.group_size) == ("mine", "gptq-int4", 4, 32)
    assert [(source.path, source.kind) for source in written.calibration.sources] == [(str(chats), "chat")]
    assert written.calibration.samples == 4
    assert written.checks.texts == ()
    again = CliRunner().invoke(cli, ["recipe", "init", str(folder), *flags, "--out", str(mine)])
    assert "File exists" in str(again.exception)
    printed = CliRunner().invoke(cli, ["recipe", "init", str(folder), *flags, "--out", "-"])
    assert recipe.parse(printed.stdout) == written


@pytest.mark.parametrize(
    ("answers", "names", "path"),
    [
        ("awq\nnowhere.txt\nCHATS\n", ["awq"], "CHATS"),
        ("nonsense\ngguf-q4_0, gptq-int8\n\n", ["gptq-int8", "gguf-q4_0"], None),
        ("\n\n", ["gptq-int4", "gptq-int8", "awq", "gguf-q8_0", "gguf-q4_0"], None),
    ],
)
def test_recipe_init_asks_where_somebody_is_there(make_checkpoint, tmp_path, monkeypatch, answers, names, path):
    """It wrote the published recipe as it stands, without a question, for who had given no options."""
    monkeypatch.setattr(sys.modules["qquant.cli.recipes"], "somebody_is_there", lambda: True)
    chats, mine = tmp_path / "chats.txt", tmp_path / "mine.yaml"
    chats.write_text("Plain text of mine.")
    words = ["recipe", "init", str(make_checkpoint()), "--recipe", "demo", "--out", str(mine)]
    done = CliRunner().invoke(cli, words, input=answers.replace("CHATS", str(chats)))
    assert done.exit_code == 0, done.output
    written = recipe.load(mine)
    assert [artifact.name for artifact in written.artifacts] == names
    assert written.name == ("demo" if len(names) == 5 else "demo-changed")
    assert written.calibration.sources[0].path == (path and str(chats))
    assert ("there is no such file" in done.output) == ("nowhere" in answers)


def test_recipe_init_names_a_calibration_file_that_is_not_there(make_checkpoint, tmp_path):
    """The recipe was written, and a build on another day stopped over it."""
    mine, texts = tmp_path / "mine.yaml", tmp_path / "texts.txt"
    texts.write_text("Plain text of mine.")
    words = ["recipe", "init", str(make_checkpoint()), "--out", str(mine)]
    missing = CliRunner().invoke(cli, [*words, "--calibration", str(texts), "--calibration", "nowhere.jsonl"])
    assert missing.exit_code == 2
    assert "nowhere.jsonl: there is no such file" in missing.output
    assert not mine.exists()
    done = CliRunner().invoke(cli, [*words, "--calibration", str(texts), "--calibration", "generated"])
    assert done.exit_code == 0, done.output


def test_a_config_that_does_not_fit_is_refused_before_a_recipe_is_proposed(make_checkpoint):
    folder = make_checkpoint()
    edit_config(folder, intermediate_size=160)
    done = CliRunner().invoke(cli, ["plan", str(folder)])
    assert "tensors and config.json disagree" in str(done.exception)


def told(*arguments):
    return CliRunner().invoke(cli, list(arguments))


def test_every_command_takes_json():
    """But those that write one thing: a schema, which is JSON, and recipes, which go into a file."""
    options = {
        name: [option for parameter in leaf.params for option in parameter.opts] for name, leaf in LEAVES.items()
    }
    without = {name.removeprefix("qquant ") for name, known in options.items() if "--json" not in known}
    assert without == {"recipe init", "recipe types", "recipe schema"}


def test_recipes_as_json():
    listed = json.loads(told("recipe", "list", "--json").stdout)
    assert [row["name"] for row in listed["recipes"]] == recipe.names()
    assert json.loads(told("recipe", "show", "demo", "--json").stdout)["effort"] == "default"
    assert json.loads(told("recipe", "validate", "demo", "--json").stdout) == {
        "schema": "qquant-validated-1", "files": 1, "problems": [],
    }  # fmt: skip
    broken = told("recipe", "validate", "nothing", "--json")
    assert isinstance(broken.exception, UsageError)
    assert "no bundled recipe" in json.loads(broken.stdout)["problems"][0]


def test_formats_of_recipes_are_the_words_of_format():
    """In the help, in the completion of a shell, and in what is said to another word."""
    words = get_args(FormatName)
    plan = cli.commands["plan"]
    (option,) = [parameter for parameter in plan.params if parameter.name == "format"]
    context = click.Context(plan)
    assert f"[{'|'.join(words)}]" in plan.get_help(context)
    assert [item.value for item in option.type.shell_complete(context, option, "g")] == [
        word for word in words if word.startswith("g")
    ]
    done = CliRunner().invoke(cli, ["plan", "--format", "exl2"])
    assert done.exit_code == 2
    assert f"is not one of {', '.join(map(repr, words))}" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("outcome", "status"), [("pass", 0), ("fail", 3)])
def test_a_reader_that_has_gone_changes_no_verdict(tmp_path, outcome, status):
    """As `qquant report x | head -1` does: the rest is said to nobody, and the exit status is that of the report."""
    rows = [replace(row, verdict=Verdict(outcome)) for row in everything().artifacts]
    (tmp_path / "report.json").write_text(replace(everything(), artifacts=tuple(rows)).to_json())
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "qquant", "report", str(tmp_path)]
    for streams in ({"stdout": theirs}, {"stderr": theirs}, {"stdout": theirs, "stderr": theirs}):
        assert subprocess.run(command, check=False, **({"stdout": subprocess.DEVNULL} | streams)).returncode == status
    os.close(theirs)
