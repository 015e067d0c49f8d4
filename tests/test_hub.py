"""Publishing with the real client against a local stand-in of the hub: whole or not at all, whatever breaks and whenever."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from huggingface_hub import HfApi

from qquant import provenance
from qquant.errors import EnvironmentMissingError, GateFailedError, InputError, PublishError, UsageError
from qquant.hub import Folder, HuggingFace, ModelScope, Request, Setting, clean, patch, pause
from qquant.provenance import complete, read_release
from tests.hub_server import TOKEN, serve

GPTQ, GGUF = "Qwen1.5-Test-Chat-GPTQ-Int4", "Qwen1.5-Test-Chat-GGUF"
CONTENTS = {
    GPTQ: {"gptq-int4": ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]},
    GGUF: {"q8_0": ["qwen1_5-test-chat-q8_0.gguf"], "q4_0": ["qwen1_5-test-chat-q4_0.gguf"]},
}


def write_build(folder, seed=0, contents=CONTENTS, outcomes=(), size=50_000):
    """The output folder of a build, small, with random bytes; `outcomes` override the verdict of artifacts."""
    draw = random.Random(seed)
    rows = []
    for repo, artifacts in contents.items():
        (folder / repo).mkdir(parents=True)
        manifest = {"schema": "qquant-manifest-1", "artifacts": {}}
        for name, files in artifacts.items():
            facts = {}
            for file in files:
                content = b'{"model_type": "qwen2"}' if file.endswith(".json") else draw.randbytes(size)
                (folder / repo / file).write_bytes(content)
                facts[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            manifest["artifacts"][name] = {
                "key": "0", "format": "gguf" if "GGUF" in repo else "gptq", "files": facts, "layers": [],
                "recipe": {"name": "test", "artifacts": []}, "inputs": {"checkpoint": "c0ffee", "qquant": "0.1.0"},
            }  # fmt: skip
            rows.append(
                {
                    "name": name, "path": str(folder / repo), "size": sum(fact["bytes"] for fact in facts.values()),
                    "bits_per_weight": 4.5, "perplexity": 10.25 + seed, "perplexity_ratio": 1.0123, "kl_divergence": 0.0213,
                    "top1_agreement": 0.95125, "verdict": dict(outcomes).get(name, {"outcome": "pass", "reasons": []}),
                }
            )  # fmt: skip
        (folder / repo / "qquant-manifest.json").write_text(json.dumps(manifest))
    report = {
        "schema": "qquant-report-1", "model": "Qwen1.5-Test-Chat", "recipe": "test", "verdict": "pass",
        "baseline": {"bits_per_weight": 16.0, "perplexity": 10.125}, "artifacts": rows,
        "conditions": {
            "checkpoint": "c0ffee", "text": {"name": "bundled:wikitext-2-test", "windows": 40, "length": 512},
        },
        "calibration": {"samples": 8, "tokens": 384, "sha256": "ab" * 32, "sources": []},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def build(tmp_path):
    return write_build(tmp_path / "build")


@pytest.fixture
def hub():
    with serve() as running:
        yield running


class Waits(list):
    """Records the pauses instead of taking them."""

    def __call__(self, seconds):
        self.append(seconds)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Pauses are recorded, not taken; the stand-in speaks LFS, not xet."""
    taken = Waits()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", taken)
    return taken


def repositories(folder, **facts):
    return [complete(repository, facts) for repository in read_release(folder).repositories]


def publish(hub, folder, waits=None, said=None, **request):
    destination = HuggingFace(HfApi(hub.url, TOKEN), (said or []).append, waits or Waits())
    return destination.publish(repositories(folder), Request(**{"namespace": "org", "tag": "v1", **request}))


def expected(folder):
    return {
        f"org/{repository.name}": {name: payload.read() for name, payload in repository.files.items()}
        for repository in repositories(folder)
    }


