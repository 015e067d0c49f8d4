"""Norm, rotary and gate for many tokens: by torch as the decoder has them, and on a GPU as torch has them, bit for bit but for sums."""

import pytest
import torch

from qquant.families.decoder import Block, rms_norm, rotary, rotate
from qquant.kernels import elementwise
from qquant.kernels.product import by_halves
from qquant.solve.fused import FusedBlock, SplitBlock, block_of
from qquant.source.checkpoint import Checkpoint


def states(*shape, device="cpu"):
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=generator) * 3).bfloat16().to(device)


def tables(length, width, device="cpu"):
    angle = torch.rand(length, width // 2) * 6
    angle = torch.cat((angle, angle), 1)
    return angle.cos().bfloat16().to(device), angle.sin().bfloat16().to(device)


def test_torch_has_the_decoders_operators():
    x, weight, pair = states(2, 5, 48), states(48), (states(7, 30), states(7, 30) + 1)
    assert torch.equal(elementwise.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6))
    heads = states(2, 3, 5, 16)
    turn = tables(5, 16)
    assert torch.equal(elementwise.rotate(heads, *turn), rotate(heads, *turn))
    assert torch.equal(elementwise.gate(*pair), Block.gated(None, pair))


def test_a_block_of_fewer_kernels_is_the_block(family, make_checkpoint):
    source = Checkpoint.open(make_checkpoint(family=family))
    weights = source.block(0)
    plain, fused = (kind(source.family, source.config, weights, torch.float32) for kind in (Block, FusedBlock))
    x = states(2, 6, source.config.hidden).float()
    assert torch.equal(fused.forward(x), plain.forward(x))
    assert torch.equal(fused.forward(x[0]), plain.forward(x[0]))
    assert torch.equal(fused.forward(x[:, :4]), plain.forward(x[:, :4]))


def test_a_block_of_split_products_is_the_block(family, make_checkpoint, monkeypatch):
    """On a GPU its products are of halves; here they are made to be."""
    source = Checkpoint.open(make_checkpoint(family=family))
    weights = source.block(0)
    plain, split = (kind(source.family, source.config, weights, torch.float32) for kind in (Block, SplitBlock))
    x = states(2, 6, source.config.hidden).float()
    assert torch.allclose(split.forward(x), plain.forward(x), rtol=1e-5, atol=1e-6)
    calls = []
    monkeypatch.setattr("qquant.solve.fused.product_transposed", lambda *a: calls.append(a) or by_halves(*a))
    expected = plain.forward(x)
    assert float((split.forward(x) - expected).norm() / expected.norm()) < 1e-5
    assert len(calls) == sum(len(stage.linears) for stage in source.family.stages)


@pytest.mark.gpu
def test_a_block_in_float32_on_a_gpu(family, make_checkpoint):
    source = Checkpoint.open(make_checkpoint(family=family))
    weights = {name: value.cuda() for name, value in source.block(0).items()}
    block = block_of(source.family, source.config, weights, torch.float32)
    assert isinstance(block, SplitBlock)
    x = states(4, 64, source.config.hidden, device="cuda").float()
    expected = Block(source.family, source.config, weights, torch.float32).forward(x)
    assert float((block.forward(x) - expected).norm() / expected.norm()) < 1e-5


def nearly(found, expected, share=1e-3):
    """Of one bit in a few values, which a sum in another order may turn."""
    assert found.dtype == expected.dtype
    wrong = found != expected
    assert float(wrong.float().mean()) <= share
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [(300, 4096), (7, 352), (3, 64)])
def test_norm_on_a_gpu(rows, width):
    x, weight = states(2, rows, width, device="cuda"), states(width, device="cuda")
    nearly(elementwise.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "width"), [(32, 128), (5, 96), (1, 64)])
def test_rotary_on_a_gpu(heads, width):
    flat = states(3, 70, heads * width, device="cuda")
    turn = tables(70, width, "cuda")
    view = flat.unflatten(-1, (heads, width)).transpose(1, 2)
    expected = rotate(view, *turn)
    assert torch.equal(elementwise.rotate(view, *turn), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 300, 11008), (7, 33)])
def test_gate_on_a_gpu(shape):
    pair = states(*shape, device="cuda"), states(*shape, device="cuda") + 1
    nearly(elementwise.gate(*pair), Block.gated(None, pair))


@pytest.mark.gpu
def test_a_block_on_a_gpu(family, make_checkpoint):
    source = Checkpoint.open(make_checkpoint(family=family))
    weights = {name: value.cuda() for name, value in source.block(0).items()}
    plain, fused = (kind(source.family, source.config, weights, torch.bfloat16) for kind in (Block, FusedBlock))
    for x in (states(4, 64, source.config.hidden, device="cuda"), states(30, source.config.hidden, device="cuda")):
        expected, kept = plain.forward(x), x.clone()
        found = fused.forward(x)
        assert torch.equal(x, kept)
        assert float((found.float() - expected.float()).norm() / expected.float().norm()) < 2e-3


def test_tables_of_a_length_are_made_once(family, make_checkpoint, monkeypatch):
    source = Checkpoint.open(make_checkpoint(family=family))
    block, asked = FusedBlock(source.family, source.config, source.block(0), torch.float32), []
    monkeypatch.setattr("qquant.solve.fused.rotary", lambda *a: asked.append(a[1]) or rotary(*a))
    for length in (6, 6, 3, 6):
        block.forward(states(2, length, source.config.hidden).float())
    assert asked == [6, 3]
