"""Blocks that are read once and kept, and passes that look at no number before the block's end: the same bytes, and the same errors."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from qquant import devices, pipeline
from qquant.algorithms.gram import Gram, NotFiniteError
from qquant.errors import InputError
from qquant.families.decoder import Block, slices
from qquant.formats.gguf import imatrix
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.solve import backward, layers, stream
from qquant.solve.block import View
from qquant.solve.curvature import BlockCurvature, measure
from qquant.solve.layers import Layers, hashed_and_read
from qquant.solve.solver import Solver
from qquant.source.checkpoint import Checkpoint
from qquant.source.safetensors_file import read_tensor
from tests.worlds.builds import contents, load_recipe

CPU = torch.device("cpu")


@pytest.fixture
def as_on_a_card(monkeypatch):
    """The CPU with the ways of a GPU."""
    monkeypatch.setitem(devices.POLICIES, "cpu", replace(devices.POLICIES["cpu"], threads=True, waits=True))


def test_kept_blocks_are_read_once(make_checkpoint, as_on_a_card, monkeypatch):
    source, read = Checkpoint.open(make_checkpoint()), []
    block = Checkpoint.block
    monkeypatch.setattr(Checkpoint, "block", lambda self, layer, *how: read.append(layer) or block(self, layer, *how))
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


def test_blocks_and_head_come_to_a_card_while_there_is_time(make_checkpoint, as_on_a_card, monkeypatch):
    source = Checkpoint.open(make_checkpoint(tie_word_embeddings=False))
    monkeypatch.setattr("qquant.families.decoder.HEAD_ROWS", 200)
    count = len(slices(source.config.vocab))
    assert count > 2
    for looks, there, rows in (
        (0, [], 0),
        (1, [0], 0),
        (2, [0, 1], 0),
        (3 + count - 2, [0, 1], 0),
        (99, [0, 1], count),
    ):
        blocks, left = Layers.of(source, CPU), iter(range(looks))
        blocks.fill(lambda left=left: next(left, None) is None, head=True)
        assert (list(blocks.kept), len(blocks.head)) == (there, rows)
    assert torch.equal(torch.cat(blocks.take_head()), source.tensor(source.family.head))
    assert not blocks.head
    blocks.fill(lambda: False, head=False)
    assert not blocks.head
    monkeypatch.setattr(layers, "free_memory", lambda device: 1000)
    few = Layers.of(source, CPU)
    few.fill(lambda: False, head=True)
    assert not few.kept
    assert not few.head


def test_a_checkpoint_is_hashed_and_read_at_once(make_checkpoint, as_on_a_card):
    plain, source = Checkpoint.open(make_checkpoint("m")), Checkpoint.open(make_checkpoint("m"))
    with hashed_and_read(source, CPU, head=True) as (blocks, wait):
        wait()
        assert source.is_hashed()
        assert source.content_hash() == plain.content_hash()
        assert blocks.keeps
    (next(source.path.glob("*.safetensors"))).unlink()
    damaged = Checkpoint.open(make_checkpoint("n"))
    (next(damaged.path.glob("*.safetensors"))).unlink()
    with pytest.raises((InputError, OSError)), hashed_and_read(damaged, CPU, head=True) as (_, wait):
        wait()


def test_a_head_that_came_with_the_blocks_is_not_read_again(make_checkpoint, as_on_a_card, monkeypatch, tmp_path):
    source, read = Checkpoint.open(make_checkpoint(tie_word_embeddings=False)), []
    rows, samples = source.rows, {0: torch.arange(40)}
    blocks = Layers.of(source, CPU)
    blocks.fill(lambda: False, head=True)
    monkeypatch.setattr(source, "rows", lambda name, *span: read.append(name) or rows(name, *span))
    for given, folder in ((blocks, "kept"), (None, "read")):
        read.clear()
        measure(source, samples, tmp_path / folder, torch.float32, CPU, Quiet(), given)
        assert (source.family.head in read) == (given is None)
    assert not blocks.head
    kept, plain = (sorted((tmp_path / folder).iterdir()) for folder in ("kept", "read"))
    assert [path.read_bytes() for path in kept] == [path.read_bytes() for path in plain]


def test_who_brings_blocks_to_a_second_card_works_on_it(make_checkpoint, monkeypatch):
    """A new thread is on the first card, whatever its parent is on, and pins memory there."""
    on, seen, second = [], [], torch.device("cuda:1")

    @contextmanager
    def device(card):
        on.append(card)
        yield
        on.remove(card)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(Layers, "of", lambda source, device: Layers(source, device, keeps=True))
    monkeypatch.setattr(Layers, "fill", lambda self, until, head: seen.append((*on, head)))
    with hashed_and_read(Checkpoint.open(make_checkpoint()), second, head=True) as (_, wait):
        wait()
    assert seen == [(second, True)]


def test_blocks_that_do_not_fit_are_read_again(make_checkpoint, as_on_a_card, monkeypatch):
    monkeypatch.setattr(layers, "free_memory", lambda device: 1000)
    blocks = Layers.of(Checkpoint.open(make_checkpoint()), CPU)
    with blocks.walk(range(2)) as found:
        assert len(list(found)) == 2
    assert not blocks.keeps
    assert not blocks.kept


@pytest.mark.parametrize("keeps", [True, False])
def test_blocks_are_read_into_two_rooms_in_turn(make_checkpoint, monkeypatch, keeps):
    """What came to the card stays as it was, whatever is read into its room afterwards."""
    monkeypatch.setitem(devices.POLICIES, "cpu", replace(devices.POLICIES["cpu"], threads=True, apart=True))
    if not keeps:
        monkeypatch.setattr(layers, "free_memory", lambda device: 1000)
    made, staging = [], layers.staging
    monkeypatch.setattr(layers, "staging", lambda *asked: made.append(asked[0]) or staging(*asked))
    source = Checkpoint.open(make_checkpoint(num_hidden_layers=5))
    blocks = Layers.of(source, CPU)
    for _ in range(2):
        with blocks.walk(range(5)) as found:
            there = list(found)
        for layer, weights in enumerate(there):
            expected = source.block(layer)
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert made == [source.block_bytes(0)] * (2 if keeps else 4)


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
    through, forward = stream.Stream.through, Block.forward

    def overflows(self, x, observe=None):
        y = forward(self, x, observe)
        return y * torch.inf if len(x) == 7 and self.dtype == torch.bfloat16 else y

    monkeypatch.setattr(Block, "forward", overflows)
    monkeypatch.setattr(stream.Stream, "through", lambda self, *rest: looked.append(rest[2]) or through(self, *rest))
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

    def solving(self, stage, weights, gram, rows, *ranks):
        seen.append((gram.tokens, gram))
        return solve(self, stage, weights, gram, rows, *ranks)

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
    assert view.token_weights("qkv", (3,), 2) is weights
    assert view.token_weights("qkv", (2,), 2) is None
    assert view.token_weights("qkv", (1, 2), 2) is None
    assert view.token_weights("qkv", (2, 3), 2).tolist() == [1.0, 1.0, 0.5, 1.5]
    gram, together, x = Gram.zeros(3), Gram.zeros(3), torch.randn(2, 3)
    view.add(gram, "qkv", x, (3,))
    view.add(gram, "qkv", x, (2,))
    assert torch.allclose(gram.matrix, x.T @ (weights[:, None] * x) + x.T @ x, atol=1e-5)
    view.add(together, "qkv", torch.stack([x, x]), (3, 2))
    assert torch.allclose(together.matrix, gram.matrix, atol=1e-5)
    assert together.tokens == gram.tokens == 4


def test_samples_go_together_where_they_are_of_one_length():
    assert stream.pieces([4, 4, 4, 5, 5, 4], 8) == [(0, 1), (2,), (3,), (4,), (5,)]
    assert stream.pieces([4, 4, 4, 5, 5, 4], 1) == [(index,) for index in range(6)]
    assert stream.pieces([2, 2, 2, 2], 100) == [(0, 1, 2, 3)]


@pytest.mark.parametrize("names", [["gptq-own"], ["gptq-shared", "awq", "gguf-q4_0"]])
def test_what_goes_together_is_solved_as_one_by_one(make_checkpoint, build, monkeypatch, names):
    """On a GPU samples go through a block a few at a time: but for the last bits of sums, the same statistics and artifacts."""
    folder = make_checkpoint()
    apart, one_by_one = build(folder, *names, out="apart")
    monkeypatch.setitem(devices.POLICIES, "cpu", replace(devices.POLICIES["cpu"], together=150, waits=True))
    ran, forward = [], Block.stages
    monkeypatch.setattr(Block, "stages", lambda self, x: ran.append(x.shape) or forward(self, x))
    together, a_few = build(folder, *names, out="together")
    assert any(len(shape) == 3 for shape in ran)
    apart_sums, sums = (imatrix.read(out / "calibration" / "imatrix.dat").sums for out in (one_by_one, a_few))
    assert sums.keys() == apart_sums.keys()
    for name, expected in apart_sums.items():
        assert float((sums[name] - expected).norm() / expected.norm()) < 0.01, name
    for one, other in zip(
        apart.artifacts, together.artifacts, strict=True
    ):  # last bits turn codes, by what the processor does
        assert other.kl_divergence == pytest.approx(one.kl_divergence, rel=0.4)


def test_gradients_of_samples_together_are_those_of_each(make_checkpoint, tmp_path, monkeypatch):
    source = Checkpoint.open(make_checkpoint())
    samples = {3: torch.arange(20) % 60, 5: torch.arange(20) % 7, 6: torch.arange(9)}
    apart = measure(source, samples, tmp_path / "apart", torch.bfloat16, CPU, Quiet())
    monkeypatch.setitem(devices.POLICIES, "cpu", replace(devices.POLICIES["cpu"], together=40))
    together = measure(source, samples, tmp_path / "together", torch.bfloat16, CPU, Quiet())
    one, other = (curvature.block(0, CPU) for curvature in (apart, together))
    for stage, weights in one.weights.items():
        for sample, expected in weights.items():
            assert torch.allclose(other.weights[stage][sample], expected, rtol=0.05, atol=0.02)
    for linear, parts in one.rows.items():
        for expected, part in zip(parts, other.rows[linear], strict=True):
            assert float((part - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("beside", [True, False])
def test_curvature_of_the_next_block_is_read_ahead_beside_a_gpu(make_checkpoint, tmp_path, monkeypatch, beside):
    source, read, read_before = Checkpoint.open(make_checkpoint()), [], []
    found = measure(source, {0: torch.arange(20) % 60}, tmp_path / "c", torch.bfloat16, CPU, Quiet())
    expected = [{name: found.block(layer, CPU).rows[name] for name in source.family.linears} for layer in range(2)]
    monkeypatch.setitem(devices.POLICIES, "cpu", replace(devices.POLICIES["cpu"], threads=beside))
    monkeypatch.setattr("qquant.solve.curvature.read_tensor", lambda info: read.append(info.name) or read_tensor(info))
    with found.blocks(range(2), CPU) as blocks:
        for block, rows in zip(blocks, expected, strict=True):
            read_before.append(sum(name.startswith("rows ") for name in read))
            for name, parts in rows.items():
                assert all(torch.equal(part, other) for part, other in zip(block.rows[name], parts, strict=True))
    linears = len(source.family.linears)
    assert sum(name.startswith("rows ") for name in read) == 2 * linears  # and none twice
    assert (read_before[0] >= linears) == beside


@pytest.mark.gpu
def test_gradients_on_a_gpu_are_the_same_every_time(make_checkpoint, tmp_path, monkeypatch):
    """Flash attention adds up as it is told, also more terms than two, in any order of which is one sum; about what the plain products give."""
    source, gpu = Checkpoint.open(make_checkpoint(hidden_size=256, intermediate_size=512)), torch.device("cuda")
    samples = {index: torch.randint(60, (2048,)) for index in range(8)}
    runs = [measure(source, samples, tmp_path / str(index), torch.bfloat16, gpu, Quiet()) for index in range(2)]
    for layer in range(2):
        first, again = ((run.folder / f"block-{layer}").read_bytes() for run in runs)
        assert first == again
    monkeypatch.setattr(backward, "_repeatable", lambda _: sdpa_kernel(SDPBackend.MATH))
    plain = measure(source, samples, tmp_path / "plain", torch.bfloat16, gpu, Quiet()).block(
        0, CPU
    )  # of the same draws
    for linear, parts in runs[0].block(0, CPU).rows.items():
        for expected, part in zip(plain.rows[linear], parts, strict=True):
            assert float((part - expected).norm() / expected.norm()) < 0.02
