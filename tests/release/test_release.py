"""Releases: a matrix of checkpoints is planned from headers, cut into shards, and shown with what fits which server."""

import json
import re
import struct
import subprocess
import sys

import pytest

from qquant.errors import UsageError
from qquant.families import FAMILIES, parse_config
from qquant.release import matrix as cells
from tests.conftest import SMALL, write_checkpoint
from tests.worlds import ROOT

GPTQ = "{name: gptq-int4, format: gptq, bits: 4}"
RECIPE = """version: 1
name: test
%s
calibration: {sources: [{bundled: books-en}], samples: 4, length: 64}
artifacts:
  - {name: gptq-int4, format: gptq, bits: 4}
  - {name: gptq-int8, format: gptq, bits: 8}
  - {name: awq, format: awq}
  - {name: q4_k_m, format: gguf, type: q4_k_m}
"""
FOURTEEN = {
    "hidden_size": 5120, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 40, "vocab_size": 152064,
}  # fmt: skip


def write_headers(folder, **changes):
    """A checkpoint whose tensor file is a hole: right in every header, no bytes on the disk."""
    config = SMALL | changes
    write_checkpoint(folder)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in FAMILIES["qwen2"].shapes(parse_config(config, "test")).items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tongyi-qianwen\n---\n")
    return folder


@pytest.fixture
def matrix(tmp_path):
    fourteen = write_headers(tmp_path / "Qwen1.5-14B-Chat", **FOURTEEN)
    small = write_checkpoint(
        tmp_path / "Qwen1.5-0.5B-Chat", hidden_size=128, intermediate_size=256, tie_word_embeddings=True
    )
    (tmp_path / "plain.yaml").write_text(RECIPE % "")
    (tmp_path / "padded.yaml").write_text(RECIPE % "pad_intermediate: 1024")
    path = tmp_path / "matrix.yaml"
    path.write_text(
        "version: 1\nname: test\ncells:\n"
        f"  - {{checkpoint: {fourteen}, recipe: {tmp_path}/plain.yaml}}\n"
        f"  - {{checkpoint: {fourteen}, recipe: {tmp_path}/padded.yaml, model: Padded-14B-Chat}}\n"
        f"  - {{checkpoint: {small}, recipe: {tmp_path}/plain.yaml}}\n"
    )
    return path


def tensors(job):
    return sum(file.size for file in job.plan.artifacts[0].files if file.tensors)


