"""The three ways into the README, and the guide's lines on publishing, typed as they stand there: small checkpoints, and a stand-in of the hub."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file

from tests.conftest import write_checkpoint
from tests.worlds import ROOT, importing
from tests.worlds.hub_server import LARGE, TOKEN, Entry, Repository

yaml = YAML(typ="safe", pure=True)
OTHERS = ("llama-cli", "ollama")  # programs that are not ours: tests/oracles has them load our files
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "max_position_embeddings": 2048}
SMALLER = (  # what a build gets added, so that it takes seconds: less text, and limits that random weights keep
    "calibration.samples=24",
    "calibration.length=64",
    "checks.profile=default",
    "checks.texts=[]",
    "checks.windows=2",
    "checks.max_windows=2",
    "checks.length=64",
    "checks.answer_length=4",
    "artifacts.*.gates.defaults=false",
)
ADDED = {
    "build": ["--effort", "fast", *(word for setting in SMALLER for word in ("--set", setting))],
    "check": ["--windows", "2", "--length", "64", "--no-defaults"],
    "bisect": ["--windows", "2", "--length", "64"],
    "run": ["--max-new-tokens", "4"],
}
OWN = ("kl_divergence=9", "perplexity_ratio=9", "top1_agreement=0")  # instead of the limits of the example recipe


def ways():
    """Title -> lines, of each of the three ways."""
    text = (ROOT / "README.md").read_text().partition("## Three ways in")[2].partition("\n## ")[0]
    return {
        title: block.splitlines() for title, block in re.findall(r"\*\*(.+?)\*\*.*?```sh\n(.*?)```", text, re.DOTALL)
    }


def guide(heading):
    """Lines of the first block below a heading of the guide."""
    text = (ROOT / "recipes" / "GUIDE.md").read_text().partition(f"## {heading}\n")[2]
    return re.search(r"```\w+\n(.*?)```", text, re.DOTALL)[1].splitlines()


@pytest.fixture
def types(tmp_path, hub):
    """`types(line, *more)`: what a line of a page says, once it was run in an empty folder whose hub has three checkpoints."""
    for name in ("Qwen/Qwen1.5-72B-Chat", "Qwen/Qwen1.5-7B-Chat", "Qwen/Qwen1.5-0.5B-Chat"):
        folder = write_checkpoint(tmp_path / "hub" / name, **SHAPE)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        tree = {
            path: Entry(content, hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else None)
            for path, content in files.items()
        }
        hub.repos[name] = Repository()
        hub.repos[name].commit("main", tree, "as published")
    (tmp_path / "here").mkdir()
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }

    def run(line, *more):
        *launcher, command = re.split(r"(?<!-m )qquant |-m qquant ", line)
        launcher = ["torch.distributed.run", *launcher[0].split()[1:], "-m"] if launcher[0] else []
        command, *words = ["cpu" if word == "cuda" else word for word in shlex.split(command, comments=True)]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, "qquant", command, *words, *ADDED.get(command, []), *more],
            cwd=tmp_path / "here", env=os.environ | importing() | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    run.folder = tmp_path / "here"
    return run


@pytest.mark.slow
def test_i_release_models(types, hub):
    plan, build, report, publish = ways()["I release models."]
    assert "gguf-q2_k" in types(plan)
    types(build)
    assert types(report).count("pass") == 11
    assert types(publish).count("published: my-org/Qwen1.5-7B-Chat-") == 4
    assert all(repository.tags.keys() == {"v1"} for name, repository in hub.repos.items() if name.startswith("my-org/"))
    before = dict(hub.uploaded)
    assert types(publish).count("unchanged: ") == 4
    assert dict(hub.uploaded) == before


@pytest.mark.slow
def test_i_fine_tuned_one(types):
    """The recipe is the one that the line says: the example of recipes/README.md."""
    folder = types.folder
    write_checkpoint(folder / "path" / "to" / "model", **SHAPE)
    write_adapter(folder / "path" / "to" / "lora")
    example = (ROOT / "recipes" / "README.md").read_text().partition("## An example")[2]
    (folder / "my.yaml").write_text(re.search(r"```yaml\n(.*?)```", example, re.DOTALL)[1])
    chats = [
        [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n} it is."}]
        for n in range(99)
    ]
    (folder / "support.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats))
    (folder / "held-out-support.txt").write_text(
        "Somebody asks what a number is, and somebody answers what it is. " * 99
    )
    build, check, bisect, run = ways()["I fine-tuned one."]
    limits = [f"artifacts.*.gates.{limit}" for limit in OWN]
    types(build, *(word for setting in limits for word in ("--set", setting)))
    assert "model-GPTQ-Int4" in types(check)
    assert "in 16 bits" in types(bisect)
    assert types(run)


@pytest.mark.slow
def test_i_have_a_laptop(types, hub):
    build, run, *others = ways()["I have a laptop."]
    assert [line.split()[0] for line in others] == list(OTHERS)
    types(build)
    assert types(run)
    for line in others:
        file = next(word for word in shlex.split(line) if word.startswith("out/"))
        assert (types.folder / file).is_file()
    dry, publish, verify = guide("Publishing")
    types(dry)
    assert not any(name.startswith("my-org/") for name in hub.repos)
    assert "published: my-org/Qwen1.5-0.5B-Chat-GGUF" in types(publish)
    assert "unchanged: my-org/Qwen1.5-0.5B-Chat-GGUF" in types(publish)
    types(verify.replace("published/folder", "out/Qwen1.5-0.5B-Chat-GGUF"))


@pytest.mark.slow
def test_i_have_several_gpus(types):
    """Ranks of the CPU, two instead of four."""
    build, check, doctor, plan = (
        line.replace("--nproc-per-node 4", "--nproc-per-node 2") for line in guide("Several GPUs or machines")
    )
    assert types(build).count("baseline (16 bit)") == 1
    assert types(check).count("baseline (16 bit)") == 1
    assert "sum by" in types(doctor)
    assert "rank 3: " in types(plan)


@pytest.mark.slow
def test_i_write_python(types):
    """The block as it stands, but for "cuda" and the three dots; its build and its check read little text."""
    write_checkpoint(types.folder / "path" / "to" / "model", **SHAPE)
    settings = {key: yaml.load(value) for key, _, value in (setting.partition("=") for setting in SMALLER)}
    lines = [
        "import functools, torch, qquant",
        f"qquant.build = functools.partial(qquant.build, settings={settings}, effort='fast')",
        "qquant.check = functools.partial(qquant.check, windows=2, length=64)",
        *guide("From Python"),
        "assert len(report.artifacts) == 1, report",
        "assert 'Qwen2ForCausalLM' in str(type(model)), model",
    ]
    code = "\n".join(lines).replace('"cuda"', '"cpu"').replace("(...)", "(torch.tensor([[1, 2]]), max_new_tokens=2)")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=types.folder, env=importing(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def write_adapter(folder):
    """A LoRA of the query projection."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    drawn, name = torch.Generator().manual_seed(0), "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {"lora_A": torch.randn(2, 256, generator=drawn), "lora_B": torch.randn(256, 2, generator=drawn)}
    save_file({f"{name}.{part}.weight": value for part, value in weights.items()}, folder / "adapter_model.safetensors")
