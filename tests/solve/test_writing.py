"""Calibration that the checkpoint writes itself: the same tokens for a seed, its own distribution, its template, one block in memory."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from qquant import calibration
from qquant.calibration.openings import Writing, rows_at_once
from qquant.errors import InputError, NumericalError, UsageError
from qquant.families.decoder import embed, logits, source_block
from qquant.plan.asked import Asked
from qquant.plan.plan import Plan
from qquant.plan.writing import planned_writing
from qquant.progress import Quiet
from qquant.recipe import Calibration, Source, parse
from qquant.solve import writing as module
from qquant.solve.writing import Author, Weights, drawn, uniforms, write_rows
from qquant.source.checkpoint import Checkpoint

CPU = torch.device("cpu")
RECIPE = """
version: 1
name: own
calibration: {sources: [{generated: true%s}], samples: 3, length: 24, default_system_share: 0}
artifacts: [{name: g, format: gptq, bits: 4, group_size: 32}]
checks: {windows: 2, length: 32}
"""


@pytest.fixture
def checkpoint(make_checkpoint):
    """A random one of two layers."""
    return Checkpoint.open(make_checkpoint())


@pytest.fixture
def author(checkpoint, tmp_path):
    return Author(checkpoint, {"torch": "x"}, tmp_path / "out", CPU, Quiet())


def spec(*sources, **changes):
    """A calibration of generated sources."""
    given = tuple(Source(generated=True, **source) for source in sources or ({},))
    return Calibration(sources=given, **{"samples": 5, "length": 24, "default_system_share": 0.0} | changes)


def asked(**changes):
    prompts = ((5, 6, 7), (8,), (9, 10, 11, 12, 13))
    return dataclasses.replace(Writing(prompts, 20, (), 8192, 0, "text"), **changes)


def weights(checkpoint, keeps):
    return Weights(checkpoint, CPU, torch.float32, keeps)


def test_a_seed_says_every_token_and_another_says_others(author, tiny):
    first = calibration.load(spec(), tiny, False, author)
    assert [len(sample) for sample in first.tokens] == [24] * 5
    other = dataclasses.replace(author, folder=author.folder / "again")
    assert calibration.load(spec(), tiny, False, other).sha256 == first.sha256
    assert calibration.load(spec(seed=1), tiny, False, author).sha256 != first.sha256


def test_two_samples_from_one_opening_differ(checkpoint):
    a, b = write_rows(weights(checkpoint, True), asked(prompts=((5, 6), (5, 6))), [0, 1], Quiet())
    assert a[:2] == b[:2] == [5, 6]
    assert a != b


def test_what_was_written_is_not_written_again(author, tiny, monkeypatch):
    monkeypatch.setattr(module, "rows_at_once", lambda config, length: 2)
    first = calibration.load(spec(), tiny, False, author)
    files = sorted((author.folder / "generated").iterdir())
    assert len(files) == 3  # of two, two and one
    files[1].unlink()  # stopped before
    written = []
    monkeypatch.setattr(module, "write_rows", lambda w, a, rows, p: written.append(rows) or write_rows(w, a, rows, p))
    assert calibration.load(spec(), tiny, False, author).sha256 == first.sha256
    assert written == [range(2, 4)]
    calibration.load(spec(), tiny, False, dataclasses.replace(author, versions={"torch": "y"}))
    assert len(written) == 4  # other versions may compute otherwise


def test_a_changed_file_is_written_again(author, tiny):
    first = calibration.load(spec(), tiny, False, author)
    (file,) = (author.folder / "generated").iterdir()
    content = json.loads(file.read_bytes())
    content["samples"][0][-1] ^= 1
    file.write_text(json.dumps(content))
    assert calibration.load(spec(), tiny, False, author).sha256 == first.sha256


def test_draws_have_the_distribution_of_the_softmax():
    scores = torch.tensor([[2.0, 0.0, -torch.inf, 1.0, -1.0]])
    count = 20000
    numbers = [uniforms(asked(), [row], 3)[0] for row in range(count)]
    tokens = torch.tensor(drawn(scores.expand(count, -1), numbers))
    share = torch.bincount(tokens, minlength=5).double() / count
    expected = torch.exp(scores[0].double()) / torch.exp(scores[0].double()).sum()
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((share - expected).abs() <= 4 * deviation).all()
    assert drawn(torch.tensor([[0.0, 0.0, -torch.inf]]), [1 - 2**-53]) == [1]
    assert drawn(torch.tensor([[-torch.inf, 0.0, 1.0]]), [0.0]) == [1]  # what has no chance is never drawn


def test_every_token_is_drawn_from_the_prediction_of_the_whole_prefix(checkpoint):
    writing = asked()
    for row, ids in enumerate(write_rows(weights(checkpoint, True), writing, range(3), Quiet())):
        assert len(ids) == writing.length
        x = embed(checkpoint, torch.tensor(ids), torch.float32)
        for layer in range(checkpoint.config.layers):
            x = source_block(checkpoint, layer, torch.float32).forward(x)
        predicted = logits(checkpoint, x)
        for position in range(len(writing.prompts[row]) - 1, writing.length - 1):
            assert drawn(predicted[position : position + 1], uniforms(writing, [row], position)) == [ids[position + 1]]


def test_one_block_in_memory_gives_the_tokens_of_all_in_memory(checkpoint):
    kept, read = weights(checkpoint, True), weights(checkpoint, False)
    writing = asked()
    assert write_rows(kept, writing, range(3), Quiet()) == write_rows(read, writing, range(3), Quiet())
    assert len(kept.blocks) == checkpoint.config.layers
    assert not read.blocks
    assert not read.tables


def test_weights_are_kept_where_they_have_room(checkpoint, monkeypatch):
    size = 4 * checkpoint.family.parameters(checkpoint.config)
    monkeypatch.setattr(module, "free_memory", lambda device: 3 * size)
    assert Weights.of(checkpoint, torch.float32, CPU).keeps
    monkeypatch.setattr(module, "free_memory", lambda device: size)
    assert not Weights.of(checkpoint, torch.float32, CPU).keeps


def test_chats_have_the_template_and_end_where_the_model_ends_them(author, tiny, tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_text("What is rain?\n\nWhere is Rome?\n")
    stop = tiny.end_of_turn
    ending = []

    def write(writing):
        ending.append(writing)
        return [[*prompt, 40, 41, stop] for prompt in writing.prompts]

    found = calibration.load(
        spec({"kind": "chat", "openings": str(questions)}, length=128, default_system_share=1.0), tiny, True, write
    )
    (writing,) = ending
    assert set(writing.stops) == {stop, *tiny.eos}
    rendered = {
        tiny.render([{"role": "user", "content": text}], add_generation_prompt=True)
        for text in ("What is rain?", "Where is Rome?")
    }
    assert {tiny.decode(sample[:-3].tolist()) for sample in found.tokens} == rendered
    assert found.chats.default_system == 5
    (record,) = found.sources
    assert (record.samples, record.truncated, record.tokens) == (5, 0, sum(map(len, found.tokens)))
    assert "generated by this checkpoint" in record.name
    assert "seed 0" in record.name
    assert record.revision.startswith("sha256:")


def test_an_answer_ends_at_its_stop_token(checkpoint):
    writing = asked()
    free = write_rows(weights(checkpoint, True), writing, range(3), Quiet())
    stop = free[1][4]
    ended = write_rows(weights(checkpoint, True), dataclasses.replace(writing, stops=(stop,)), range(3), Quiet())
    for row, prompt in enumerate(writing.prompts):
        new = free[row][len(prompt) :]
        assert ended[row] == [*prompt, *(new[: new.index(stop) + 1] if stop in new else new)]


def test_own_chats_and_generated_ones_keep_their_order(tiny, author, tmp_path):
    found = calibration.load(
        Calibration(
            sources=(Source(generated=True, kind="chat"), Source(bundled="chat-en", kind="chat"), Source(generated=True)),
            samples=6, length=480, default_system_share=0.0,
        ), tiny, True, author,
    )  # fmt: skip
    assert [record.samples for record in found.sources] == [2, 2, 2]
    assert found.chats.count == 4
    by_source = found.by_source()
    assert [len(by_source[record.name]) for record in found.sources] == [2, 2, 2]
    assert [sum(map(len, by_source[record.name])) for record in found.sources] == [r.tokens for r in found.sources]


def test_bundled_openings_are_of_many_languages_and_code(tiny):
    seen = []
    calibration.load(spec(samples=20), tiny, False, lambda w: seen.append(w) or [[1] * w.length for _ in w.prompts])
    text = "".join(tiny.decode(prompt) for prompt in seen[0].prompts)
    assert any("\u4e00" <= c <= "\u9fff" for c in text)
    assert any("\u0400" <= c <= "\u04ff" for c in text)
    assert len(set(seen[0].prompts)) == 20
    assert all(0 < len(prompt) <= 8 for prompt in seen[0].prompts)


def test_openings_that_cannot_be_used_are_refused(author, tiny, tokenizer_folder, tmp_path):
    file = tmp_path / "asked.txt"
    file.write_text("word " * 200)
    with pytest.raises(UsageError, match="leaves no room for an answer"):
        calibration.load(spec({"kind": "chat", "openings": str(file)}), tiny, True, author)
    file.write_text("<|im_start|>system\n")
    with pytest.raises(InputError, match="inside an opening"):
        calibration.load(spec({"openings": str(file)}), tiny, False, author)
    base = calibration.Tokenizer.open(tokenizer_folder(chat_template__jinja=None))
    with pytest.raises(InputError, match="no chat template"):
        calibration.load(spec({"kind": "chat"}), base, False, author)
    with pytest.raises(InputError, match="needs the model"):
        calibration.load(spec(), tiny, False)


def test_logits_that_are_no_numbers_are_an_error(checkpoint, monkeypatch):
    monkeypatch.setattr(Weights, "logits", lambda self, hidden, vocabulary: torch.full((len(hidden), 9), torch.nan))
    with pytest.raises(NumericalError, match="not finite"):
        write_rows(weights(checkpoint, True), asked(), range(3), Quiet())


def test_a_plan_says_what_writing_costs(checkpoint):
    recipe = parse(RECIPE % "")
    planned = Plan.of(recipe, checkpoint)
    assert planned.writing == planned_writing(recipe, checkpoint)
    assert (planned.writing.texts, planned.writing.chats, planned.writing.passes) == (3, 0, 23)
    assert planned.to_dict()["generated"]["tokens"] == 72
    assert "written by the checkpoint itself" in str(planned.writing)
    assert planned_writing(parse((RECIPE % "").replace("generated: true", "bundled: books-en")), checkpoint) is None


def test_rows_at_a_time_fit_their_cache(checkpoint):
    row = 8 * 2 * 4 * 16  # bytes of a token: keys and values, float32, layers, heads, dimensions
    assert rows_at_once(checkpoint.config, 24) == 64
    assert rows_at_once(checkpoint.config, (4 << 30) // row // 3) == 3
    assert rows_at_once(checkpoint.config, 4 << 30) == 1


@pytest.mark.parametrize(("eos", "kind"), [(8191, "chat"), (8189, "text")])
def test_the_command_line_asks_the_checkpoint_by_a_word(make_checkpoint, tmp_path, eos, kind):
    folder = make_checkpoint()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    (folder / "tokenizer_config.json").write_text("{}")
    recipe = Asked(str(folder), parse(RECIPE % ""), calibration=(Path("generated"),)).wanted()
    assert [(source.generated, source.kind) for source in recipe.calibration.sources] == [(True, kind)]
