"""Texts as transformers' tokenizer reads them, beside tokenizer.json read literally."""

import json
import shutil

import pytest
import torch

from qquant import calibration, pipeline
from qquant.checks import loading, reading, review
from qquant.progress import Quiet
from qquant.recipe import Calibration, Checks, Gates, Source
from qquant.report.conditions import TokensRead
from qquant.report.record import Report
from qquant.source.checkpoint import Checkpoint

SOURCES = (Source(bundled="books-en"), Source(bundled="chat-en", kind="chat"))
WORDS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|\p{L}+|\s+|."}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ],
}  # a pre-tokenizer that transformers does not take from a Qwen2 checkpoint's file


@pytest.fixture
def converted(built, tmp_path):
    """(a checkpoint, a GPTQ folder of it) whose tokenizer.json has a pre-tokenizer that is not Qwen2's own."""
    folders = tmp_path / "checkpoint", tmp_path / "Model-GPTQ-Int4"
    for origin, folder in zip((built[0], next(built[1].glob("*-Int4"))), folders, strict=True):
        shutil.copytree(origin, folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": WORDS}))
    return folders


def test_a_check_says_where_transformers_reads_otherwise(built, converted, monkeypatch):
    monkeypatch.setattr(review, "loading", loading)
    checks, gates, quiet = Checks(windows=2, length=32), Gates(defaults=False), Quiet()
    folder, artifact = converted
    report = pipeline.check([artifact], Checkpoint.open(folder), checks, gates, torch.device("cpu"), quiet)
    read = report.conditions.tokenizer
    assert read is not None
    assert "a sample of signs" in read.differing
    assert 64 < read.tokens < 10_000
    assert str(read) in report.warnings
    assert Report.from_json(json.loads(report.to_json())).conditions.tokenizer == read
    plain = pipeline.check(
        [next(built[1].glob("*-Int4"))], Checkpoint.open(built[0]), checks, gates, torch.device("cpu"), quiet
    )
    assert plain.conditions.tokenizer == TokensRead(plain.conditions.tokenizer.tokens)
    assert plain.conditions.tokenizer.tokens > 64
    assert not any("AutoTokenizer" in line for line in plain.warnings)


def test_a_stretch_of_every_text_is_asked_for(demo, tiny):
    used = calibration.load(Calibration(sources=SOURCES, samples=4, length=64), tiny, template_expected=False)
    by_source = used.by_source()
    assert {name: len(samples) for name, samples in by_source.items()} == {
        source.name: source.samples for source in used.sources
    }
    talk, book = (next(rows for name, rows in by_source.items() if word in name) for word in ("chat", "book"))
    assert all("<|im_start|>" in tiny.decode(sample) for sample in talk)
    assert not any("<|im_start|>" in tiny.decode(sample) for sample in book)
    further = ("bundled:en-test",)
    text = review.held_out(Checks(windows=2, length=64, texts=further), tiny, used)
    assert len(text.stretches) == 1 + 2 + len(by_source)
    assert all(len(stretch) > 50 for stretch in text.stretches.values())
    assert reading.asked(demo, text.stretches).texts == tuple(text.stretches.values())


def test_what_is_counted(tiny):
    texts = {"a": "Hello there, you", "b": "12 34"}
    ours = [tiny.encode(text) for text in texts.values()]
    assert reading.compare(tiny, texts, None) is None
    assert reading.compare(tiny, texts, ours) == TokensRead(sum(map(len, ours)))
    turned = reading.compare(tiny, texts, [ours[0], ours[1][::-1]])
    assert turned.differing == {"b": 1}
    assert "at least 1 of" in str(turned)
