"""What is measured: protocols, texts, stretches, looks, llama-perplexity's arithmetic and file, and the search for the loss."""

import json
import math
import os
import struct
from threading import Event, current_thread

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant import pipeline, recipe
from qquant.artifact.opening import open_weights
from qquant.checks import bisect as bisection
from qquant.checks import evidence, fidelity, llama_cpp, regression
from qquant.checks.fidelity import Peaks, Scored, final_states, first_scored, measure, plain_block
from qquant.devices import free_memory
from qquant.errors import InputError
from qquant.families.decoder import Block, embed, source_block
from qquant.formats.gguf import quantize
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.recipe import Checks, Gates
from qquant.source.checkpoint import Checkpoint
from tests.worlds import GOLDEN
from tests.worlds.watched import Told, Watched

quiet = Quiet()

CPU = torch.device("cpu")


def check(built, checks, gates=None, out=None):
    folder, made = built
    (path,) = [path for path in made.iterdir() if path.name.endswith("Int4")]
    return pipeline.check(
        [path], Checkpoint.open(folder), checks, gates or Gates(defaults=False), CPU, quiet, out
    ).artifacts[0]


class Rolled:
    """A checkpoint with other embeddings: a model that is wrong."""

    def __init__(self, source):
        self.source, self.family, self.config = source, source.family, source.config

    def tensor(self, name):
        return self.source.tensor(name)

    def rows(self, name, start, stop):
        return self.source.rows(name, start, stop) * 0.9


@pytest.fixture
def pair(built):
    source = Checkpoint.open(built[0])
    windows = torch.randint(0, 8000, (3, 24), generator=torch.Generator().manual_seed(0))
    return source, Rolled(source), windows


def test_protocols_score_what_they_say(pair):
    source, other, windows = pair
    assert first_scored("llama.cpp", 512) == 256
    assert first_scored("llama.cpp", 25) == 12
    assert first_scored("sliding", 2048) == 0
    half = measure(source, {"o": other}, Scored(windows, 12, 8000), CPU, quiet)["o"]
    every = measure(source, {"o": other}, Scored(windows, 0, 8000), CPU, quiet)["o"]
    assert half.nll.shape == (3, 11)
    assert every.nll.shape == (3, 23)
    for name in ("nll", "nll_baseline", "kl", "same_top"):
        assert torch.equal(getattr(half, name), getattr(every, name)[:, 12:]), name


def test_headroom_is_the_largest_activation_of_a_block(pair):
    """Against a forward pass that looks at every stage itself."""
    source, other, windows = pair
    peaks = Peaks()
    measure(source, {"o": other}, Scored(windows, 12, 8000), CPU, quiet, peaks)
    states = [embed(source, window, torch.float32) for window in windows]
    for layer, found in enumerate(peaks.of(0)):
        block, seen = source_block(source, layer, torch.float32), []
        for index, state in enumerate(states):
            for _, value, _ in block.stages(state):
                seen.append(float(value.abs().max()))
            states[index] = value
        assert found == pytest.approx(max(seen), rel=1e-6)
    assert len(peaks.of(0)) == len(peaks.of(1)) == 2


def test_activations_beyond_fp16_are_warned_of(built):
    from qquant.checks import review

    row = check(built, Checks(windows=2, length=32))
    assert all(0 < share < 0.01 for share in row.headroom)
    assert review._fp16_warnings((0.1, 0.7), (0.1, 0.6)) == [
        "block 1: activations reach 70% of the largest fp16 number, the checkpoint's 60%; use bf16"
    ]
    assert review._fp16_warnings((0.1, 0.4), (0.1, 0.6)) == []


def test_windows_are_independent(pair):
    source, other, windows = pair
    whole = measure(source, {"o": other}, Scored(windows, 12, 8000), CPU, quiet)["o"]
    first = measure(source, {"o": other}, Scored(windows[:1], 12, 8000), CPU, quiet)["o"]
    rest = measure(source, {"o": other}, Scored(windows[1:], 12, 8000), CPU, quiet)["o"]
    joined = first.joined([first, rest])
    assert torch.allclose(joined.kl, whole.kl, atol=1e-9)
    assert np.allclose(joined.window_means()["nll"], whole.window_means()["nll"], atol=1e-9)


