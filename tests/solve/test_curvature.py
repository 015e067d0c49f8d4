"""Curvature: the streamed backward pass is autograd's, the drawn gradients have the Fisher information as their mean, and it predicts KL."""

import errno
import math
import threading
from dataclasses import replace

import pytest
import torch

from qquant import devices
from qquant.algorithms.gram import Gram
from qquant.errors import InputError, NumericalError
from qquant.families.decoder import embed, rms_norm, source_block
from qquant.progress import Quiet
from qquant.solve import curvature
from qquant.solve.curvature import BACKWARD, HEAD, head_share, measure, spread
from qquant.solve.head import SEED, Head, HeadInput, head_gradients
from qquant.source.checkpoint import Checkpoint
from tests.worlds.watched import Watched

CPU = torch.device("cpu")


quiet = Quiet()


@pytest.fixture
def source(make_checkpoint):
    return Checkpoint.open(make_checkpoint(dtype=torch.float32, num_hidden_layers=2, vocab_size=8192))


def samples(count=3, length=24):
    generator = torch.Generator().manual_seed(1)
    return {place: torch.randint(0, 8000, (length + place,), generator=generator) for place in range(0, 2 * count, 2)}


def whole_gradients(source, tokens, drawn_gradients):
    """Gradients by every linear's output with the whole model in one graph; the head's gradients are given."""
    outputs = {}
    x = embed(source, tokens, torch.float32).requires_grad_()
    for layer in range(source.config.layers):
        block = source_block(source, layer, torch.float32)

        def linear(name, value, block=block, layer=layer, plain=block.linear):
            outputs[layer, name] = plain(name, value)
            outputs[layer, name].retain_grad()
            return outputs[layer, name]

        block.linear = linear
        x = block.forward(x)
    x.backward(drawn_gradients)
    return {key: value.grad for key, value in outputs.items()}


def test_factors_are_those_of_one_backward_pass_through_the_whole_model(family, make_checkpoint, tmp_path):
    source = Checkpoint.open(make_checkpoint(family=family, dtype=torch.float32))
    given = samples()
    found = measure(source, given, tmp_path / "c", torch.float32, CPU, quiet)
    hidden = []
    for tokens in given.values():
        x = embed(source, tokens, torch.float32)
        for layer in range(source.config.layers):
            x = source_block(source, layer, torch.float32).forward(x)
        hidden.append(x)
    heads = head_gradients(source, hidden, HeadInput.zeros(source, CPU), lambda *_: None)
    whole = [whole_gradients(source, tokens, head) for tokens, head in zip(given.values(), heads, strict=True)]
    for layer in range(source.config.layers):
        block = found.block(layer, CPU)
        for stage in source.family.stages:
            weights = [sum(grads[layer, name].square().sum(1) for name in stage.linears) for grads in whole]
            mean = torch.cat(weights).mean()
            for place, expected in zip(given, weights, strict=True):
                assert torch.allclose(block.weights[stage.name][place], expected / mean, rtol=1e-4, atol=1e-6)
            for name in stage.linears:
                rows = sum(grads[layer, name].T @ grads[layer, name] for grads in whole)
                rows = rows / rows.diagonal().mean()
                assert torch.allclose(block.rows[name][0], rows, rtol=2**-8, atol=1e-6), name  # kept as bfloat16


def test_drawn_gradients_have_the_fisher_information_as_second_moment(source):
    hidden = torch.randn(1, source.config.hidden)
    norm = source.tensor(source.family.final_norm)
    normed = rms_norm(hidden, norm, source.config.epsilon)
    head = source.rows(source.family.head, 0, source.config.vocab)
    p = (normed @ head.T).softmax(1)[0].double()
    fisher = head.T.double() @ (torch.diag(p) - torch.outer(p, p)) @ head.double()
    draw = Head(source, CPU)
    generator = torch.Generator().manual_seed(SEED)
    drawn = draw.draw(normed.expand(20000, -1).contiguous(), draw.chances(20000, generator)).gradient.double()
    estimate = drawn.T @ drawn / len(drawn)
    assert float((estimate - fisher).norm() / fisher.norm()) < 0.1
    assert float(drawn.mean(0).norm() / fisher.trace().sqrt()) < 0.03


def test_draws_do_not_depend_on_how_many_tokens_are_taken_together(source):
    hidden = [
        torch.randn(count, source.config.hidden, generator=torch.Generator().manual_seed(count))
        for count in (90, 7, 60)
    ]
    draw, generator = Head(source, CPU), torch.Generator().manual_seed(SEED)
    together = draw.draw(torch.cat(hidden), draw.chances(157, torch.Generator().manual_seed(SEED))).gradient
    apart = [draw.draw(part, draw.chances(len(part), generator)).gradient for part in hidden]
    assert torch.equal(together, torch.cat(apart))
    assert len(together.unique(dim=0)) > 140


