"""That the benches of several ranks can be run anywhere, and say what went wrong."""

import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest

from qquant.formats import FORMATS
from tests.bench import answers, ranks
from tests.worlds import ROOT, importing


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "bench").glob("*.py")), ids=lambda path: path.stem)
def test_every_program_can_be_imported(path):
    importlib.import_module(f"tests.bench.{path.stem}")


def test_random_artifacts_of_the_answers_are_read(tmp_path):
    answers.write_artifact(tmp_path / "out", "toy", 1, "cpu")
    source = FORMATS["gptq"].read(tmp_path / "out")
    assert source.config.layers == 1
    assert source.tensor("model.layers.0.mlp.down_proj.weight").shape == (256, 768)


def test_children_import_this_tree_and_what_their_parent_may(tmp_path, monkeypatch):
    """Packages may lie in a folder that PYTHONPATH alone names."""
    (tmp_path / "lies_apart.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "import lies_apart, tests.worlds, os; print(tests.worlds.ROOT, os.environ['MORE'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=importing(MORE="1"), cwd="/", capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{ROOT} 1\n", done.stderr
    monkeypatch.delenv("PYTHONPATH")
    assert importing()["PYTHONPATH"].split(os.pathsep) == [str(ROOT)]


def test_ranks_that_fail_are_heard(tmp_path, monkeypatch):
    options = Namespace(work=tmp_path, out=tmp_path)

    def start(world, options):
        with ranks.log_of(world, options).open("wb") as log:
            return subprocess.Popen(
                [
                    "sh",
                    "-c",
                    "seq 100; echo No module named x; echo E torch/distributed/elastic/api.py failed; echo more; exit 3",
                ],
                stdout=log,
                stderr=log,
            )

    monkeypatch.setattr(ranks, "start", start)
    found, files = ranks.measured(2, options)
    assert (found["status"], files) == (3, {})
    lines = ranks.summary(found, found).splitlines()
    assert "2 ranks: ended with 3" in lines[0]
    assert lines[-1].strip() == "No module named x"
    assert len(lines) == 1 + ranks.TAIL


@pytest.mark.slow
def test_a_toy_shape_on_one_and_two_ranks(tmp_path):
    words = "--shape toy --layers 1 --samples 5 --length 64 --windows 1 --device cpu --worlds 1 2 --only gptq-int4"
    command = [sys.executable, "-m", "tests.bench.ranks", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    done = subprocess.run([*command, *words.split()], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = json.loads((tmp_path / "ranks.json").read_text())
    assert one["sha256"] == two["sha256"]
    assert one["sha256"]["model-GPTQ-Int4/model.safetensors"] in done.stdout
    assert {"quantize", "check"} <= two["ranks"][0]["phases"].keys()
    assert {"read back", "waited"} <= two["ranks"][1]["inside"].keys()
    assert two["ranks"][1]["sent_gb"] > 0
