"""What people meet first: no network, a missing folder, a narrow terminal, an open verdict. One line each, before the work."""

import json
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from qquant import pipeline, recipe
from qquant.artifact.manifest import ArtifactEntry, Manifest, ReleaseEntry, artifact_bytes
from qquant.checks.gate import judge
from qquant.checks.regression import LossChange
from qquant.cli import cli, main
from qquant.cli.reports import changes_table
from qquant.cli.tables import table_of
from qquant.errors import EnvironmentMissingError, PublishError, UsageError
from qquant.plan.plan import Plan
from qquant.recipe import Gates
from qquant.recipe.changes import Flags, changed
from qquant.release.card import _chats
from qquant.release.hub.failures import require_answer
from qquant.report.conditions import Conditions, TextFacts
from qquant.report.record import ArtifactReport, Report, Verdict
from qquant.source.checkpoint import Checkpoint
from tests.worlds.builds import BASE


def run(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.fixture
def no_names(monkeypatch):
    """A machine whose resolver knows no name."""

    def refuse(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_hub_id_without_a_network_is_one_line(no_names, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", "Qwen/Qwen1.5-0.5B-not-in-a-cache", "--recipe", "demo"])
    assert caught.value.code == EnvironmentMissingError.exit_code
    error = capsys.readouterr().err
    assert error.startswith("error: Qwen/Qwen1.5-0.5B-not-in-a-cache: cannot be fetched from the hub (")
    assert error.count("\n") == 1
    assert "Name or service not known" in error


def test_a_hub_that_cannot_be_named_is_given_up_in_seconds(no_names):
    pauses = []
    with pytest.raises(PublishError, match="Name or service not known; is there a network"):
        require_answer("https://hub.example", pauses.append)
    assert sum(pauses) <= 3


def test_a_hub_where_nothing_listens_is_given_up_in_seconds(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    pauses = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            PublishError, match=r"^127.0.0.1: Connection refused; is there a network, and is --endpoint"
        ):
            require_answer(endpoint, pauses.append)
        taken.listen()
        require_answer(endpoint, pauses.append)
    assert sum(pauses) <= 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "x.gguf", "--against", "y", "--junit", "{}/none/x.xml"],
        ["check", "x.gguf", "--against", "y", "--out", "{}/file/out"],
        ["report", "{}", "--html", "{}/none/x.html"],
        ["perplexity", "x.gguf", "--against", "y", "--save-logits", "{}/none/x"],
        ["build", "--recipe", "demo", "--out", "{}/out", "--junit", "{}/none/x.xml"],
    ],
)
def test_outputs_are_looked_at_before_the_work(arguments, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(*(argument.format(tmp_path) for argument in arguments))
    assert done.exit_code == UsageError.exit_code
    assert "there is no folder" in done.stderr or "is no folder that can be written to" in done.stderr


# --- a narrow terminal --------------------------------------------------------------------------------------------------


WITHOUT_TORCH = """
import os, sys
class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.stderr.flush()
            os.write(2, b"torch is imported\\n")
            os._exit(0)
sys.meta_path.insert(0, Torch())
from qquant.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "words",
    [
        "build {checkpoint} --recipe demo --only gguf-q4_0 --out {new}",
        "plan {checkpoint} --recipe demo --only gguf-q4_0 --time",
        "recipe types {checkpoint} --recipe demo --size 1MB --out {new}",
        "dequantize {artifact} --out {new}",
        "doctor --out {new}",
        "check {artifact} --against {checkpoint}",
        "compare {out} {out}",
        "bisect {artifact} --against {checkpoint} --max-kl 0.1",
        "speed {artifact} --against {checkpoint}",
        "perplexity {artifact} --against {checkpoint}",
        "tasks {artifact} --against {checkpoint} --task arc_easy",
        "run {artifact} Hello",
        "verify {artifact}",
    ],
    ids=lambda words: words.partition(" {")[0],
)
def test_work_says_what_begins_before_it_imports_torch(words, built, tmp_path):
    """On a busy machine the import takes minutes, and an empty screen is that of a program which hangs: `check` said nothing for three."""
    checkpoint, out = built
    typed = words.format(checkpoint=checkpoint, out=out, artifact=out / "model-AWQ", new=tmp_path / "new").split()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *typed], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    first, *_, last = done.stderr.splitlines()
    assert last == "torch is imported", done.stderr
    assert first != last


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_every_number_is_whole_at_any_width(width):
    names = ("gptq-int4", "a-name-that-is-much-longer", "[bold]x[/]")
    row = ArtifactReport("", "", 14_266_280, 5.1, 102.4, 1.0016, 0.00151, 0.1, 0.972, Verdict("inconclusive"))
    report = Report(
        "model", "recipe", 16, Conditions(TextFacts("t", 1, 1)), 100.0, tuple(replace(row, name=name) for name in names)
    )
    screen = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    screen.print(table_of(report, width))
    text = screen.export_text()
    assert text.count("0.00151") == text.count("inconclusive") == len(names)
    assert text.count("1.0016") == (len(names) if width > 60 else 0), "whole, or its column left out"
    assert "…" not in text
    assert "[bold]x[/]" in text
    assert "gptq-int4" in text, "a name is folded where it is long, and not before"
    assert max(map(len, text.splitlines())) <= width
    assert ("14,266,280" in text) == (width == 140)


def test_a_comparison_keeps_what_decides_on_a_narrow_terminal():
    """At 80 columns each number was cut to two digits, and the verdict to three letters."""
    change = LossChange("gptq-int4", "mean KL divergence", 0.011917, 0.01829, 0.002216, 0.010531, "inconclusive", 40)
    for width in range(40, 150):
        screen = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        screen.print(changes_table([change], width))
        text = screen.export_text()
        assert max(map(len, text.splitlines())) <= width
        for title, number in (("before", "0.011917"), ("now", "0.018290"), ("change", "+0.006373")):
            assert (number in text) == (title in text), (width, text)
        assert width < 60 or all(part in text for part in ("+0.006373", "inconclusive", "gptq-int4")), text
        assert width < 80 or all(part in text for part in ("+0.002216", "+0.010531", "0.018290")), text


def test_float32_is_told_with_its_price(make_checkpoint):
    narrow = Plan.of(BASE, Checkpoint.open(make_checkpoint("narrow")))
    wide = Plan.of(BASE, Checkpoint.open(make_checkpoint("wide", dtype=torch.float32)))
    assert not any("float32" in line for line in narrow.warnings)
    (told,) = [line for line in wide.warnings if "float32" in line]
    assert f"gptq has {wide.artifacts[0].bits_per_weight:.1f} bits per weight" in told
    assert wide.artifacts[0].bits_per_weight > 1.5 * narrow.artifacts[0].bits_per_weight


def test_a_plan_without_times_says_how_to_see_them(demo):
    told = run("plan", demo, "--recipe", "demo", "--only", "gguf-q4_0").output
    assert "time:   --time says how long" in told
    assert "--time" not in run("plan", demo, "--recipe", "demo", "--only", "gguf-q4_0", "--no-time").output


# --- what decides, and what stays at home -------------------------------------------------------------------------------


def test_an_undecided_gate_says_what_to_type():
    noise = np.random.default_rng(0).standard_normal(40)
    windows = 0.1 + 0.02 * (noise - noise.mean()) / noise.std(ddof=1)
    means = {"nll": windows, "kl": windows, "top1": windows}
    verdict = judge(Gates(kl_divergence=0.105), means)
    (reason,) = verdict.reasons
    assert verdict.outcome == "inconclusive"
    assert "cannot be told" not in reason
    count = int(reason.rpartition("--max-windows ")[2].partition(",")[0])
    assert 40 < count < 400
    many = np.tile(windows, -(-count // 40) * 2)
    assert judge(Gates(kl_divergence=0.105), dict.fromkeys(means, many)).outcome == "pass", "twice as many do"
    far = judge(Gates(kl_divergence=0.1 + 1e-7), means)
    assert "too near the limit" in far.reasons[0]


def test_a_single_window_is_no_reason_to_build_better():
    """It has no spread: a first look with `--windows 1` said that no text of up to 65,536 windows would do."""
    verdict = judge(Gates(kl_divergence=0.1), {"nll": np.ones(1), "kl": np.full(1, 0.01), "top1": np.full(1, 0.9)})
    (reason,) = verdict.reasons
    assert verdict.outcome == "inconclusive"
    assert "1 window;" in reason
    assert reason.endswith("One window has no spread to judge by: --windows 8 or more, or checks.windows in a recipe")


def test_folders_of_this_machine_stay_on_it(tmp_path):
    settings = (
        "checkpoint=/home/somebody/model", "calibration.sources=[{path: /home/somebody/chats.jsonl}]",
        "checks.text=/home/somebody/held.txt", "checks.texts=[../other.txt, bundled:code-test]",
        "artifacts.gptq.gates.regression_vs=/home/somebody/v1",
    )  # fmt: skip
    data = recipe.published(changed(BASE, Flags(settings=settings)))
    assert "somebody" not in repr(data)
    assert data["checkpoint"] == "model"
    assert data["calibration"]["sources"][0]["path"] == "chats.jsonl"
    assert (data["checks"]["text"], data["checks"]["texts"]) == ("held.txt", ["other.txt", "bundled:code-test"])
    hub = changed(BASE, Flags(settings=("checkpoint=Qwen/Qwen1.5-0.5B",)))
    assert recipe.published(hub)["checkpoint"] == "Qwen/Qwen1.5-0.5B"
    whole = BASE.model_dump(mode="json")
    for source in whole["calibration"]["sources"]:  # told only where they say something
        assert (source.pop("generated"), source.pop("openings")) == (False, None)
    assert recipe.published(BASE) == whole


def test_a_card_chats_by_the_template_and_not_by_the_name():
    def manifest(repository, chat=None, kind="text"):
        entry = ArtifactEntry("0", "gptq", {}, recipe={"calibration": {"sources": [{"kind": kind}]}})
        return Manifest({"a": entry}, ReleaseEntry(repository, chat=chat))

    assert _chats(manifest("support-assistant", chat=True))
    assert not _chats(manifest("Tiny-Chat-base", chat=False))
    assert _chats(manifest("support-assistant", kind="chat")), "of a build that did not note it"
    assert not _chats(manifest("Tiny-Chat"))


def test_no_torch_is_needed_to_be_told():
    code = "import sys; from qquant.cli import main\ntry: main(['plan', '--recipe', 'demo', '--set', 'calibration.samples=4'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_namespace_that_no_hub_takes_is_refused(tmp_path):
    done = run("publish", tmp_path, "--to", "dir", "--out", tmp_path / "o", "--namespace", "my org")
    assert "letters, digits and . _ - only" in str(done.exception)


def test_a_base_model_that_no_hub_has_is_refused(tmp_path):
    """It leads the card's head, which nobody escapes."""
    done = run("publish", tmp_path, "--to", "dir", "--out", tmp_path / "o", "--base-model", "<script>")
    assert "an id of a hub" in str(done.exception)


def test_verify_speaks_json_and_reads_bytes_without_torch(built):
    folder = built[1] / "model-AWQ"
    code = "import sys; from qquant.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", folder, "--bytes", "--json"], capture_output=True, text=True, check=True
    )
    (row,) = json.loads(done.stdout)["folders"]
    assert row == {"folder": str(folder), "bytes": row["bytes"]}
    assert done.stderr.strip() == "False"
    assert json.loads(run("verify", folder, "--json").stdout)["folders"][0]["tensors"] > 0


