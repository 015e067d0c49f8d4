"""Weights that are compared as they pass: a checkpoint whose blocks are there already, or are read once."""

import pytest
import torch

from qquant.checks.structure import CachedWeights, InspectedWeights
from qquant.families.decoder import source_block
from qquant.source.checkpoint import Checkpoint


class Counted:
    """A checkpoint that notes which tensors it is asked for."""

    def __init__(self, checkpoint):
        self.family, self.config, self.checkpoint, self.asked = checkpoint.family, checkpoint.config, checkpoint, []

    def tensor(self, name):
        self.asked.append(name)
        return self.checkpoint.tensor(name)

    def rows(self, name, start, stop):
        return self.checkpoint.rows(name, start, stop)


@pytest.fixture
def counted(make_checkpoint):
    return Counted(Checkpoint.open(make_checkpoint(num_hidden_layers=3)))


def names_of(source, layer):
    inside = [f"{linear}.weight" for linear in source.family.linear_shapes(source.config, layer)]
    return {name: source.family.block.format(layer) + name for name in inside}


def test_blocks_that_are_there_are_not_read(counted):
    """Each tensor is its own block's; a block that is not there, and what lies outside of them, is read."""
    outside = counted.family.embedding
    marked = {
        layer: {inside: torch.full((1,), 10.0 * layer + place) for place, inside in enumerate(names_of(counted, layer))}
        for layer in (1, 2)
    }
    cached = CachedWeights(counted, torch.device("cpu"), marked)
    for layer, block in marked.items():
        for inside, name in names_of(counted, layer).items():
            assert cached.tensor(name) is block[inside]
    assert counted.asked == []
    for name in (*names_of(counted, 0).values(), outside):
        assert torch.equal(cached.tensor(name), counted.checkpoint.tensor(name))
    assert counted.asked == [*names_of(counted, 0).values(), outside]


def test_the_block_that_was_asked_for_last_is_kept_and_no_other(counted):
    cached = CachedWeights(counted)
    first, second = (list(names_of(counted, layer).values()) for layer in (0, 1))
    for name in (*first, *first):
        assert torch.equal(cached.tensor(name), counted.checkpoint.tensor(name))
    assert counted.asked == first
    cached.tensor(second[0])
    assert list(cached.kept) == second[:1]
    cached.tensor(first[0])
    assert counted.asked == [*first, second[0], first[0]]


def test_threads_read_a_block_once_and_tell_its_faults_in_its_order(counted):
    """For every block in turn: the checkpoint's tensors are kept for who compares with them, and nothing is lost between threads."""

    class Damaged(Counted):
        def tensor(self, name):
            return super().tensor(name) * torch.nan

    cached = CachedWeights(counted)
    watched = InspectedWeights(Damaged(counted.checkpoint), cached, folds=False)
    for layer in range(3):
        alone = source_block(counted.checkpoint, layer, torch.float32)
        mine = source_block(cached, layer, torch.float32, threads=4)
        source_block(watched, layer, torch.float32, threads=4)
        assert alone.weights.keys() == mine.weights.keys()
        assert all(torch.equal(value, mine.weights[name]) for name, value in alone.weights.items())
    wanted = [name for layer in range(3) for name in counted.family.block_shapes(counted.config, layer)]
    assert sorted(counted.asked) == sorted(wanted)
    assert list(watched.told(watched.problems)) == [f"{name} holds NaN or infinity" for name in wanted]
    assert watched.told(dict(reversed(watched.problems.items()))) == watched.told(watched.problems)
