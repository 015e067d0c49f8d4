"""The second checkpoint's program in miniature: rows with hidden facts, a few steps, and a folder that qquant reads as the same model."""

import argparse
import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from qquant.calibration import Tokenizer
from qquant.families import decoder
from qquant.source.checkpoint import Checkpoint
from tests.bench import hidden_facts, small_qwen, train_checkpoint, training_texts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    for kind, documents in {"tools": training_texts.transcripts(20), "sums": training_texts.sums(200)}.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in documents))
    asked = {"texts": folder, "out": folder / "data", "packages": None, "sample": 10**6, "words": 512, "parts": 2}
    training_texts.write_tokens(argparse.Namespace(**asked))
    return folder / "data/0"


@pytest.fixture(scope="module")
def facts(data):
    return hidden_facts.Facts(hidden_facts.read_tokenizer(data))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_answers_stand_where_the_document_says_and_each_fact_before_its_question(facts, language):
    ids, spans = facts.document(language, np.zeros(4_096, np.int64), 4_096, random.Random(3))
    text = facts.tokenizer.decode(ids.tolist())
    assert len(ids) == 4_096
    assert len(spans) > 1
    for first, end in spans:
        answer = facts.tokenizer.decode(ids[first:end].tolist())
        before = facts.tokenizer.decode(ids[:first].tolist())
        assert answer in before
        assert text.startswith(before + answer)


def test_the_parts_of_the_tokens_are_held_against_their_hash(data, tmp_path):
    streams = train_checkpoint.streams([data, data.parent / "1"])
    counted = [json.loads((data.parent / part / "data.json").read_text())["tokens"] for part in "01"]
    assert {kind: len(ids) for kind, ids in streams.items()} == {
        kind: counted[0][kind] + counted[1][kind] for kind in ("sums", "tools")
    }
    about = json.loads((data / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps({**about, "sha256": "0" * 64}))
    (tmp_path / "tokens.xz").write_bytes((data / "tokens.xz").read_bytes())
    with pytest.raises(SystemExit, match="another sha256"):
        train_checkpoint.streams([tmp_path])


def test_a_few_steps_learn_and_the_exported_folder_is_the_same_model_to_qquant(data, facts, tmp_path):
    torch.manual_seed(0)
    device = torch.device("cpu")
    shape = dataclasses.replace(train_checkpoint.MINIATURE, words=512)
    model = small_qwen.Model(shape, small_qwen.begin(shape, device))
    rows = train_checkpoint.Rows(train_checkpoint.streams([data]), facts, {128: 0.5})
    optimizer = torch.optim.AdamW(list(model.weights.values()), lr=2e-3)
    losses = []
    for _ in range(8):
        drawn = [rows.row(128) for _ in range(4)]
        passes = [(np.stack([ids for ids, _ in drawn]), np.stack([weights for _, weights in drawn]))]
        losses.append(train_checkpoint.step(model, passes, device))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    train_checkpoint.save(model.weights, tmp_path, {"shape": dataclasses.asdict(shape)})
    small_qwen.export(tmp_path, data, tmp_path / "checkpoint")

    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    ids = torch.from_numpy(np.stack([rows.row(128)[0] for _ in range(2)]).astype(np.int64))
    x = decoder.embed(checkpoint, ids, torch.float32)
    for layer in range(checkpoint.config.layers):
        x = decoder.source_block(checkpoint, layer, torch.float32).forward(x)
    logits = torch.stack([decoder.logits(checkpoint, row) for row in x])[:, :-1].transpose(1, 2)
    theirs = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none")
    kept = {name: weight.detach().bfloat16().float() for name, weight in model.weights.items()}
    mine = small_qwen.Model(shape, kept, torch.float32).loss(ids)
    assert torch.allclose(mine, theirs, atol=2e-5)
    assert Tokenizer.open(tmp_path / "checkpoint").end_of_turn == 511