def test_a_check_counts_bits_as_the_build_does(built):
    folder, out = built
    report = json.loads((out / "report.json").read_text())
    paths = {"gptq": out / "model-GPTQ-Int4", "q4_0": out / "model-GGUF" / "model-q4_0.gguf"}
    checkpoint = Checkpoint.open(folder)
    parameters = checkpoint.family.parameters(checkpoint.config)
    found = {row["name"]: row["bits_per_weight"] for row in report["artifacts"]}
    for name, path in paths.items():
        assert 8 * pipeline._tensor_bytes(path) / parameters == pytest.approx(found[name])


def test_check_counts_bytes_as_the_build_did(tmp_path):
    """All files of a folder; with a GGUF file what the manifest lists with it; of a file that nobody lists, itself."""
    folder, files = tmp_path / "m-AWQ", {"model.safetensors": 7, "tokenizer.json": 5}
    folder.mkdir()
    for name, count in files.items():
        (folder / name).write_bytes(b"x" * count)
    (folder / ".cache").write_text("not ours")
    assert artifact_bytes(folder) == 12
    listed = {
        name: {"bytes": count, "sha256": "0"} for name, count in {"m-q8_0.gguf": 100, "Modelfile-q8_0": 3}.items()
    }
    entry = {"key": "k", "format": "gguf", "files": listed}
    (tmp_path / "qquant-manifest.json").write_text(
        json.dumps({"schema": "qquant-manifest-1", "artifacts": {"q8": entry}})
    )
    assert artifact_bytes(tmp_path / "m-q8_0.gguf") == 103


