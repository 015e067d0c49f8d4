"""Blocks that are read once and kept, and passes that look at no number before the block's end: the same bytes, and the same errors."""

from dataclasses import replace

import pytest
import torch

from qquant import devices, pipeline
from qquant.algorithms.gram import Gram, NotFiniteError
from qquant.families.decoder import Block
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.solve import layers, stream
from qquant.solve.block import View
from qquant.solve.curvature import BlockCurvature
from qquant.solve.layers import Layers
from qquant.solve.solver import Solver
from qquant.source.checkpoint import Checkpoint
from tests.worlds.builds import contents, load_recipe

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


def test_bytes_are_those_of_a_build_that_looks_at_every_sample(make_checkpoint, build, as_on_a_card, monkeypatch):
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
    inputs = source.family.inputs(source.config, 0)

    def advanced(lengths):
        run = stream.Stream([torch.randn(length, 64).bfloat16() for length in lengths], CPU)
        grams = {stage: Gram.zeros(columns) for stage, columns in inputs.items()}
        run.advance(0, block, grams)
        assert all(gram.tokens == sum(lengths) and gram.largest > 0 for gram in grams.values())
        return run

    assert advanced([5, 6]).overflowed == set()
    assert not looked
    assert advanced([5, 7, 6]).overflowed == {1}
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


@pytest.mark.parametrize("own_stream", [True, False])
def test_samples_without_a_gradient_count_with_weight_one(make_checkpoint, tmp_path, monkeypatch, own_stream):
    """Of 8 samples one is measured; every Gram matrix that is solved with holds the tokens of all eight."""
    source = Checkpoint.open(make_checkpoint())
    seen = []
    solve = Solver.solve

    def solving(self, stage, weights, gram, rows):
        seen.append((gram.tokens, gram))
        return solve(self, stage, weights, gram, rows)

    monkeypatch.setattr(Solver, "solve", solving)
    loaded = load_recipe(tmp_path, ["gptq-own" if own_stream else "gptq-shared"])
    calibration = loaded.calibration.model_copy(update={"curvature_tokens": 256, "objective": "kl"})
    loaded = loaded.model_copy(update={"calibration": calibration})
    pipeline.build(loaded, source, Plan.of(loaded, source), tmp_path / "out", CPU, Quiet())
    expected = calibration.samples * calibration.length
    assert expected > 256
    assert seen
    assert {tokens for tokens, _ in seen} == {expected}


def test_weights_of_a_view_are_those_that_were_measured():
    weights = torch.tensor([0.5, 1.5])
    view = View(None, 0, {}, torch.float32, BlockCurvature({"qkv": {3: weights}}, None, {}))
    assert view.token_weights("qkv", 3) is weights
    assert view.token_weights("qkv", 2) is None
    gram, x = Gram.zeros(3), torch.randn(2, 3)
    view.add(gram, "qkv", x, 3)
    view.add(gram, "qkv", x, 2)
    assert torch.allclose(gram.matrix, x.T @ (weights[:, None] * x) + x.T @ x, atol=1e-5)
