"""Norms and gated MLPs of a loaded model: transformers' numbers bit by bit, its names, gradients and hooks, in fewer launches."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from transformers.models.qwen2 import modeling_qwen2

import qquant
from qquant.kernels import elementwise
from qquant.runtime import generating, layers
from tests.conftest import write_checkpoint
from tests.kernels.test_launcher import rotated_by_torch
from tests.runtime.test_generating import GREEDY, theirs, tokens
from tests.worlds import GOLDEN

PACKED = GOLDEN / "artifacts" / "gptqmodel-int4"
PLACES = ("input_layernorm", "post_attention_layernorm")
LAYERS = 2


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A checkpoint with grouped queries, in bfloat16."""
    return write_checkpoint(tmp_path_factory.mktemp("layers") / "model", num_key_value_heads=2)


def loaded(path, dtype=torch.bfloat16, device="cpu"):
    return qquant.load(path, device, dtype)


def as_theirs(model):
    """A copy with transformers' modules in the places of ours."""
    twin = copy.deepcopy(model)
    twin._quick = None

    def norm(owner, name):
        module = modeling_qwen2.Qwen2RMSNorm(model.config.hidden_size, getattr(owner, name).variance_epsilon)
        module.weight = getattr(owner, name).weight
        setattr(owner, name, module)

    for layer in twin.model.layers:
        for name in PLACES:
            norm(layer, name)
        mlp = modeling_qwen2.Qwen2MLP(model.config)
        for name in ("gate_proj", "up_proj", "down_proj", "act_fn"):
            setattr(mlp, name, getattr(layer.mlp, name))
        layer.mlp = mlp
    norm(twin.model, "norm")
    return twin.eval()


def counted(monkeypatch):
    """Launches by kernel: a CPU passes for a GPU, and torch computes what a kernel would."""
    made = Counter()
    plain = {name: getattr(elementwise, name) for name in ("rms_norm", "gate")} | {"rotated": rotated_by_torch}

    def launch(name):
        def launched(*given):
            made[name] += 1
            with monkeypatch.context() as patch:
                patch.setattr(elementwise, "serves", lambda _: False)
                return plain[name](*given[: {"rms_norm": 3, "gate": 2, "rotated": 4}[name]])

        return launched

    monkeypatch.setattr(elementwise, "AVAILABLE", True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for name in plain:
        monkeypatch.setattr(elementwise, f"launch_{name}", launch(name))
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("packed", [True, False])
def test_numbers_are_transformers(packed, dtype, dense):
    model = loaded(PACKED if packed else dense, dtype)
    other, ids = as_theirs(model), tokens(2, 30) % model.config.vocab_size
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)
    ids = ids[:1, :9]
    found = theirs(model, ids, **GREEDY, max_new_tokens=8)
    assert torch.equal(found, theirs(other, ids, **GREEDY, max_new_tokens=8))


def test_names_and_kinds_are_kept(dense):
    model = loaded(dense)
    other = as_theirs(model)
    assert list(model.state_dict()) == list(other.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in other.named_parameters()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in other.named_modules()]
    assert not any(weight.requires_grad for weight in model.parameters())
    assert repr(model.model.norm) == f"RMSNorm(({model.config.hidden_size},), eps=1e-06)"
    assert model.model.norm.variance_epsilon == model.config.rms_norm_eps
    kinds = Counter(type(module) for module in model.modules())
    assert (kinds[layers.RMSNorm], kinds[layers.GatedMLP]) == (2 * LAYERS + 1, LAYERS)
    assert not any(isinstance(module, modeling_qwen2.Qwen2RMSNorm) for module in model.modules())
    quick = model._quick
    weights = generating.weights_of(model, quick.family, quick.config)
    assert weights.final_norm is model.model.norm.weight
    assert weights.layers[1].norms["qkv"] is model.model.layers[1].input_layernorm.weight


def test_copies_moves_and_pickles(dense):
    model, ids = loaded(dense), tokens(1, 7)
    block = model.model.layers[0]
    again = pickle.loads(pickle.dumps(block))
    assert list(again.state_dict()) == list(block.state_dict())
    x = torch.ones(1, 2, model.config.hidden_size).bfloat16()
    assert torch.equal(again.mlp(again.input_layernorm(x)), block.mlp(block.input_layernorm(x)))
    twin = copy.deepcopy(model).to(torch.float16)
    assert twin.model.norm.weight.dtype == torch.float16
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, as_theirs(twin)(ids).logits)
    kept = copy.deepcopy(model.state_dict())
    model.model.norm.weight.data.fill_(7)
    model.load_state_dict(kept)
    assert torch.equal(model.model.norm.weight, kept["model.norm.weight"])


