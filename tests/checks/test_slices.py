"""A release by language, kind of text and position: what is read, what is compared, and that damage is named and harmless artifacts are not."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qquant.calibration import heldout
from qquant.calibration import slices as texts
from qquant.calibration.slices import LENGTH, Slice, Sliced
from qquant.checks import gate, ratios, slices
from qquant.checks.fidelity import Fidelity
from qquant.checks.ratios import ratio
from qquant.checks.slices import SliceReading
from qquant.checks.statistics import holm
from qquant.errors import InputError
from qquant.plan.slices import slice_reaches
from qquant.progress import Quiet
from qquant.recipe.limits import ASKED, BEHAVIOUR, LEVEL, SLICES
from qquant.report import html
from qquant.report import slices as report_slices
from qquant.report.conditions import Conditions, TextFacts
from qquant.report.record import ArtifactReport, Report, Verdict
from qquant.report.slices import worst
from qquant.source.checkpoint import Checkpoint
from tests.conftest import write_checkpoint

CPU = torch.device("cpu")


def fidelity(kl):
    kl = torch.as_tensor(kl, dtype=torch.float64)
    kl = kl[:, None] if kl.ndim == 1 else kl
    return Fidelity(kl + 1, torch.ones_like(kl), kl, kl < 1, -kl, kl < 1, kl < 1)


def part(name, kl, group="language", beside=None, bits=1.0):
    return SliceReading(name, group, fidelity(kl), None if beside is None else fidelity(beside), bits, 4.0)


def drawn(rng, mean, windows=16, spread=0.3):
    return mean * np.exp(rng.normal(0, spread, windows) - spread**2 / 2)


class Noisy:
    """A model whose weights are a little off, and `also(name, weight)` what is wrong with it besides."""

    def __init__(self, source, noise, also=lambda name, value: value, **config):
        self.source, self.family, self.config = source, source.family, replace(source.config, **config)
        self.noise, self.also = noise, also

    def tensor(self, name):
        value = self.source.tensor(name).float()
        generator = torch.Generator().manual_seed(len(name) + value.numel())
        return self.also(name, value + self.noise * value.std() * torch.randn(value.shape, generator=generator))

    def rows(self, name, start, stop):
        return self.also(name, self.source.rows(name, 0, self.config.vocab).float())[start:stop]


# ---- what is read


def test_every_language_kind_and_stretch_is_read(tiny):
    found = texts.sliced(tiny, 2048)
    names = [one.name for one in found.slices]
    assert names == [*texts.LANGUAGES, *texts.KINDS]
    assert len(texts.LANGUAGES) == 14
    assert len(found.short) == sum(one.windows for one in found.slices)
    assert all(12 <= one.windows <= texts.WINDOWS for one in found.slices)
    assert found.long.shape == (2, 2048)
    assert (found.again.reshape(2, -1) == found.long).all()
    assert found.stretches() == [("positions 0 to 2,048", 0, 4)]
    short, long = texts.most_tokens(2048)
    assert found.tokens <= short + long
    assert long == found.long.size
    starts = np.cumsum([0, *(one.windows for one in found.slices)])
    german = heldout("bundled:de-test", tiny)[0]
    first = found.short[starts[names.index("German")]]
    assert (first == german[:LENGTH]).all()


def test_documents_are_cut_to_the_context():
    long = np.zeros((2, 32768), np.int32)
    assert [entry[0] for entry in Sliced((), long, long).stretches()] == [
        "positions 0 to 2,048", "positions 2,048 to 8,192", "positions 8,192 to 16,384", "positions 16,384 to 32,768",
    ]  # fmt: skip
    assert Sliced((), long, long[:, :4096]).stretches()[-1] == ("positions 2,048 to 4,096", 4, 8)
    assert texts.documents_length(1_000_000) == 32768
    assert texts.documents_length(5000) == 4608
    assert texts.most_tokens(512) == (18 * 24 * 512, 0)


def test_chats_are_plain_text_where_the_template_does_not_render_them(tokenizer_folder):
    from qquant.calibration import Tokenizer

    tokenizer = Tokenizer.open(tokenizer_folder("{% for m in messages %}{{ m.content }}{% endfor %}"))
    found = texts.sliced(tokenizer, 512)
    assert [one.name for one in found.slices] == [*texts.LANGUAGES, *texts.KINDS]
    assert len(found.long) == 0
    assert found.stretches() == []


def test_frequencies_are_the_entropy_of_characters():
    assert texts.frequencies("abab") == 1
    assert texts.frequencies("abcd" * 5) == 2
    assert texts.frequencies("") == 0


# ---- the ratio


def test_a_ratio_is_that_of_the_means_with_the_error_of_both():
    rng = np.random.default_rng(0)
    ours, theirs = drawn(rng, 3.0, 40), drawn(rng, 1.0, 30)
    found = ratio(ours, theirs)
    assert found.times == pytest.approx(ours.mean() / theirs.mean())
    logs = [math.log(rng.choice(ours, 40).mean() / rng.choice(theirs, 30).mean()) for _ in range(4000)]
    assert found.error == pytest.approx(np.std(logs), rel=0.1)
    low, high = found.interval()
    assert low < found.times < high
    assert found.p_within(1.0) > 0.99
    assert found.p_beyond(1.0) < 0.001
    assert found.p_within(9.0) < 0.001


def test_pairs_are_sharper_than_two_samples():
    rng = np.random.default_rng(0)
    theirs = drawn(rng, 1.0, 24, 0.8)
    ours = 1.3 * theirs * drawn(rng, 1.0, 24, 0.05)
    assert ratio(ours, theirs, paired=True).p_beyond(1.0) < 0.001
    assert ratio(ours, theirs).p_beyond(1.0) > 0.05


def test_harmless_losses_and_broken_ones_need_no_statistics():
    tiny, none, broken = np.full(5, 1e-6), np.zeros(5), np.full(5, math.inf)
    assert ratio(tiny * 100, tiny, floor=1e-3).times == pytest.approx(0.1)
    assert ratio(none, tiny).p_within(2.0) == 0
    assert ratio(none, none).p_within(2.0) == 0
    assert ratio(broken, tiny).p_beyond(2.0) == 0
    assert ratio(broken, tiny).p_within(2.0) == 1


# ---- the verdict


def test_the_lost_language_is_named():
    rng = np.random.default_rng(0)
    found = [part("English", drawn(rng, 0.02)), part("French", drawn(rng, 0.03)), part("Thai", drawn(rng, 0.2))]
    rows, verdict = slices.judge(found, 3.0)
    assert [row.standing for row in rows] == ["reference", "pass", "fail"]
    assert verdict.outcome == "fail"
    assert verdict.gates[0].name == "worst slice"
    assert verdict.reasons[0].startswith("worst slice: Thai has ")
    assert "times the KL divergence of English, above the limit 3" in verdict.reasons[0]
    assert worst(rows).name == "Thai"
    whole = gate.with_gates(Verdict("pass"), verdict)
    assert (whole.outcome, whole.reasons, whole.gates) == ("fail", verdict.reasons, verdict.gates)


def test_what_cannot_be_told_is_inconclusive_and_without_a_limit_nothing_is_asked():
    rng = np.random.default_rng(0)
    found = [part("English", drawn(rng, 0.02)), part("Thai", drawn(rng, 0.057))]
    rows, verdict = slices.judge(found, 3.0)
    assert verdict.outcome == "inconclusive"
    assert "cannot be told from the limit 3" in verdict.reasons[0]
    rows, verdict = slices.judge(found, None)
    assert verdict is None
    assert [row.standing for row in rows] == ["reference", "measured"]
    assert rows[1].relative.value == pytest.approx(found[1].fidelity.mean_kl / found[0].fidelity.mean_kl)
    assert slices.judge([], 3.0) == ((), None)


def test_a_language_that_the_checkpoint_does_not_know_fails_nobody():
    rng = np.random.default_rng(0)
    found = [part("English", drawn(rng, 0.02)), part("Thai", drawn(rng, 0.5), bits=3.0)]
    rows, verdict = slices.judge(found, 3.0)
    assert [row.standing for row in rows] == ["reference", "unknown"]
    assert verdict is None
    rows, verdict = slices.judge([part("English", drawn(rng, 0.02), bits=3.0), found[1]], 3.0)
    assert [row.standing for row in rows] == ["unknown", "unknown"]
    assert verdict is None


def test_positions_stand_beside_their_own_tokens_at_half_the_distance():
    rng = np.random.default_rng(0)
    near = drawn(rng, 0.02)
    found = [
        part("English", drawn(rng, 0.05)),
        part("positions 0 to 2,048", near * 1.01, "position", near),
        part("positions 2,048 to 8,192", near * drawn(rng, 2.2), "position", near),
    ]
    rows, verdict = slices.judge(found, 3.0)
    assert [row.standing for row in rows] == ["reference", "pass", "fail"]
    assert rows[2].limit == pytest.approx(math.sqrt(3))
    assert "positions 2,048 to 8,192 has 2." in verdict.reasons[0]
    assert "of the same tokens in short windows" in verdict.reasons[0]


@pytest.mark.parametrize(("windows", "runs"), [(11, 400), (24, 25)])
def test_artifacts_at_the_limit_fail_as_seldom_as_promised(windows, runs, monkeypatch):
    """Eighteen slices whose true ratio is the limit: the worst case of a harmless artifact; window means skewed as real ones."""
    monkeypatch.setattr(ratios, "RESAMPLES", 2000)
    rng = np.random.default_rng(1)
    failed = 0
    for _ in range(runs):
        english = drawn(rng, 0.02, 24, 0.35)
        found = [ratio(drawn(rng, 0.06, windows, 0.35), english, floor=0.001) for _ in range(18)]
        failed += min(holm([one.p_beyond(3.0) for one in found])) <= SLICES
    assert SLICES + BEHAVIOUR + ASKED == pytest.approx(LEVEL)
    assert failed <= SLICES * runs + 3 * math.sqrt(SLICES * runs)


# ---- damage is named


def english_and(tiny, **others):
    """Six windows of English and of each other held-out text."""
    rows = [
        heldout(f"bundled:{text}", tiny)[0][: 6 * LENGTH].reshape(6, LENGTH) for text in ("en-test", *others.values())
    ]
    names = ("English", *others)
    return Sliced(
        tuple(Slice(name, "language", 6) for name in names), np.concatenate(rows), np.zeros((0, LENGTH), np.int32)
    )


def named_alone(source, text, tiny, damaged, name):
    """The verdict names slice `name` and no other where embeddings of the `damaged` tokens are turned round; noise alone passes."""

    def forgets(tensor, value):
        changed = value.clone()
        if tensor == source.family.embedding:
            changed[damaged] *= -1
        return changed

    artifacts = {"harmless": Noisy(source, 0.03), "forgets": Noisy(source, 0.03, forgets)}
    readings = slices.readings(source, artifacts, text, tiny, CPU, Quiet())
    rows, verdict = slices.judge(readings["harmless"], 3.0)
    assert verdict.outcome == "pass", [(row.name, row.relative) for row in rows]
    rows, verdict = slices.judge(readings["forgets"], 3.0)
    first, *others = rows
    assert first.standing == "reference"
    assert {row.name for row in others} > {name}
    assert all(row.standing == ("fail" if row.name == name else "pass") for row in others), rows
    assert verdict.reasons[0].startswith(f"worst slice: {name} has ")


def test_damage_to_the_tokens_of_one_language_is_named(demo, tiny, monkeypatch):
    """Embeddings of tokens that German uses and English does not; the demo model knows neither well, which is lifted here."""
    monkeypatch.setattr(slices, "FAMILIAR", 2.0)
    source = Checkpoint.open(str(demo))
    text = english_and(tiny, German="de-test", French="fr-test")
    counts = [np.bincount(text.short[start : start + 6].ravel(), minlength=8192) for start in (0, 6, 12)]
    mostly = torch.as_tensor((counts[1] > 3) & (counts[1] > 4 * counts[0]) & (counts[1] > 4 * counts[2]))
    assert 20 < mostly.sum() < 500

    named_alone(source, text, tiny, mostly, "German")


def test_damage_to_far_positions_is_named(tmp_path, tiny, monkeypatch):
    """A rope whose theta is 1 % off, on a random model that attends sharply; with 8,192 positions of context."""
    monkeypatch.setattr(slices, "FAMILIAR", math.inf)
    changes = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16384}
    source = Checkpoint.open(str(write_checkpoint(tmp_path / "sharp", dtype=torch.float32, **changes)))
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 8000, (1, 8192), dtype=np.int32)
    text = Sliced((Slice("English", "language", 16),), tokens.reshape(-1, LENGTH).copy(), tokens)
    sharp = SimpleNamespace(
        also=lambda name, value: value * 3 if "q_proj.weight" in name or "k_proj.weight" in name else value
    )
    model = Noisy(source, 0.0, sharp.also)
    artifacts = {"harmless": Noisy(model, 0.01), "rope": Noisy(model, 0.01, rope_theta=source.config.rope_theta * 1.01)}
    found = slices.readings(model, artifacts, text, tiny, CPU, Quiet())
    rows, verdict = slices.judge(found["harmless"], 3.0)
    print([(row.name, row.kl_divergence, row.relative, row.standing) for row in rows])
    assert verdict.outcome == "pass"
    rows, verdict = slices.judge(found["rope"], 3.0)
    print([(row.name, row.kl_divergence, row.relative, row.standing) for row in rows])
    assert verdict.outcome == "fail"
    assert verdict.reasons[0].startswith("worst slice: positions 2,048 to 8,192 has ")


# ---- memory


def test_artifacts_take_turns_where_their_streams_do_not_fit():
    artifacts = {name: None for name in "abcde"}
    values = 1000
    one = 4 * slices.HELD * values
    assert [list(turn) for turn in slices.turns(artifacts, values, CPU, 6 * one)] == [list("abcde")]
    assert [list(turn) for turn in slices.turns(artifacts, values, CPU, 3 * one)] == [["a", "b"], ["c", "d"], ["e"]]
    assert [list(turn) for turn in slices.turns(artifacts, values, CPU, 0)] == [[name] for name in "abcde"]


LONG = r"""
import re, sys, torch
from pathlib import Path
from qquant.checks.fidelity import Scored, measure
from qquant.errors import InputError
from qquant.plan.slices import slice_reaches
from qquant.progress import Quiet
from qquant.source.checkpoint import Checkpoint
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
source, length = Checkpoint.open(sys.argv[1]), int(sys.argv[2])
tokens = torch.arange(length)[None] % 8000
measure(source, {"same": source}, Scored(tokens[:, :1024], 0, 8192), torch.device("cpu"), Quiet())
before = peak()
measure(source, {"same": source}, Scored(tokens, 0, 8192), torch.device("cpu"), Quiet())
print(peak() - before)
"""


def test_a_window_of_32768_takes_memory_by_its_length_and_not_its_square(tmp_path):
    """One head's square of attention would be 4.3 GB."""
    changes = {
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "max_position_embeddings": 32768,
    }
    folder = write_checkpoint(tmp_path / "long", **changes)
    run = subprocess.run([sys.executable, "-c", LONG, str(folder), "32768"], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 400 << 20


# ---- the views


def test_report_page_table_and_card_line_show_what_is_kept():
    rng = np.random.default_rng(0)
    found = [
        part("English", drawn(rng, 0.02)),
        part("Thai", drawn(rng, 0.2)),
        part("<b>|Lao", drawn(rng, 0.03), bits=3.9),
        part("positions 0 to 2,048", drawn(rng, 0.02), "position", drawn(rng, 0.02)),
    ]
    rows, verdict = slices.judge(found, 3.0)
    one = ArtifactReport(
        "a|b", "p", 10, 4.0, 9.0, 1.0, 0.02, 0.1, 0.9, gate.with_gates(Verdict("pass"), verdict), slices=rows
    )
    other = replace(one, name="few", slices=rows[:2])
    conditions = Conditions(TextFacts("wiki", 4, 512))
    report = Report("m", "r", 16.0, conditions, 9.0, (one, other))
    assert Report.from_json(json.loads(report.to_json())) == report
    broken = json.loads(report.to_json())
    broken["artifacts"][0]["slices"][0]["windows"] = "many"
    with pytest.raises(InputError, match=r"artifacts.*slices.*windows"):
        Report.from_json(broken)
    text = report.to_markdown()
    assert "## What each file keeps, by language and length" in text
    assert f"| Thai | {rows[1].kl_divergence.value:.4f} ×{rows[1].relative.value:.2f} **fail** |" in text
    assert "| a\\|b | few |" in text
    assert "&lt;b>\\|Lao" in text
    page = html.render(report)
    assert "What each file keeps, by language and length" in page
    assert re.search('title="3.9 bits a character, .* by frequencies alone">not known to the checkpoint<', page)
    assert "<b>|Lao" not in page
    assert 'class="h7"' in page  # beyond the limit
    assert report_slices.line(one).startswith("a|b: worst slice Thai, ")
    assert report_slices.line(one).endswith("times the KL divergence of English (limit 3): fail")
    assert report_slices.line(replace(one, slices=())) == ""
    assert report_slices.table([replace(one, slices=())]) == []


def test_the_plan_says_what_each_slice_can_tell(tiny):
    found = {one.name: one for one in slice_reaches(tiny, 4096, 3.0)}
    assert set(found) == {*texts.LANGUAGES, *texts.KINDS, "positions 0 to 2,048", "positions 2,048 to 4,096"} - {
        "English"
    }
    assert found["Thai"].limit == 3
    assert found["positions 0 to 2,048"].limit == pytest.approx(math.sqrt(3))
    assert 0.3 < found["Thai"].detectable < 1
    whole = sum(one.tokens for one in found.values()) + 24 * LENGTH
    assert whole == texts.sliced(tiny, 4096).tokens
