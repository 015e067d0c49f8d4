"""`generate` of a loaded model: transformers' tokens, whatever is asked for, and which of the two loops made them."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers

import qquant
from qquant.errors import NumericalError
from qquant.runtime import decoding, generating
from qquant.runtime.decoding import AnswerLimits, GraphDecoder, one_by_one
from qquant.runtime.sampling import Sampling, choose
from tests.conftest import write_checkpoint

CPU = torch.device("cpu")
VOCAB = 8192
GREEDY = {
    "do_sample": False,
    "repetition_penalty": 1.0,
    "eos_token_id": None,
    "pad_token_id": 0,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights with grouped queries, in float32."""
    folder = write_checkpoint(tmp_path_factory.mktemp("generating") / "model", num_key_value_heads=2)
    return qquant.load(folder, "cpu", torch.float32)


@pytest.fixture
def fresh(model):
    """The model with a decoder that has not answered yet."""
    model._quick._made, model.keeps_history = None, False
    return model


def tokens(*shape):
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(3))


def decoder_of(model):
    return model._quick.decoder(model)


def theirs(model, *given, **settings):
    """transformers' own loop."""
    return transformers.Qwen2ForCausalLM.generate(model, *given, **settings)


@pytest.fixture
def only_quick(monkeypatch):
    """transformers' loop would fail: what passes went the quick way."""
    monkeypatch.setattr(transformers.GenerationMixin, "_sample", None)
    return monkeypatch


# -- the same tokens


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_transformers(fresh, penalty, only_quick):
    ids = tokens(1, 9)
    settings = GREEDY | {"max_new_tokens": 24, "repetition_penalty": penalty}
    found = fresh.generate(ids, **settings)
    only_quick.undo()
    assert torch.equal(found, theirs(fresh, ids, **settings))
    assert found.dtype == torch.int64


def test_padded_batches_with_stops_are_transformers(fresh, only_quick):
    ids, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.int64)
    ids[1, :4], mask[1, :4] = 0, 0
    free = fresh.generate(ids, attention_mask=mask, **GREEDY, max_new_tokens=12)[:, 7:]
    settings = GREEDY | {"eos_token_id": [int(free[0, 3]), int(free[2, 8])], "max_new_tokens": 40}
    found = fresh.generate(input_ids=ids, attention_mask=mask, **settings)
    assert fresh.generate(ids, attention_mask=mask, **GREEDY, max_length=9).shape == (3, 9)
    only_quick.undo()
    wanted = theirs(fresh, input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(found, wanted)
    assert found[0, 11:].eq(0).all(), "an ended row is filled"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},
        {"top_k": 0, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 5, "top_p": 1.0},
    ],
)
def test_a_seed_samples_what_transformers_samples(fresh, settings, only_quick):
    ids, asked = tokens(2, 6), {"do_sample": True, "max_new_tokens": 16, "pad_token_id": 0, **settings}
    torch.manual_seed(11)
    found = fresh.generate(ids, **asked)
    assert not torch.equal(found, fresh.generate(ids, **asked)), "the next draw is another one"
    only_quick.undo()
    torch.manual_seed(11)
    assert torch.equal(found, theirs(fresh, ids, **asked))


def test_a_given_config_counts_before_the_models(fresh, only_quick):
    config = transformers.GenerationConfig(max_new_tokens=5, do_sample=False)
    fresh.generation_config.do_sample = True
    ids = tokens(1, 4)
    assert torch.equal(fresh.generate(ids, config), fresh.generate(ids, config))
    only_quick.undo()
    assert torch.equal(fresh.generate(ids, config), theirs(fresh, ids, config))


class Heard:
    def __init__(self):
        self.put_, self.ended = [], 0

    def put(self, value):
        self.put_.append(value.clone())

    def end(self):
        self.ended += 1


def test_streamers_hear_what_transformers_tells(fresh):
    ids, here, there = tokens(1, 5), Heard(), Heard()
    fresh.generate(ids, **GREEDY, max_new_tokens=6, streamer=here)
    theirs(fresh, ids, **GREEDY, max_new_tokens=6, streamer=there)
    assert here.ended == there.ended == 1
    assert [value.tolist() for value in here.put_] == [value.tolist() for value in there.put_]


# -- the choice by itself


def test_draws_follow_the_kept_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 3.0]]).expand(20000, 5)
    drawn = choose(logits, None, Sampling(True, 0.8, 4, 0.95))
    chances = (logits[0] / 0.8).softmax(0)
    chances[3] = 0  # not among the four
    chances /= chances.sum()
    chances[2] = 0  # 4, 0 and 1 reach 0.95
    chances /= chances.sum()
    assert torch.allclose(torch.bincount(drawn, minlength=5) / 20000, chances, atol=0.015)


def test_at_least_one_token_is_kept():
    logits = torch.randn(50, 30)
    assert torch.equal(choose(logits, None, Sampling(True, 1.0, 0, 1e-6)), logits.argmax(-1))
    assert torch.equal(choose(logits, None, Sampling(True, 1.0, 1, 1.0)), logits.argmax(-1))