def require_whole(hub, *folders):
    """Every tree that main ever showed was empty or exactly one release."""
    releases = [expected(folder) for folder in folders]
    for name, trees in hub.history.items():
        for tree in trees:
            shown = {path: entry.content for path, entry in tree.items() if path != ".gitattributes"}
            assert shown == {} or any(shown == release[name] for release in releases), sorted(shown)


@pytest.mark.parametrize("pull_request", [False, True])
def test_a_release_is_published_whole_tagged_and_collected(hub, build, pull_request):
    done = publish(hub, build, pull_request=pull_request, collection="Qwen1.5 quantized")
    assert [result.state for result in done] == ["published", "published"]
    for name, files in expected(build).items():
        assert hub.files(name) == files
        assert hub.files(name, "v1") == files
        assert len(hub.history[name]) == 2  # what create_repo made, and the release: one step
    assert {result.revision for result in done} == {repo.branches["main"] for repo in hub.repos.values()}
    if not pull_request:
        assert all(set(repo.branches) == {"main"} for repo in hub.repos.values())
    (collection,) = hub.collections.values()
    assert sorted(collection["items"]) == sorted(hub.repos)


@pytest.mark.parametrize("pull_request", [False, True])
def test_a_second_run_uploads_nothing(hub, build, pull_request):
    publish(hub, build, pull_request=pull_request)
    before = dict(hub.uploaded), {name: len(repo.commits) for name, repo in hub.repos.items()}
    hub.requests.clear()
    done = publish(hub, build, pull_request=pull_request)
    assert [result.state for result in done] == ["unchanged", "unchanged"]
    assert (dict(hub.uploaded), {name: len(repo.commits) for name, repo in hub.repos.items()}) == before
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}


def test_a_new_release_replaces_the_old_one_in_one_step(hub, build, tmp_path):
    publish(hub, build)
    contents = {GPTQ: {"gptq-int4": ["config.json", "model.safetensors"]}, GGUF: CONTENTS[GGUF]}
    second = write_build(tmp_path / "second", seed=1, contents=contents)
    with pytest.raises(PublishError, match=r"tag v1 marks another release .* Give a new --tag"):
        publish(hub, second)
    publish(hub, second, tag="v2")
    assert set(hub.files(f"org/{GPTQ}")) == {"config.json", "model.safetensors", "qquant-manifest.json", "report.json"}
    assert hub.files(f"org/{GPTQ}", "v1") == expected(build)[f"org/{GPTQ}"]
    require_whole(hub, build, second)


def test_a_pull_request_can_wait_for_a_person(hub, build):
    done = publish(hub, build, pull_request=True, merge=False)
    assert {result.state for result in done} == {"waiting"}
    for name, files in expected(build).items():
        assert hub.files(name) == {}
        assert hub.files(name, "refs/pr/1") == files
        assert not hub.repos[name].tags
    publish(hub, build, pull_request=True)  # finds the pull request that is open already
    assert all(len(repo.discussions) == 1 for repo in hub.repos.values())
    require_whole(hub, build)
    assert hub.files(f"org/{GGUF}") == expected(build)[f"org/{GGUF}"]


def test_a_dry_run_only_looks(hub, build):
    done = publish(hub, build, dry_run=True)
    assert [result.state for result in done] == ["planned", "planned"]
    assert "model-00001-of-00002.safetensors" in next(r for r in done if r.repository.endswith("Int4")).uploaded
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}
    assert not hub.repos


def test_private_repositories_are_private(hub, build):
    publish(hub, build, private=True)
    assert all(repo.private for repo in hub.repos.values())


def test_only_files_of_the_manifest_are_published(hub, build):
    (build / GPTQ / ".tmpa1b2c3").write_bytes(b"left by a killed process")
    (build / GPTQ / "notes.txt").write_text("private")
    publish(hub, build)
    assert not {".tmpa1b2c3", "notes.txt"} & set(hub.files(f"org/{GPTQ}"))