def test_a_file_system_without_room_for_anything_is_named(monkeypatch, tmp_path, demo):
    plan = Plan.of(recipe.load("demo"), Checkpoint.open(str(demo)), ("gguf-q4_0",))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=0))
    with pytest.raises(EnvironmentMissingError, match="is no place for files"):
        plan.require_room(tmp_path / "out")


@pytest.mark.parametrize(
    "words",
    [
        ["check", "ARTIFACT", "--against", "org/model"],
        ["bisect", "ARTIFACT", "--against", "org/model", "--max-kl", "1"],
        ["speed", "ARTIFACT", "--against", "org/model"],
        ["perplexity", "ARTIFACT", "--against", "org/model"],
        ["tasks", "ARTIFACT", "--against", "org/model", "--task", "arc_easy"],
        ["run", "org/model", "Hello"],
    ],
    ids=lambda words: words[0],
)
def test_a_hub_id_is_pinned_by_every_command_that_takes_one(words, tmp_path, monkeypatch):
    """`build` took --revision; what was built of it could not be compared with the same commit but by hand."""
    asked = []

    def download(repo, revision):
        asked.append((repo, revision))
        raise EnvironmentMissingError("no network")

    monkeypatch.setattr("qquant.source.hub._download", download)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    words = [str(artifact) if word == "ARTIFACT" else word for word in words]
    done = CliRunner().invoke(cli, [*words, "--revision", "v1"])
    assert asked == [("org/model", "v1")], done.output