@pytest.mark.parametrize("ahead", [False, True])
def test_a_head_that_is_kept_has_every_slice_in_its_place(source, monkeypatch, ahead):
    """As a GPU keeps it, with a slice read ahead of the one that goes there."""
    monkeypatch.setattr("qquant.families.decoder.HEAD_ROWS", 3000)
    monkeypatch.setattr("qquant.devices.readers", lambda device: 3 if ahead else 1)
    head = Head(source, CPU)
    kept = head._to(CPU)
    assert len(kept) == len(head.slices) == 3
    assert torch.equal(torch.cat(kept), source.rows(source.family.head, 0, source.config.vocab))
    chances, normed = head.chances(50, torch.Generator().manual_seed(1)), torch.randn(50, source.config.hidden)
    read = head.draw(normed, chances).gradient
    head.kept = kept
    assert torch.equal(head.draw(normed, chances).gradient, read)


def test_a_draw_from_many_slices_follows_the_prediction(source, monkeypatch):
    """Slices of unequal size and mass, none a multiple of a strip: how often each token is drawn against its probability."""
    monkeypatch.setattr("qquant.families.decoder.HEAD_ROWS", 3000)
    vocab, hidden = source.config.vocab, source.config.hidden
    normed = 3 * torch.randn(1, hidden, generator=torch.Generator().manual_seed(4))
    head = (
        source.rows(source.family.head, 0, vocab) * torch.linspace(0.2, 2, vocab)[:, None]
    )  # later slices score higher
    p = (normed @ head.T).softmax(1)[0].double()
    draw = Head(source, CPU)
    monkeypatch.setattr(draw, "_rows", lambda number: head[draw.slices[number]])
    assert len(draw.slices) == 3
    count = 20000
    chances = draw.chances(count, torch.Generator().manual_seed(5))
    drawn = draw.draw(normed.expand(count, -1).contiguous(), chances).gradient.double()
    assert torch.allclose(drawn.mean(0), torch.zeros(hidden).double(), atol=5 * float(drawn.std() / count**0.5))
    mean = p @ head.double()
    variance = p @ head.double().square() - mean.square()
    assert torch.allclose(drawn.square().mean(0), variance, rtol=0.1)


def test_rows_that_were_divided_have_the_curvature_of_the_products(source, tmp_path):
    """Outputs y / s cost what y costs: G of them is s G s."""
    found = measure(source, samples(2), tmp_path / "c", torch.float32, CPU, quiet).block(0, CPU)
    name = source.family.linears[0]
    scale = torch.rand(source.config.hidden, generator=torch.Generator().manual_seed(6)) + 0.5
    divided = found.rows.divided({name: scale})
    assert torch.equal(divided[name][0], found.rows[name][0] * scale[:, None] * scale)
    assert all(torch.equal(divided[other][0], found.rows[other][0]) for other in found.rows if other != name)