def test_only_what_passed_or_was_waived_is_published(hub, tmp_path):
    failed = {"outcome": "fail", "reasons": ["KL divergence 0.3 > 0.1"]}
    waived = {
        "outcome": "waived",
        "reasons": ["KL divergence 0.2 > 0.1"],
        "waiver": "waived by me until 2099-01-01: a test",
    }
    build = write_build(tmp_path / "build", outcomes={"q4_0": failed, "gptq-int4": waived})
    release = read_release(build)
    assert release.refused == {"q4_0": "verdict fail; KL divergence 0.3 > 0.1"}
    publish(hub, build)
    assert "qwen1_5-test-chat-q4_0.gguf" not in hub.files(f"org/{GGUF}")
    for name in ("qquant-manifest.json", "report.json"):
        assert b"q4_0" not in hub.files(f"org/{GGUF}")[name]
    assert "config.json" in hub.files(f"org/{GPTQ}")


def test_nothing_passed(tmp_path):
    failed = {name: {"outcome": "fail", "reasons": ["worse"]} for name in ("q4_0", "q8_0", "gptq-int4")}
    with pytest.raises(GateFailedError, match=r"nothing may be published\n  q8_0: verdict fail; worse"):
        read_release(write_build(tmp_path / "build", outcomes=failed))


def test_a_damaged_file_is_not_published(build):
    file = build / GPTQ / "model-00002-of-00002.safetensors"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: does not match qquant-manifest\.json"):
        read_release(build)


def test_a_report_of_another_build_does_not_count(build):
    report = json.loads((build / "report.json").read_text())
    report["conditions"]["checkpoint"] = "decaf"
    (build / "report.json").write_text(json.dumps(report))
    with pytest.raises(GateFailedError, match="judged another checkpoint"):
        read_release(build)


def test_not_a_build(tmp_path):
    with pytest.raises(UsageError, match="Publish the output folder of a finished"):
        read_release(tmp_path)


def test_weights_of_somebody_else_are_not_mixed_with_ours(hub, build):
    api = HfApi(hub.url, TOKEN)
    api.create_repo(f"org/{GPTQ}")
    hub.push(f"org/{GPTQ}", pytorch_model__bin=b"old")
    with pytest.raises(PublishError, match=r"main holds pytorch_model\.bin, which no qquant-manifest\.json names"):
        publish(hub, build)
    assert hub.files(f"org/{GPTQ}") == {"pytorch_model.bin": b"old"}


@pytest.mark.parametrize("pull_request", [False, True])
def test_somebody_elses_commit_stops_the_release(hub, build, pull_request):
    moved = []

    def meddle(method, path):
        if path.endswith("qwen1_5-test-chat-q4_0.gguf") and "/resolve/" in path and not moved:
            moved.append(hub.push(f"org/{GGUF}", notes__txt=b"theirs"))

    hub.faults.append(meddle)
    with pytest.raises(PublishError, match=r"(?s)somebody moved main.*Nothing of this release is visible"):
        publish(hub, build, pull_request=pull_request)
    assert hub.files(f"org/{GGUF}") == {"notes.txt": b"theirs"}
    hub.faults.clear()
    publish(hub, build, pull_request=pull_request)
    assert hub.files(f"org/{GGUF}") == expected(build)[f"org/{GGUF}"] | {"notes.txt": b"theirs"}


def test_parent_commit_guards_the_last_moment(hub, build):
    moved = []

    def meddle(method, path):
        if path.endswith(f"{GGUF}/commit/main") and not moved:
            moved.append(hub.push(f"org/{GGUF}", notes__txt=b"theirs"))

    hub.faults.append(meddle)
    with pytest.raises(PublishError, match="A commit has happened since"):
        publish(hub, build)
    assert hub.files(f"org/{GGUF}") == {"notes.txt": b"theirs"}


