"""A stream of an artifact's own: what it holds, and the correction by its definition."""

import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qquant import devices
from qquant.exchange import ALONE
from qquant.families import FAMILIES
from qquant.families.decoder import Block
from qquant.families.forward import StageInput
from qquant.plan import room
from qquant.solve import block as blocks
from qquant.solve import drift, propagate, stream, walk
from qquant.solve.stream import Stream
from tests.worlds.builds import CPU, HEAD, contents


def test_inputs_of_the_last_stage_let_go_of_the_passage_without_quantization():
    """Else its activations stay in memory: Python up to 3.12.3 keeps what a closed generator held."""
    ways = [iter([StageInput("down", torch.ones(1)), StageInput("", torch.zeros(1))]) for _ in range(2)]
    held = _passage(ways[0])
    known = weakref.ref(held)
    passes = {(7,): [held, _passage(ways[1])]}
    del held
    found = list(propagate._inputs(passes, last=True, onward=False))
    assert [place for place, _, _ in found] == [(7,)]
    assert known() is None
    assert [next(way)[0] for way in passes[7,]] == [""]


def test_after_the_last_stage_a_passage_that_goes_on_holds_its_output_alone():
    """Its input is 2.7 times as wide: those of all samples of a 7B in float32 had no room beside 32 blocks, and were made anew for every stage."""
    outputs = torch.zeros(1), torch.ones(2)
    ways = [iter([StageInput("down", torch.ones(1)), StageInput("", output)]) for output in outputs]
    held = _passage(ways[0])
    known = weakref.ref(held)
    passes = {(7,): [held, _passage(ways[1])]}
    del held
    inputs = propagate._inputs(passes, last=True, onward=True)
    assert next(inputs).exact.stage == "down"
    assert next(inputs, None) is None
    assert known() is None
    assert [next(way).x for way in passes[7,]] == [*outputs]


def _passage(way):
    yield from way


