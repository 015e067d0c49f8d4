"""Where a build writes: no other folder than its own, whatever names it is given; and signals end it without a traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

from qquant import pipeline, recipe
from qquant.cli import main
from qquant.cli.terminal import Stop
from qquant.errors import InputError, StoppedError, UsageError
from qquant.plan.plan import Plan
from qquant.source.checkpoint import Checkpoint
from tests.source.test_checkpoint import low_rank, write_adapter
from tests.worlds.builds import CPU, HEAD, contents, load_recipe, quiet


@pytest.mark.parametrize(
    "name", ["../evil", "a/b", "a\\b", "", ".", "..", ".hidden", "a\x00b", "a\nb", "caf\udce9", "evidence", "x" * 300]
)
def test_a_model_name_is_part_of_a_name(make_checkpoint, tmp_path, name):
    loaded, checkpoint = load_recipe(tmp_path, ["gptq-int4"]), Checkpoint.open(make_checkpoint())
    with pytest.raises(UsageError, match="model name"):
        Plan.of(loaded, checkpoint, model=name or "\t")
    Plan.of(loaded, checkpoint, model="Qwen1.5 café 0.5B")


@pytest.mark.parametrize("place", [".", "out", "deep/out"])
def test_a_build_does_not_write_into_what_it_reads(make_checkpoint, tmp_path, place):
    folder, loaded = make_checkpoint(), load_recipe(tmp_path, ["gptq-int4"])
    checkpoint, before = Checkpoint.open(folder), sorted(folder.rglob("*"))
    with pytest.raises(UsageError, match="which is read"):
        pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), folder / place, CPU, quiet)
    assert sorted(folder.rglob("*")) == before


def test_a_build_does_not_write_into_its_adapter(make_checkpoint, tmp_path):
    adapter = write_adapter(tmp_path / "lora", low_rank())
    loaded, checkpoint = load_recipe(tmp_path, ["gptq-int4"]), Checkpoint.open(make_checkpoint(), adapter=adapter)
    before = sorted(adapter.rglob("*"))
    with pytest.raises(UsageError, match="which is read"):
        pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), adapter / "out", CPU, quiet)
    assert sorted(adapter.rglob("*")) == before


def test_a_folder_that_is_no_utf8_is_one_error(make_checkpoint, tmp_path):
    loaded, checkpoint = load_recipe(tmp_path, ["gptq-int4"]), Checkpoint.open(make_checkpoint())
    with pytest.raises(UsageError, match="is not UTF-8"):
        pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), tmp_path / "caf\udce9" / "out", CPU, quiet)
    assert not os.path.lexists(os.fsencode(tmp_path) + b"/caf\xe9")


@pytest.mark.parametrize("argument", ["caf\udce9", "a\x00b"])
def test_an_argument_that_is_no_utf8_is_one_error(argument, capsys):
    for arguments in (["plan", argument, "--recipe", "demo"], ["verify", argument], ["report", argument]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "is not UTF-8" in capsys.readouterr().err


SAME = [
    ("{name: a, format: gptq, bits: 4}", "{name: b, format: gptq, bits: 4, group_size: 32}"),
    ("{name: a, format: gguf, type: q4_0}", "{name: b, format: gguf, type: q4_0, solver: gptq}"),
    ("{name: a, format: awq}", "{name: b, format: awq, group_size: 64}"),
]


@pytest.mark.parametrize("pair", SAME)
def test_two_artifacts_of_one_place_are_refused_by_validate_and_plan(make_checkpoint, pair, tmp_path, capsys):
    path = tmp_path / "both.yaml"
    path.write_text(HEAD + "".join(f"  - {one}\n" for one in pair))
    with pytest.raises(SystemExit) as caught:
        main(["recipe", "validate", str(path)])
    assert caught.value.code == 2
    assert "artifacts a and b would both write" in capsys.readouterr().err
    with pytest.raises(UsageError, match="a and b would both write"):
        Plan.of(recipe.load(str(path)), Checkpoint.open(make_checkpoint(hidden_size=128, intermediate_size=256)))
    path.write_text(HEAD + f"  - {pair[0]}\n  - {{name: b, format: gguf, type: q8_0}}\n")
    assert recipe.load(str(path)).clashes == ()


def test_an_artifact_that_is_taken_away_while_it_is_checked_is_built_again(
    make_checkpoint, build, monkeypatch, tmp_path
):
    folder = make_checkpoint()
    _, whole = build(folder, "gptq-int4", out="whole")
    finish = pipeline.owning.finish

    def taken(drafts, planned, out, *given):
        finish(drafts, planned, out, *given)
        for path in (out / "model-GPTQ-Int4").iterdir():
            path.unlink()

    monkeypatch.setattr(pipeline.owning, "finish", taken)
    with pytest.raises(InputError):
        build(folder, "gptq-int4")
    monkeypatch.undo()
    _, out = build(folder, "gptq-int4")
    assert contents(out) == contents(whole)


def test_a_second_signal_is_heard_once():
    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StoppedError, match="at once"):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
    assert stop.asked == "SIGTERM"


def test_what_nohup_asks_holds():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.asked == ""
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("pause", [0.0, 0.002, 0.05])
def test_two_signals_end_in_one_line(tmp_path, pause):
    """TERM and HUP within milliseconds, at a command that waits: 75 and no traceback."""
    code = (
        "import sys, time, click\nfrom qquant import cli\n"
        "@cli.cli.command('wait')\ndef wait():\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "cli.main(['wait'])\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    time.sleep(pause)
    child.send_signal(signal.SIGHUP)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, "Traceback" in err) == (75, False), err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_while_a_library_executes_text_ends_with_75(name):
    """As dataclasses do while they are imported: there Python notes a KeyboardInterrupt, and ends with 130 whatever became of it."""
    code = (
        "from qquant import cli\n"
        "@cli.cli.command('wait')\ndef wait():\n"
        f"    exec('import signal; signal.raise_signal(signal.{name})')\n"
        "cli.main(['wait'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (75, "stopped\ncontinue with: qquant wait")
