"""The speed check: the stepping model is the model, windows take turns, and noise decides before ratios do."""

import dataclasses
import itertools
import json
import sys
import types

import numpy as np
import pytest
import torch
import transformers

from qquant import pipeline, recipe
from qquant.artifact.opening import open_weights
from qquant.checks import speed
from qquant.cli import main
from qquant.errors import UsageError
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.report.record import Pace, Report
from qquant.runtime.stepping import Stepper, read_weights
from qquant.source.checkpoint import Checkpoint
from tests.conftest import write_checkpoint
from tests.runtime.test_runtime import RECIPE, built, gguf

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random checkpoint with grouped queries."""
    return write_checkpoint(tmp_path_factory.mktemp("speed") / "model", num_key_value_heads=2, hidden_size=128)


def stepper(folder, dtype=torch.float32, capacity=40):
    source = Checkpoint.open(folder)
    return Stepper(source.config, read_weights(source, CPU, dtype), capacity, CPU, dtype)


@pytest.mark.parametrize("tied", [False, True])
def test_stepping_is_transformers_model(make_checkpoint, tied):
    folder = make_checkpoint(num_key_value_heads=2, tie_word_embeddings=tied)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = stepper(folder)
    ids = torch.randint(0, 8192, (17,))
    with torch.inference_mode():
        found = [ours.prefill(ids)]
        tokens = ids.tolist()
        for _ in range(6):
            tokens.append(int(ours.token))
            found.append(ours.step())
        truth = theirs(torch.tensor([tokens])).logits[0, 16:]
    assert torch.allclose(torch.cat(found), truth, rtol=1e-4, atol=1e-4)
    ours.rewind(17, tokens[17])
    with torch.inference_mode():
        assert torch.allclose(ours.step(), truth[1:2], rtol=1e-4, atol=1e-4), "a rewound step is the same step"


def test_bytes_are_counted_once(make_checkpoint):
    parts = {}
    for tied in (False, True):
        folder = make_checkpoint(f"tied {tied}", tie_word_embeddings=tied)
        source = Checkpoint.open(folder)
        weights = read_weights(source, CPU, torch.bfloat16)
        shapes = source.family.shapes(source.config)
        linears = sum(2 * int(np.prod(s)) for n, s in shapes.items() if "proj" in n)
        table = 2 * 8192 * 64
        assert weights.bytes_read() == linears + table
        parts[tied] = weights.bytes_held() - linears
    assert parts == {False: 2 * table, True: table}


def test_copies_have_weights_of_their_own_and_one_sequence(small):
    first = stepper(small)
    second = first.with_copied_weights()
    assert second.keys is first.keys
    assert second.position is first.position
    assert second.weights.head.weight.data_ptr() != first.weights.head.weight.data_ptr()
    with torch.inference_mode():
        first.prefill(torch.arange(9))
        token = int(first.token)
        a = first.step()
        first.rewind(9, token)
        assert torch.equal(second.step(), a)


# -- timing


class Clock:
    """A clock that windows advance."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(speed.time, "perf_counter", lambda: self.now)

    def window(self, seconds, log=None, name=""):
        seconds = itertools.cycle(seconds if isinstance(seconds, list) else [seconds])

        def run():
            self.now += next(seconds)
            if log is not None:
                log.append(name)

        return run


def test_windows_take_turns_and_warm_up(monkeypatch):
    clock, log = Clock(monkeypatch), []
    found = speed.take_turns(clock.window(1.0, log, "A"), clock.window(0.5, log, "B"), 3)
    assert "".join(log) == "AB" + "ABBA" * 3
    assert found.ratio() == (2.0, 2.0, 2.0)


def test_a_drifting_clock_cancels(monkeypatch):
    """Every window is 1 % slower than the one before; the same work is as fast as itself."""
    clock = Clock(monkeypatch)
    durations = itertools.count()

    def drifting():
        clock.now += 1 + 0.01 * next(durations)

    median, low, high = speed.take_turns(drifting, drifting, 5).ratio()
    assert (median, low, high) == pytest.approx((1, 1, 1), abs=1e-12)


def test_short_windows_are_repeated(monkeypatch):
    clock, log = Clock(monkeypatch), []
    speed.take_turns(clock.window(0.003, log, "A"), clock.window(0.003, log, "B"), 3)
    assert len(log) == 2 + 3 * 4 * 7


def test_interval_covers_the_median_as_often_as_it_says():
    """95 % of intervals over 15 pairs of a skewed distribution; a bootstrap of a median is a little short."""
    random = np.random.default_rng(3)
    values = np.exp(random.normal(0, 0.1, (300, 15)))
    inside = 0
    for row in values:
        _, low, high = speed.median_interval(row)
        inside += low <= 1.0 <= high
    assert 0.88 <= inside / len(values) <= 0.99


def pace(phase="decode", ratio=1.5, half=0.02, noise=0.01):
    return Pace(phase, 1, 0, 10.0, 5.0, ratio, ratio - half, ratio + half, noise, 2.0)


