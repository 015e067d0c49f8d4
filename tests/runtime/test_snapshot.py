"""Whether a model is what it was: every change that a pass of ours would not see, and how little is done where there is none."""

import gc
import sys
import weakref

import pytest
import torch
from torch import nn

import qquant
from qquant.runtime import generating
from qquant.runtime.snapshot import Snapshot
from tests.runtime.test_generating import GREEDY, theirs, tokens
from tests.runtime.test_layers import PACKED, Doubled, dense  # noqa: F401 a fixture


def tree():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4, bias=False)))
    model[1].table = nn.Buffer(torch.ones(3))
    return model


def replaced_tensor(model):
    model[0].bias = nn.Parameter(torch.ones(4))


def lost_bias(model):
    model[0].bias = None


def moved_buffer(model):
    model[1].table.data = torch.ones(3)


CHANGES = {
    "hook": lambda model: model[1][0].register_forward_hook(lambda *_: None),
    "hook before": lambda model: model.register_forward_pre_hook(lambda *_: None),
    "another child": lambda model: setattr(model[1], "0", nn.LayerNorm(4)),
    "another child of the model": lambda model: setattr(model, "0", Doubled(model[0])),
    "one more": lambda model: model.append(nn.Identity()),
    "one less": lambda model: model[1].pop(1),
    "another tensor": replaced_tensor,
    "no tensor": lost_bias,
    "another place": moved_buffer,
    "another type": lambda model: model[1].half(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name):
    model = tree()
    snapshot = Snapshot(model)
    assert snapshot.holds(model)
    model.train()
    model[0].weight.data.add_(1)
    assert snapshot.holds(model), "it is the same memory"
    CHANGES[name](model)
    assert not snapshot.holds(model)


def test_a_model_that_holds_its_snapshot_is_freed():
    model = tree()
    model.kept = [Snapshot(model)]
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_an_answer_asks_for_names_once(dense, monkeypatch):  # noqa: F811
    model, ids = qquant.load(dense, "cpu", torch.float32), tokens(1, 6)
    read = []
    plain = generating.weights_of
    monkeypatch.setattr(generating, "weights_of", lambda *given: read.append(1) or plain(*given))
    first = model._quick.decoder(model)
    for _ in range(3):
        model.generate(ids, **GREEDY, max_new_tokens=2)
    assert model._quick.decoder(model) is first
    assert len(read) == 1
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    assert model._quick.decoder(model) is None
    hook.remove()
    assert model._quick.decoder(model) is first
    mlp = model.model.layers[1].mlp
    kept, mlp.up_proj = mlp.up_proj, Doubled(mlp.up_proj)
    assert model._quick.decoder(model) is None
    wanted = theirs(model, ids, **GREEDY, max_new_tokens=4)
    assert torch.equal(model.generate(ids, **GREEDY, max_new_tokens=4), wanted)
    mlp.up_proj = kept
    assert model._quick.decoder(model) is first
    model.bfloat16()
    assert model._quick.decoder(model) is not first
    model.train()
    assert model._quick.decoder(model) is None


def test_asking_again_is_a_walk_over_a_list():
    """Counted, since seconds depend on the machine: a module costs what its tensors and its children's tuple cost."""
    model = qquant.load(PACKED, "cpu")
    model._quick.decoder(model)
    calls = []
    sys.setprofile(lambda frame, event, what: calls.append(event) if event in ("call", "c_call") else None)
    model._quick.decoder(model)
    sys.setprofile(None)
    modules, tensors = len(list(model.modules())), len(model.state_dict())
    assert len(calls) <= 4 * modules + 2 * tensors + 10
