"""A few hundred inputs of each target of tests/fuzz/strangers.py; `make fuzz` tries more."""

import pytest

from tests.conftest import write_checkpoint
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
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(write_checkpoint(tmp_path_factory.mktemp("fuzz") / "model", num_hidden_layers=1))


@pytest.mark.parametrize("name", RUNS)
def test_mutations_are_refused_by_name_or_read(world, name):
    refused, bad = run(world.targets()[name], name, RUNS[name])
    assert bad == []
    assert 0 < refused <= RUNS[name]
