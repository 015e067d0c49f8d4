"""What people meet first: no network, a missing folder, a narrow terminal, too little text, the wrong folder. One line each, before the work."""

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
from qquant.cli import cli, main
from qquant.cli.tables import table_of
from qquant.errors import EnvironmentMissingError, InputError, PublishError, UsageError
from qquant.formats import detect
from qquant.plan.beside import beside
from qquant.plan.capacity import Free, require_memory
from qquant.plan.plan import Plan
from qquant.plan.texts import examine, shortfall
from qquant.recipe import Gates
from qquant.recipe.changes import Flags, changed
from qquant.release.card import _chats
from qquant.release.hub.failures import require_answer
from qquant.report.conditions import Conditions, TextFacts
from qquant.report.record import ArtifactReport, Report, Verdict
from qquant.report.solved import LinearRecord, warnings_of
from qquant.source.checkpoint import Checkpoint

BASE = recipe.parse(
    "version: 1\nname: small\ncalibration: {sources: [{bundled: books-en}], samples: 2, length: 32}\n"
    "checks: {windows: 2, length: 32}\nartifacts: [{name: gptq, format: gptq, bits: 4, group_size: 32}]\n"
)


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


def test_a_build_says_what_it_begins_before_it_imports_torch(demo, tmp_path):
    """Seconds of an empty screen look like a program that hangs."""
    code = "import sys, qquant.cli.terminal as t\nfrom qquant.cli import main\nold = t.echo\n" + "\n".join(
        [
            "import qquant.cli.build; b = sys.modules['qquant.cli.build']",
            "def said(text, **more):",
            "    print('torch' in sys.modules, text); sys.exit(0)",
            "b.echo = said",
            f"main(['build', {str(demo)!r}, '--recipe', 'demo', '--only', 'gguf-q4_0', '--out', {str(tmp_path / 'out')!r}])",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"False tiny-qwen1.5: 1 artifact, recipe demo: {tmp_path / 'out'}\n", done.stderr


@pytest.mark.parametrize("width", [80, 100, 140])
def test_every_number_is_whole_at_any_width(width):
    names = ("gptq-int4", "a-name-that-is-much-longer", "[bold]x[/]")
    row = ArtifactReport("", "", 14_266_280, 5.1, 102.4, 1.0016, 0.00151, 0.1, 0.972, Verdict("inconclusive"))
    report = Report(
        "model", "recipe", 16, Conditions(TextFacts("t", 1, 1)), 100.0, tuple(replace(row, name=name) for name in names)
    )
    screen = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    screen.print(table_of(report, width))
    text = screen.export_text()
    assert text.count("0.00151") == text.count("1.0016") == text.count("inconclusive") == len(names)
    assert "…" not in text
    assert "[bold]x[/]" in text
    assert max(map(len, text.splitlines())) <= width
    assert ("14,266,280" in text) == (width == 140)


# --- too little text ----------------------------------------------------------------------------------------------------


def test_calibration_that_runs_out_is_one_line(make_checkpoint, tmp_path):
    folder, short = make_checkpoint(), tmp_path / "short.txt"
    short.write_text("Ships and sailors. " * 40)
    asked = changed(BASE, Flags(settings=(f"calibration.sources=[{{path: {short}}}]", "calibration.samples=500")))
    (line,) = Plan.of(asked, Checkpoint.open(folder)).texts.warnings
    assert line.startswith("calibration: ")
    assert "of 500 samples" in line
    assert "of 16,000 tokens" in line
    assert shortfall(500, 16_000, asked.calibration) == ()
    many = [LinearRecord(f"w{i}", 0.0, inputs=64 + i, tokens=31) for i in range(42)]
    assert warnings_of(many) == ["42 linears, w0 first: 31 calibration tokens for 105 inputs; give more samples"]


def test_a_check_text_is_counted_before_it_is_promised(make_checkpoint, tmp_path):
    folder, short = make_checkpoint(), tmp_path / "held.txt"
    short.write_text("Ships and sailors. " * 200)
    asked = changed(BASE, Flags(settings=(f"checks.text={short}", "checks.windows=400", "checks.max_windows=800")))
    plan = Plan.of(asked, Checkpoint.open(folder))
    assert plan.looks == [plan.texts.windows]
    assert 0 < plan.texts.windows < 400
    assert plan.texts.warnings == (f"{short}: {plan.texts.windows} of 400 windows of 32 tokens: the text has no more",)
    fewer, more = (changed(asked, Flags(settings=(f"checks.windows={n}",))) for n in (2, 4))
    assert Plan.of(fewer, Checkpoint.open(folder)).reach("gptq")[0].detectable > (
        Plan.of(more, Checkpoint.open(folder)).reach("gptq")[0].detectable
    )


def test_memory_is_foreseen_for_the_text_that_is_there(make_checkpoint, tmp_path):
    """A build of fifty chats was refused for the memory of the millions of tokens that its recipe would have taken."""
    source, few = Checkpoint.open(make_checkpoint()), tmp_path / "few.txt"
    few.write_text("Ships and sailors. " * 200)
    of_few = changed(BASE, Flags(settings=(f"calibration.sources=[{{path: {few}}}]", "calibration.samples=8")))
    much = changed(of_few, Flags(settings=("calibration.samples=60000",)))
    plan, other = Plan.of(much, source), Plan.of(of_few, source)
    assert plan.texts.tokens < 4000
    assert (plan.memory, plan.disk, plan.tokens) < (2 * other.memory, 2 * other.disk, 4000)
    assert all(cost.memory < 2 * other.memory for cost in beside(much, source, plan, None))
    require_memory(much, source, plan, Free("cpu", 4 * other.memory, 4 * other.memory))


@pytest.mark.parametrize("setting", ["calibration.sources=[{path: none.jsonl}]", "checks.text=none.txt"])
def test_a_text_that_is_not_there_is_missed_by_plan(make_checkpoint, setting):
    with pytest.raises(InputError, match="not found, and c"):
        Plan.of(changed(BASE, Flags(settings=(setting,))), Checkpoint.open(make_checkpoint()))


def test_a_template_whose_answers_do_not_end_is_told_by_plan(tokenizer_folder):
    good = examine(BASE, tokenizer_folder()).warnings
    assert good == ()
    odd = tokenizer_folder("{% for m in messages %}[{{ m['role'] }}]: {{ m['content'] }}\n{% endfor %}")
    (told,) = examine(BASE, odd).warnings
    assert told.startswith("answers in chats will not end with their turn")
    assert "ends an answer with" in told
    chats = changed(BASE, Flags(settings=("calibration.sources=[{bundled: chat-en, kind: chat}]",)))
    assert examine(chats, odd).warnings[0].startswith("the build will refuse to calibrate on chats")


def test_float32_is_told_with_its_price(make_checkpoint):
    narrow = Plan.of(BASE, Checkpoint.open(make_checkpoint("narrow")))
    wide = Plan.of(BASE, Checkpoint.open(make_checkpoint("wide", dtype=torch.float32)))
    assert not any("float32" in line for line in narrow.warnings)
    (told,) = [line for line in wide.warnings if "float32" in line]
    assert f"gptq has {wide.artifacts[0].bits_per_weight:.1f} bits per weight" in told
    assert wide.artifacts[0].bits_per_weight > 1.5 * narrow.artifacts[0].bits_per_weight


# --- the wrong folder ---------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_models_names_them(tmp_path):
    (tmp_path / "model-GGUF").mkdir()
    for name in ("model-q4_0.gguf", "model-q8_0.gguf"):
        (tmp_path / "model-GGUF" / name).write_bytes(b"GGUF")
    (tmp_path / "model-AWQ").mkdir()
    (tmp_path / "model-AWQ" / "config.json").write_text("{}")
    for folder, found in (
        (tmp_path / "model-GGUF", "holds model-q4_0.gguf, model-q8_0.gguf; name one, e.g. "),
        (tmp_path, "holds model-AWQ/, model-GGUF/model-q4_0.gguf, model-GGUF/model-q8_0.gguf; name one"),
    ):
        for look in (detect, Checkpoint.open):
            with pytest.raises(InputError, match=found):
                look(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no config\.json, so it is no model folder"):
        detect(tmp_path / "empty")


def test_an_importance_matrix_is_no_model(tmp_path):
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "imatrix.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="has no config"):
        detect(tmp_path)
    (tmp_path / "m-AWQ").mkdir()
    (tmp_path / "m-AWQ" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds m-AWQ/; name one"):
        detect(tmp_path)


def test_verify_of_an_output_folder_names_what_is_in_it(tmp_path):
    (tmp_path / "m-AWQ").mkdir()
    (tmp_path / "m-AWQ" / "qquant-manifest.json").write_text("{}")
    (tmp_path / "calibration").mkdir()
    message = str(run("verify", tmp_path).exception)
    assert (
        message == f"{tmp_path}: holds no qquant-manifest.json; name the folders in it: qquant verify {tmp_path}/m-AWQ"
    )


def test_an_artifact_of_the_hub_is_told_how_it_comes_here(demo):
    result = run("check", "somebody/Model-AWQ", "--against", demo)
    assert "hf download somebody/Model-AWQ --local-dir Model-AWQ" in str(result.exception)
    assert "hf download" not in str(run("check", "somewhere", "--against", demo).exception)


def test_a_plan_without_times_says_how_to_see_them(demo):
    told = run("plan", demo, "--recipe", "demo", "--only", "gguf-q4_0").output
    assert "time:   --time says how long" in told
    assert "--time" not in run("plan", demo, "--recipe", "demo", "--only", "gguf-q4_0", "--no-time").output


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="is a file; a checkpoint is the folder of the 16-bit model"):
        Checkpoint.open(tmp_path / "m.gguf")


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


def test_a_pointer_of_git_lfs_is_named(make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="is a pointer of Git LFS, not the file. Fetch it: git lfs pull"):
        Checkpoint.open(folder)


def test_windows_beyond_the_models_positions_are_told(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint())
    (told,) = pipeline.beyond(4096, checkpoint)
    assert told.startswith("windows of 4,096 tokens, and the model has 512 positions")
    assert pipeline.beyond(512, checkpoint) == []


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


def test_a_users_own_chats_get_no_invented_system_turns():
    own = changed(BASE, Flags(sources=({"path": "chats.jsonl", "kind": "chat"},)))
    assert own.calibration.default_system_share == 1


def test_a_users_own_texts_get_a_background_that_the_recipe_names():
    """What the checkpoint writes itself, and recipes that nobody changed, get none."""
    own = changed(BASE, Flags(sources=({"path": "chats.jsonl", "kind": "chat"},)))
    assert own.calibration.background == 0.05
    assert "background: 0.05" in recipe.dump(own, brief=True)
    assert recipe.parse(recipe.dump(own)) == own
    declined = ("calibration.background=0",)
    assert changed(BASE, Flags(sources=({"path": "a.txt"},), settings=declined)).calibration.background == 0
    assert changed(BASE, Flags(sources=({"generated": True},))).calibration.background == 0
    assert {recipe.load(name).calibration.background for name in recipe.names()} == {0}


@pytest.mark.parametrize(
    ("first", "second", "file"),
    [
        ("format: awq, group_size: 64", "format: awq, group_size: 32", "model-AWQ/config.json"),
        (
            "format: gptq, bits: 4, group_size: 64",
            "format: gptq, bits: 4, group_size: 32",
            "model-GPTQ-Int4/config.json",
        ),
        ("format: gguf, type: q4_0", "format: gguf, type: q4_0, solver: gptq", "model-GGUF/model-q4_0.gguf"),
    ],
)
def test_two_artifacts_of_one_file_are_refused(make_checkpoint, first, second, file):
    settings = (f"artifacts=[{{name: a, {first}}}, {{name: b, {second}}}]",)
    both, checkpoint = changed(BASE, Flags(settings=settings)), Checkpoint.open(make_checkpoint())
    with pytest.raises(UsageError, match=f"artifacts a and b would both write {file}"):
        Plan.of(both, checkpoint)
    assert Plan.of(both, checkpoint, ["b"]).artifacts[0].name == "b"


def test_a_folder_of_artifacts_is_told_apart_from_a_model(tmp_path):
    (tmp_path / "m-AWQ").mkdir()
    (tmp_path / "m-AWQ" / "config.json").write_text("{}")
    result = run("inspect", tmp_path)
    assert str(result.exception) == f"{tmp_path}: holds m-AWQ/; name one, e.g. {tmp_path}/m-AWQ"


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


def test_verify_takes_a_file_by_its_folder(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    result = run("verify", tmp_path / "m.gguf")
    assert f"{tmp_path}: holds no qquant-manifest.json" in str(result.exception)


def test_a_build_that_will_refuse_its_chats_says_so_once(make_checkpoint, tmp_path, capsys):
    """What its plan found out is not tried again: a template that runs away takes its seconds once, and the answer is one line."""
    folder = make_checkpoint()
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    (tmp_path / "recipe.yaml").write_text(
        "version: 1\nname: chats\ncalibration: {sources: [{bundled: chat-en, kind: chat}], samples: 2, length: 32}\n"
        "checks: {windows: 2, length: 32}\nartifacts: [{name: q4_0, format: gguf, type: q4_0}]\n"
    )
    asked = ["--recipe", str(tmp_path / "recipe.yaml")]
    with pytest.raises(SystemExit) as caught:
        main(["build", str(folder), *asked, "--out", str(tmp_path / "out")])
    assert caught.value.code == InputError.exit_code
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert "the chat template refuses a chat" in said
    assert "never" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(folder), *asked])
    assert caught.value.code == 0
    assert "the build will refuse to calibrate on chats" in capsys.readouterr().out