@pytest.mark.parametrize(("first", "tile"), [(12, 24), (12, 1024), (0, 8)])
def test_short_memory_changes_no_bit(pair, monkeypatch, first, tile):
    """Windows in one group, and one by one: the same numbers, peaks, and progress that ends at the end."""
    source, other, windows = pair
    monkeypatch.setattr(fidelity, "TILE", tile)
    text, found, told = Scored(windows, first, 8000), [], []
    for memory in (1e12, 1.0):
        peaks, seen = Peaks(), []
        numbers = measure(
            source, {"o": other}, text, CPU, Watched(lambda _, *at, seen=seen: seen.append(at)), peaks, memory
        )["o"]
        found.append((numbers, peaks))
        told.append(seen)
    for name, column in vars(found[0][0]).items():
        assert torch.equal(column, getattr(found[1][0], name)), name
    assert found[0][1] == found[1][1]
    groups = 1 if tile == 1024 else 3 if first == 0 else 2
    each = told[0][0][1]
    for seen, of in zip(told, (1, groups), strict=True):
        done = [at for at, _ in seen]
        assert {whole for _, whole in seen} == {each * of}, "a group is as much as all windows together"
        assert done == sorted(done)
        assert {0, *(each * group for group in range(of + 1))} <= set(done), "a group says where it begins and ends"


