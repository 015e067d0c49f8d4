"""Our block forward is transformers' Qwen2, bit for bit, and stage by stage."""

import pytest
import torch
import transformers

from qquant.families import decoder
from qquant.families import linear as products
from qquant.solve.stream import Stream
from qquant.source.checkpoint import Checkpoint

CASES = {
    "attention biases": {},
    "grouped queries": {"num_key_value_heads": 2},
    "one key-value head": {"num_key_value_heads": 1},
    "tied head": {"tie_word_embeddings": True},
    "head wider than hidden / heads": {"head_dim": 32},
}


def ours(checkpoint, tokens, dtype):
    x = decoder.embed(checkpoint, tokens, dtype)
    for layer in range(checkpoint.config.layers):
        x = decoder.source_block(checkpoint, layer, dtype).forward(x)
    return decoder.logits(checkpoint, x).float()


@torch.no_grad()
def theirs(folder, tokens, dtype, mask=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model(tokens[None] if tokens.dim() == 1 else tokens, attention_mask=mask).logits.float()


@pytest.fixture
def with_instructions(monkeypatch):
    """A CPU that multiplies bfloat16 as torch does everywhere, however slowly."""
    monkeypatch.setattr(products, "multiplies", lambda dtype: True)


@pytest.mark.usefixtures("with_instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(make_checkpoint, case, dtype):
    folder = make_checkpoint(**CASES[case])
    tokens = torch.randint(0, 8192, (40,))
    assert torch.equal(ours(Checkpoint.open(folder), tokens, dtype), theirs(folder, tokens, dtype)[0])


@pytest.mark.usefixtures("with_instructions")
def test_logits_equal_transformers_on_the_demo(demo):
    tokens = torch.randint(0, 8192, (300,))
    assert torch.equal(ours(Checkpoint.open(demo), tokens, torch.bfloat16), theirs(demo, tokens, torch.bfloat16)[0])


def test_without_instructions_logits_are_as_near_to_float32s(demo, monkeypatch):
    """Products by float32 round once, as torch's of bfloat16 do."""
    tokens = torch.randint(0, 8192, (300,), generator=torch.Generator().manual_seed(1))
    checkpoint = Checkpoint.open(demo)
    exact = ours(checkpoint, tokens, torch.float32)
    errors = []
    for slow in (True, False):
        monkeypatch.setattr(products, "multiplies", lambda dtype, slow=slow: dtype == torch.float32 or not slow)
        errors.append(float((ours(checkpoint, tokens, torch.bfloat16) - exact).square().mean()))
    assert errors[0] < 1.05 * errors[1]
    assert errors[0] != errors[1]


def test_one_sequence_at_a_time_equals_a_padded_batch(make_checkpoint):
    """What transformers gives for a left-padded batch, we give without padding."""
    folder = make_checkpoint()
    checkpoint = Checkpoint.open(folder)
    short, long = torch.randint(0, 8192, (11,)), torch.randint(0, 8192, (24,))
    batch = torch.stack([torch.cat([torch.zeros(13, dtype=torch.long), short]), long])
    mask = torch.ones_like(batch)
    mask[0, :13] = 0
    padded = theirs(folder, batch, torch.float32, mask)
    assert torch.allclose(ours(checkpoint, short, torch.float32), padded[0, 13:], atol=2e-5)
    assert torch.allclose(ours(checkpoint, long, torch.float32), padded[1], atol=2e-5)


def test_a_stream_reads_the_table_once_for_all_samples(demo, monkeypatch):
    checkpoint = Checkpoint.open(demo)
    samples = [torch.randint(0, 8192, (length,)) for length in (40, 7, 90)]
    alone = [decoder.embed(checkpoint, sample, torch.bfloat16) for sample in samples]
    reads, rows = [], Checkpoint.rows
    monkeypatch.setattr(Checkpoint, "rows", lambda *args: reads.append(args[2:]) or rows(*args))
    together = Stream.start(checkpoint, samples, torch.bfloat16, torch.device("cpu")).hidden
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert len(reads) == len(set(reads))


def test_stages_see_the_inputs_of_their_linears(make_checkpoint):
    """Every stage's recorded input, multiplied by hand, gives what transformers' linears give."""
    folder = make_checkpoint(num_key_value_heads=2)
    checkpoint = Checkpoint.open(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, 8192, (17,))
    inputs = {}
    for stage in checkpoint.family.stages:
        for linear in stage.linears:
            module = model.get_submodule(f"model.layers.0.{linear}")
            module.register_forward_pre_hook(lambda _, args, linear=linear: inputs.__setitem__(linear, args[0][0]))
    with torch.no_grad():
        model(tokens[None])
    seen = {}
    block = decoder.source_block(checkpoint, 0, torch.float32)
    block.forward(decoder.embed(checkpoint, tokens, torch.float32), seen.__setitem__)
    for stage in checkpoint.family.stages:
        for linear in stage.linears:
            assert torch.equal(seen[stage.name], inputs[linear]), linear


def test_embedding_reads_only_what_it_needs(make_checkpoint, monkeypatch):
    checkpoint = Checkpoint.open(make_checkpoint(vocab_size=40000))
    read = []
    rows = Checkpoint.rows
    monkeypatch.setattr(
        Checkpoint, "rows", lambda self, name, start, stop: read.append((start, stop)) or rows(self, name, start, stop)
    )
    tokens = torch.tensor([5, 39999, 5])
    values = decoder.embed(checkpoint, tokens, torch.float32)
    assert torch.equal(values, checkpoint.tensor("model.embed_tokens.weight")[tokens].float())
    assert read == [(0, 16384), (32768, 40000)]


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_table_is_read_once_for_the_words_of_several_texts(make_checkpoint, monkeypatch, ahead):
    """Only slices that hold one of them; every text has memory of its own."""
    source, read = Checkpoint.open(make_checkpoint()), []
    table, rows = source.tensor(source.family.embedding), source.rows
    monkeypatch.setattr(decoder, "HEAD_ROWS", 100)
    monkeypatch.setattr("qquant.devices.readers", lambda device: ahead)
    monkeypatch.setattr(source, "rows", lambda name, start, stop: read.append((start, stop)) or rows(name, start, stop))
    texts = [torch.tensor([3, 250, 3]), torch.tensor([299]), torch.tensor([0, 99, 200, 7])]
    found = decoder.embed_each(source, texts, torch.float32, torch.device("cpu"))
    for text, x in zip(texts, found, strict=True):
        assert torch.equal(x, table[text].float())
    assert sorted(read) == [(0, 100), (200, 300)]
    assert len({x.untyped_storage().data_ptr() for x in found}) == 3
