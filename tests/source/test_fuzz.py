"""A few hundred inputs of each target of tests/fuzz/strangers.py; `make fuzz` tries more."""

import pytest

from tests.conftest import write_checkpoint
from tests.fuzz.records import Records
from tests.fuzz.strangers import World, run

RUNS = {
    "config": 150,
    "index": 150,
    "tokenizer": 40,
    "template": 150,
    "gguf": 60,
    "adapter": 150,
    "imatrix": 150,
    "recipe": 150,
    "report": 40,
    "manifest": 60,
    "source": 60,
    "published": 60,
    "evidence": 80,
    "journal": 80,
}
UNHARMED = ("journal",)  # nothing is refused: what is not whole is made again


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    place = tmp_path_factory.mktemp("fuzz")
    strangers = World(write_checkpoint(place / "model", num_hidden_layers=1))
    return strangers.targets() | Records(place / "records").targets()


@pytest.mark.parametrize("name", RUNS)
def test_mutations_are_refused_by_name_or_read(world, name):
    refused, bad = run(world[name], name, RUNS[name])
    assert bad == []
    assert (0 < refused <= RUNS[name]) != (name in UNHARMED)
