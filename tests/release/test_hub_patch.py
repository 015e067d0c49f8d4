"""One setting changed in all sibling repositories: asked for first, in one commit each."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import HfApi

from qquant.artifact.manifest import verify_files
from qquant.errors import PublishError, UsageError
from qquant.release.hub import HuggingFace, Setting, patch
from tests.worlds.hub_release import Waits, publish, write_build
from tests.worlds.hub_server import TOKEN

pytestmark = pytest.mark.usefixtures("waits")


@pytest.fixture
def family(hub, tmp_path):
    """Two sibling repositories, published."""
    contents = {
        name: {"a": ["config.json", "model.safetensors"]} for name in ("Qwen1.5-7B-Chat-AWQ", "Qwen1.5-14B-Chat-AWQ")
    }
    contents = {name: {f"{name}-a": files["a"]} for name, files in contents.items()}
    folder = write_build(tmp_path / "family", contents=contents)
    publish(hub, folder)
    return [f"org/{name}" for name in contents]


def change(hub, text, *patterns, accept=True):
    shown = []
    client = HuggingFace(HfApi(hub.url, TOKEN), lambda text: None, Waits())
    changes = patch(client, Setting.parse(text), patterns, lambda change: shown.append(change.diff) or accept)
    return changes, shown


def test_one_setting_changes_in_all_siblings(hub, family, tmp_path):
    weights = {name: hub.files(name)["model.safetensors"] for name in family}
    changes, shown = change(hub, "config.json:eos_token_id=[151645, 151643]", "org/Qwen1.5-*-Chat-*")
    assert [found.repository for found in changes] == sorted(family)
    for name, diff in zip(sorted(family), shown, strict=True):
        assert f"--- {name}/config.json" in diff
        files = hub.files(name)
        assert json.loads(files["config.json"])["eos_token_id"] == [151645, 151643]
        assert files["model.safetensors"] == weights[name]
        assert len(hub.history[name]) == 3  # created, released, changed: one commit
        assert "eos_token_id" not in hub.files(name, "v1")["config.json"].decode()
        copy = tmp_path / name.replace("/", "-")
        copy.mkdir()
        for path, content in files.items():
            (copy / path).write_bytes(content)
        verify_files(copy)  # the manifest knows the new hash
    again, _ = change(hub, "config.json:eos_token_id=[151645, 151643]", "org/Qwen1.5-*-Chat-*")
    assert all(found.commit is None and not found.diff for found in again)
    assert all(len(hub.history[name]) == 3 for name in family)


def test_what_vouched_for_the_old_bytes_goes_with_a_change(hub, family):
    """The statement keeps what is still true, the bill of materials has the new hash, the signature is gone."""
    name = family[0]
    old = {file: hashlib.sha256(content).hexdigest() for file, content in hub.files(name).items()}
    statement = {"subject": [{"name": file, "digest": {"sha256": digest}} for file, digest in old.items()]}
    component = {"name": "config.json", "hashes": [{"alg": "SHA-256", "content": old["config.json"]}]}
    bill = {"metadata": {"component": {"components": [component]}}}
    signed = {
        "qquant-provenance__json": json.dumps(statement).encode(),
        "qquant-bom__cdx__json": json.dumps(bill).encode(),
        "model__sig": b"over the old bytes",
    }
    hub.push(name, **signed)
    _, shown = change(hub, "config.json:a=1", name)
    assert f"{name}/model.sig: goes" in shown[0]
    files = hub.files(name)
    assert "model.sig" not in files
    subjects = json.loads(files["qquant-provenance.json"])["subject"]
    assert {subject["name"] for subject in subjects} == old.keys() - {"config.json", "qquant-manifest.json"}
    assert all(
        subject["digest"]["sha256"] == hashlib.sha256(files[subject["name"]]).hexdigest() for subject in subjects
    )
    (listed,) = json.loads(files["qquant-bom.cdx.json"])["metadata"]["component"]["components"]
    assert listed["hashes"][0]["content"] == hashlib.sha256(files["config.json"]).hexdigest()


def test_nothing_changes_without_consent_or_when_one_cannot(hub, family):
    _, shown = change(hub, "config.json:a=1", "org/*", accept=False)
    assert len(shown) == 2
    with pytest.raises(PublishError, match=r"none has a generation_config\.json"):
        change(hub, "generation_config.json:a=1", "org/*")
    assert all(len(hub.history[name]) == 2 for name in family)


def test_a_sibling_without_the_file_is_left_as_it_is(hub, family, tmp_path):
    contents = {"Qwen1.5-7B-Chat-GGUF": {"q8_0": ["qwen1_5-7b-chat-q8_0.gguf"]}}
    publish(hub, write_build(tmp_path / "gguf", contents=contents))
    changes, shown = change(hub, "config.json:a=1", "org/Qwen1.5-*")
    assert [found.repository for found in changes] == sorted(family)
    assert all(shown)
    assert len(hub.history["org/Qwen1.5-7B-Chat-GGUF"]) == 2


def test_a_patch_survives_a_lost_answer_and_stops_at_somebody_elses_commit(hub, family):
    hub.fail("POST .*commit/main", "lost")
    change(hub, "config.json:a=1", f"{family[0]}")
    assert len(hub.history[family[0]]) == 3
    moved = []

    def meddle(method, path):
        if path.endswith(f"{family[1]}/commit/main") and not moved:
            moved.append(hub.push(family[1], notes__txt=b"theirs"))

    hub.faults.append(meddle)
    with pytest.raises(PublishError, match="A commit has happened since"):
        change(hub, "config.json:a=1", family[1])
    assert b'"a"' not in hub.files(family[1])["config.json"]


@pytest.mark.parametrize(
    "text", ["config.json", "config.json:a", "../x.json:a=1", "qquant-manifest.json:a=1", "a.txt:b=1"]
)
def test_a_setting_has_one_form(text):
    with pytest.raises(UsageError, match=r"must be FILE\.json:KEY=VALUE"):
        Setting.parse(text)


def test_settings_go_into_mappings_and_keep_the_rest():
    setting = Setting.parse("config.json:quantization_config.desc_act=false")
    assert setting.apply(b'{"b": 1, "quantization_config": {}}', "x") == (
        b'{\n  "b": 1,\n  "quantization_config": {\n    "desc_act": false\n  }\n}'
    )
    assert Setting.parse("a.json:k=plain text").value == "plain text"
    with pytest.raises(PublishError, match="has no mapping quantization_config"):
        setting.apply(b"{}", "x")
    same = b'{"k":   1}'
    assert Setting.parse("a.json:k=1").apply(same, "x") == same
    assert Setting.parse("a.json:k=true").apply(same, "x") != same  # True == 1 in Python, not in JSON


def test_the_patch_command_asks_first(hub, family):
    command = [
        sys.executable,
        "-m",
        "qquant.cli",
        "patch",
        "config.json:a=1",
        "--repos",
        "org/*",
        "--endpoint",
        hub.url,
    ]
    settings = os.environ | {"HF_TOKEN": TOKEN}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=settings, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    done = subprocess.run([*command, "--dry-run"], check=False, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    assert '+  "a": 1' in done.stdout
    assert all(len(hub.history[name]) == 2 for name in family)
    done = subprocess.run([*command, "--yes"], check=False, capture_output=True, text=True, env=settings)
    assert "2 of 2 repositories changed" in done.stderr
