"""qquant from Python: three calls, the words of the command line, and an import that costs nothing."""

import inspect
import json
import subprocess
import sys

import pytest

import qquant
from qquant import api
from qquant.cli import cli
from qquant.errors import InputError, UsageError
from qquant.report.conditions import Conditions, TextFacts
from qquant.report.record import Report

CHANGES = {
    "calibration.sources": [{"bundled": "books-en"}], "calibration.samples": 2, "calibration.length": 32,
    "calibration.default_system_share": 0, "checks.windows": 2, "checks.length": 32, "checks.texts": [],
    "checks.answer_length": 0, "checks.max_windows": None, "artifacts.*.gates.defaults": False,
}  # fmt: skip


def test_import_is_cheap_and_lists_what_there_is():
    code = "import sys, qquant; print(sorted(set(sys.modules) & {'torch', 'numpy', 'pydantic', 'click'}), dir(qquant))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['Report', '__version__', 'build', 'check', 'load']"
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        _ = qquant.biuld


@pytest.mark.parametrize("name", ["build", "check"])
def test_arguments_are_documented_typed_and_those_of_the_command(name):
    call = getattr(qquant, name)
    assert call is getattr(api, name)
    signature = inspect.signature(call)
    for argument, parameter in signature.parameters.items():
        assert f"        {argument}: " in call.__doc__, argument
        assert parameter.annotation is not inspect.Parameter.empty
    options = {option.name for option in cli.commands[name].params}
    mine = set(signature.parameters) - {"progress", "checkpoint", "defaults"}
    assert mine <= options, mine - options
    left_out = {"junit", "github", "log", "as_json", "help", "allow_pickle", "against", "no_defaults", "checkpoint"}
    assert options - set(signature.parameters) <= left_out
    for option in cli.commands[name].params:
        default = getattr(signature.parameters.get(option.name), "default", None)
        if isinstance(default, int | str) and option.name != "out":
            assert default == option.default, option.name


@pytest.mark.filterwarnings("ignore:64 calibration tokens")
def test_build_and_check_return_reports_that_a_notebook_shows(make_checkpoint, tmp_path, capsys):
    folder, out = make_checkpoint(), tmp_path / "out"
    report = qquant.build(folder, out=out, format="gptq", bits=4, group_size=32, settings=CHANGES, device="cpu")
    assert isinstance(report, qquant.Report)
    assert json.loads((out / "report.json").read_text())["model"] == report.model == "model"
    assert (out / "source.json").is_file(), "what publish needs"
    assert "quantize: block 2 of 2" in capsys.readouterr().err
    frame = report.to_frame()
    assert list(frame.index) == ["16 bit", "gptq-int4"]
    assert frame.loc["gptq-int4", "kl_divergence"] == report.artifacts[0].kl_divergence
    assert "<td>gptq-int4</td>" in report._repr_html_()
    assert repr(report).splitlines()[0] == "model: passed"
    again = qquant.check(
        out / "model-GPTQ-Int4", folder, windows=2, length=32, defaults=False, device="cpu", progress=False
    )
    assert again.artifacts[0].kl_divergence == pytest.approx(report.artifacts[0].kl_divergence, rel=1e-6)
    assert capsys.readouterr().err == ""
    assert qquant.load(out / "model-GPTQ-Int4", device="cpu").config.num_hidden_layers == 2


def test_what_is_wrong_is_raised_as_the_command_line_says_it(make_checkpoint, tmp_path):
    with pytest.raises(UsageError, match="no bundled recipe has this name"):
        qquant.build(make_checkpoint(), "qwen1.5-chta", tmp_path / "out")
    with pytest.raises(UsageError, match="calibration.sampels: unknown key"):
        qquant.build(make_checkpoint(), "demo", tmp_path / "out", settings={"calibration.sampels": 3})
    with pytest.raises(UsageError, match="--max-kl: out of range, got -1; allowed: number, 0 or more$"):
        qquant.check("x.gguf", make_checkpoint(), max_kl=-1)
    with pytest.raises(InputError, match="not found"):
        qquant.check(tmp_path / "x.gguf", make_checkpoint(), progress=False)
    assert not (tmp_path / "out").exists()


def test_marks_in_a_report_are_text():
    report = Report("<b>m</b>", "r", 16, Conditions(TextFacts("t", 1, 1)), 100.0, (), ("<script>",))
    assert "<b>" not in report._repr_html_()
    assert "<script>" not in report._repr_html_()
