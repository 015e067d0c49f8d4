"""Blocks that are read once and kept, and passes that look at no number before the block's end: the same bytes, and the same errors."""

from dataclasses import replace

import pytest
import torch

from qquant import devices
from qquant.algorithms.gram import Gram, NotFiniteError
from qquant.families.decoder import Block
from qquant.solve import layers, stream
from qquant.solve.layers import Layers
from qquant.source.checkpoint import Checkpoint
from tests.test_pipeline import (
    build,  # noqa: F401  a fixture
    contents,
)

CPU = torch.device("cpu")


@pytest.fixture
def as_on_a_card(monkeypatch):
    """The CPU with the ways of a GPU."""
    monkeypatch.setitem(devices.POLICIES, "cpu", replace(devices.POLICIES["cpu"], threads=True, waits=True))


def test_kept_blocks_are_read_once(make_checkpoint, as_on_a_card, monkeypatch):
    source, read = Checkpoint.open(make_checkpoint()), []
    block = Checkpoint.block
    monkeypatch.setattr(Checkpoint, "block", lambda self, layer, threads=1: read.append(layer) or block(self, layer))
    blocks = Layers.of(source, CPU)
    assert blocks.keeps
    for order in (range(2), reversed(range(2)), range(2)):
        numbers = list(order)
        with blocks.walk(numbers) as found:
            for layer, weights in zip(numbers, found, strict=True):
                expected = block(source, layer)
                assert all(torch.equal(weights[name], value) for name, value in expected.items())
                weights.clear()  # the caller's own dictionary
    assert read == [0, 1]


def test_blocks_that_do_not_fit_are_read_again(make_checkpoint, as_on_a_card, monkeypatch):
    monkeypatch.setattr(layers, "free_memory", lambda device: 1000)
    blocks = Layers.of(Checkpoint.open(make_checkpoint()), CPU)
    with blocks.walk(range(2)) as found:
        assert len(list(found)) == 2
    assert not blocks.keeps
    assert not blocks.kept


def test_nothing_is_kept_on_a_cpu(make_checkpoint):
    assert not Layers.of(Checkpoint.open(make_checkpoint()), CPU).keeps


def test_bytes_are_those_of_a_build_that_looks_at_every_sample(make_checkpoint, build, as_on_a_card, monkeypatch):  # noqa: F811
    folder, names = make_checkpoint(), ["gptq-int4", "awq", "gguf-q4_0"]
    _, quick = build(folder, *names, out="quick")
    monkeypatch.setitem(devices.POLICIES, "cpu", replace(devices.POLICIES["cpu"], threads=False, waits=False))
    _, plain = build(folder, *names, out="plain")
    assert contents(quick) == contents(plain)


def test_a_sample_that_is_not_finite_is_found_at_the_end_of_the_block(make_checkpoint, as_on_a_card, monkeypatch):
    """Then every sample is looked at, as on a CPU, and that one goes through the block in float32; no sum is counted twice."""
    source, looked = Checkpoint.open(make_checkpoint()), []
    through, forward = stream.Stream._through, Block.forward

    def overflows(self, x, observe=None):
        y = forward(self, x, observe)
        return y * torch.inf if len(x) == 7 and self.dtype == torch.bfloat16 else y

    monkeypatch.setattr(Block, "forward", overflows)
    monkeypatch.setattr(stream.Stream, "_through", lambda self, *rest: looked.append(rest[2]) or through(self, *rest))
    with Layers.of(source, CPU).walk([0]) as found:
        block = Block(source.family, source.config, next(found), torch.bfloat16)
    shapes = source.family.linear_shapes(source.config)

    def advanced(lengths):
        run = stream.Stream([torch.randn(length, 64).bfloat16() for length in lengths], CPU)
        grams = {stage.name: Gram.zeros(shapes[stage.linears[0]][1]) for stage in source.family.stages}
        run.advance(0, block, grams)
        assert all(gram.tokens == sum(lengths) and gram.largest > 0 for gram in grams.values())
        return run

    assert advanced([5, 6]).wide == set()
    assert not looked
    assert advanced([5, 7, 6]).wide == {1}
    assert looked == [0, 1, 2]


def test_sums_that_were_not_looked_at_are_settled():
    gram = Gram.zeros(4)
    gram.unseen = []
    gram.add(torch.ones(3, 4))
    gram.add(torch.full((2, 4), 2.0))
    assert gram.largest == 0.0
    gram.settle()
    assert gram.largest == 2.0
    gram.unseen = []
    gram.add(torch.full((1, 4), torch.inf))
    with pytest.raises(NotFiniteError):
        gram.settle()
    gram.clear()
    assert (gram.tokens, gram.largest, float(gram.matrix.abs().max())) == (0, 0.0, 0.0)