def test_fourteen_billion_before_and_after_padding(matrix):
    plain, wide, small = cells.plan(cells.load(matrix).cells)
    assert plain.facts["tensor_parallel"]["gptq-int4"]["vllm"] == [1]
    assert wide.facts["tensor_parallel"]["gptq-int4"] == {
        "vllm": [1, 2, 4, 8], "sglang": [1, 2, 4, 8], "without_padding": [1],
    }  # fmt: skip
    assert (wide.facts["intermediate"], wide.facts["padded_to"], plain.facts["padded_to"]) == (13696, 14336, None)
    assert plain.facts["licence"] == "tongyi-qianwen"
    assert (plain.facts["tied_head"], small.facts["tied_head"]) == (False, True)
    assert [a.folder for a in plain.plan.artifacts] == [
        "Qwen1.5-14B-Chat-GPTQ-Int4", "Qwen1.5-14B-Chat-GPTQ-Int8", "Qwen1.5-14B-Chat-AWQ", "Qwen1.5-14B-Chat-GGUF",
    ]  # fmt: skip
    assert plain.plan.artifacts[3].files[0].name == "qwen1_5-14b-chat-q4_k_m.gguf"
    assert len(plain.plan.artifacts[3].fallbacks) == 40  # ffn_down: 13696 does not divide by 256
    assert not wide.plan.artifacts[3].fallbacks
    # Qwen's first 14B-Int4 holds 9,677,446,960 bytes, of which 3 MB are zero biases that qquant does not write
    assert 9_677_446_960 - 4_500_000 < tensors(plain) < 9_677_446_960
    assert tensors(wide) > tensors(plain)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "version: missing key; needed: version, name, cells"),
        ("[]", "matrix: wrong type, got a list; allowed: a mapping of version, name, cells"),
        ("{version: 1, name: a, cels: []}", "cels: unknown key; allowed: version, name, cells; did you mean 'cells'?"),
        ("{version: 1, name: a, cells: 3}", "cells: wrong type, got 3; allowed: a list of {checkpoint: ..., recipe: ...}"),
        ("{version: 1, name: a, cells: [{recipe: r, chekpoint: c}]}", "cells[0].checkpoint: missing key; needed: checkpoint, recipe"),
        ("{version: 1, name: a, cells: [{recipe: r, chekpoint: c}]}", "cells[0].chekpoint: unknown key; allowed: checkpoint, recipe, revision, model; did you mean 'checkpoint'?"),
    ],
)  # fmt: skip
def test_problems_of_a_matrix_are_told_like_those_of_a_recipe(tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        cells.load(tmp_path / "m.yaml")
    assert f"{tmp_path}/m.yaml: {message}" in str(caught.value).splitlines()


def test_shards_cover_every_cell_once(matrix):
    wanted = cells.load(matrix).cells
    for count in (1, 2, 3, 5):
        parts = [cell for i in range(1, count + 1) for cell in cells.shard(cells.load(matrix), f"{i}/{count}")]
        assert sorted(map(str, parts)) == sorted(map(str, wanted))
    for part in ("0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"):
        with pytest.raises(UsageError, match="--shard"):
            cells.shard(cells.load(matrix), part)


def run(*arguments):
    command = [sys.executable, "-m", "qquant.cli", "matrix", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_command_prints_jobs(matrix):
    done = run(matrix, "--github-matrix", "--shard", "2/2")
    assert done.returncode == 0, done.stderr
    (job,) = json.loads(done.stdout)["include"]
    assert job["model"] == "Padded-14B-Chat"
    assert job["disk_gb"] > 30
    shown = run(matrix)
    assert "padded 13696 -> 14336" in shown.stdout
    assert "TP 1,2,4,8 (unpadded 1)" in shown.stdout
    assert "40 K-quant fallbacks" in shown.stdout
    assert json.loads(run(matrix, "--json").stdout)["jobs"][2]["model"] == "Qwen1.5-0.5B-Chat"


def test_a_broken_cell_does_not_hide_the_others(matrix, tmp_path):
    config = tmp_path / "Qwen1.5-14B-Chat" / "config.json"
    config.write_text(config.read_text().replace("13696", "14436"))  # as it once was published
    done = run(matrix)
    assert done.returncode == 2
    assert "Qwen1.5-0.5B-Chat: licence" in done.stdout
    assert "mlp.gate_proj.weight" in done.stderr
    assert "14436" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 2\nname: a\ncells: [{checkpoint: a, recipe: b}]", "version"),
        ("version: 1\nname: a\ncells: []", "cells"),
        ("version: 1\nname: a\ncells: [{checkpoint: a, recipe: b, colour: red}]", r"cells\[0\]\.colour"),
        ("version: 1\nname: [", "not valid YAML"),
        ("just text", "matrix"),
    ],
)
def test_a_wrong_matrix_says_where(tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        cells.load(tmp_path / "m.yaml")


def test_no_matrix(tmp_path):
    with pytest.raises(UsageError, match="cannot read the matrix"):
        cells.load(tmp_path / "none.yaml")


def test_the_workflow_calls_commands_that_exist():

    from ruamel.yaml import YAML

    from qquant.cli import cli

    path = ROOT / ".github" / "workflows" / "release.yml"
    steps = [step for job in YAML(typ="safe").load(path)["jobs"].values() for step in job["steps"]]
    text = "\n".join(step.get("run", "") for step in steps)
    called = re.findall(r"qquant (\w+)((?:[^\n])*)", text)
    assert {name for name, _ in called} == {"matrix", "build", "publish"}
    for name, rest in called:
        known = {option for parameter in cli.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= known, name
    assert "${{" not in text  # inputs reach the shell as variables, not as code
