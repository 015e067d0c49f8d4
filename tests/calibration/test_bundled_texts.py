"""Held-out texts share no run with what calibrates, and what is bundled is what its manifest says."""

import gzip
import hashlib
import json
import runpy
import shutil
import sys

import numpy as np
import pytest

from qquant import calibration
from qquant.calibration import CalibrationSet
from qquant.calibration import sources as sources_module
from qquant.errors import InputError, UsageError
from qquant.recipe import Source
from qquant.resources import data_dir
from tests.worlds.chats import chat_file, many, spec

# ---- held-out texts


def as_set(*samples):
    return CalibrationSet(tuple(np.array(sample, np.int32) for sample in samples), (), None, len(samples), 64, 0)


def test_shared_runs_are_those_of_a_slow_search():
    random = np.random.default_rng(0)
    for run in (1, 2, 5):
        samples = [random.integers(0, 4, size) for size in (1, 3, 30, 40)]
        text = random.integers(0, 4, 60).astype(np.int32)
        runs = {tuple(sample[i : i + run]) for sample in samples for i in range(len(sample) - run + 1)}
        slow = [i for i in range(60 - run + 1) if tuple(text[i : i + run]) in runs]
        assert calibration.shared_runs(as_set(*samples), text, run).tolist() == slow


def test_a_collision_of_hashes_invents_nothing(monkeypatch):
    module = sys.modules["qquant.calibration.heldout"]
    monkeypatch.setattr(module, "_run_hashes", lambda ids, run: np.zeros(len(ids) - run + 1, np.uint64))
    assert len(calibration.shared_runs(as_set(range(40)), np.arange(100, 140, dtype=np.int32))) == 0


def test_runs_do_not_reach_across_samples_and_short_texts_share_none():
    text = np.arange(40, dtype=np.int32)
    assert len(calibration.shared_runs(as_set(range(20), range(20, 40)), text)) == 0
    assert len(calibration.shared_runs(as_set(range(5)), text)) == 0
    assert len(calibration.shared_runs(as_set(range(40)), text[:31])) == 0
    assert len(calibration.shared_runs(as_set(range(40)), text[:32])) == 1