# -- recorded, ahead of the host, in a cache that grows


class Tape:
    """Records like a graph: work that ran before, replayed by calling it again."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, work):
        self.recorded += 1

        def replay():
            self.replayed += 1
            work()

        return replay


def quick(model, record=one_by_one, ahead=0):
    found = GraphDecoder(model._quick.config, decoder_of(model).weights, CPU, torch.float32, record)
    found.ahead = ahead
    return found


def made_by(decoder, ids, count, sampling=None, **more):
    found = decoder.answer(ids.tolist(), sampling or Sampling(), AnswerLimits(count), **more)
    return torch.tensor(list(found)).T


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_replayed_passes_give_the_same_tokens(fresh, ahead):
    ids, tape = tokens(2, 8), Tape()
    decoder = quick(fresh, tape, ahead)
    wanted = theirs(fresh, ids, **GREEDY, max_new_tokens=20)[:, 8:]
    assert torch.equal(made_by(decoder, ids, 20), wanted)
    assert (tape.recorded, tape.replayed) == (2, 18 + 19), (
        "one pass and one choice, each replayed but for its first run"
    )
    assert torch.equal(made_by(decoder, ids, 20), wanted)
    assert tape.recorded == 2, "the next answer records nothing"
    made_by(decoder, ids, 5, Sampling(True))
    assert tape.recorded == 3, "another way to choose is another graph, the pass is the same"


def test_nothing_is_computed_before_the_first_token_is_told(fresh):
    tape = Tape()
    answer = quick(fresh, tape, ahead=2).answer(tokens(1, 8).tolist(), Sampling(), AnswerLimits(9))
    next(answer)
    assert tape.recorded == 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_cache_that_grows_keeps_what_it_holds(fresh, ahead, monkeypatch):
    monkeypatch.setattr(decoding, "BLOCK", 4)
    monkeypatch.setattr(decoding, "FIRST", 3)
    ids, tape = tokens(2, 8), Tape()
    decoder = quick(fresh, tape, ahead)
    wanted = theirs(fresh, ids, **GREEDY | {"repetition_penalty": 1.2}, max_new_tokens=40)[:, 8:]
    assert torch.equal(made_by(decoder, ids, 40, Sampling(repetition_penalty=1.2)), wanted)
    assert 48 <= decoder.stepper.capacity <= 52, "not more than the answer needs"
    assert 3 <= tape.recorded <= 7, "it grows by half, not by a block"


def test_long_prompts_are_read_in_parts(fresh, monkeypatch):
    ids = tokens(2, 37)
    wanted = made_by(quick(fresh), ids, 6)
    monkeypatch.setattr(decoding, "PREFILL", 10)
    assert torch.equal(made_by(quick(fresh), ids, 6), wanted)


def test_where_nothing_can_be_recorded_it_is_said_once(fresh):
    def refuse(work):
        raise RuntimeError("operation not permitted\nwhile capturing")

    ids, decoder = tokens(1, 8), quick(fresh, refuse, ahead=1)
    with pytest.warns(RuntimeWarning, match="no CUDA graph could be recorded .operation not permitted."):
        first = made_by(decoder, ids, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(made_by(decoder, ids, 12), first)
    assert torch.equal(first, theirs(fresh, ids, **GREEDY, max_new_tokens=12)[:, 8:])


def test_a_conversation_reads_only_what_is_new(fresh, monkeypatch):
    read = []
    original = decoding.Stepper.extend

    def extend(self, parts, starts, rows=None):
        read.append([len(part) for part in parts])
        return original(self, parts, starts, rows)

    monkeypatch.setattr(decoding.Stepper, "extend", extend)
    fresh.keeps_history = True
    first = fresh.generate(tokens(1, 20), **GREEDY, max_new_tokens=10)
    longer = torch.cat([first, tokens(1, 7)], 1)
    found = fresh.generate(longer, **GREEDY, max_new_tokens=10)
    again = fresh.generate(longer, **GREEDY, max_new_tokens=10)
    other = torch.cat([longer[:, :4], tokens(1, 9)], 1)
    third = fresh.generate(other, **GREEDY, max_new_tokens=10)
    fresh.keeps_history = False
    assert torch.equal(found, fresh.generate(longer, **GREEDY, max_new_tokens=10))
    assert torch.equal(again, found)
    assert torch.equal(third, fresh.generate(other, **GREEDY, max_new_tokens=10))
    assert read == [[20], [8], [1], [9], [37], [13]], "the last token of an answer was never read"


def test_stopping_early_leaves_the_next_answer_right(fresh):
    ids, decoder = tokens(1, 8), quick(fresh, Tape(), ahead=1)
    wanted = made_by(decoder, ids, 12)
    stop = int(wanted[0, 4])
    first = int((wanted[0] == stop).nonzero()[0])
    cut = list(decoder.answer(ids.tolist(), Sampling(), AnswerLimits(12, frozenset({stop}))))
    assert [row[0] for row in cut] == wanted[0, : first + 1].tolist()
    assert torch.equal(made_by(decoder, ids, 12, keep=True), wanted)


# -- which loop


UNUSUAL = {
    "beams": {"num_beams": 2},
    "dictionary": {"return_dict_in_generate": True},
    "two answers": {"num_return_sequences": 2, "do_sample": True},
    "min_new_tokens": {"min_new_tokens": 3},
    "bad words": {"bad_words_ids": [[5]]},
    "min_p": {"min_p": 0.1, "do_sample": True},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "processor": {"logits_processor": [lambda ids, scores: scores]},
    "criteria": {"stopping_criteria": [lambda ids, scores, **_: torch.ones(len(ids), dtype=torch.bool)]},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_known_here_goes_to_transformers(name, fresh, monkeypatch):
    monkeypatch.setattr(GraphDecoder, "answer", None)
    found = fresh.generate(tokens(1, 6), **{**GREEDY, "max_new_tokens": 4, **UNUSUAL[name]})
    assert found is not None
    with pytest.raises(TypeError):
        fresh.generate(tokens(1, 6), **GREEDY, max_new_tokens=4)


def test_other_modules_and_padding_in_the_middle_go_to_transformers(fresh, monkeypatch):
    monkeypatch.setattr(GraphDecoder, "answer", None)
    ids, mask = tokens(1, 6), torch.tensor([[1, 1, 0, 1, 1, 1]])
    fresh.generate(ids, attention_mask=mask, **GREEDY, max_new_tokens=3)
    fresh.generate(tokens(17, 3), **GREEDY, max_new_tokens=2)
    hook = fresh.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    fresh.generate(ids, **GREEDY, max_new_tokens=3)
    hook.remove()
    linear = fresh.model.layers[1].self_attn.o_proj
    fresh.model.layers[1].self_attn.o_proj = torch.nn.Sequential(linear)
    assert decoder_of(fresh) is None
    fresh.generate(ids, **GREEDY, max_new_tokens=3)
    fresh.model.layers[1].self_attn.o_proj = linear
    assert decoder_of(fresh) is not None


def test_changed_weights_are_seen(fresh):
    ids = tokens(1, 6)
    fresh.keeps_history = True
    fresh.generate(ids, **GREEDY, max_new_tokens=8)
    weight = fresh.model.layers[0].input_layernorm.weight
    kept = weight.data
    weight.data = kept.flip(0).contiguous()
    found = fresh.generate(ids, **GREEDY, max_new_tokens=8)
    assert torch.equal(found, theirs(fresh, ids, **GREEDY, max_new_tokens=8))
    weight.data = torch.full_like(kept, torch.inf)
    with pytest.raises(NumericalError, match="not finite"):
        fresh.generate(ids, **GREEDY, max_new_tokens=8)
    weight.data = kept


def test_two_answers_at_once_take_both_loops(fresh):
    ids = tokens(1, 6)
    wanted = fresh.generate(ids, **GREEDY, max_new_tokens=5)

    class Asks(Heard):
        def put(self, value):
            if not self.put_:
                self.inner = fresh.generate(ids, **GREEDY, max_new_tokens=5)
            super().put(value)

    asks = Asks()
    assert torch.equal(fresh.generate(ids, **GREEDY, max_new_tokens=5, streamer=asks), wanted)
    assert torch.equal(asks.inner, wanted)


def test_the_model_is_still_transformers(fresh):
    assert isinstance(fresh, transformers.Qwen2ForCausalLM)
    assert type(fresh).__name__ == "Qwen2ForCausalLM"
    assert fresh.can_generate()
    ids = tokens(1, 6)
    wanted = fresh.generate(ids, **GREEDY, max_new_tokens=5)
    twin = copy.deepcopy(fresh)
    assert torch.equal(twin.generate(ids, **GREEDY, max_new_tokens=5), wanted)
    assert decoder_of(twin).weights.final_norm is twin.model.norm.weight
    assert pickle.loads(pickle.dumps(fresh._quick)).config == fresh._quick.config


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 4])
def test_captured_answers_are_the_eager_loops(batch, demo):
    model = qquant.load(demo, "cuda", torch.float32)
    ids = tokens(batch, 30).cuda()
    wanted = theirs(model, ids, **GREEDY, max_new_tokens=60)
    assert torch.equal(model.generate(ids, **GREEDY, max_new_tokens=60), wanted)
    assert torch.equal(model.generate(ids, **GREEDY, max_new_tokens=60), wanted), "replayed from the first token on"
    assert generating.weights_of(model, model._quick.family, model._quick.config) is not None
    torch.manual_seed(5)
    first = model.generate(ids, do_sample=True, max_new_tokens=30, pad_token_id=0)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, do_sample=True, max_new_tokens=30, pad_token_id=0), first)
