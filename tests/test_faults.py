"""What goes wrong while a build runs, and what it does then: memory, range, numbers, signals, locks, disks."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant import pipeline
from qquant.algorithms.gram import Gram
from qquant.checks import loading
from qquant.disk.output import MANIFEST
from qquant.errors import EnvironmentMissingError, NumericalError
from qquant.families.decoder import Block
from qquant.plan.plan import Plan
from qquant.report.solved import LinearRecord, warnings_of
from qquant.solve import propagate, solver
from qquant.source.checkpoint import Checkpoint
from tests.conftest import write_checkpoint
from tests.torture import VOCABULARY, cut_vocabulary
from tests.worlds.builds import ARTIFACTS, CPU, contents, quiet
from tests.worlds.builds import HEAD as WHOLE
from tests.worlds.builds import load_recipe as loaded_recipe

HEAD = WHOLE.replace("bundled: books-en", "path: PLACE/read.txt").replace("bundled:wikitext-2-test", "PLACE/judge.txt")
NAMES = ("gptq-int4", "awq", "gguf-q4_0")


@pytest.fixture
def make_checkpoint(tmp_path):
    """As in conftest, with a small vocabulary."""

    def make(name="model", **options):
        return cut_vocabulary(write_checkpoint(tmp_path / name, vocab_size=VOCABULARY, **options))

    return make


def load_recipe(place, names, text=HEAD):
    """As in test_pipeline, on two short texts."""
    for name in ("read", "judge"):
        lines = (" ".join(f"{name}{i * j}" for i in range(80)) for j in range(1, 12))
        (place / f"{name}.txt").write_text("\n\n".join(lines))
    return loaded_recipe(place, names, text.replace("PLACE", str(place)))


@pytest.fixture
def build(tmp_path, monkeypatch):
    """`build(folder, *artifacts, out="out")` -> (report, out), without the process that imports transformers."""
    monkeypatch.setattr(loading, "examine", lambda *_, **__: loading.Loaded({}))

    def run(folder, *names, out="out", text=HEAD):
        loaded = load_recipe(tmp_path, names or NAMES, text)
        checkpoint = Checkpoint.open(folder)
        return pipeline.build(
            loaded, checkpoint, Plan.of(loaded, checkpoint), tmp_path / out, CPU, quiet
        ), tmp_path / out

    return run


# --- F11: memory, and I7 ------------------------------------------------------------------------------------------------


def failing(monkeypatch, owner, name, at, error):
    """The calls of owner.name whose numbers are in `at` raise; half of the work is done before."""
    real, count = getattr(owner, name), [0]

    def call(*arguments, **named):
        count[0] += 1
        if count[0] in at:
            if name == "forward":
                real(*arguments, **named)  # observers have seen every stage
            raise error
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, call)
    return count


@pytest.mark.parametrize(
    ("owner", "name", "at", "error"),
    [
        (Block, "forward", {1, 4, 9}, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        (Gram, "add", {3, 7}, MemoryError()),
        (
            solver.Solver,
            "solve",
            {2, 9},
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ),
    ],
    ids=["three times", "inside a sample", "while solving"],
)
def test_short_memory_gives_the_same_bytes(make_checkpoint, build, monkeypatch, owner, name, at, error, caplog):
    folder = make_checkpoint()
    _, whole = build(folder, out="whole")
    failing(monkeypatch, owner, name, at, error)
    _, out = build(folder)
    assert contents(out) == contents(whole)
    assert len([record for record in caplog.records if "out of memory" in record.message]) == len(at)


def test_an_artifact_that_is_not_solved_is_the_same_beside_solved_ones(make_checkpoint, build, monkeypatch):
    """I7: neither its blocks nor its record depend on what is measured for the others."""
    monkeypatch.setitem(ARTIFACTS, "plain", "{name: plain, format: gguf, type: q4_0, solver: ggml}")
    folder = make_checkpoint()
    _, beside = build(folder, "gptq-int4", "plain", out="beside")
    _, alone = build(folder, "plain", out="alone")
    name = "model-GGUF"
    assert contents(alone / name) == contents(beside / name)
    layers = [
        json.loads((out / name / MANIFEST).read_text())["artifacts"]["plain"]["layers"] for out in (alone, beside)
    ]
    assert layers[0] == layers[1]


def test_memory_that_never_suffices_ends_with_6(make_checkpoint, build, monkeypatch):
    failing(monkeypatch, Block, "forward", set(range(5, 100)), torch.OutOfMemoryError("CUDA out of memory. Tried"))
    with pytest.raises(EnvironmentMissingError, match=r"block 0: out of memory .* the same command continues"):
        build(make_checkpoint())


def test_other_errors_are_not_taken_for_short_memory(make_checkpoint, build, monkeypatch):
    failing(monkeypatch, Block, "forward", {2}, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        build(make_checkpoint())


# --- F7: range ----------------------------------------------------------------------------------------------------------


def overflowing(monkeypatch, dtypes, calls):
    real, count = Block.gated, [0]

    def gated(self, pair):
        count[0] += 1
        value = real(self, pair)
        return value * float("inf") if self.dtype in dtypes and count[0] in calls else value

    monkeypatch.setattr(Block, "gated", gated)


def test_a_sample_that_overflows_goes_through_that_block_in_float32(make_checkpoint, build, monkeypatch, tmp_path):
    folder = make_checkpoint()
    text = HEAD.replace("  samples: 6", "  objective: output\n  samples: 6")
    names = ("gptq-int4", "awq-unscaled", "gguf-q4_0")  # two scales of nearly one loss are chosen between by a hair
    _, whole = build(folder, *names, out="whole", text=text)
    overflowing(monkeypatch, {torch.bfloat16}, {2, 4})
    report, out = build(folder, *names, text=text)
    manifest = json.loads((out / "model-GPTQ-Int4" / "qquant-manifest.json").read_text())
    wide = {entry["name"]: entry.get("float32_samples") for entry in manifest["artifacts"]["gptq-int4"]["layers"]}
    assert wide["model.layers.0"] == 2
    assert "model.layers.1" not in wide
    assert any("model.layers.0: 2 samples overflowed and were computed in float32" in line for line in report.warnings)
    assert contents(out) != contents(whole)
    plain = json.loads((whole / "report.json").read_text())["artifacts"]
    for row, found in zip(plain, report.artifacts, strict=True):
        assert found.kl_divergence == pytest.approx(row["kl_divergence"], rel=0.2)


def test_a_stream_of_its_own_that_overflows_goes_through_that_block_in_float32(make_checkpoint, build, monkeypatch):
    folder = make_checkpoint()
    real, dtypes = propagate._propagated, []

    def watched(view, *rest):
        dtypes.append(view.dtype)
        with monkeypatch.context() as patch:
            plain = Block.gated
            wrong = view.layer == 1 and view.dtype == torch.bfloat16
            patch.setattr(Block, "gated", lambda self, pair: plain(self, pair) * (float("inf") if wrong else 1))
            real(view, *rest)

    monkeypatch.setattr(propagate, "_propagated", watched)
    report, _ = build(folder, "gptq-int4")
    assert dtypes == [
        torch.bfloat16,
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    ]  # carrying the 16-bit stream along, then alone
    assert any("model.layers.1: 6 samples overflowed and were computed in float32" in line for line in report.warnings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_overflows_float32_too_ends_with_7(make_checkpoint, build, monkeypatch, dtype):
    folder = make_checkpoint(dtype=dtype)
    overflowing(monkeypatch, {torch.bfloat16, torch.float32}, set(range(100)))
    with pytest.raises(NumericalError, match=r"block 0: activations of sample 0 are not finite in float32 either"):
        build(folder)


def test_float16_checkpoints_are_computed_in_float32(make_checkpoint, build):
    """Activations of 1e5, which float16 does not hold, and the report says who cannot run it."""
    folder = make_checkpoint(dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    for name in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] *= 300
    tensors["model.layers.0.mlp.down_proj.weight"] /= 60000
    save_file(tensors, folder / "model.safetensors")
    report, _ = build(folder, "gptq-int8")
    assert any(
        "layers.0.mlp.down_proj.weight: inputs up to" in line and "do not fit float16" in line
        for line in report.warnings
    )


# --- F8, F9, F10: the report tells ----------------------------------------------------------------------------------------


def test_dead_channels_and_too_few_tokens_are_in_the_report(make_checkpoint, build):
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = 0
    save_file(tensors, folder / "model.safetensors")
    report, _ = build(folder, "gptq-int4", text=HEAD.replace("samples: 6", "samples: 2"))
    told = "\n".join(report.warnings)
    assert "layers.1.self_attn.q_proj.weight: 1 input channels were always zero" in told
    assert "model.layers.0.mlp.down_proj.weight first: 96 calibration tokens for 128 inputs" in told


def test_too_few_tokens_are_told_by_the_plan(make_checkpoint, tmp_path):
    loaded = load_recipe(tmp_path, ["gptq-int4"], HEAD.replace("samples: 6", "samples: 2"))
    plan = Plan.of(loaded, Checkpoint.open(make_checkpoint()))
    assert plan.warnings == (
        "96 calibration tokens for linears of 128 inputs: give at least 128, better ten times as many",
    )


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        ({"damping": 0.1, "damping_asked": 0.01}, "w: damping was raised from 0.01 to 0.1"),
        ({"fallback": "rtn: not positive definite"}, "w: rtn: not positive definite"),
        ({"largest": 70000.0}, "w: inputs up to 7e+04 do not fit float16 (65504); run it in bfloat16"),
        ({"damping": 0.01, "damping_asked": 0.01, "dead": 0, "tokens": 9, "inputs": 9, "largest": 65504.0}, None),
    ],
)
def test_what_the_solver_met_is_a_warning(layer, told):
    assert warnings_of([LinearRecord("w", 0.0, **layer)]) == ([told] if told else [])


# --- F1, F3: what a killed build leaves, and disks ------------------------------------------------------------------------


def test_room_is_asked_for_what_is_still_to_be_written(make_checkpoint, build, tmp_path, monkeypatch):
    folder = make_checkpoint()
    _, out = build(folder, "gptq-int8")
    loaded, checkpoint = load_recipe(tmp_path, ["gptq-int8"]), Checkpoint.open(folder)
    plan = Plan.of(loaded, checkpoint)
    assert plan.still_to_write(out) == plan.disk - plan.artifacts[0].size
    assert plan.still_to_write(tmp_path / "new") == plan.disk


@pytest.mark.parametrize("damage", ["head", "copy", "journal", "moments"])
def test_nothing_kept_is_used_before_it_was_checked(make_checkpoint, build, monkeypatch, tmp_path, damage):
    """I4: heads, copies, the journal's lines and the statistics of a killed build."""
    from qquant.artifact.draft import Draft

    folder = make_checkpoint()
    _, whole = build(folder, out="whole")
    finish = Draft.finish
    monkeypatch.setattr(Draft, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(folder)
    monkeypatch.setattr(Draft, "finish", finish)
    partial = tmp_path / "out" / ".partial"
    path = {
        "head": partial / "gptq-int4" / "model.safetensors",
        "copy": partial / "awq" / "tokenizer.json",
        "journal": partial / "awq.journal",
        "moments": next(partial.glob("moments-*/block-1")),
    }[damage]
    data = bytearray(path.read_bytes())
    data[20 if damage == "head" else len(data) // 2] ^= 1
    path.write_bytes(data)
    _, out = build(folder)
    assert contents(out) == contents(whole)


# --- F2: signals ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, time
from qquant.solve import solver
from qquant.checks import loading
from qquant.cli import main
loading.examine = lambda *_, **__: loading.Loaded({})
finish = solver.Solver.finish
def slow(self, *rest):
    print("solving", flush=True)
    time.sleep(float(sys.argv.pop(1)) if len(sys.argv) > 1 and sys.argv[1][0].isdigit() else 0.3)
    finish(self, *rest)
solver.Solver.finish = slow
sys.argv[0] = "qquant"
main(sys.argv[1:])
"""


@pytest.mark.parametrize(("number", "twice"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_signals_stop_the_build_and_print_what_continues_it(make_checkpoint, build, tmp_path, number, twice):
    folder = make_checkpoint(num_hidden_layers=3)
    load_recipe(tmp_path, ["gptq-int4"])
    _, whole = build(folder, "gptq-int4", out="whole")
    command = [
        "build",
        str(folder),
        "--recipe",
        str(tmp_path / "test.yaml"),
        "--out",
        str(tmp_path / "out put"),
        "--device",
        "cpu",
    ]
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "solving\n"
    child.send_signal(number)
    if twice:
        time.sleep(0.1)
        child.send_signal(number)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 75, said
    assert (
        f"continue with: qquant build {folder} --recipe {tmp_path}/test.yaml --out '{tmp_path}/out put' --device cpu"
        in said
    )
    assert ("stopped at once by SIGTERM" if twice else f"stopped by {number.name}") in said
    journal = (tmp_path / "out put" / ".partial" / "gptq-int4.journal").read_text().splitlines()
    assert len(journal) == (2 if twice else 3)  # the key, the rest, and block 0 where it was finished
    _, out = build(folder, "gptq-int4", out="out put")
    assert contents(out) == contents(whole)


def test_a_limit_of_file_sizes_is_told_and_survived(make_checkpoint, build, tmp_path):
    """`ulimit -f`: a write that is refused for the file's size ends the build; without the limit the same command goes on."""
    folder = make_checkpoint()
    load_recipe(tmp_path, ["gptq-int4"])
    _, whole = build(folder, "gptq-int4", out="whole")
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    out = ["--recipe", str(tmp_path / "test.yaml"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({largest // 2}, {largest // 2}))\n{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", program, "build", str(folder), *out], capture_output=True, text=True, check=False
    )
    assert done.returncode in (6, 75), done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert not list((tmp_path / "out").glob("model-*"))
    build(folder, "gptq-int4")
    assert contents(tmp_path / "out") == contents(whole)
