"""Damage where nobody usually looks is named by the verdict: beyond 8,192 positions, in the tokens that tool calls are made of."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qquant.calibration.slices import LENGTH, Slice, Sliced
from qquant.checks import slices
from qquant.progress import Quiet
from qquant.source.checkpoint import Checkpoint
from tests.checks.test_slices import Noisy, english_and, named_alone
from tests.conftest import write_checkpoint

CPU = torch.device("cpu")


def sharper(name, value):
    """Attention that depends on places: random weights attend to everything alike."""
    return value * 3 if "q_proj.weight" in name or "k_proj.weight" in name else value


@pytest.mark.parametrize(
    ("length", "off", "named"),
    [
        (16384, 1.001, "positions 8,192 to 16,384"),
        pytest.param(16384, 1.01, "positions 8,192 to 16,384", marks=pytest.mark.slow),
        pytest.param(32768, 1.01, "positions 16,384 to 32,768", marks=pytest.mark.slow),
    ],
)
def test_damage_beyond_8192_positions_is_named(length, off, named, tmp_path, monkeypatch):
    """A rope whose theta is off by a thousandth shows only far from the beginning; by a hundredth, the more the farther."""
    monkeypatch.setattr(slices, "FAMILIAR", math.inf)
    changes = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": length,
        "vocab_size": 512,
    }
    source = Checkpoint.open(str(write_checkpoint(tmp_path / "sharp", dtype=torch.float32, **changes)))
    tokens = np.random.default_rng(0).integers(0, 512, (1, length), dtype=np.int32)
    text = Sliced((Slice("English", "language", length // LENGTH),), tokens.reshape(-1, LENGTH).copy(), tokens)
    model = Noisy(source, 0.0, sharper)
    theta = source.config.rope_theta
    artifacts = {"harmless": Noisy(model, 0.03), "rope": Noisy(model, 0.03, rope_theta=theta * off)}
    letters = SimpleNamespace(size=512, decode=lambda ids: "".join(chr(97 + one % 26) for one in ids))
    readings = slices.readings(model, artifacts, text, letters, CPU, Quiet())
    rows, verdict = slices.judge(readings["harmless"], 3.0)
    assert verdict.outcome == "pass", [(row.name, row.relative) for row in rows]
    rows, verdict = slices.judge(readings["rope"], 3.0)
    assert verdict.outcome == "fail", [(row.name, row.relative) for row in rows]
    assert verdict.reasons[0].startswith(f"worst slice: {named} has ")
    if off < 1.01:
        assert [row.name for row in rows if row.standing == "fail"] == [named]


STRUCTURE = (
    "Thought:",
    "Action:",
    "Action Input:",
    "Observation:",
    "Final Answer:",
    '{"',
    '": "',
    '"}',
    '"}]',
    '[{"function": "',
)


def test_damage_to_the_tokens_of_tool_calls_is_named(demo, tiny, monkeypatch):
    """Embeddings of what calls are made of and English is not; the demo model knows neither well, which is lifted here."""
    monkeypatch.setattr(slices, "FAMILIAR", 2.0)
    source = Checkpoint.open(str(demo))
    text = english_and(tiny, French="fr-test", **{"tool calls": "tools-test"})
    counts = [np.bincount(text.short[start : start + 6].ravel(), minlength=8192) for start in (0, 6, 12)]
    structure = np.zeros(8192, bool)
    structure[[token for one in STRUCTURE for token in tiny.encode(one, special=False)]] = True
    damaged = torch.as_tensor(structure & (counts[0] < 4) & (counts[1] < 4))
    assert 5 < damaged.sum() < 40

    named_alone(source, text, tiny, damaged, "tool calls")