def test_gradients_are_transformers(dense, monkeypatch):
    """To inputs and to norms, also where kernels would run: they have none."""
    model = loaded(dense)
    other, made = as_theirs(model), counted(monkeypatch)
    given = torch.randn(1, 5, model.config.hidden_size).bfloat16()
    found = []
    for one in (model, other):
        for name, weight in one.named_parameters():
            weight.requires_grad_("norm" in name)
        x = given.clone().requires_grad_()
        one(inputs_embeds=x).logits.float().square().sum().backward()
        found.append([x.grad, *(weight.grad for weight in one.parameters() if weight.requires_grad)])
    assert len(found[0]) == 2 * LAYERS + 2
    assert all(torch.equal(mine, yours) for mine, yours in zip(*found, strict=True))
    assert not made
    with torch.no_grad():
        model(inputs_embeds=given)
    assert made["rms_norm"] == 2 * LAYERS + 1
    model.model.norm(given).float().sum().backward()
    assert made["rms_norm"] == 2 * LAYERS + 1, "a weight's gradient is one, too"


def test_a_token_takes_one_launch_for_each(dense, monkeypatch):
    model, made = loaded(PACKED), counted(monkeypatch)
    ids = tokens(1, 5) % model.config.vocab_size
    with torch.no_grad():
        model(ids)
    blocks = model.config.num_hidden_layers
    assert made == {"rms_norm": 2 * blocks + 1, "gate": blocks, "rotated": blocks}


def test_what_replaces_or_hooks_a_part_is_heard(dense):
    model, ids = loaded(dense), tokens(1, 6)
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        plain = model(ids).logits
        seen = []
        handle = mlp.act_fn.register_forward_hook(lambda *given: seen.append(given[2].shape))
        assert torch.equal(model(ids).logits, plain)
        handle.remove()
        assert seen == [(1, 6, model.config.intermediate_size)]
        mlp.act_fn = nn.GELU()
        assert torch.equal(model(ids).logits, as_theirs(model)(ids).logits)
        assert not torch.equal(model(ids).logits, plain)
        mlp.act_fn = model.model.layers[0].mlp.act_fn
        mlp.up_proj = Doubled(mlp.up_proj)
        assert torch.equal(model(ids).logits, as_theirs(model)(ids).logits)
        assert not torch.equal(model(ids).logits, plain)
    assert model._quick.decoder(model) is None, "one that answers without it"


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def test_a_compiler_sees_torch(dense):
    """As one graph, without what asks for addresses."""
    norm = loaded(dense).model.norm
    exported = torch.export.export(norm, (torch.ones(1, 3, len(norm.weight)).bfloat16(),))
    assert "rsqrt" in str(exported.graph)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
def test_numbers_are_transformers_on_a_gpu(packed, dense):
    """But for the order of sums: a few values one bit apart after the first norm, which later ones spread."""
    model = loaded(PACKED if packed else dense, device="cuda")
    other = as_theirs(model)
    for shape in ((1, 1), (1, 40), (3, 1), (2, 90)):
        ids = (tokens(*shape) % model.config.vocab_size).cuda()
        with torch.no_grad():
            found, expected = model(ids).logits.float(), other(ids).logits.float()
        assert float((found - expected).norm() / expected.norm()) < 1e-2
        x = torch.randn(*shape, model.config.hidden_size, device="cuda").bfloat16()
        one, two = model.model.layers[0].mlp(x), other.model.layers[0].mlp(x)
        assert float((one.float() - two.float()).norm() / two.float().norm()) < 2e-3
    x = torch.randn(300, model.config.hidden_size, device="cuda").bfloat16()
    one, two = model.model.norm(x), other.model.norm(x)
    assert one.dtype == two.dtype
    assert float((one != two).float().mean()) <= 2e-3
    ids = (tokens(1, 20) % model.config.vocab_size).cuda()
    made = theirs(model, ids, **GREEDY, max_new_tokens=12)
    assert made.shape == (1, 32)
    x = torch.randn(1, 5, model.config.hidden_size, device="cuda").bfloat16().requires_grad_()
    model.model.layers[0].input_layernorm(x).float().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
