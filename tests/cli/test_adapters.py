"""What was built with an adapter is checked against the merged model, by every command that compares."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from qquant.cli import cli
from qquant.errors import UsageError
from qquant.source.checkpoint import Checkpoint


@pytest.fixture
def merged(make_checkpoint, tmp_path):
    """(checkpoint, adapter, artifact of both): far enough apart for a comparison to see which model is meant."""
    folder, adapter = make_checkpoint(), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    drawn = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(2, 64, generator=drawn)
        weights[f"{name}.lora_B.weight"] = torch.randn(64, 2, generator=drawn)
    save_file(weights, adapter / "adapter_model.safetensors")
    settings = (
        "calibration.samples=3",
        "calibration.length=32",
        "checks.windows=2",
        "checks.length=32",
        "checks.answer_length=0",
    )
    changes = [word for setting in settings for word in ("--set", setting)]
    changes += ["--set", "checks.max_windows=null", "--set", "artifacts.*.gates.defaults=false"]
    arguments = [
        "build",
        folder,
        "--recipe",
        "demo",
        "--type",
        "q8_0",
        "--adapter",
        adapter,
        "--out",
        tmp_path / "out",
        *changes,
    ]
    done = CliRunner().invoke(cli, [*map(str, arguments), "--device", "cpu"])
    assert done.exit_code == 0, done.exception
    (artifact,) = (tmp_path / "out").glob("*-GGUF/*.gguf")
    return folder, adapter, artifact


def test_check_bisect_and_perplexity_take_the_adapter(merged, tmp_path):
    folder, adapter, artifact = merged
    small = ["--against", str(folder), "--length", "32", "--device", "cpu", "--json", "--windows", "2"]

    told = "q8_0.gguf was built with adapter merged"

    def kl(*more):
        done = CliRunner().invoke(cli, ["check", str(artifact), *small, "--no-defaults", *more])
        report = json.loads(done.stdout)
        assert any(told in warning for warning in report["warnings"]) == (told in done.stderr) == (more == ())
        return report["artifacts"][0]["kl_divergence"]

    near = kl("--adapter", str(adapter))
    assert near < kl() / 5, "without it another model is meant"
    done = CliRunner().invoke(
        cli, ["bisect", str(artifact), *small, "--max-kl", str(2 * near), "--adapter", str(adapter)]
    )
    assert json.loads(done.stdout)["restored"] == []
    assert told not in done.stderr
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4}))
    done = CliRunner().invoke(cli, ["bisect", str(artifact), *small, "--max-kl", "9", "--adapter", str(other)])
    assert told in done.stderr, "another adapter is not that one"
    again = ["--against", str(folder), "--context", "32", "--chunks", "2", "--device", "cpu", "--json"]
    done = CliRunner().invoke(cli, ["perplexity", str(artifact), *again, "--adapter", str(adapter)])
    (numbers,) = json.loads(done.stdout)["artifacts"].values()
    assert told not in done.stderr
    assert numbers["kld_mean"] < 3 * near


@pytest.mark.parametrize("command", ["check", "bisect", "speed", "perplexity"])
def test_the_checkpoint_is_opened_with_the_adapter(command, tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    seen = []

    class Opened(Exception):
        pass

    def look(reference, revision=None, adapter=None):
        seen.append(adapter)
        raise Opened

    monkeypatch.setattr(Checkpoint, "open", look)
    needed = {"bisect": ["--max-kl", "1"]}.get(command, [])
    arguments = [command, tmp_path / "a.gguf", "--against", "base", "--adapter", tmp_path / "adapter", *needed]
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert isinstance(done.exception, Opened), done.output
    assert seen == [tmp_path / "adapter"]


def test_tasks_refuse_an_adapter_that_they_would_not_merge(tmp_path):
    """They ask the folder as transformers loads it: the baseline would be the model without the adapter."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    arguments = ["tasks", tmp_path / "a.gguf", "--against", "base", "--adapter", tmp_path, "--task", "x"]
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert isinstance(done.exception, UsageError)
    assert "merge the adapter" in str(done.exception)
