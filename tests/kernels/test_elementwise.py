"""Norm, rotary and gate for many tokens: by torch as the decoder has them, and on a GPU as torch has them, bit for bit but for sums."""

from types import SimpleNamespace

import pytest
import torch

from qquant.families.decoder import Block, rms_norm, rotary, rotate
from qquant.kernels import elementwise
from qquant.kernels.scaled_half import scaled_product
from qquant.solve.fused import FusedBlock, HalfBlock, block_of
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


def test_rows_lie_apart_by_one_number_or_none():
    both, apart = torch.zeros(2, 3, 20), elementwise._rows_apart
    half = both[..., :10]
    assert (apart(both), apart(half), apart(half[:1]), apart(half[:, :1])) == (20, 20, 20, 60)
    assert apart(half[:1, :1]) == 10, "one row is as good as a whole matrix"
    assert apart(both[:, :2]) == 0, "two rows of three"
    assert apart(both[:, ::2, :10]) == 0
    assert apart(both[:1, ::2, :10]) == 40
    assert apart(both.transpose(0, 1)) == 0
    assert apart(both[..., ::2]) == 0
    assert apart(both[:1, :1].expand(2, 3, 20)) == 0
    assert apart(torch.zeros(7)) == 7


def test_tokens_lie_apart_by_one_number_or_none():
    joined, apart = torch.zeros(2, 3, 40), elementwise._tokens_apart
    heads = joined[..., :24].view(2, 3, 3, 8).transpose(1, 2)
    assert (apart(heads), apart(heads[:1]), apart(heads[:, :, :1]), apart(heads[:1, :, :1])) == (40, 40, 120, 24)
    assert apart(heads[:, :, :2]) == 0, "two tokens of three"
    assert apart(heads[:1, :, ::2]) == 80
    assert apart(heads[:, ::2]) == 0, "heads apart"
    assert apart(heads.contiguous()) == 0, "tokens of a head together"
    assert apart(heads[..., ::2]) == apart(heads[0]) == 0
    assert apart(heads[:1, :, :1].expand(2, 3, 4, 8)) == 0
    assert elementwise.rotated(heads, heads, heads[:, 0], heads[:, 0]) is None, "on a CPU"


def test_kernels_serve_no_gradients_and_no_compiler(monkeypatch):
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setattr(elementwise, "AVAILABLE", True)
    monkeypatch.setattr(elementwise, "Tensor", SimpleNamespace)
    assert not elementwise.serves(x)
    with torch.no_grad():
        assert elementwise.serves(x)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not elementwise.serves(x)
    monkeypatch.undo()
    x = states(2, 48).requires_grad_()
    elementwise.gate(elementwise.rms_norm(x, states(48), 1e-6), x).sum().backward()
    assert x.grad is not None


def test_a_block_of_fewer_kernels_is_the_block(family, make_checkpoint):
    source = Checkpoint.open(make_checkpoint(family=family))
    weights = source.block(0)
    plain, fused = (kind(source.family, source.config, weights, torch.float32) for kind in (Block, FusedBlock))
    x = states(2, 6, source.config.hidden).float()
    assert torch.equal(fused.forward(x), plain.forward(x))
    assert torch.equal(fused.forward(x[0]), plain.forward(x[0]))
    assert torch.equal(fused.forward(x[:, :4]), plain.forward(x[:, :4]))


def test_a_block_of_float16_products_is_the_block(family, make_checkpoint, monkeypatch):
    """On a GPU its products are of float16; here they are made to be."""
    source = Checkpoint.open(make_checkpoint(family=family))
    weights = source.block(0)
    plain, half = (kind(source.family, source.config, weights, torch.float32) for kind in (Block, HalfBlock))
    x = states(2, 6, source.config.hidden).float()
    calls = []
    monkeypatch.setattr("qquant.solve.fused.scaled_product", lambda *a: calls.append(a) or scaled_product(*a))
    assert 0 < far(half.forward(x), plain.forward(x)) < 1e-3
    assert len(calls) == sum(len(stage.linears) for stage in source.family.stages)
    name = f"{source.family.stages[-1].linears[-1]}.weight"
    for block in (plain, half):  # as a solved linear takes the place of what it was
        block.weights[name] = weights[name].float() * 100
    assert 0 < far(half.forward(x), plain.forward(x)) < 1e-3


