"""What people type first, by the habit of another tool: the answer has the word that it has here."""

import pytest
from click.testing import CliRunner

from qquant.cli import cli
from qquant.cli.command import ARGUMENTS, COMMANDS, OPTIONS
from tests.cli.test_entrance import LEAVES


def answer(typed):
    done = CliRunner().invoke(cli, typed.split(), prog_name="qquant")
    assert done.exit_code == 2
    return " ".join(done.stderr.rpartition("Error: ")[2].split())


@pytest.mark.parametrize(
    ("typed", "answered"),
    [
        ("build C demo", "Missing option '--out'. Did you mean --recipe demo? Output folder;"),
        ("build C demo --out x", "Got unexpected extra argument (demo). Did you mean --recipe demo?"),
        ("plan C demo", "Did you mean --recipe demo?"),
        ("recipe init C demo", "Did you mean --recipe demo?"),
        ("check A.gguf C", "Missing option '--against'. Did you mean --against C?"),
        ("tasks A C --task arc_easy", "Did you mean --against C?"),
        ("bisect A C --max-kl 1", "Did you mean --against C?"),
        ("dequantize A DIR", "Did you mean --out DIR?"),
        ("publish DIR me", "Did you mean --namespace me?"),
        ("compare A B C", "Did you mean qquant report, which shows several?"),
        ("run A how are you", "Did you mean one PROMPT in quotes?"),
        ("check A", "The 16-bit checkpoint it was made from: a folder, or a hub id. For example: qquant check "),
        ("inspect", "Missing argument 'PATH'. For example: qquant inspect "),
        ("quantize C", "No such command 'quantize'. Did you mean 'build'?"),
        ("convert", "Did you mean 'build'?"),
        ("eval", "Did you mean 'check'?"),
        ("info", "Did you mean 'inspect'?"),
        ("list", "Did you mean 'recipe list'?"),
        ("Qwen/Qwen1.5-0.5B", "Qwen/Qwen1.5-0.5B: give a command before it, such as build, plan,"),
        ("build C -o x", "No such option '-o'. Did you mean --out?"),
        ("build C --nsamples 3", "Did you mean --set calibration.samples=N?"),
        ("build --model C", "No such option '--model'. CHECKPOINT is given without an option: qquant build "),
        ("check A --base C", "No such option '--base'. Did you mean --against?"),
        ("build C --recip demo", "No such option '--recip'. (Did you mean one of: '--help', '--recipe'?)"),
    ],
)
def test_a_first_guess_is_answered_with_the_word_for_it(typed, answered):
    assert answered in answer(typed)


def test_words_of_other_tools_are_none_of_ours():
    """And each stands for a command, an option or an argument that is there."""
    known = {name.removeprefix("qquant ") for name in LEAVES}
    assert set(COMMANDS) <= known
    assert not {word for others in COMMANDS.values() for word in others.split()} & set(cli.commands)
    parameters = [parameter for command in LEAVES.values() for parameter in command.params]
    options = {option for parameter in parameters for option in parameter.opts}
    assert {name.split()[0] for name in OPTIONS} <= options
    assert set(ARGUMENTS) <= {parameter.name for parameter in parameters}


def test_a_file_called_like_a_command_hides_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe").mkdir()
    assert CliRunner().invoke(cli, ["recipe", "list"]).exit_code == 0
