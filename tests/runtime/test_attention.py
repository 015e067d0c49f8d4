"""Transformers' attention with our rotation: its numbers and its class, our function only inside, whatever wraps its code."""

import copy
import functools
import pickle
import types

import pytest
import torch
import transformers
from torch import nn
from transformers.models.qwen2 import modeling_qwen2

import qquant
from qquant.kernels import elementwise
from qquant.runtime import attention
from tests.kernels.test_launcher import rotated_by_torch
from tests.runtime.test_generating import GREEDY, theirs, tokens
from tests.runtime.test_layers import PACKED, dense  # noqa: F401 a fixture

THEIRS = modeling_qwen2.Qwen2Attention


@pytest.fixture
def asked(monkeypatch):
    """Shapes of queries that our rotation was asked for; torch makes it."""
    found = []

    def rotated(query, key, cosine, sine):
        found.append(tuple(query.shape))
        return rotated_by_torch(query, key, cosine, sine)

    monkeypatch.setattr(elementwise, "rotated", rotated)
    return found


def as_theirs(model):
    twin = copy.deepcopy(model)
    twin._quick = None
    for layer in twin.model.layers:
        layer.self_attn.__class__ = THEIRS
    return twin


def test_numbers_are_transformers(dense, asked):  # noqa: F811
    model, ids = qquant.load(dense, "cpu"), tokens(2, 7)
    other = as_theirs(model)
    with torch.no_grad():
        wanted = other(ids).logits
        assert asked == [], "theirs is as it was"
        assert torch.equal(model(ids).logits, wanted)
    assert asked == [(2, 4, 7, model.config.hidden_size // 4)] * 2
    made = theirs(model, ids, **GREEDY, max_new_tokens=5)
    assert torch.equal(made, theirs(other, ids, **GREEDY, max_new_tokens=5))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    made = theirs(model, ids, attention_mask=mask, **GREEDY, max_new_tokens=5)
    assert torch.equal(made, theirs(other, ids, attention_mask=mask, **GREEDY, max_new_tokens=5))


def test_it_is_transformers_class(dense, asked):  # noqa: F811
    model, ids = qquant.load(dense, "cpu"), tokens(1, 5)
    layer = model.model.layers[0]
    kind = type(layer.self_attn)
    assert (kind.__name__, issubclass(kind, THEIRS), kind is THEIRS) == ("Qwen2Attention", True, False)
    assert attention.rotating(kind) is kind
    assert attention.rotating(THEIRS) is kind
    assert THEIRS.forward.__globals__ is not kind.forward.__globals__ or THEIRS.forward is not kind.forward
    again, twin = pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)
    assert type(again.self_attn) is type(twin.self_attn) is kind
    assert list(again.state_dict()) == list(layer.state_dict())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(ids, output_attentions=True).attentions
        wanted = as_theirs(model)(ids, output_attentions=True).attentions
    assert len(found) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_gradient_is_transformers(dense, monkeypatch):  # noqa: F811
    """The kernel serves none."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(elementwise, "AVAILABLE", True)
    monkeypatch.setattr(elementwise, "launch_rotated", None)
    model = qquant.load(dense, "cpu")
    x = torch.randn(1, 4, model.config.hidden_size).bfloat16().requires_grad_()
    model.model.layers[0].self_attn(x, model.model.rotary_emb(x, torch.arange(4)[None]), None)[0].sum().backward()
    assert x.grad.isfinite().all()


def apply_rotary_pos_emb(query, key, cosine, sine, sign=1):
    return query + sign * cosine, key + sign * sine


class Plain(nn.Module):
    def forward(self, query, key, *, sign=None):
        more = {} if sign is None else {"sign": sign}
        return apply_rotary_pos_emb(query, key, 2, 3, **more)


def renamed(function):
    @functools.wraps(function)
    def named(self, *given, k=None, **more):
        return function(self, *given, *([] if k is None else [k]), **more)

    return named


class Wrapped(Plain):
    forward = renamed(Plain.forward)


class Other(nn.Module):
    def forward(self, query):
        return self.apply_rotary_pos_emb(query)

    def apply_rotary_pos_emb(self, query):
        return query


class Hidden(nn.Module):
    """A wrapper that finds its function in another way."""

    forward = functools.partialmethod(Plain.forward)


def test_code_of_any_version(monkeypatch):
    monkeypatch.setattr(elementwise, "rotated", lambda *_: ("ours", "too"))
    assert attention.with_rotation(Plain())(5, 6) == ("ours", "too")
    assert attention.with_rotation(Plain())(5, 6, sign=-1) == (3, 3), "an argument that ours does not know"
    assert attention.with_rotation(Wrapped())(5, k=6) == ("ours", "too")
    assert Plain()(5, 6) == Wrapped()(5, k=6) == (7, 9)
    monkeypatch.setattr(elementwise, "rotated", lambda *_: None)
    assert attention.with_rotation(Plain())(5, 6) == attention.with_rotation(Wrapped())(5, k=6) == (7, 9)
    for kind in (Other, Hidden, nn.Linear):
        assert attention.rotating(kind) is kind
    twin = pickle.loads(pickle.dumps(attention.with_rotation(Wrapped())))
    assert isinstance(twin, Wrapped)
    assert isinstance(type(twin).forward, types.FunctionType)


def test_a_compiler_sees_one_graph(dense):  # noqa: F811
    torch.compiler.reset()
    model, ids = qquant.load(dense, "cpu", torch.float32), tokens(1, 6)
    block = model.model.layers[0].self_attn
    x = torch.randn(1, 6, model.config.hidden_size)
    tables = model.model.rotary_emb(x, torch.arange(6)[None])
    with torch.no_grad():
        wanted = block(x, tables, None)[0]
        found = torch.compile(lambda *given: block(*given)[0], backend="eager", fullgraph=True)(x, tables, None)
        assert torch.allclose(found, wanted, atol=1e-6)
        assert model(ids).logits.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
def test_numbers_are_transformers_on_a_gpu(packed, dense, monkeypatch):  # noqa: F811
    """Bit by bit: products and sums of a rotation are rounded as torch rounds them."""
    model = qquant.load(PACKED if packed else dense, "cuda", torch.bfloat16)
    other, launched = as_theirs(model), []
    plain = elementwise.launch_rotated
    monkeypatch.setattr(elementwise, "launch_rotated", lambda *given: launched.append(1) or plain(*given))
    blocks = model.config.num_hidden_layers
    for shape in ((1, 1), (1, 40), (3, 1), (2, 90)):
        ids = (tokens(*shape) % model.config.vocab_size).cuda()
        with torch.no_grad():
            assert torch.equal(model(ids).logits, other(ids).logits)
    assert len(launched) == 4 * blocks
    ids = (tokens(2, 20) % model.config.vocab_size).cuda()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    made = theirs(model, ids, attention_mask=mask, **GREEDY, max_new_tokens=12)
    assert torch.equal(made, theirs(other, ids, attention_mask=mask, **GREEDY, max_new_tokens=12))
    assert isinstance(model, transformers.Qwen2ForCausalLM)