def test_weights_of_a_stage_are_converted_once(family, make_checkpoint):
    source = Checkpoint.open(make_checkpoint(family=family))
    block = HalfBlock(source.family, source.config, source.block(0), torch.float32)
    x, (stage, other) = states(3, source.config.hidden).float(), source.family.stages[:2]
    first, made = block.apply(stage.name, x), dict(block.halved)
    assert made.keys() == set(stage.linears)
    again = block.apply(stage.name, x)
    assert all(block.halved[name] is pair for name, pair in made.items())
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    name = f"{stage.linears[0]}.weight"
    block.weights[name] = (
        block.weights[name] * 2
    )  # as a solved linear takes its place between two pieces of the samples
    bias = block.weights.get(f"{stage.linears[0]}.bias", 0.0)
    assert torch.allclose(block.apply(stage.name, x)[0] - bias, 2 * (first[0] - bias), rtol=1e-5, atol=1e-6)
    block.apply(other.name, states(3, source.family.inputs(source.config, 0)[other.name]).float())
    assert block.halved.keys() == set(other.linears), "weights of one stage are in memory"


@pytest.mark.parametrize("factors", [(1, 1, 1), (1e6, 1e-5, 1e9), (1e-12, 1e9, 1e-12), (0, 1, 1), (1, 1, 0)])
def test_attention_of_any_size_is_made_in_float16(make_checkpoint, factors):
    """Queries and keys of any size whose products are not; values of any size."""
    source = Checkpoint.open(make_checkpoint())
    plain, half = (kind(source.family, source.config, {}, torch.float32) for kind in (Block, HalfBlock))
    heads = [factor * torch.randn(2, 4, 9, 16) for factor in factors]
    found, expected = half.mixed(*heads), plain.mixed(*heads)
    assert float((found - expected).norm()) <= 2e-3 * float(expected.norm())
    heads[2][0, 0, 0, 0] = torch.nan
    assert not bool(half.mixed(*heads).isfinite().all())


def far(found, expected):
    """Relative error of a whole."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.gpu
def test_a_block_in_float32_on_a_gpu(family, make_checkpoint):
    source = Checkpoint.open(make_checkpoint(family=family))
    weights = {name: value.cuda() for name, value in source.block(0).items()}
    block = block_of(source.family, source.config, weights, torch.float32)
    assert isinstance(block, HalfBlock)
    x = states(4, 64, source.config.hidden, device="cuda").float()
    expected = Block(source.family, source.config, weights, torch.float32).forward(x)
    assert 0 < far(block.forward(x), expected) < 1e-3


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
@pytest.mark.parametrize("shape", [(300, 4096), (7, 352)])
def test_float32_on_a_gpu(shape):
    """The same kernels for streams of float32."""
    x, u = (torch.randn(shape, device="cuda") for _ in range(2))
    weight, turn = torch.randn(shape[1], device="cuda"), [table.float() for table in tables(shape[0], 32, "cuda")]
    heads = x.unflatten(-1, (-1, 32)).transpose(0, 1)[None]
    for found, expected in (
        (elementwise.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6)),
        (elementwise.gate(x, u), Block.gated(None, (x, u))),
        (elementwise.rotate(heads.clone(), *turn), rotate(heads, *turn)),
    ):
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


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


def test_differences_are_rounded_once():
    x, y = torch.randn(2, 30, 50).unbind()
    expected = (x[:, 7:20] - y[:, 7:20]).bfloat16()
    assert torch.equal(elementwise.difference(x[:, 7:20], y[:, 7:20]), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [slice(0, 2048), slice(2048, 4096), slice(3, 700), slice(10240, 11008)])
def test_differences_on_a_gpu(dtype, columns):
    x, y = (torch.randn(300, 11008, device="cuda").to(dtype)[:, columns] for _ in range(2))
    found = elementwise.difference(x, y)
    assert found.is_contiguous()
    assert torch.equal(found, (x.float() - y.float()).bfloat16())