def test_bytes_that_come_back_wrong_are_never_shown(hub, build):
    hub.fail(r"GET .*resolve.*q8_0\.gguf", "corrupt")
    with pytest.raises(
        PublishError, match=r"(?s)q8_0\.gguf was downloaded with sha256 .*Nothing of this release is visible"
    ):
        publish(hub, build)
    assert all(hub.files(name) == {} for name in hub.repos)
    publish(hub, build)
    require_whole(hub, build)


def test_a_busy_server_is_waited_for(hub, build, waits):
    limited = (429, {"RateLimit": '"api";r=0;t=7', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'})
    hub.fail("POST .*/commit/", limited, 500, 503)
    hub.fail("GET .*/tree/", (429, {"Retry-After": "11"}))
    hub.fail("PUT /lfs/", 500, "reset", limited)
    hub.fail("POST .*/tag/", 502)
    publish(hub, build, waits)
    assert {8.0, 12.0} <= set(waits)
    require_whole(hub, build)
    assert all(hub.files(name) == files for name, files in expected(build).items())


def test_lost_answers_are_not_repeated_as_new_steps(hub, build, waits):
    for step in ("commit/main", "commit/qquant", "/tag/", "/branch/", "repos/create", "PUT /lfs/"):
        hub.fail(step if step.startswith("PUT") else f"POST .*{step}", "lost")
    publish(hub, build, waits)
    require_whole(hub, build)
    for name, files in expected(build).items():
        assert hub.files(name, "v1") == files
        assert len(hub.history[name]) == 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pull_request", [False, True])
def test_random_faults_never_show_half_a_release(hub, build, waits, seed, pull_request):
    hub.fail_often(0.15, [500, 503, (429, {"Retry-After": "1"}), "reset", "lost"], seed)
    for _ in range(10):
        try:
            publish(hub, build, waits, pull_request=pull_request)
            break
        except PublishError:
            require_whole(hub, build)
    else:
        pytest.fail("not published after ten runs")
    require_whole(hub, build)
    assert all(hub.files(name, "v1") == files for name, files in expected(build).items())


def test_giving_up_says_what_is_visible(hub, build, waits):
    hub.fail(f"POST .*{GPTQ}/commit/main", *[503] * 100)
    with pytest.raises(PublishError) as caught:
        publish(hub, build, waits)
    assert caught.value.exit_code == 8
    assert f"Complete and visible: org/{GGUF}. The others are as they were" in str(caught.value)
    assert hub.files(f"org/{GPTQ}") == {}


def test_tokens_are_never_said(hub, build):
    said = []
    destination = HuggingFace(HfApi(hub.url, "hf_anotherTokenThatIsWrong"), said.append, Waits())
    with pytest.raises(PublishError) as caught:
        destination.publish(repositories(build), Request("org"))
    assert "hf auth login" in str(caught.value)
    assert "hf_another" not in str(caught.value) + "".join(said)
    assert clean(f"Bearer {TOKEN} https://x/y?X-Amz-Signature=abc&z=1") == "Bearer *** https://x/y?X-Amz-***"


def test_pauses_follow_the_server():
    class Response:
        def __init__(self, status, **headers):
            self.status_code, self.headers = status, {key.replace("_", "-"): value for key, value in headers.items()}

    def error(*args, **headers):
        found = OSError("x")
        found.response = Response(*args, **headers)
        return found

    assert pause(error(429, RateLimit='"api";r=0;t=55'), 0) == 56
    assert pause(error(429, Retry_After="3"), 5) == 4
    assert pause(error(503), 3) == 8
    assert pause(error(500), 30) == 60
    assert pause(error(404), 0) is None
    assert pause(ConnectionResetError(), 2) == 4
    assert pause(OSError(28, "No space left"), 0) is None


PUBLISHER = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from qquant.hub import HuggingFace, Request
from tests.test_hub import repositories
url, token, folder, pull_request = sys.argv[1:]
print("ready", flush=True)
HuggingFace(HfApi(url, token), lambda text: None).publish(
    repositories(Path(folder)), Request("org", pull_request=pull_request == "True", collection="C"))
"""


def kill_at_random(hub, build, times, seed, pull_request):
    """Start the publisher `times` times, kill each after a random share of what a whole run takes."""
    draw = random.Random(seed)
    environment = os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", PUBLISHER, hub.url, TOKEN, str(build), str(pull_request)]
    killed, longest = 0, 1.0
    for attempt in range(times):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        process.stdout.readline()
        began = time.monotonic()
        try:
            process.wait(draw.uniform(0, longest))
            assert process.returncode == 0
            longest = time.monotonic() - began
            require_whole(hub, build)
            assert all(hub.files(name, "v1") == files for name, files in expected(build).items())
            with hub.lock:  # begin again with an empty hub
                hub.repos.clear()
                hub.history.clear()
                hub.collections.clear()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        process.stdout.close()
        require_whole(hub, build)
    return killed


@pytest.mark.parametrize("pull_request", [False, True])
def test_a_killed_publisher_shows_nothing_half_and_a_rerun_completes(hub, build, pull_request):
    assert kill_at_random(hub, build, 5, 1, pull_request) >= 1
    publish(hub, build, pull_request=pull_request)
    require_whole(hub, build)
    assert all(hub.files(name, "v1") == files for name, files in expected(build).items())


@pytest.mark.slow
@pytest.mark.parametrize("pull_request", [False, True])
def test_a_hundred_kills(hub, build, pull_request):
    killed = kill_at_random(hub, build, 120, 2, pull_request)
    assert killed >= 50
    publish(hub, build, pull_request=pull_request)
    require_whole(hub, build)


def test_a_folder_gets_the_same_files(build, tmp_path):
    target = tmp_path / "release"
    done = Folder(target).publish(repositories(build), Request(""))
    assert {result.state for result in done} == {"published"}
    for name, files in expected(build).items():
        folder = target / name.removeprefix("org/")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert {r.state for r in Folder(target).publish(repositories(build), Request(""))} == {"unchanged"}
    shutil.rmtree(target / GPTQ)
    (target / GGUF / "report.json").write_text("{}")
    with pytest.raises(UsageError, match=r"report\.json: exists and is not of this release"):
        Folder(target).publish(repositories(build), Request(""))


class Scope:
    """What ModelScope's client is asked to do."""

    def __init__(self):
        self.calls = []

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))

    def upload_folder(self, repo_id, folder_path, commit_message, **patterns):
        self.calls.append(("upload", repo_id, patterns))