def test_propagated_artifact_makes_up_for_what_came_before(make_checkpoint, build):
    folder = make_checkpoint(hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    text = HEAD.replace("samples: 6", "samples: 24")
    shared, first = build(folder, "gptq-shared", text=text)
    own, second = build(folder, "gptq-own", out="own", text=text)
    a, b = (load_file(out / "model-GPTQ-Int4" / "model.safetensors") for out in (first, second))
    assert torch.equal(a["model.layers.0.self_attn.q_proj.qweight"], b["model.layers.0.self_attn.q_proj.qweight"])
    assert not torch.equal(a["model.layers.1.mlp.down_proj.qweight"], b["model.layers.1.mlp.down_proj.qweight"])
    assert own.artifacts[0].kl_divergence < shared.artifacts[0].kl_divergence


def test_bytes_do_not_depend_on_what_gave_way(make_checkpoint, build, monkeypatch):
    """Passages begin anew for every stage, and hidden states are on the host, where memory is short.

    And the model's statistics are of single channels: nothing is solved on them, and matrices would be thrown away.
    """
    folder, names, sides = make_checkpoint(num_hidden_layers=1), ["gptq-own", "gptq-int8"], []
    grams = blocks.View.grams

    def seen(*asked, **how):
        found = grams(*asked, **how)
        sides.extend(len(gram.matrix) for gram in found.values())
        return found

    monkeypatch.setattr(blocks.View, "grams", seen)
    _, kept = build(folder, *names, out="kept")
    assert sides == [0] * 4
    anew, left, begins, leave = [], [], propagate._anew, stream.Stream.leave_device
    monkeypatch.setattr(propagate, "_anew", lambda *asked: anew.append(begins(*asked)) or anew[-1])
    monkeypatch.setitem(devices.POLICIES, "cpu", replace(devices.POLICIES["cpu"], apart=True))
    monkeypatch.setattr(room, "STATES", 0)
    monkeypatch.setattr(stream.Stream, "leave_device", lambda self: left.append(self) or leave(self))
    _, short = build(folder, *names, out="short")
    assert len(left) == 2 + 2, "the model's in two dtypes, and one of each artifact"
    assert anew == [True, True], "since their states had to leave"
    assert contents(short) == contents(kept)


@pytest.mark.parametrize("other", ["", "\n  - {name: other, format: gguf, type: q4_0, solver: gptq, propagate: true}"])
def test_a_carried_stream_is_the_one_that_is_taken_through_by_itself(make_checkpoint, build, monkeypatch, other):
    """Bytes and importance matrix, and no block runs twice for it."""
    text = HEAD.replace("artifacts:", f"artifacts:{other}")
    folder, ran, forward = make_checkpoint(), [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *rest: ran.append(self) or forward(self, *rest))
    _, carried = build(folder, "gptq-own", out="carried", text=text)
    once = len(ran)
    ran.clear()
    monkeypatch.setattr(walk, "carry", lambda *rest: False)
    _, apart = build(folder, "gptq-own", out="apart", text=text)
    assert contents(carried) == contents(apart)
    assert len(ran) == once + 2 * 6  # blocks times samples
    kept = [(out / "calibration" / "imatrix.dat").read_bytes() for out in (carried, apart)]
    assert kept[0] == kept[1]


def test_the_last_of_eight_bits_takes_the_stream_in_float32_along(make_checkpoint, build, monkeypatch):
    """The bytes of one that is taken through by itself, which runs every block once more."""
    folder, ran, forward = make_checkpoint(), [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *rest: ran.append(self) or forward(self, *rest))
    _, carried = build(folder, "gptq-own", "gptq-int8", out="carried")
    once = len(ran)
    ran.clear()
    monkeypatch.setattr(walk._Streams, "_last_in_float32", lambda *_: None)
    _, apart = build(folder, "gptq-own", "gptq-int8", out="apart")
    assert contents(carried) == contents(apart)
    assert len(ran) == once + 2 * 6  # blocks times samples


def test_where_a_carried_stream_is_not_finite_the_block_is_taken_in_float32(make_checkpoint, build, monkeypatch):
    """As without it: the samples that overflow are counted, and the same bytes."""
    folder, attend = make_checkpoint(), Block.attend

    def overflowing(self, heads):
        mixed = attend(self, heads)
        return mixed * torch.inf if self.dtype == torch.bfloat16 and len(mixed) > 60 else mixed

    monkeypatch.setattr(Block, "attend", overflowing)
    _, carried = build(folder, "gptq-own", out="carried")
    monkeypatch.setattr(walk, "carry", lambda *rest: False)
    _, apart = build(folder, "gptq-own", out="apart")
    assert contents(carried) == contents(apart)


def test_the_correction_is_the_ridge_regression_of_what_is_missing():
    """For weights W' = W + correction: W' x~ is nearest to W x + (r - r~) under the ridge, computed by stacking rows."""
    generator = torch.Generator().manual_seed(3)
    weight, x, own, r, q = (
        torch.randn(*shape, generator=generator) for shape in ((5, 8), (40, 8), (40, 8), (40, 5), (40, 5))
    )
    own = x + 0.3 * own
    stage = FAMILIES["qwen2"].stage("o")
    weights = {f"{stage.linears[0]}.weight": weight}
    view = blocks.View(None, 0, weights, torch.float32, None)
    inputs = [
        drift.Inputs((place,), StageInput("o", x[part], r[part]), StageInput("o", own[part], q[part]))
        for place, part in enumerate((slice(0, 25), slice(25, None)))
    ]
    sums = drift.drift(view, stage, iter(inputs), Stream([x[:25], x[25:]], CPU))
    targets = propagate._targets(stage, weights, sums, ALONE)
    found = (targets[f"{stage.linears[0]}.weight"] - weight) / propagate.SHARE
    wanted = (x @ weight.T + r - q) - own @ weight.T  # what W x~ lacks
    ridge = (propagate.RIDGE * sums.gram.matrix.diagonal().mean()).sqrt()
    stacked = torch.cat([own, ridge * torch.eye(8)]).double(), torch.cat([wanted, torch.zeros(8, 5)]).double()
    expected = torch.linalg.lstsq(*stacked).solution.T
    assert torch.allclose(found.double(), expected, atol=1e-5)
