"""Paths of strangers: no file outside the folder that was given is read, and no pipe or device."""

import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qquant.calibration import Tokenizer
from qquant.errors import InputError
from qquant.source import safetensors_file
from qquant.source.checkpoint import Checkpoint
from tests.conftest import SMALL
from tests.worlds.strange import FAST, values

# --- F16, F17: paths ---------------------------------------------------------------------------------------------------

ESCAPES = ("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "C:x.safetensors", ".x.safetensors", "x\0.safetensors", "", "a.bin", 5, None, "x.safetensors\n", "x" * 300 + ".safetensors")  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_names_files_of_its_folder_only(make_checkpoint, name, monkeypatch):
    folder = make_checkpoint(shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(safetensors_file, "read_header", None)  # refused before anything is opened
    with pytest.raises(InputError, match="is not the plain name"):
        Checkpoint.open(folder)


@FAST
@given(st.dictionaries(st.text(max_size=5), values, max_size=3), values)
def test_strange_indexes(strange_folder, weights, metadata):
    path = strange_folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": metadata, "weight_map": weights}))
    try:
        with pytest.raises(InputError):
            Checkpoint.open(strange_folder)
    finally:
        path.unlink()


FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE",
)


def outside(path):
    path.rename(path.parent.parent / "outside") if path.exists() else (path.parent.parent / "outside").write_text("{}")
    path.symlink_to(path.parent.parent / "outside")


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def circle(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("put", [outside, pipe, device, circle])
def test_links_pipes_and_devices_are_refused(make_checkpoint, put, name):
    folder = make_checkpoint()
    put(folder / name)
    began = time.process_time()

    def read_all():
        Checkpoint.open(folder).require_tokenizer()
        Tokenizer.open(folder)
        return Checkpoint.open(folder).side_files

    with pytest.raises(InputError, match=r"link out of its folder|not a regular file|not found|has no config.json"):
        read_all()
    assert time.process_time() - began < 5


def test_links_of_a_hub_cache_are_read(make_checkpoint, tmp_path):
    folder = make_checkpoint()
    repository = tmp_path / "models--Q--M"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    checkpoint = Checkpoint.open(snapshot)
    checkpoint.require_tokenizer()
    assert Tokenizer.open(snapshot).size == 8192
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../elsewhere/config.json")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(InputError, match="link out of its folder"):
        Checkpoint.open(snapshot)
