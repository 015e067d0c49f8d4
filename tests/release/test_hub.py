"""Publishing with the real client against a local stand-in of the hub: what is published, where, and what is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import HfApi

from qquant.errors import EnvironmentMissingError, GateFailedError, InputError, PublishError, UsageError
from qquant.release.hub import Folder, ModelScope, Request
from qquant.release.repository import read_release
from tests.worlds.hub_release import CONTENTS, GGUF, GPTQ, expected, publish, repositories, require_whole, write_build
from tests.worlds.hub_server import TOKEN

pytestmark = pytest.mark.usefixtures("waits")


@pytest.mark.parametrize("pull_request", [False, True])
def test_a_release_is_published_whole_tagged_and_collected(hub, random_release, pull_request):
    done = publish(hub, random_release, pull_request=pull_request, collection="Qwen1.5 quantized")
    assert [result.state for result in done] == ["published", "published"]
    for name, files in expected(random_release).items():
        assert hub.files(name) == files
        assert hub.files(name, "v1") == files
        assert len(hub.history[name]) == 2  # what create_repo made, and the release: one step
    assert {result.revision for result in done} == {repo.branches["main"] for repo in hub.repos.values()}
    if not pull_request:
        assert all(set(repo.branches) == {"main"} for repo in hub.repos.values())
    (collection,) = hub.collections.values()
    assert sorted(collection["items"]) == sorted(hub.repos)


@pytest.mark.parametrize("pull_request", [False, True])
def test_a_second_run_uploads_nothing(hub, random_release, pull_request):
    publish(hub, random_release, pull_request=pull_request)
    before = dict(hub.uploaded), {name: len(repo.commits) for name, repo in hub.repos.items()}
    hub.requests.clear()
    done = publish(hub, random_release, pull_request=pull_request)
    assert [result.state for result in done] == ["unchanged", "unchanged"]
    assert (dict(hub.uploaded), {name: len(repo.commits) for name, repo in hub.repos.items()}) == before
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}


def test_a_new_release_replaces_the_old_one_in_one_step(hub, random_release, tmp_path):
    publish(hub, random_release)
    contents = {GPTQ: {"gptq-int4": ["config.json", "model.safetensors"]}, GGUF: CONTENTS[GGUF]}
    second = write_build(tmp_path / "second", seed=1, contents=contents)
    with pytest.raises(PublishError, match=r"tag v1 marks another release .* Give a new --tag"):
        publish(hub, second)
    publish(hub, second, tag="v2")
    assert set(hub.files(f"org/{GPTQ}")) == {"config.json", "model.safetensors", "qquant-manifest.json", "report.json"}
    assert hub.files(f"org/{GPTQ}", "v1") == expected(random_release)[f"org/{GPTQ}"]
    require_whole(hub, random_release, second)


def test_a_pull_request_can_wait_for_a_person(hub, random_release):
    done = publish(hub, random_release, pull_request=True, merge=False)
    assert {result.state for result in done} == {"waiting"}
    for name, files in expected(random_release).items():
        assert hub.files(name) == {}
        assert hub.files(name, "refs/pr/1") == files
        assert not hub.repos[name].tags
    publish(hub, random_release, pull_request=True)  # finds the pull request that is open already
    assert all(len(repo.discussions) == 1 for repo in hub.repos.values())
    require_whole(hub, random_release)
    assert hub.files(f"org/{GGUF}") == expected(random_release)[f"org/{GGUF}"]


def test_a_dry_run_only_looks(hub, random_release):
    done = publish(hub, random_release, dry_run=True)
    assert [result.state for result in done] == ["planned", "planned"]
    assert "model-00001-of-00002.safetensors" in next(r for r in done if r.repository.endswith("Int4")).uploaded
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}
    assert not hub.repos


def test_private_repositories_are_private(hub, random_release):
    publish(hub, random_release, private=True)
    assert all(repo.private for repo in hub.repos.values())


def test_only_files_of_the_manifest_are_published(hub, random_release):
    (random_release / GPTQ / ".tmpa1b2c3").write_bytes(b"left by a killed process")
    (random_release / GPTQ / "notes.txt").write_text("private")
    publish(hub, random_release)
    assert not {".tmpa1b2c3", "notes.txt"} & set(hub.files(f"org/{GPTQ}"))


@pytest.mark.parametrize("outcome", ["fail", "inconclusive"])
def test_only_what_passed_or_was_waived_is_published(hub, tmp_path, outcome):
    failed = {"outcome": outcome, "reasons": ["KL divergence 0.3 > 0.1"]}
    waived = {
        "outcome": "waived",
        "reasons": ["KL divergence 0.2 > 0.1"],
        "waiver": "waived by me until 2099-01-01: a test",
    }
    build = write_build(tmp_path / "build", outcomes={"q4_0": failed, "gptq-int4": waived})
    release = read_release(build)
    assert run(build, "--to", "dir", "--out", tmp_path / "folders").returncode == 10
    assert release.refused == {"q4_0": f"verdict {outcome}; KL divergence 0.3 > 0.1"}
    publish(hub, build)
    assert "qwen1_5-test-chat-q4_0.gguf" not in hub.files(f"org/{GGUF}")
    for name in ("qquant-manifest.json", "report.json"):
        assert b"q4_0" not in hub.files(f"org/{GGUF}")[name]
    assert "config.json" in hub.files(f"org/{GPTQ}")


def test_nothing_passed(tmp_path):
    failed = {name: {"outcome": "fail", "reasons": ["worse"]} for name in ("q4_0", "q8_0", "gptq-int4")}
    with pytest.raises(GateFailedError, match=r"nothing may be published\n  q8_0: verdict fail; worse"):
        read_release(write_build(tmp_path / "build", outcomes=failed))


def test_a_damaged_file_is_not_published(random_release):
    file = random_release / GPTQ / "model-00002-of-00002.safetensors"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: does not match qquant-manifest\.json"):
        read_release(random_release)


def test_a_report_of_another_build_does_not_count(random_release):
    report = json.loads((random_release / "report.json").read_text())
    report["conditions"]["checkpoint"] = "decaf"
    (random_release / "report.json").write_text(json.dumps(report))
    with pytest.raises(GateFailedError, match="judged another checkpoint"):
        read_release(random_release)


def test_not_a_build(tmp_path):
    with pytest.raises(UsageError, match="Publish the output folder of a finished"):
        read_release(tmp_path)


def test_weights_of_somebody_else_are_not_mixed_with_ours(hub, random_release):
    api = HfApi(hub.url, TOKEN)
    api.create_repo(f"org/{GPTQ}")
    hub.push(f"org/{GPTQ}", pytorch_model__bin=b"old")
    with pytest.raises(PublishError, match=r"main holds pytorch_model\.bin, which no qquant-manifest\.json names"):
        publish(hub, random_release)
    assert hub.files(f"org/{GPTQ}") == {"pytorch_model.bin": b"old"}


def test_a_folder_gets_the_same_files(random_release, tmp_path):
    target = tmp_path / "release"
    done = Folder(target).publish(repositories(random_release), Request(""))
    assert {result.state for result in done} == {"published"}
    for name, files in expected(random_release).items():
        folder = target / name.removeprefix("org/")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert {r.state for r in Folder(target).publish(repositories(random_release), Request(""))} == {"unchanged"}
    shutil.rmtree(target / GPTQ)
    (target / GGUF / "report.json").write_text("{}")
    with pytest.raises(UsageError, match=r"report\.json: exists and is not of this release"):
        Folder(target).publish(repositories(random_release), Request(""))


class Scope:
    """What ModelScope's client is asked to do."""

    def __init__(self):
        self.calls = []

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))

    def upload_folder(self, repo_id, folder_path, commit_message, **patterns):
        self.calls.append(("upload", repo_id, patterns))