def test_free_memory_is_what_the_kernel_says_is_available():
    assert 1 << 20 < free_memory(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_report_has_texts_percentiles_and_worst_tokens(built):
    row = check(built, Checks(windows=4, length=32, texts=("bundled:code-test", "bundled:zh-test")))
    assert [text.name for text in row.texts] == ["bundled:code-test", "bundled:zh-test"]
    assert all(text.tokens == 4 * 15 for text in row.texts)
    assert row.texts[0].perplexity != row.texts[1].perplexity
    values = [row.kl_percentiles[key] for key in ("50", "90", "99", "99.9")]
    assert values == sorted(values)
    assert values[2] == pytest.approx(row.kl_99)
    assert sum(row.kl_histogram) == 4 * 15
    assert len(row.worst) == 12
    assert row.worst[0].kl >= row.worst[-1].kl
    assert row.worst[0].kl > values[2]
    assert abs(row.delta_p["mean"]) <= row.delta_p["rms"]


def test_long_windows_are_told_apart_by_position(built, monkeypatch):
    from qquant.checks import figures

    monkeypatch.setattr(figures, "BUCKETS", (0, 8, 24))
    row = check(built, Checks(windows=2, length=32, protocol="sliding"))
    assert [stretch.name for stretch in row.positions] == ["0 to 8", "8 to 24", "24 to 31"]
    assert [stretch.tokens for stretch in row.positions] == [16, 32, 14]
    mean = sum(stretch.kl_divergence * stretch.tokens for stretch in row.positions) / 62
    assert mean == pytest.approx(row.kl_divergence)


def test_more_text_is_read_only_where_it_is_needed(built):
    sure = check(built, Checks(windows=8, max_windows=32, length=32), Gates(kl_divergence=5.0, defaults=False))
    assert (sure.verdict.outcome, sure.verdict.gates[0].windows) == ("pass", 8)
    close = check(built, Checks(windows=40, length=32)).kl_divergence
    unsure = check(
        built, Checks(windows=8, max_windows=32, length=32), Gates(kl_divergence=close * 1.02, defaults=False)
    )
    assert unsure.verdict.gates[0].windows in (16, 32)


def test_artifacts_are_paired_by_name_or_by_what_their_paths_end_with():
    """A check calls artifacts by their paths, a build by their names in the recipe."""
    then, fresh = dict.fromkeys(["int4", "awq", "gone"]), dict.fromkeys(["/x/m-GPTQ-Int4", "awq", "/x/other"])
    paths = {"int4": "out/m-GPTQ-Int4", "awq": "out/m-AWQ", "gone": "out/gone"}
    fresh_paths = {"/x/m-GPTQ-Int4": "/x/m-GPTQ-Int4", "awq": "new/m-AWQ", "/x/other": "/x/other"}
    assert regression._pairs(then, fresh, paths, fresh_paths) == {"int4": "/x/m-GPTQ-Int4", "awq": "awq"}
    assert regression._pairs({"a": None}, {"/x/b": None}, {"a": "a"}, {"/x/b": "/x/b"}) == {"a": "/x/b"}


def test_comparison_of_two_reports(built, tmp_path):
    checks = Checks(windows=16, length=32)
    check(built, checks, out=tmp_path / "a")
    check(built, checks, out=tmp_path / "b")
    assert {change.outcome for change in regression.compare(tmp_path / "a", tmp_path / "b")} == {"equal"}
    path = next((tmp_path / "b" / "evidence").iterdir())
    worse = evidence.read(path)
    tensors = {
        "nll": torch.zeros(16, 15, dtype=torch.int8),
        "kl": torch.zeros(16, 15, dtype=torch.uint8),
        "top1": torch.zeros(16, 2, dtype=torch.uint8),
    }
    means = torch.from_numpy(np.stack([worse.means[name] * (1.5 if name == "kl" else 1) for name in evidence.LOSSES]))
    head = {"schema": evidence.SCHEMA, "tokens": 15, "facts": vars(worse.facts)}
    save_file(tensors | {"means": means}, path, metadata={"evidence": json.dumps(head)})
    outcomes = {change.loss: change.outcome for change in regression.compare(tmp_path / "a", tmp_path / "b")}
    assert outcomes == {"mean KL divergence": "worse", "top-1 disagreement": "equal", "mean NLL difference": "equal"}
    backwards = {change.loss: change.outcome for change in regression.compare(tmp_path / "b", tmp_path / "a")}
    assert backwards["mean KL divergence"] == "better"


def test_regression_gate_reads_the_earlier_report(built, tmp_path):
    checks = Checks(windows=16, length=32)
    check(built, checks, out=tmp_path / "a")
    row = check(built, checks, Gates(regression_vs=str(tmp_path / "a"), defaults=False))
    assert row.verdict.outcome == "pass"
    assert len(row.verdict.gates) == 2
    with pytest.raises(InputError, match="length"):
        check(built, Checks(windows=16, length=64), Gates(regression_vs=str(tmp_path / "a"), defaults=False))


# --- llama-perplexity ---------------------------------------------------------------------------------------------------


def test_codes_of_the_base_file():
    logits = torch.tensor([[0.0, -1.0, -40.0, 3.0, 2.5]])
    rows = llama_cpp.encode(logits)
    assert rows.shape == (1, 4 + 5 + 1)
    scale, least = struct.unpack("<2f", rows[0, :4].tobytes())
    assert scale == pytest.approx(16 / 65535)
    log_sum = math.log(sum(math.exp(x - 3) for x in logits[0].tolist()))
    assert least == pytest.approx(-16 - log_sum, rel=1e-6)
    assert rows[0, 4:].tolist() == [53247, 49151, 0, 65535, 63487, 0]
    assert llama_cpp.decode(rows, 5)[0, 3] == pytest.approx(-log_sum, abs=1e-5)


def test_file_of_base_logits_round_trip(pair, tmp_path):
    source, other, windows = pair
    path = tmp_path / "base.kld"
    written = llama_cpp.compare(source, {"o": other}, llama_cpp.Run(windows, CPU, quiet), path)["o"]
    base = llama_cpp.BaseLogits.open(path)
    assert np.array_equal(base.windows, windows.numpy())
    assert path.stat().st_size == 20 + 4 * 72 + 3 * 11 * 2 * (4 + 8192)
    assert llama_cpp.compare_with_file(base, {"o": other}, CPU, quiet)["o"] == pytest.approx(written, abs=1e-9)
    for damage in (path.read_bytes()[:-2], b"_logits_", b"x" * 100):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=r"base\.kld"):
            llama_cpp.BaseLogits.open(path)


def test_statistics_agree_with_the_exact_ones(pair):
    source, other, windows = pair
    exact = measure(source, {"o": other}, Scored(windows, 12, 8192), CPU, quiet)["o"]
    theirs = llama_cpp.compare(source, {"o": other}, llama_cpp.Run(windows, CPU, quiet))["o"]
    assert theirs["ppl"] == pytest.approx(exact.perplexity, rel=1e-5)
    assert theirs["ppl_base"] == pytest.approx(exact.perplexity_baseline, rel=1e-3)
    assert theirs["kld_mean"] == pytest.approx(exact.mean_kl, rel=0.02)
    assert theirs["dp_rms"] == pytest.approx(float(exact.delta_p.square().mean().sqrt()), rel=0.02)
    assert theirs["same_top"] == pytest.approx(exact.top1)
    assert theirs["kld_50"] == pytest.approx(float(np.median(exact.kl.numpy())), rel=0.02)


