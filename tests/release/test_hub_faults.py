"""Publishing while the server fails, others commit, or the publisher is killed: whole or not at all, whatever breaks and whenever."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from huggingface_hub import HfApi

from qquant.errors import PublishError
from qquant.release.hub import HuggingFace, Request, clean, pause
from tests.worlds.hub_release import GGUF, GPTQ, Waits, expected, publish, repositories, require_whole
from tests.worlds.hub_server import TOKEN

pytestmark = pytest.mark.usefixtures("waits")


@pytest.mark.parametrize("pull_request", [False, True])
def test_somebody_elses_commit_stops_the_release(hub, random_release, pull_request):
    moved = []

    def meddle(method, path):
        if path.endswith("qwen1_5-test-chat-q4_0.gguf") and "/resolve/" in path and not moved:
            moved.append(hub.push(f"org/{GGUF}", notes__txt=b"theirs"))

    hub.faults.append(meddle)
    with pytest.raises(PublishError, match=r"(?s)somebody moved main.*Nothing of this release is visible"):
        publish(hub, random_release, pull_request=pull_request)
    assert hub.files(f"org/{GGUF}") == {"notes.txt": b"theirs"}
    hub.faults.clear()
    publish(hub, random_release, pull_request=pull_request)
    assert hub.files(f"org/{GGUF}") == expected(random_release)[f"org/{GGUF}"] | {"notes.txt": b"theirs"}


def test_parent_commit_guards_the_last_moment(hub, random_release):
    moved = []

    def meddle(method, path):
        if path.endswith(f"{GGUF}/commit/main") and not moved:
            moved.append(hub.push(f"org/{GGUF}", notes__txt=b"theirs"))

    hub.faults.append(meddle)
    with pytest.raises(PublishError, match="A commit has happened since"):
        publish(hub, random_release)
    assert hub.files(f"org/{GGUF}") == {"notes.txt": b"theirs"}


def test_bytes_that_come_back_wrong_are_never_shown(hub, random_release):
    hub.fail(r"GET .*resolve.*q8_0\.gguf", "corrupt")
    with pytest.raises(
        PublishError, match=r"(?s)q8_0\.gguf was downloaded with sha256 .*Nothing of this release is visible"
    ):
        publish(hub, random_release)
    assert all(hub.files(name) == {} for name in hub.repos)
    publish(hub, random_release)
    require_whole(hub, random_release)


def test_a_busy_server_is_waited_for(hub, random_release, waits):
    limited = (429, {"RateLimit": '"api";r=0;t=7', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'})
    hub.fail("POST .*/commit/", limited, 500, 503)
    hub.fail("GET .*/tree/", (429, {"Retry-After": "11"}))
    hub.fail("PUT /lfs/", 500, "reset", limited)
    hub.fail("POST .*/tag/", 502)
    publish(hub, random_release, waits)
    assert {8.0, 12.0} <= set(waits)
    require_whole(hub, random_release)
    assert all(hub.files(name) == files for name, files in expected(random_release).items())


def test_lost_answers_are_not_repeated_as_new_steps(hub, random_release, waits):
    for step in ("commit/main", "commit/qquant", "/tag/", "/branch/", "repos/create", "PUT /lfs/"):
        hub.fail(step if step.startswith("PUT") else f"POST .*{step}", "lost")
    publish(hub, random_release, waits)
    require_whole(hub, random_release)
    for name, files in expected(random_release).items():
        assert hub.files(name, "v1") == files
        assert len(hub.history[name]) == 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pull_request", [False, True])
def test_random_faults_never_show_half_a_release(hub, random_release, waits, seed, pull_request):
    hub.fail_often(0.15, [500, 503, (429, {"Retry-After": "1"}), "reset", "lost"], seed)
    for _ in range(10):
        try:
            publish(hub, random_release, waits, pull_request=pull_request)
            break
        except PublishError:
            require_whole(hub, random_release)
    else:
        pytest.fail("not published after ten runs")
    require_whole(hub, random_release)
    assert all(hub.files(name, "v1") == files for name, files in expected(random_release).items())


def test_giving_up_says_what_is_visible(hub, random_release, waits):
    hub.fail(f"POST .*{GPTQ}/commit/main", *[503] * 100)
    with pytest.raises(PublishError) as caught:
        publish(hub, random_release, waits)
    assert caught.value.exit_code == 8
    assert f"Complete and visible: org/{GGUF}. The others are as they were" in str(caught.value)
    assert hub.files(f"org/{GPTQ}") == {}


def test_tokens_are_never_said(hub, random_release):
    said = []
    destination = HuggingFace(HfApi(hub.url, "hf_anotherTokenThatIsWrong"), said.append, Waits())
    with pytest.raises(PublishError) as caught:
        destination.publish(repositories(random_release), Request("org"))
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
    said = "Network error: Request error: HTTP status client error ({}), domain: http://hub/api/models/a/b/xet-write-token/x"
    assert pause(RuntimeError(said.format("404 Not Found")), 0) is None, "two minutes, for an answer that stays"
    assert pause(RuntimeError(said.format("429 Too Many Requests")), 2) == 4
    assert pause(OSError(28, "No space left"), 0) is None


PUBLISHER = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from qquant.release.hub import HuggingFace, Request
from tests.worlds.hub_release import repositories
url, token, folder, pull_request = sys.argv[1:]
print("ready", flush=True)
HuggingFace(HfApi(url, token), lambda text: None).publish(
    repositories(Path(folder)), Request("org", pull_request=pull_request == "True", collection="C"))
"""


def kill_at_random(hub, random_release, times, seed, pull_request):
    """Start the publisher `times` times, kill each after a random share of what a whole run takes."""
    draw = random.Random(seed)
    environment = os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", PUBLISHER, hub.url, TOKEN, str(random_release), str(pull_request)]
    killed, longest = 0, 1.0
    for attempt in range(times):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        process.stdout.readline()
        began = time.monotonic()
        try:
            process.wait(draw.uniform(0, longest))
            assert process.returncode == 0
            longest = time.monotonic() - began
            require_whole(hub, random_release)
            assert all(hub.files(name, "v1") == files for name, files in expected(random_release).items())
            with hub.lock:  # begin again with an empty hub
                hub.repos.clear()
                hub.history.clear()
                hub.collections.clear()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        process.stdout.close()
        require_whole(hub, random_release)
    return killed


@pytest.mark.parametrize("pull_request", [False, True])
def test_a_killed_publisher_shows_nothing_half_and_a_rerun_completes(hub, random_release, pull_request):
    assert kill_at_random(hub, random_release, 5, 1, pull_request) >= 1
    publish(hub, random_release, pull_request=pull_request)
    require_whole(hub, random_release)
    assert all(hub.files(name, "v1") == files for name, files in expected(random_release).items())


@pytest.mark.slow
@pytest.mark.parametrize("pull_request", [False, True])
def test_a_hundred_kills(hub, random_release, pull_request):
    killed = kill_at_random(hub, random_release, 120, 2, pull_request)
    assert killed >= 50
    publish(hub, random_release, pull_request=pull_request)
    require_whole(hub, random_release)
