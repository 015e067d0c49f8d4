"""Recipes: the bundled ones load, a file is found, the fingerprint is that of the content."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from qquant import recipe
from qquant.errors import UsageError
from qquant.recipe import (
    AwqArtifact,
    Calibration,
    GgufArtifact,
    GptqArtifact,
    Recipe,
    Source,
)
from qquant.resources import data_dir
from tests.worlds.recipe_text import GOOD, changed, fingerprint

OFFICIAL = ["gptq-int4", "gptq-int8", "awq"] + [
    f"gguf-{kind}" for kind in ("q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_0", "q5_k_m", "q6_k", "q8_0")
]


# The bundled recipes.


def test_bundled_names():
    assert recipe.names() == ["demo", "laptop", "qwen1.5-base", "qwen1.5-chat"]


@pytest.mark.parametrize("name", recipe.names())
def test_bundled_recipe_loads_under_its_name(name):
    loaded = recipe.load(name)
    assert loaded.name == name
    assert loaded.description
    assert recipe.parse(recipe.dump(loaded)) == loaded
    assert all(artifact.gates.defaults for artifact in loaded.artifacts)


@pytest.mark.parametrize("name", ["qwen1.5-chat", "qwen1.5-base"])
def test_official_artifacts_and_settings(name):
    loaded = recipe.load(name)
    assert [artifact.name for artifact in loaded.artifacts] == OFFICIAL
    for artifact in loaded.artifacts:
        match artifact:
            case GptqArtifact():
                assert artifact.name == f"gptq-int{artifact.bits}"
                assert (artifact.group_size, artifact.symmetric, artifact.desc_act, artifact.damping) == (
                    128,
                    True,
                    False,
                    0.01,
                )
            case AwqArtifact():
                assert (artifact.bits, artifact.group_size, artifact.zero_point) == (4, 128, True)
            case GgufArtifact():
                assert artifact.name == f"gguf-{artifact.type}"
    assert (loaded.calibration.samples, loaded.calibration.length) == (128, 2048)


def test_the_laptop_recipe_is_the_chat_recipe_with_less():
    small, whole = recipe.load("laptop"), recipe.load("qwen1.5-chat")
    assert small.calibration.sources == whole.calibration.sources
    assert (
        small.calibration.samples * small.calibration.length * 8 == whole.calibration.samples * whole.calibration.length
    )
    (artifact,) = small.artifacts
    assert artifact.name == "gguf-q4_k_m"
    assert small.checks.profile == "default"
    assert artifact.sweeps == 0


def test_base_and_demo_recipes_are_plain_text_and_the_chat_recipe_is_mostly_chat():
    def share_of_chats(name):
        sources = recipe.load(name).calibration.sources
        return sum(source.weight for source in sources if source.kind == "chat") / sum(
            source.weight for source in sources
        )

    assert share_of_chats("qwen1.5-base") == share_of_chats("demo") == 0
    assert share_of_chats("qwen1.5-chat") > 0.5
    assert recipe.load("qwen1.5-chat").calibration.default_system_share == 0.25


def test_demo_builds_the_bundled_checkpoint():
    demo = recipe.load("demo")
    assert [artifact.name for artifact in demo.artifacts] == ["gptq-int4", "gptq-int8", "awq", "gguf-q8_0", "gguf-q4_0"]
    assert demo.checkpoint == "bundled:tiny-qwen1.5"
    assert (data_dir("recipes") / "demo" / "tiny-qwen1.5" / "config.json").is_file()


@pytest.mark.parametrize("name", recipe.names())
def test_every_bundled_text_exists_and_is_of_the_kind_named(name):
    loaded = recipe.load(name)
    corpora, heldout = (
        {entry["name"]: entry["kind"] for entry in YAML(typ="safe", pure=True).load(data_dir("calibration") / file)}
        for file in ("corpora.yaml", "heldout.yaml")
    )
    for source in loaded.calibration.sources:
        assert corpora[source.bundled] == source.kind
    assert loaded.checks.text.removeprefix("bundled:") in heldout


# Finding the file.


def test_a_bare_name_is_bundled_and_the_rest_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text(GOOD)
    Path("demo.yaml").write_text(GOOD)
    Path("demo.yml").write_text(GOOD)
    assert recipe.load("demo").name == "demo"
    for file in ("./demo", "demo.yaml", "demo.yml", Path("demo"), tmp_path / "demo"):
        assert recipe.load(file).name == "good"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError) as caught:
        recipe.load("qwen15-chat")
    assert str(caught.value) == (
        'no bundled recipe has this name, got "qwen15-chat"; allowed: demo, laptop, qwen1.5-base, qwen1.5-chat,'
        " or the path of a .yaml file; did you mean 'qwen1.5-chat'?"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.yaml", "No such file or directory"),
        ("folder.yaml", "Is a directory"),
        ("a\0.yaml", "embedded null byte"),
    ],
)
def test_unreadable_file(tmp_path, name, reason):
    (tmp_path / "folder.yaml").mkdir()
    file = f"{tmp_path}/{name}"
    with pytest.raises(UsageError) as caught:
        recipe.load(file)
    assert str(caught.value) == f"{file}: cannot read the recipe: {reason}"


def test_a_pipe_without_a_writer_is_not_waited_for(tmp_path):
    file = tmp_path / "pipe.yaml"
    os.mkfifo(file)
    code = f"from qquant import recipe; recipe.load({str(file)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert b"pipe.yaml: cannot read the recipe: it is a pipe" in done.stderr


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(b"version: 1\nname: caf\xe9\n")
    with pytest.raises(UsageError, match=re.escape(f"{file}:2:10: a recipe is UTF-8 text, got the byte 0xe9")):
        recipe.load(file)
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode().replace(b"\n", b"\r\n"))
    assert recipe.load(file) == recipe.parse(GOOD)


def test_messages_carry_the_path_of_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(changed("samples: 64", "samples: 0"))
    with pytest.raises(UsageError) as caught:
        recipe.load(str(file))
    assert str(caught.value).startswith(f"{file}:8:12: calibration.samples: out of range, got 0; ")
    assert caught.value.exit_code == 2


# The fingerprint.


def test_fingerprint_is_of_the_content_not_of_the_writing():
    first = fingerprint(recipe.parse(GOOD))
    assert re.fullmatch("[0-9a-f]{64}", first)
    rewritten = "# a comment\n" + changed("weight: 3", "weight: 3.00").replace(
        "version: 1\nname: good", "name: 'good'\nversion: 1"
    )
    assert fingerprint(recipe.parse(rewritten + "shard_size: 4000000000\n")) == first
    zero, negative_zero = (
        recipe.parse(changed("samples: 64", f"samples: 64\n  default_system_share: {text}")) for text in ("0", "-0.0")
    )
    assert zero == negative_zero
    assert fingerprint(zero) == fingerprint(negative_zero)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: good", "name: better"),
        ("weight: 3", "weight: 4"),
        ("bits: 4", "bits: 8"),
        ("0.1}", "0.2}"),
        ("windows: 8", "windows: 9"),
    ],
)
def test_fingerprint_changes_with_the_content(old, new):
    assert fingerprint(recipe.parse(changed(old, new))) != fingerprint(recipe.parse(GOOD))


def test_fingerprint_stays_what_it_was():
    made = Recipe(
        version=1,
        name="语".encode().hex(),
        description="语",
        calibration=Calibration(sources=(Source(bundled="a"),)),
        artifacts=(AwqArtifact(name="a", format="awq"),),
    )
    assert fingerprint(made) == "3ca279a2fa46390fc1b2a5b9080d8cd0bef53d4f1a9eb1173ee27ebec8f1629c"


def test_import_and_load_stay_light():
    heavy = {
        "torch",
        "numpy",
        "transformers",
        "datasets",
        "huggingface_hub",
        "gguf",
        "safetensors",
        "jinja2",
        "click",
        "rich",
    }
    program = "import sys, qquant.recipe; print('ruamel.yaml' in sys.modules); qquant.recipe.load('demo'); print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    lazily, loaded = output.splitlines()
    assert lazily == "False"
    assert not heavy & set(loaded.split())
