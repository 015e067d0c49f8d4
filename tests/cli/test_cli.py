"""The command line as a user meets it: output, exit codes, start-up cost."""

import importlib
import json
import re
import subprocess
import sys

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

from qquant import __version__
from qquant.cli import main
from tests.source.test_checkpoint import edit_config
from tests.worlds.builds import ARTIFACTS, HEAD


@pytest.fixture
def qquant(capsys):
    """`qquant("plan", ...)` -> (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "test.yaml"
    path.write_text(HEAD + f"  - {ARTIFACTS['gptq-int4']}\n  - {ARTIFACTS['gguf-q4_0']}\n")
    return path


def test_build_prints_the_table_and_writes_reports(qquant, make_checkpoint, recipe_file, tmp_path):
    code, out, err = qquant(
        "build", make_checkpoint(), "--recipe", recipe_file, "--out", tmp_path / "out", "--device", "cpu"
    )
    assert code == 0, err
    for word in (
        "artifact",
        "bytes",
        "bits per weight",
        "perplexity",
        "ratio",
        "mean KL",
        "top-1",
        "verdict",
        "gptq-int4",
        "gguf-q4_0",
        "baseline",
    ):
        assert word in out
    assert "block 2 of 2" in err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [artifact["name"] for artifact in report["artifacts"]] == ["gptq-int4", "gguf-q4_0"]
    code, published, _ = qquant("recipe", "schema", "--report")
    assert code == 0
    jsonschema.validate(report, json.loads(published))
    assert "| gptq-int4 |" in (tmp_path / "out" / "report.md").read_text()


def test_build_json_is_one_document(qquant, make_checkpoint, recipe_file, tmp_path):
    code, out, _ = qquant(
        "build",
        make_checkpoint(),
        "--recipe",
        recipe_file,
        "--out",
        tmp_path / "out",
        "--only",
        "gguf-q4_0",
        "--json",
        "--device",
        "cpu",
    )
    assert code == 0
    assert [artifact["name"] for artifact in json.loads(out)["artifacts"]] == ["gguf-q4_0"]


def test_failed_gate_exits_3_with_the_reason(qquant, make_checkpoint, recipe_file, tmp_path):
    before, last = recipe_file.read_text().rsplit("defaults: false", 1)
    recipe_file.write_text(f"{before}defaults: false, kl_divergence: 0.0000001{last}")
    folder, made = make_checkpoint(), tmp_path / "out"
    code, out, err = qquant("build", folder, "--recipe", recipe_file, "--out", made, "--device", "cpu")
    assert code == 3
    assert "fail" in out
    assert "gguf-q4_0: mean KL divergence" in err
    failed = made / "model-GGUF" / "model-q4_0.gguf"
    assert failed.is_file(), "what failed is kept, to be looked at"
    assert f"find:    qquant bisect {failed} --against {folder} --max-kl 1e-07\n" in err, "to be copied as it is"


def test_plan_is_exact(qquant, make_checkpoint, recipe_file, tmp_path):
    folder = make_checkpoint()
    code, out, _ = qquant("plan", folder, "--recipe", recipe_file, "--json")
    assert code == 0
    qquant("build", folder, "--recipe", recipe_file, "--out", tmp_path / "out", "--device", "cpu")
    planned = json.loads(out)
    for artifact in planned["artifacts"]:
        for file in artifact["files"]:
            assert (tmp_path / "out" / artifact["folder"] / file["name"]).stat().st_size == file["bytes"]
    kinds = {artifact["name"]: artifact["tensors"] for artifact in planned["artifacts"]}
    assert kinds["gptq-int4"]["model.layers.0.mlp.up_proj.weight"] == "int4 g32"
    assert kinds["gguf-q4_0"]["lm_head.weight"] == "q8_0", "64 columns do not fit q6_k"


def test_plan_for_people(qquant, make_checkpoint, recipe_file):
    folder = make_checkpoint()
    code, out, _ = qquant("plan", folder, "--recipe", recipe_file)
    assert code == 0
    assert len(out.splitlines()) <= 24, "a screen"
    rows = [line.replace("│", " ").split() for line in out.splitlines()]
    (row,) = [row for row in rows if row[:1] == ["gptq-int4"]]
    assert row[-1] == "1,2", "tensor-parallel sizes"
    assert "gguf-q4_0: 1 tensor cannot have the type of the mix, e.g. " in out
    assert "check:  bundled:wikitext-2-test, 3 windows of 64 tokens (93 scored)" in out
    assert " GB at the peak on a CPU (" in out
    assert " GB of windows while it is checked; " in out
    assert "with --device cuda " in out
    for detail in ("model.safetensors", "down_proj", "measured, not gated", "time:   about "):
        assert detail not in out
    assert "time:   --time says how long" in out
    code, out, _ = qquant(
        "plan", folder, "--recipe", recipe_file, "--files", "--tensors", "--gates", "--time", "--device", "cpu"
    )
    assert "model-GPTQ-Int4/model.safetensors" in out
    assert "    model.layers.1.mlp.down_proj.weight" in out
    assert "gptq-int4: measured, not gated" in out
    assert "time:   about " in out
    assert "--recipe laptop" not in out
    recipe_file.write_text(recipe_file.read_text().replace(", gates: {defaults: false}", ""))
    code, out, _ = qquant("plan", make_checkpoint("other"), "--recipe", recipe_file, "--gates")
    assert "gptq-int4: perplexity ratio at most 1.08 (detectable" in out


def test_a_plan_of_a_day_names_what_takes_less(qquant, make_checkpoint, recipe_file, monkeypatch):
    recipe_file.write_text(recipe_file.read_text().replace("checks: {", "checks: {profile: release, "))
    monkeypatch.setattr(importlib.import_module("qquant.cli.plan"), "LONG", 0)
    code, out, _ = qquant("plan", make_checkpoint(), "--recipe", recipe_file, "--time", "--device", "cpu")
    assert code == 0
    lines = out.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("time:   about ")]
    assert "--recipe laptop" in lines[at + 1]


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--recipe", "demo"], ["recipe", "list"]])
def test_answers_without_torch(arguments):
    code = "import sys; from qquant.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_base_logits_are_written_and_read(qquant, make_checkpoint, recipe_file, tmp_path):
    folder, base = make_checkpoint(), tmp_path / "base.kld"
    qquant(
        "build", folder, "--recipe", recipe_file, "--out", tmp_path / "out", "--device", "cpu", "--only", "gguf-q4_0"
    )
    (made,) = (tmp_path / "out").rglob("*q4_0.gguf")
    size = ("--chunks", 2, "--context", 32, "--device", "cpu")
    code, out, err = qquant("perplexity", made, "--against", folder, "--save-logits", base, *size, "--json")
    assert code == 0, err
    first = json.loads(out)["artifacts"][str(made)]
    code, out, _ = qquant("perplexity", made, "--logits", base, "--device", "cpu", "--json")
    assert code == 0
    assert json.loads(out)["artifacts"][str(made)] == pytest.approx(first, abs=1e-9)
    code, out, _ = qquant("perplexity", made, "--logits", base, "--device", "cpu")
    assert "Mean    KLD" in out
    for wrong in ([], [made], ["--logits", base, "--against", folder], [made, "--logits", base, "--save-logits", "x"]):
        assert qquant("perplexity", *wrong)[0] == 2, wrong
    assert qquant("perplexity", made, "--logits", made)[0] == 5


def test_check_another_tools_file(qquant, make_checkpoint, recipe_file, tmp_path):
    folder = make_checkpoint()
    qquant("build", folder, "--recipe", recipe_file, "--out", tmp_path / "out", "--device", "cpu")
    gguf = tmp_path / "out" / "model-GGUF" / "model-q4_0.gguf"
    common = ("--against", folder, "--windows", 16, "--length", 64, "--device", "cpu", "--no-defaults")
    loose = ("--max-perplexity-ratio", 3)
    code, out, _ = qquant("check", gguf, tmp_path / "out" / "model-GPTQ-Int4", *common, *loose, "--json")
    assert code == 0
    assert len(json.loads(out)["artifacts"]) == 2
    code, _, err = qquant("check", gguf, *common, "--max-kl", 1e-9)
    assert code == 3
    assert "mean KL divergence" in err


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8", "bitsandbytes"])
def test_inspect_of_what_is_quantized_otherwise(qquant, make_checkpoint, method):
    folder = make_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    tensors = {"a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn), "a.absmax": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors")
    code, out, _ = qquant("inspect", folder, "--tensors")
    assert code == 0
    assert method in out
    assert "F8_E4M3" in out


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint16, torch.uint32, torch.uint64, torch.complex64])
def test_inspect_of_types_that_no_checkpoint_of_ours_has(qquant, make_checkpoint, dtype):
    folder = make_checkpoint()
    save_file({"a.weight_scale": torch.zeros(2, 3).to(dtype)}, folder / "model.safetensors")
    code, out, err = qquant("inspect", folder)
    assert code == 0, err
    assert re.search(r"^ +\d+  [A-Z]\d+\w* +1 tensor$", out, re.MULTILINE)


@pytest.mark.parametrize("what", ["checkpoint", "folder", "gguf"])
def test_inspect(qquant, make_checkpoint, recipe_file, tmp_path, what):
    folder = make_checkpoint()
    qquant("build", folder, "--recipe", recipe_file, "--out", tmp_path / "out", "--device", "cpu")
    path = {
        "checkpoint": folder,
        "folder": tmp_path / "out" / "model-GPTQ-Int4",
        "gguf": tmp_path / "out" / "model-GGUF" / "model-q4_0.gguf",
    }[what]
    code, out, _ = qquant("inspect", path)
    assert code == 0
    assert re.search(r"^ +[\d,]+  \w+ +\d+ tensors?$", out, re.MULTILINE), "a summary by type"
    assert "layers.1" not in out
    assert "blk.1" not in out
    code, out, _ = qquant("inspect", path, "--tensors")
    expected = {
        "checkpoint": "num_hidden_layers: 2",
        "folder": "up_proj.qweight",
        "gguf": "general.architecture: qwen2",
    }[what]
    assert expected in out
    code, out, _ = qquant("inspect", path, "--json")
    assert json.loads(out)["tensors"]


ERRORS = {
    "no such recipe": (2, lambda f, r, o: ["build", f, "--recipe", "nothing", "--out", o], "nothing"),
    "no such artifact": (
        2,
        lambda f, r, o: ["build", f, "--recipe", r, "--out", o, "--only", "gptq-int2"],
        "it has gptq-int4, gguf-q4_0",
    ),
    "no checkpoint": (2, lambda f, r, o: ["build", "--recipe", r, "--out", o], "names no checkpoint"),
    "no such folder": (
        2,
        lambda f, r, o: ["build", "no/such/folder", "--recipe", r, "--out", o],
        "no such file or folder",
    ),
    "no such option": (2, lambda f, r, o: ["build", f, "--recipe", r, "--out", o, "--fast"], "No such option"),
    "no such device": (2, lambda f, r, o: ["build", f, "--recipe", r, "--out", o, "--device", "gpu9"], "not a device"),
    "not an artifact": (5, lambda f, r, o: ["check", r, "--against", f], "is not a GGUF file"),
    "no such artifact file": (5, lambda f, r, o: ["inspect", o], "not found"),
    "impossible gate": (2, lambda f, r, o: ["check", f, "--against", f, "--max-perplexity-ratio", "0.5"], "perplexity"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_message_and_an_exit_code(qquant, make_checkpoint, recipe_file, tmp_path, case):
    status, arguments, message = ERRORS[case]
    code, out, err = qquant(*arguments(make_checkpoint(), recipe_file, tmp_path / "out"))
    assert (code, out) == (status, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoint_exits_5(qquant, make_checkpoint, recipe_file, tmp_path):
    folder = make_checkpoint()
    edit_config(folder, intermediate_size=160)
    code, _, err = qquant("build", folder, "--recipe", recipe_file, "--out", tmp_path / "out")
    assert code == 5
    assert "tensors and config.json disagree" in err
    assert not (tmp_path / "out").exists()


def test_cuda_that_is_not_there_exits_6(qquant, make_checkpoint, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = qquant(
        "build", make_checkpoint(), "--recipe", recipe_file, "--out", tmp_path / "out", "--device", "cuda"
    )
    assert code == 6
    assert "sees no CUDA device" in err


def test_interrupt_exits_75(qquant, make_checkpoint, recipe_file, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qquant.solve.walk.quantize", interrupt)
    code, _, err = qquant(
        "build", make_checkpoint(), "--recipe", recipe_file, "--out", tmp_path / "out", "--device", "cpu"
    )
    assert code == 75
    assert "continue with: qquant build" in err


def test_bug_is_called_a_bug(tmp_path, make_checkpoint, recipe_file):
    code = "import sys, qquant.plan.plan\nfrom qquant.cli import main\nqquant.plan.plan.Plan.of = lambda *a: 1 / 0\nmain(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", make_checkpoint(), "--recipe", recipe_file],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert f"this is a bug in qquant {__version__}" in done.stderr


def test_recipe_commands(qquant, recipe_file, tmp_path):
    code, out, _ = qquant("recipe", "list")
    assert code == 0
    assert {"demo", "qwen1.5-chat", "qwen1.5-base"} <= {line.split()[0] for line in out.splitlines()}
    code, out, _ = qquant("recipe", "show", "demo")
    copy = tmp_path / "copy.yaml"
    copy.write_text(out)
    assert qquant("recipe", "validate", copy, recipe_file)[:2] == (0, "2 valid\n")
    copy.write_text(out.replace("bits: 4", "bits: 5").replace("damping", "dampening"))
    code, _, err = qquant("recipe", "validate", copy)
    assert code == 2
    assert "bits" in err
    assert "dampening" in err
    code, out, _ = qquant("recipe", "schema")
    assert json.loads(out)["title"]