@pytest.mark.parametrize(
    ("given", "least", "outcome"),
    [
        (pace(ratio=1.5), None, "pass"),
        (pace(ratio=1.5), 1.4, "pass"),
        (pace(ratio=1.5), 1.6, "fail"),
        (pace(ratio=1.5), 1.51, "inconclusive"),
        (pace(ratio=1.0, noise=0.2), 1.6, "inconclusive"),
        (pace(ratio=3.0, noise=0.2), None, "inconclusive"),
        (pace("prefill", ratio=0.3), 1.0, "pass"),
    ],
)
def test_verdicts(given, least, outcome):
    found, reasons = speed.judge([given], speed.SpeedSettings(min_decode=least))
    assert found == outcome
    assert bool(reasons) == (outcome != "pass")


@pytest.mark.parametrize("bad", [{"prompt": 0}, {"steps": 0}, {"pairs": 2}, {"margin": 0}, {"margin": 1.5}])
def test_settings_that_measure_nothing_are_refused(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        speed.SpeedSettings(**bad)


def test_most_alive_counts_what_lives_at_once():
    kept = torch.zeros(1000)

    def work():
        a = kept + 1  # 4000 bytes
        b = a * 2  # 8000
        del a
        _ = b.view(10, 100)  # no memory of its own
        c = torch.cat([b, b])  # 12000
        del b, c
        _ = kept * 3

    assert speed.most_alive(work) == 12000


# -- the check


@pytest.fixture(scope="module")
def artifact(small, tmp_path_factory):
    """The same model in q8_0."""
    return built(Checkpoint.open(small), tmp_path_factory.mktemp("speed"), [gguf("q8_0")])["q8_0"]


def test_measure_reports_both(small, artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(speed, "last_cache", lambda _: 500_000)
    found = speed.measure(
        artifact, Checkpoint.open(small), speed.SpeedSettings(prompt=20, steps=4, pairs=3, margin=0.9), CPU
    )
    assert found.outcome in ("pass", "inconclusive")
    assert {p.phase for p in found.paces} == {"decode", "prefill"}
    decode = found.pace("decode")
    assert decode.low <= decode.ratio <= decode.high
    assert 1.3 < decode.ceiling < 2
    assert found.pace("prefill").ceiling == 1
    assert found.weights < found.weights_baseline < found.peak_baseline
    assert found.weights + found.cache < found.peak
    assert found.cache == 2 * 2 * 2 * 2 * 32 * 25
    assert "int4 product, twice" in found.runtime
    assert "torch linear" in found.runtime


def test_cli_json_and_exit_codes(small, artifact, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)

    def run(*more):
        with pytest.raises(SystemExit) as ended:
            main(
                ["speed", str(artifact), "--against", str(small), "--prompt", "8", "--steps", "2", "--pairs", "3"]
                + ["--margin", "0.99", "--device", "cpu", *more]
            )
        return ended.value.code or 0, *capsys.readouterr()

    status, out, _ = run("--json")
    content = json.loads(out)
    assert content["schema"] == "qquant-speed-1"
    assert status == {"pass": 0, "inconclusive": 4}[content["outcome"]]
    status, _, err = run("--min-decode", "1000")
    assert status == 3 or "differs from itself" in err
    assert run("--prompt", "5000")[0] == 2
    assert run("--pairs", "1")[0] == 2


class FakeLlama:
    """What the check needs of llama-cpp-python."""

    def __init__(self, path, **options):
        self.options, self.n_tokens, self.log = options, 0, []

    def reset(self):
        self.n_tokens = 0

    def eval(self, tokens):
        self.log.append((self.n_tokens, len(tokens)))
        self.n_tokens += len(tokens)


def test_gguf_runs_in_llama_cpp(artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=FakeLlama, __version__="1.2"))
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: name == "llama_cpp")
    settings = speed.SpeedSettings(prompt=20, steps=3, pairs=3, margin=0.9)
    source = open_weights(artifact)
    contender = speed._contender(source, artifact, settings, CPU, torch.bfloat16)
    contender.prefill()
    contender.decode()
    contender.decode()
    assert contender.model.log == [(0, 20), (20, 1), (21, 1), (22, 1), (20, 1), (21, 1), (22, 1)]
    assert contender.weights == artifact.stat().st_size
    assert contender.runtime.startswith("llama.cpp (llama-cpp-python 1.2)")
    assert dataclasses.is_dataclass(speed.compare(contender, contender, settings, CPU))


def test_build_with_speed_says_it_in_the_report(small, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "last_cache", lambda _: 1)
    path = tmp_path / "recipe.yaml"
    head = RECIPE.replace("length: 32}", "length: 32, speed: true}")
    path.write_text(head + "  - {name: a, format: gptq, bits: 4, group_size: 64, solver: rtn, scale_search: minmax}\n")
    loaded, checkpoint = recipe.load(str(path)), Checkpoint.open(small)
    plan = Plan.of(loaded, checkpoint)
    report = pipeline.build(loaded, checkpoint, plan, tmp_path / "out", CPU, Quiet())
    (row,) = report.artifacts
    assert row.speed.pace("decode").ratio > 0
    assert all(reason in " ".join(report.warnings) for reason in row.speed.reasons)
    again = Report.from_json(json.loads((tmp_path / "out" / "report.json").read_text()))
    assert again.artifacts[0].speed == row.speed
