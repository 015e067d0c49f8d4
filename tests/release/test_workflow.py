"""The reusable release workflow, run step by step: planned from a matrix file, built, published to a stand-in of the hub, and published again."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import write_checkpoint
from tests.worlds import importing, workflow
from tests.worlds.hub_server import TOKEN

ROOT = Path(__file__).parents[2]
PATH = ROOT / ".github" / "workflows" / "release.yml"
RECIPE = """
version: 1
name: small
calibration: {sources: [{bundled: books-en}], samples: 2, length: 32, default_system_share: 0}
checks: {windows: 2, length: 32}
artifacts: [{name: q4_0, format: gguf, type: q4_0, imatrix: false, gates: {%s}}]
"""


@pytest.fixture
def release():
    return workflow.load(PATH)


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """A checkout with a matrix of two small models, and the inputs of a caller."""
    monkeypatch.setenv("PYTHONPATH", importing()["PYTHONPATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("One", "Two"):
        write_checkpoint(tmp_path / name, num_hidden_layers=1)
    (tmp_path / "small.yaml").write_text(RECIPE % "defaults: false")
    (tmp_path / "strict.yaml").write_text(RECIPE % "kl_divergence: 0.0")
    cells = "{checkpoint: ./One, recipe: small.yaml}, {checkpoint: ./Two, recipe: strict.yaml, model: Two-Strict}"
    (tmp_path / "release.yaml").write_text(f"version: 1\nname: t\ncells: [{cells}]\n")
    given = {"matrix": "release.yaml", "namespace": "org", "tag": "v1", "package": "a-wheel"}
    defaults = {"runner": "here", "oidc-resource": "", "dry-run": False}
    return workflow.Runner(tmp_path, {"inputs": given | defaults, "secrets": {"HF_TOKEN": TOKEN}})


def test_a_release_is_planned_in_jobs(release, runner):
    jobs = json.loads(runner.job(release["jobs"]["plan"])["jobs"])["include"]
    assert [(job["model"], job["recipe"]) for job in jobs] == [("One", "small.yaml"), ("Two-Strict", "strict.yaml")]
    assert (runner.folder / ".tools" / "pip.log").read_text() == "install a-wheel\n"
    used = {name for name in workflow.expressions(release["jobs"]["build"]) if name.startswith("matrix.")}
    assert used <= {f"matrix.{key}" for key in jobs[0]}


def test_what_the_workflow_names_is_there(release):
    """Inputs, secrets and environment of every expression and shell line; each line is one that bash reads."""
    call = release[True] if True in release else release["on"]
    known = {f"inputs.{name}" for name in call["workflow_call"]["inputs"]}
    known |= {f"secrets.{name}" for name in call["workflow_call"]["secrets"]}
    for job in release["jobs"].values():
        for expression in workflow.expressions(job):
            first = re.sub(r"^fromJSON\(|\)$", "", expression.split()[0])
            assert first in known or first.split(".")[0] in ("matrix", "steps", "needs", "env"), expression
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            if "run" in step:
                names = set(re.findall(r"\$\{?([A-Z_]+)", step["run"]))
                assert names <= {*job.get("env", {}), *step.get("env", {}), "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"}
                subprocess.run(["bash", "-n", "-c", step["run"]], check=True)
            else:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])


@pytest.mark.slow
def test_jobs_are_built_checked_and_published_and_again(release, runner, hub):
    """The whole of it: a job whose gates pass is published, one that fails is not; a second run of both changes nothing."""
    outputs = runner.job(release["jobs"]["plan"])
    one, two = json.loads(outputs["jobs"])["include"]
    build, hosts = release["jobs"]["build"], {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    runner.context |= {"needs": {"plan": {"outputs": outputs}}, "matrix": one}
    runner.job(build, hosts)
    assert not runner.failed, runner.log[-1]
    assert list(hub.repos) == ["org/One-GGUF"]
    assert hub.repos["org/One-GGUF"].tags.keys() == {"v1"}
    assert "Publish?" in (runner.folder / ".summary").read_text()
    before = dict(hub.uploaded), len(hub.repos["org/One-GGUF"].commits)

    runner.context["matrix"] = two
    runner.job(build, hosts)
    assert runner.failed
    assert [status for line, status, _ in runner.log if "qquant build" in line] == [0, 3]
    assert "FAILED" in (runner.folder / ".summary").read_text(), "the report of a failed build is shown, too"
    assert list(hub.repos) == ["org/One-GGUF"]

    runner.context["matrix"] = one
    runner.job(build, hosts)
    assert not runner.failed
    assert (dict(hub.uploaded), len(hub.repos["org/One-GGUF"].commits)) == before
    published = [output for line, _, output in runner.log if "qquant publish" in line]
    assert "published: org/One-GGUF" in published[0]
    assert "unchanged: org/One-GGUF" in published[1]
    assert "nothing to publish: v1 is there with these bytes" in published[1]


# --- the container ---------------------------------------------------------------------------------------------------------

CONTAINER = ROOT / ".github" / "Containerfile"


def instructions():
    """(word, rest) of every instruction, continued lines joined."""
    text = re.sub(r"\\\n", " ", CONTAINER.read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def stages():
    """Name -> (image or stage below it, instructions)."""
    found = {}
    for word, rest in instructions():
        if word == "FROM":
            below, _, name = rest.partition(" AS ")
            found[name] = (below, [])
            current = found[name][1]
        elif found:
            current.append((word, rest))
    return found


def test_the_container_recipe_is_sound():
    """What a linter asks: pinned images, no downloads by ADD, clean pip and apt, an entry point that gets signals, no root."""
    known = stages()
    assert {"cpu", "cuda"} <= known.keys()
    assert {word for word, _ in instructions()} <= {
        "ARG",
        "FROM",
        "COPY",
        "RUN",
        "USER",
        "WORKDIR",
        "ENTRYPOINT",
        "ENV",
    }
    declared = {rest.partition("=")[0] for word, rest in instructions() if word == "ARG"}
    for name, (below, inside) in known.items():
        assert below in known or re.fullmatch(r"[a-z]+:\$\{?[A-Z]+\}?-slim|[a-z]+:[\w.-]+", below), below
        assert not below.endswith(":latest")
        for word, rest in inside:
            if word == "RUN":
                subprocess.run(["bash", "-n", "-c", rest], check=True)
                assert set(re.findall(r"\$\{?([A-Z_]+)", rest)) <= declared
                assert "pip install" not in rest or "--no-cache-dir" in rest
                assert "apt-get install" not in rest or (
                    "--no-install-recommends" in rest and "rm -rf /var/lib/apt" in rest
                )
            if word == "COPY" and "--from=" in rest:
                assert re.search(r"--from=(\S+)", rest)[1] in known, name
    for name in ("cpu", "cuda"):
        words = [(word, rest) for stage in (known[name][0], name) if stage in known for word, rest in known[stage][1]]
        assert [rest for word, rest in words if word == "ENTRYPOINT"][-1] == '["qquant"]'
        assert [rest for word, rest in words if word == "USER"][-1] not in ("root", "0")
        homes = [rest for word, rest in words if word == "ENV"]
        assert any("HOME=/home/qquant USER=qquant" in rest for rest in homes), "of whoever `docker run --user` names"


def test_the_container_copies_what_the_wheel_is_made_of():
    import tomllib

    copied = [
        part for word, rest in instructions() if word == "COPY" and "--from=" not in rest for part in rest.split()[:-1]
    ]
    assert all((ROOT / part).exists() for part in copied), copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel["force-include"], project["project"]["readme"], "LICENSE", "pyproject.toml"]
    tops = {os.path.normpath(part) for part in copied}
    assert all(any(path == top or path.startswith(f"{top}/") for top in tops) for path in needed)