def test_modelscope_gets_the_weights_before_what_makes_them_loadable(random_release):
    api = Scope()
    ModelScope(api, print).publish(repositories(random_release)[1:], Request("org", private=True))
    heads = ["config.json", "qquant-manifest.json"]
    assert api.calls == [
        ("create", f"org/{GPTQ}", {"visibility": "private", "exist_ok": True}),
        ("upload", f"org/{GPTQ}", {"ignore_patterns": heads}),
        ("upload", f"org/{GPTQ}", {"allow_patterns": heads}),
    ]


def test_modelscope_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(EnvironmentMissingError, match=r"pip install 'qquant\[modelscope\]'"):
        ModelScope.connect(print)


def run(*arguments, **environment):
    settings = os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    command = [sys.executable, "-m", "qquant.cli", "publish", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=settings)


def test_the_command_publishes_and_never_shows_its_token(hub, random_release):
    hub.fail("PUT /lfs/", 503)
    done = run(random_release, "--namespace", "org", "--endpoint", hub.url, "--json", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert {r["state"] for r in json.loads(done.stdout)["repositories"]} == {"published"}
    assert TOKEN not in done.stdout + done.stderr
    assert "/lfs/" not in done.stderr
    refused = run(
        random_release, "--namespace", "org", "--endpoint", hub.url, "--tag", "v2", HF_TOKEN="hf_wrongTokenOfSomebody"
    )
    assert refused.returncode == 8
    assert "Nothing of this release is visible on main" in refused.stderr
    assert "hf_wrong" not in refused.stderr


def test_a_signature_is_published_with_what_it_signs(hub, random_release, tmp_path):
    arguments = (random_release, "--namespace", "org", "--base-model", "Qwen/Qwen1.5-Test-Chat")
    assert run(*arguments, "--to", "dir", "--out", tmp_path / "release").returncode == 0
    remote = (*arguments, "--endpoint", hub.url, "--signed", tmp_path / "release")
    unsigned = run(*remote, HF_TOKEN=TOKEN)
    assert unsigned.returncode == 5
    assert "model.sig: not found" in unsigned.stderr
    for name in CONTENTS:
        (tmp_path / "release" / name / "model.sig").write_bytes(f"signature of {name}".encode())
    other = run(*remote, "--tag", "v2", HF_TOKEN=TOKEN)
    assert other.returncode == 5
    assert "is not what would be published, so the signature would not hold" in other.stderr
    done = run(*remote, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    for name in CONTENTS:
        files = hub.files(f"org/{name}")
        assert files.pop("model.sig") == f"signature of {name}".encode()
        folder = {path.name: path.read_bytes() for path in (tmp_path / "release" / name).iterdir()}
        assert files == {file: content for file, content in folder.items() if file != "model.sig"} | {
            file: files[file] for file in files if file == ".gitattributes"
        }


def test_the_command_asks_for_what_is_missing(random_release):
    done = run(random_release)
    assert (done.returncode, done.stderr) == (2, "error: --to hf needs --namespace USER_OR_ORGANISATION\n")