def test_modelscope_gets_the_weights_before_what_makes_them_loadable(build):
    api = Scope()
    ModelScope(api, print).publish(repositories(build)[1:], Request("org", private=True))
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


def test_the_command_publishes_and_never_shows_its_token(hub, build):
    hub.fail("PUT /lfs/", 503)
    done = run(build, "--namespace", "org", "--endpoint", hub.url, "--json", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert {r["state"] for r in json.loads(done.stdout)["repositories"]} == {"published"}
    assert TOKEN not in done.stdout + done.stderr
    assert "/lfs/" not in done.stderr
    refused = run(build, "--namespace", "org", "--endpoint", hub.url, "--tag", "v2", HF_TOKEN="hf_wrongTokenOfSomebody")
    assert refused.returncode == 8
    assert "Nothing of this release is visible on main" in refused.stderr
    assert "hf_wrong" not in refused.stderr


def test_a_signature_is_published_with_what_it_signs(hub, build, tmp_path):
    arguments = (build, "--namespace", "org", "--base-model", "Qwen/Qwen1.5-Test-Chat")
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


def test_the_command_asks_for_what_is_missing(build):
    done = run(build)
    assert (done.returncode, done.stderr) == (2, "error: --to hf needs --namespace USER_OR_ORGANISATION\n")


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
        provenance.verify(copy)  # the manifest knows the new hash
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
    with pytest.raises(PublishError, match=r"has no generation_config\.json"):
        change(hub, "generation_config.json:a=1", "org/*")
    assert all(len(hub.history[name]) == 2 for name in family)


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
