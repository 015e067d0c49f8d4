"""Artifacts whose files are changed, and put back."""

import json
import shutil

import pytest

from qquant.formats.gguf.container import read_header
from qquant.source.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def world(built, tmp_path_factory):
    """(checkpoint, artifact by format); small copies of the built ones, to be changed and put back."""
    folder, out = built
    place, found = tmp_path_factory.mktemp("claims"), {}
    for origin in out.iterdir():
        for name, end in (("gptq", "int4"), ("awq", "awq"), ("gguf", "gguf")):
            if origin.name.lower().endswith(end):
                shutil.copytree(origin, place / name)
                found[name] = place / name
    (found["gguf"],) = found["gguf"].glob("*.gguf")
    return Checkpoint.open(folder), found


@pytest.fixture
def edited(world):
    """`edited(format, file)` -> (path, content); put back afterwards."""
    checkpoint, found = world
    kept = {}

    def open_file(name, file):
        path = found[name] / file
        kept.setdefault(path, path.read_bytes() if path.exists() else None)
        return path, json.loads(path.read_text()) if path.exists() and path.suffix == ".json" else {}

    yield checkpoint, found, open_file
    for path, content in kept.items():
        path.unlink() if content is None else path.write_bytes(content)


@pytest.fixture
def gguf(world):
    """(checkpoint, path, fields()), put back afterwards."""
    checkpoint, found = world
    path, before = found["gguf"], found["gguf"].read_bytes()
    yield checkpoint, path, list(read_header(path).fields.values())
    path.write_bytes(before)
