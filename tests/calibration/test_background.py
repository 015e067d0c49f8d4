"""The background of a calibration: how many tokens, of which texts, in which order; and nothing where none is asked for."""

import hashlib

import numpy as np
import pytest

from qquant import calibration, recipe
from qquant.calibration import CalibrationSet, Tokenizer, corpora, heldout_texts
from qquant.plan.plan import Plan
from qquant.plan.texts import shortfall
from qquant.recipe import Source
from qquant.recipe.changes import Flags, changed
from qquant.report.conditions import background as sentence
from qquant.source.checkpoint import Checkpoint
from tests.worlds.chats import FEBRUARY, chat_file, chats_spec, many, spec


def bundled(*names, **options):
    return spec(*(Source(bundled=name) for name in names), **{"samples": 24, "length": 256, **options})


def load(asked, tokenizer):
    return calibration.load(asked, tokenizer, False)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_pieces_of_one_length_have_the_share_of_the_tokens_of_the_sources(tiny, share):
    found = load(bundled("books-en", background=share), tiny)
    samples, tokens = found.from_sources()
    assert (samples, tokens) == (24, 24 * 256)
    asked = round(share * tokens)
    count = -(-asked // 64)
    lengths = [record.tokens / record.samples for record in found.background]
    assert set(lengths) == {asked // count}
    assert sum(record.samples for record in found.background) == count == len(found.tokens) - 24
    assert sum(map(len, found.tokens)) == tokens + count * (asked // count)


def test_the_share_is_of_what_the_sources_gave_not_of_what_was_asked(tiny, tmp_path):
    path = chat_file(tmp_path / "c.jsonl", many(6))
    asked = chats_spec(path, samples=500, length=512, background=0.25)
    found = load(asked, tiny)
    samples, tokens = found.from_sources()
    assert samples == 6
    assert 0.8 * tokens / 4 < sum(record.tokens for record in found.background) <= tokens / 4
    assert "6 of 500 samples" in shortfall(samples, tokens, asked)[0]


def test_the_samples_of_the_sources_are_those_of_the_same_recipe_without_it(tiny):
    alone, both = (load(bundled("books-en", "docs-de", background=share), tiny) for share in (0, 0.1))
    mine, theirs = alone.by_source(), both.by_source()
    assert list(theirs)[: len(mine)] == list(mine)
    for name, samples in mine.items():
        assert list(map(bytes, samples)) == list(map(bytes, theirs[name]))
    assert set(theirs) - set(mine) == {record.name for record in both.background}


def test_none_leaves_tokens_and_provenance_as_they_were(tiny):
    found = load(bundled("books-en", samples=2), tiny)
    assert found.background == ()
    assert "background" not in found.provenance()
    windows = tiny.encode(corpora()["books-en"].read().decode(), special=False)
    joined = np.array(windows, "<i4").tobytes()
    assert all(sample.astype("<i4").tobytes() in joined for sample in found.tokens)
    lengths = np.array([2, 256, 256], "<i4").tobytes()
    assert found.sha256 == hashlib.sha256(lengths + np.concatenate(found.tokens).astype("<i4").tobytes()).hexdigest()


def test_every_language_code_and_every_kind_of_chat_takes_its_turn_and_nothing_held_out(tiny):
    found = load(bundled("books-en", samples=96, background=0.1), tiny)
    read = {record.name for record in found.background}
    one_each = {one.language for one in corpora().values() if one.kind == "text"}
    assert {corpora()[name].language for name in read if corpora()[name].kind == "text"} == one_each
    assert {one.name for one in corpora().values() if one.kind == "chat"} <= read
    assert not read & ({"books-en"} | heldout_texts().keys())
    for name in ("zh-test", "code-test", "wikitext-2-test", "chat-test"):
        calibration.require_apart(found, calibration.heldout(f"bundled:{name}", tiny)[0], tiny)


def test_pieces_of_a_text_stand_in_it(tiny):
    found = load(bundled("books-en", background=0.3), tiny)
    for record in found.background:
        if record.kind == "text":
            text = corpora()[record.name].read().decode()
            assert all(tiny.decode(piece.tolist()).strip("\ufffd") in text for piece in found.by_source()[record.name])


def test_the_seed_chooses_and_nothing_else(tiny):
    first, again, other = (load(bundled("books-en", seed=seed, background=0.1), tiny) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256
    pieces = [
        {bytes(piece) for some in list(found.by_source().values())[1:] for piece in some} for found in (first, other)
    ]
    assert len(pieces[0] & pieces[1]) < len(pieces[0]) / 4


@pytest.mark.parametrize("template", [FEBRUARY, "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"])
def test_without_a_template_that_ends_its_turns_there_are_no_chats(tokenizer_folder, template):
    found = load(bundled("books-en", background=0.2), Tokenizer.open(tokenizer_folder(template)))
    assert {record.kind for record in found.background} == {"text"}


def test_a_saved_set_keeps_it(tiny, tmp_path):
    found = load(bundled("books-en", background=0.1), tiny)
    found.save(tmp_path)
    opened = CalibrationSet.open(tmp_path)
    assert (opened.background, opened.sha256, opened.from_sources()) == (
        found.background,
        found.sha256,
        found.from_sources(),
    )


def test_a_share_below_one_sample_is_none(tiny):
    assert load(bundled("books-en", samples=1, length=64, background=0.05), tiny).background == ()


def test_reports_say_how_much_and_of_what(tiny):
    found = load(bundled("books-en", background=0.05), tiny)
    said = sentence(found.provenance())
    tokens = sum(record.tokens for record in found.background)
    assert said.startswith(f"{tokens} of these tokens, {tokens / (24 * 256) * 100:.1f} % of the others")
    assert all(f"{record.name} ({record.licence})" in said for record in found.background)
    assert sentence(load(bundled("books-en", samples=1), tiny).provenance()) is None


def test_a_plan_counts_it_apart(demo):
    base = recipe.load("demo")
    asked = [changed(base, Flags(settings=(f"calibration.background={share}",))) for share in (0, 0.05)]
    without, planned = (Plan.of(one, Checkpoint.open(str(demo))) for one in asked)
    assert without.tokens == 96 * 256
    assert planned.tokens - without.tokens == planned.background == round(0.05 * 96 * 256)
    assert planned.memory > without.memory
    assert planned.to_dict()["background"] == {"tokens": planned.background}
    assert "background" not in without.to_dict()