def test_inputs_are_rounded_as_llama_cpp_rounds():
    """Its input rounding to q8_0 is that of q8_0 weights, of which there are golden blocks."""
    golden = np.load(GOLDEN / "ggml_blocks.npz")
    weight = torch.from_numpy(golden["weight"])[:16]
    expected = quantize.dequantize(torch.from_numpy(golden["Q8_0.none"])[:16], "q8_0")
    differing = llama_cpp.rounded_inputs(weight, "q8_0") != expected
    assert int(differing.sum()) == 1, "one tie: weights round it away from zero, vector code for inputs to even"
    x = torch.randn(4, 512) * 10.0 ** torch.arange(-3, 1)[:, None]
    x[0] = 0
    rounded = llama_cpp.rounded_inputs(x, "q8_k")
    step = x.view(4, 2, 256).abs().amax(-1, keepdim=True) / 127
    assert bool(((rounded - x).view(4, 2, 256).abs() <= 0.5001 * step).all())
    codes = rounded.view(4, 2, 256)[1:] / step[1:]
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert llama_cpp.rounded_inputs(x, None) is x


def test_only_gguf_products_are_rounded(pair, built):
    source, other, windows = pair
    (folder,) = [path for path in built[1].iterdir() if path.name.endswith("Int4")]
    artifacts = {"o": other, "folder": open_weights(folder)}
    plain = llama_cpp.compare(source, artifacts, llama_cpp.Run(windows, CPU, quiet))
    assert llama_cpp.compare(source, artifacts, llama_cpp.Run(windows, CPU, quiet, rounded=True)) == plain


GGUF = """
version: 1
name: gguf
calibration: {sources: [{bundled: books-en}], samples: 1, length: 16, default_system_share: 0}
checks: {windows: 1, length: 16}
artifacts:
"""


@pytest.mark.slow
def test_llama_perplexity_prints_the_same(demo, tmp_path):
    """On the same files: perplexity within 0.1 %, mean KL divergence within 3 %, and without input rounding it would not be."""
    golden = json.loads((GOLDEN / "llama_perplexity.json").read_text())
    kinds = [kind for kind in golden if kind != "f32"]
    lines = [f"  - {{name: {kind}, format: gguf, type: {kind}, imatrix: false, solver: ggml}}\n" for kind in kinds]
    (tmp_path / "r.yaml").write_text(GGUF + "".join(lines))
    loaded, checkpoint = recipe.load(tmp_path / "r.yaml"), Checkpoint.open(demo)
    pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), tmp_path / "out", CPU, quiet)
    paths = {kind: next((tmp_path / "out").rglob(f"*-{kind}.gguf")) for kind in kinds}
    base = tmp_path / "base.kld"
    pipeline.perplexity([], checkpoint, Checks(windows=100, length=512), base, CPU, quiet, rounded=True)
    found = pipeline.perplexity_from(base, list(paths.values()), CPU, quiet, rounded=True)
    exact = pipeline.perplexity_from(base, [paths["q8_0"]], CPU, quiet, rounded=False)
    for kind, path in paths.items():
        mine, theirs = found[str(path)], golden[kind]
        print(f"{kind}: ppl {mine['ppl'] / theirs['ppl'] - 1:+.4%}, kl {mine['kld_mean']:.6f} for {theirs['kld_mean']}")
        assert mine["ppl"] == pytest.approx(theirs["ppl"], rel=1e-3), kind
        assert mine["ppl_base"] == pytest.approx(theirs["ppl_base"], rel=1e-3), kind
        assert mine["kld_mean"] == pytest.approx(theirs["kld_mean"], rel=0.03, abs=5e-7), kind
        assert 100 * mine["same_top"] == pytest.approx(theirs["same_top_percent"], abs=0.3), kind
        assert 100 * mine["dp_rms"] == pytest.approx(theirs["rms_dp_percent"], rel=0.03, abs=2e-3), kind
    assert exact[str(paths["q8_0"])]["kld_mean"] < 0.5 * golden["q8_0"]["kld_mean"]