def test_calibrating_on_the_text_that_judges_is_an_error_that_shows_it(tiny, book):
    found = calibration.load(spec(Source(path=str(book))), tiny, False)
    ids, record = calibration.heldout(str(book), tiny)
    assert record == {
        "name": "book.txt", "kind": "text", "licence": "unknown", "tokens": len(ids), "sha256": hashlib.sha256(book.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert len(calibration.shared_runs(found, ids)) == 8 * (64 - 31)
    with pytest.raises(
        InputError,
        match=r"shares 264 runs of 32 tokens with the calibration set, the first at token \d+: '.*(ships|sailors)",
    ):
        calibration.require_apart(found, ids, tiny)
    calibration.require_apart(found, tiny_ids(tiny, "Something else entirely. " * 20), tiny)


@pytest.mark.parametrize(
    "phrase", ["โดยคลิกที่ปุ่ม ที่อยู่ด้านขวา", '", "required": true, "schema": {"type": "string"}}, {"name": "']
)
def test_a_phrase_is_no_shared_text_and_a_passage_is_one(tiny, tmp_path, phrase):
    """A tokenizer that spells Thai byte by byte takes 32 tokens for a few words: the published recipe refused its own texts there."""
    (tmp_path / "a.txt").write_text(f"{book_of('ships')} {phrase} {book_of('sailors')}")
    found = calibration.load(spec(Source(path=str(tmp_path / "a.txt")), samples=1, length=4096), tiny, False)
    ids = tiny_ids(tiny, f"Elsewhere they wrote {phrase} and nothing else.")
    assert len(calibration.shared_runs(found, ids)) > 0
    calibration.require_apart(found, ids, tiny)
    (tmp_path / "b.txt").write_text(f"{book_of('ships')} {phrase * 3} {book_of('sailors')}")
    found = calibration.load(spec(Source(path=str(tmp_path / "b.txt")), samples=1, length=4096), tiny, False)
    with pytest.raises(InputError, match="shares"):
        calibration.require_apart(found, tiny_ids(tiny, f"Elsewhere they wrote {phrase * 3} and nothing else."), tiny)


def book_of(what):
    return " ".join(
        f"Chapter {number} tells of {what}, and of the harbour that they left {number} days ago."
        for number in range(90)
    )


def tiny_ids(tokenizer, text):
    return np.array(tokenizer.encode(text), np.int32)


def test_heldout_chats_are_rendered(tiny, tmp_path):
    path = chat_file(tmp_path / "h.jsonl", many(2))
    ids, record = calibration.heldout(str(path), tiny)
    assert tiny.decode(ids) == "".join(tiny.render(chat) for chat in many(2))
    assert record["kind"] == "chat"


def test_unknown_names_are_usage_errors(tiny, tmp_path):
    with pytest.raises(
        UsageError, match=r"no held-out text 'bundled:wiki'; there are bundled:wikitext-2-test, bundled:"
    ):
        calibration.heldout("bundled:wiki", tiny)
    with pytest.raises(UsageError, match=r"no bundled corpus 'wiki'; there are chat-en, chat-zh"):
        calibration.load(spec(Source(bundled="wiki")), tiny, False)
    with pytest.raises(UsageError, match=r"chat-en is `kind: chat`, the recipe says text"):
        calibration.load(spec(Source(bundled="chat-en")), tiny, False)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="an empty evaluation text"):
        calibration.heldout(str(tmp_path / "empty.txt"), tiny)


# ---- what is bundled


def texts(entry):
    """The text of a bundled file; of chats, what was said."""
    content = entry.read().decode()
    if entry.kind == "text":
        return content
    return "\n\n".join(
        m["content"] for line in content.splitlines() for m in json.loads(line)["messages"] if m["role"] != "system"
    )


def shared_with(corpus):
    """Held-out texts that are allowed to share runs of 8 words with a corpus: the other split, other files of programmers."""
    return {"wikitext-2-valid": "wikitext-2-test", "code": "code-test"}.get(corpus)


def test_manifests_describe_the_files():
    entries = [*calibration.corpora().values(), *calibration.heldout_texts().values()]
    assert sum(entry.size for entry in entries) <= 10_000_000
    for entry in entries:
        assert len(entry.read()) == entry.size
        assert entry.licence
        assert entry.origin
        assert f"| `{entry.name}` | {entry.size:,} |" in (data_dir("calibration") / "README.md").read_text()
    listed = {entry.file for entry in entries}
    there = {path.relative_to(data_dir("calibration")).as_posix() for path in data_dir("calibration").glob("[ch]*/*.*")}
    assert listed == there
    for entry in entries:
        if entry.file.endswith(".gz"):  # packed without name and time: the same text gives the same file
            packed = (data_dir("calibration") / entry.file).read_bytes()
            assert packed[3] == 0
            assert packed[4:8] == bytes(4)


def test_a_changed_bundled_text_is_refused(tmp_path, monkeypatch):
    shutil.copytree(data_dir("calibration"), tmp_path / "calibration")
    (tmp_path / "calibration/corpora/docs-zh.txt.gz").write_bytes(gzip.compress(b"other"))
    entry = calibration.corpora()["docs-zh"]
    monkeypatch.setattr(sources_module, "data_dir", lambda name: tmp_path / name)
    with pytest.raises(
        InputError, match=r"docs-zh\.txt\.gz: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}: the bundled text was changed"
    ):
        entry.read()


def test_no_heldout_text_shares_a_run_with_a_calibration_text():
    """8 words, or 24 letters of a script without spaces; 13 and 26 where two splits of one work are compared."""
    runs = runpy.run_path(str(data_dir("calibration") / "apart.py"))["runs"]
    heldout = {name: texts(entry) for name, entry in calibration.heldout_texts().items()}
    judging = {name: runs(text) for name, text in heldout.items()}
    assert len(set().union(*judging.values())) > 400_000
    shared = []
    for name, entry in calibration.corpora().items():
        text = texts(entry)
        mine, near = runs(text), shared_with(name)
        shared += [(name, other) for other, theirs in judging.items() if other != near and mine & theirs]
        if near:
            assert mine & judging[near], "the shorter run is no longer needed"
            shared += [(name, near)] if runs(text, 13, 26) & runs(heldout[near], 13, 26) else []
    assert shared == []


def test_the_bundled_chats_are_many_varied_and_well_formed():
    corpora, chats = calibration.corpora(), {}
    for name, file in (
        ("chat-en", corpora["chat-en"]),
        ("chat-zh", corpora["chat-zh"]),
        ("test", calibration.heldout_texts()["chat-test"]),
    ):
        chats[name] = [json.loads(line)["messages"] for line in file.read().decode().splitlines()]
    calibrating = chats["chat-en"] + chats["chat-zh"]
    assert len(calibrating) >= 160
    assert 0.35 <= len(chats["chat-zh"]) / len(calibrating) <= 0.45
    assert sum(chat[0]["role"] == "system" for chat in calibrating) >= 20
    assert sum(sum(m["role"] == "user" for m in chat) > 1 for chat in calibrating) >= 30
    answers = [m["content"] for chat in calibrating for m in chat if m["role"] == "assistant"]
    assert len({json.dumps(chat) for chat in calibrating + chats["test"]}) == len(calibrating) + len(chats["test"])
    assert len(set(answers)) > 0.98 * len(answers)  # a classifier answers with the same word twice
    assert min(map(len, answers)) < 30
    assert max(map(len, answers)) > 1500
    for chat in calibrating + chats["test"]:
        turns = [m["role"] for m in chat if m["role"] != "system"]
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(m["content"] == m["content"].strip() and m["content"] for m in chat)


def test_bundled_sources_calibrate_the_demo_checkpoint(tiny):
    names = calibration.corpora()
    sources = tuple(Source(bundled=name, kind=entry.kind) for name, entry in names.items())
    found = calibration.load(spec(*sources, samples=32, length=256, default_system_share=0.25), tiny, True)
    assert len(found.tokens) == 32
    assert sorted(source.samples for source in found.sources) == [1] * 16 + [2] * 8
    assert found.chats.default_system == 2
    assert all(not source.dropped for source in found.sources)
    assert found.notes == ()
    ids, record = calibration.heldout("bundled:wikitext-2-test", tiny)
    assert record["licence"] == "CC-BY-SA-3.0"
    calibration.require_apart(found, ids, tiny)