def test_the_factors_predict_which_errors_cost_kl_divergence(source, tmp_path):
    """Errors of one size in the directions that G calls dear and cheap: KL divergences in the proportion that the factors predict."""
    given = samples(4, 64)
    found = measure(source, given, tmp_path / "c", torch.float32, CPU, quiet).block(1, CPU)
    stage = source.family.stage("o")
    gram, inputs = Gram.zeros(source.config.hidden), {}
    rows = found.rows[stage.linears[0]][0]
    blocks = [source_block(source, layer, torch.float32) for layer in range(source.config.layers)]
    norm = source.tensor(source.family.final_norm)
    head = source.rows(source.family.head, 0, source.config.vocab).float()

    def log_p(place):
        x = blocks[0].forward(embed(source, given[place], torch.float32))
        x = blocks[1].forward(x, lambda name, value: inputs.__setitem__((name, place), value))
        return (rms_norm(x, norm, source.config.epsilon) @ head.T).log_softmax(1).double()

    base = {place: log_p(place) for place in given}
    for place in given:
        gram.add(inputs[stage.name, place], found.weights[stage.name][place])
    name = f"{stage.linears[0]}.weight"
    weight = blocks[1].weights[name]
    noise = torch.randn(source.config.hidden, generator=torch.Generator().manual_seed(2))
    directions = torch.linalg.eigh(rows).eigenvectors
    measured, predicted = [], []
    for direction in (directions[:, -1], directions[:, len(directions) // 2]):
        error = 3e-3 * torch.outer(direction, noise)
        blocks[1].weights[name] = weight + error
        measured.append(sum(float((b.exp() * (b - log_p(place))).sum()) for place, b in base.items()))
        predicted.append(float((rows * (error @ gram.matrix @ error.T)).sum()))
    assert predicted[0] > 3 * predicted[1]
    assert measured[0] / measured[1] == pytest.approx(predicted[0] / predicted[1], rel=0.6)


def test_complete_factors_are_read_again_and_changed_ones_measured_again(source, tmp_path):
    counted = []
    folder = tmp_path / "c"

    def count(*values):
        counted.append(values)

    measure(source, samples(), folder, torch.float32, CPU, Watched(count))
    calls = len(counted)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == ["block-0", "block-1", "complete", "outside"]
    measure(source, samples(), folder, torch.float32, CPU, Watched(count))
    assert len(counted) == calls
    (folder / "block-1").write_bytes(first["block-1"][:-1] + bytes([first["block-1"][-1] ^ 1]))
    measure(source, samples(), folder, torch.float32, CPU, Watched(count))
    assert len(counted) == 2 * calls
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_progress_counts_the_forward_pass_the_head_and_the_way_back(source, tmp_path, monkeypatch):
    monkeypatch.setitem(
        devices.POLICIES, "cpu", replace(devices.POLICIES["cpu"], head_tokens=20)
    )  # 24 + 26 + 28 tokens in four slices
    told = []
    measure(source, samples(), tmp_path / "c", torch.float32, CPU, Watched(lambda *values: told.append(values)))
    head = head_share(source.family, source.config)
    assert head == round(HEAD * 8192 / (4 * 64 + 3 * 128)) > 4
    back = [2 + head + BACKWARD, 2 + head + 2 * BACKWARD]
    slices = [2 + head * tokens // 78 for tokens in (20, 40, 60, 78)]
    assert told == [("curvature", done, back[-1]) for done in [0, 1, 2, *slices, *back]]


def test_a_head_that_costs_little_counts_too(source):
    assert head_share(source.family, replace(source.config, intermediate=10**6)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["device", "host", "files"])
@pytest.mark.parametrize("beside", [True, False])
def test_threads_and_where_inputs_stay_change_no_byte(source, tmp_path, monkeypatch, place, beside, dtype):
    """What a GPU build does, against what a build on the CPU does; and no scratch file is left."""
    plain, other, seen = tmp_path / "plain", tmp_path / "other", []
    measure(source, samples(), plain, dtype, CPU, quiet)
    monkeypatch.setattr(devices, "threads_help", lambda device: beside)
    monkeypatch.setattr(curvature, "_place", lambda device, nbytes: place)
    measure(source, samples(), other, dtype, CPU, Watched(lambda *_: seen.append(any(other.glob("input-*")))))
    assert any(seen) == (place == "files")
    assert {path.name: path.read_bytes() for path in other.iterdir()} == {
        path.name: path.read_bytes() for path in plain.iterdir()
    }


def test_inputs_stay_where_there_is_room(monkeypatch):
    free = {"cuda": 300, "cpu": 1000}
    monkeypatch.setattr(curvature, "free_memory", lambda device: free[device.type])
    places = {size: curvature._place(torch.device("cuda"), size) for size in (100, 101, 250, 251)}
    assert places == {100: "device", 101: "host", 250: "host", 251: "files"}
    assert curvature._place(CPU, 1) == "files"


def test_a_file_that_cannot_be_written_beside_the_computation_ends_it(source, tmp_path, monkeypatch):
    """The last file that is written, too: nothing is called complete that is not there."""
    monkeypatch.setattr(devices, "threads_help", lambda device: True)
    write = curvature.write_pieces
    for name in ("block-1", "block-0"):

        def full(path, content, name=name):
            if path.name == name:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            write(path, content)

        monkeypatch.setattr(curvature, "write_pieces", full)
        with pytest.raises(OSError, match="No space left on device"):
            measure(source, samples(), tmp_path / "c", torch.float32, CPU, quiet)
        assert not (tmp_path / "c" / "complete").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qquant-")]


def test_a_block_that_cannot_be_read_ahead_is_told_in_its_turn(source, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "threads_help", lambda device: True)
    read, told = source.block, []

    def block(layer, *how):
        if layer == 1:
            raise InputError("damaged")
        return read(layer, *how)

    monkeypatch.setattr(source, "block", block)
    with pytest.raises(InputError, match="damaged"):
        measure(source, samples(), tmp_path / "c", torch.float32, CPU, Watched(lambda _, done, of: told.append(done)))
    assert told == [0, 1]


def test_gradients_that_overflow_are_an_error(source, tmp_path, monkeypatch):
    draw = Head.draw

    def overflowing(self, normed, generator):
        drawn = draw(self, normed, generator)
        return replace(drawn, gradient=torch.full_like(normed, math.inf))

    monkeypatch.setattr(Head, "draw", overflowing)
    with pytest.raises(NumericalError, match="gradients are not finite in torch.float32"):
        measure(source, samples(), tmp_path / "c", torch.float32, CPU, quiet)


def test_spread_takes_whole_samples_evenly():
    assert spread([10] * 8, 1000) == list(range(8))
    assert spread([10] * 8, 40) == [0, 2, 4, 6]
    assert spread([10] * 8, 1) == [0]