# --- bisection ----------------------------------------------------------------------------------------------------------


def test_the_broken_linear_is_found(built, tmp_path):
    import shutil

    folder, made = built
    (origin,) = [path for path in made.iterdir() if path.name.endswith("Int4")]
    broken = tmp_path / "broken"
    shutil.copytree(origin, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.scales"] *= 1.6
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    checks = Checks(windows=2, length=32)
    source = Checkpoint.open(folder)
    fine = check(built, checks).kl_divergence
    found = pipeline.bisect(broken, source, checks, fine * 1.05, CPU, quiet)
    assert found.kl > 1.5 * fine
    assert found.gains[0][0].weights == ("model.layers.1.mlp.down_proj.weight",)
    assert [part.weights for part in found.restored] == [("model.layers.1.mlp.down_proj.weight",)]
    assert found.kl_restored <= fine * 1.05
    nothing = pipeline.bisect(origin, source, checks, fine * 1.05, CPU, quiet)
    assert nothing.restored == ()


def test_awq_is_searched_by_blocks(built):
    folder, made = built
    (path,) = [path for path in made.iterdir() if path.name.endswith("AWQ")]
    found = pipeline.bisect(path, Checkpoint.open(folder), Checks(windows=2, length=32), 1e-9, CPU, quiet)
    assert [part.name for part in found.restored] == ["model.layers.0", "model.layers.1"] or len(found.restored) == 2
    assert found.kl_restored == 0.0


def test_all_linears_in_16_bits_leave_nothing(built):
    folder, made = built
    (path,) = [path for path in made.iterdir() if path.name.endswith("Int4")]
    found = pipeline.bisect(path, Checkpoint.open(folder), Checks(windows=1, length=32), 0.0, CPU, quiet)
    assert found.kl_restored == 0.0
    assert len(found.restored) == len(bisection.stages(Checkpoint.open(folder)))


def test_finals_are_those_of_the_windows(pair):
    source, _, windows = pair
    (states,) = final_states([source], Scored(windows, 20, 8192), CPU, quiet)
    assert states.shape == (3, 3, 64)


def test_the_next_models_block_is_read_while_one_computes(pair, monkeypatch):
    """By a thread, where threads help, and with the same numbers; a block that fails is told."""
    source, other, windows = pair
    plain = final_states([source, other], Scored(windows, 20, 8192), CPU, quiet)
    monkeypatch.setattr("qquant.checks.fidelity.threads_help", lambda device: True)
    read, computing, waited = [], Event(), []

    def block_of(model, layer, device):
        read.append((layer, model is other, current_thread().name.rpartition("_")[0]))
        if len(read) == 2:
            waited.append(computing.wait(10))
        return plain_block(model, layer, device)

    def forward(self, *given):
        computing.set()
        return inner(self, *given)

    inner = Block.forward
    monkeypatch.setattr(Block, "forward", forward)
    found = final_states([source, other], Scored(windows, 20, 8192), CPU, quiet, block_of)
    assert waited == [True]
    assert [place[:2] for place in read] == [
        (layer, last) for layer in range(source.config.layers) for last in (False, True)
    ]
    assert {thread for _, _, thread in read} == {"qquant-prefetch"}
    assert all(torch.equal(*states) for states in zip(found, plain, strict=True))

    def broken(model, layer, device):
        raise InputError(f"no block {layer}")

    with pytest.raises(InputError, match="no block 0"):
        final_states([source], Scored(windows, 20, 8192), CPU, quiet, broken)


def test_a_measurement_tells_of_its_windows_and_of_the_head(pair):
    """The head of a small model with a large vocabulary takes as long as half its blocks, and a window of 32,768 tokens minutes."""
    source, other, windows = pair
    progress = Told()
    measure(source, {"other": other}, Scored(windows, 10, 8192), CPU, progress)
    progress.require_whole("check")
    done = [step for step, _ in progress.steps["check"]]
    assert done == sorted(set(done))
    assert len(done) > source.config.layers + 4, "the head has steps of its own"
    first, *_, last = progress.within["check"]
    assert first == "block 1 of 2, model 1 of 2, window 1 of 3"
    assert "block 2 of 2, model 2 of 2, window 3 of 3" in progress.within["check"]
    assert last == "the head, word 8,192 of 8,192"
