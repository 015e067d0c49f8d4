"""Injected faults, each caught by its name."""

import errno
import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant import pipeline
from qquant.calibration import Tokenizer
from qquant.checks import structure
from qquant.errors import EnvironmentMissingError, StoppedError
from qquant.formats import claims_of
from qquant.formats.gguf.source import GgufSource
from qquant.progress import Quiet
from qquant.recipe import Checks, Gates
from qquant.report import views
from qquant.source.checkpoint import Checkpoint

quiet = Quiet()

CPU = torch.device("cpu")


@pytest.fixture
def damaged(built, tmp_path):
    """`damaged("gptq" or "awq")` -> (copy of the artifact, reasons()): the findings of a check."""
    folder, out = built

    def copy(kind):
        ends = {"gptq": "int4", "awq": "awq", "gguf": "gguf"}
        (origin,) = [path for path in out.iterdir() if path.name.lower().endswith(ends[kind])]
        made = tmp_path / "artifact"
        shutil.copytree(origin, made)
        if kind == "gguf":
            (made,) = made.glob("*.gguf")

        def reasons():
            report = pipeline.check(
                [made], Checkpoint.open(folder), Checks(windows=2, length=32), Gates(defaults=False), CPU, quiet
            )
            assert report.artifacts[0].verdict.outcome == ("fail" if report.artifacts[0].verdict.reasons else "pass")
            return "; ".join(report.artifacts[0].verdict.reasons)

        return made, reasons

    return copy


def edit(folder, change):
    """Apply `change` to the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj"
O = "model.layers.1.self_attn.o_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("kind", ["gptq", "awq", "gguf"])
def test_no_fault_no_finding(damaged, kind):
    assert damaged(kind)[1]() == ""


def test_wrong_eos(damaged):
    made, reasons = damaged("gptq")
    path = made / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 5}))
    assert "generation_config.json: eos_token_id is 5, the checkpoint's is" in reasons()


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_one_nan_scale(damaged, kind):
    made, reasons = damaged(kind)

    def change(tensors):
        tensors[f"{DOWN}.scales"][0, 3] = float("nan")

    edit(made, change)
    assert f"{DOWN}.weight holds NaN or infinity" in reasons()


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_zero_points_off_by_one(damaged, kind):
    made, reasons = damaged(kind)

    def change(tensors):
        zeros = tensors[f"{Q}.qzeros"]
        tensors[f"{Q}.qzeros"] = zeros ^ 0x11111111  # each of the eight moves up or down by one

    edit(made, change)
    assert f"{Q}.weight is shifted by whole groups against the checkpoint: zero points are off" in reasons()


def test_awq_nibble_order(damaged):
    made, reasons = damaged("awq")

    def change(tensors):
        for name in ("qweight", "qzeros"):
            packed = tensors[f"{O}.{name}"]
            nibbles = [(packed >> 4 * place) & 15 for place in range(8)]
            mixed = [nibbles[place] << 4 * target for target, place in enumerate((0, 4, 1, 5, 2, 6, 3, 7))]
            tensors[f"{O}.{name}"] = torch.stack(mixed).sum(0).to(torch.int32)
        scales = tensors[f"{O}.scales"]
        assert scales.dtype == torch.float16

    edit(made, change)
    assert f"{O}.weight has the checkpoint's rows in another order within groups of 8" in reasons()


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_swapped_shard(damaged, built, kind):
    """The blocks of a shard stand under each other's names."""
    made, reasons = damaged(kind)

    def change(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            other = name.replace("layers.0.", "layers.1.")
            tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()

    edit(made, change)
    found = reasons()
    assert "model.layers.0.mlp.up_proj.weight is not the checkpoint's weight: swapped, or of another model" in found


@pytest.mark.parametrize(("key", "value"), [("rope_theta", 10000.0), ("rms_norm_eps", 1e-2)])
def test_numbers_of_its_own_are_what_is_measured(damaged, built, key, value):
    """A runtime computes with what config.json says, and so does the check: the loss is there, and the reason."""
    made, reasons = damaged("gptq")
    path, before = made / "config.json", fidelity(made, built[0])
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert fidelity(made, built[0]) > 1.2 * before
    assert "config.json: " in reasons()


def fidelity(made, folder):
    """The mean KL divergence that a check finds."""
    text = Checks(windows=2, length=32)
    return (
        pipeline.check([made], Checkpoint.open(folder), text, Gates(defaults=False), CPU, quiet)
        .artifacts[0]
        .kl_divergence
    )


def test_another_models_tokenizer(damaged):
    made, reasons = damaged("gptq")
    path = made / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    names = [name for name in vocabulary if name in ("a", "t", "Ġ")]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    path.write_text(json.dumps(content))
    assert "tokenizer: is not the checkpoint's" in reasons()


def test_another_template(damaged):
    made, reasons = damaged("awq")
    path = made / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", "<|endoftext|>"))
    assert "chat template: is not the checkpoint's" in reasons()


def test_head_that_is_not_the_tied_one(damaged):
    made, reasons = damaged("gptq")
    path = made / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))

    def change(tensors):
        tensors["lm_head.weight"] = torch.roll(tensors["model.embed_tokens.weight"], 1000, 0)

    edit(made, change)
    assert "lm_head.weight is not the checkpoint's weight" in reasons()


def test_missing_files_warn(damaged, built):
    made, _ = damaged("gptq")
    (made / "generation_config.json").unlink()
    assert claims_of(made, Checkpoint.open(built[0])).warnings == (
        "generation_config.json: missing; answers are drawn by a runtime's own settings, and end where config.json says",
    )


def patch(path, before, old, new):
    """Replace `old` by `new` in a file, right after the bytes `before`."""
    content = path.read_bytes()
    at = content.index(before) + len(before)
    assert content[at : at + len(old)] == old
    path.write_bytes(content[:at] + new + content[at + len(old) :])


def test_wrong_eos_of_a_gguf_file(damaged, demo):
    made, reasons = damaged("gguf")
    kind, eos = struct.pack("<I", 4), Tokenizer.open(demo).eos[0]
    patch(made, b"tokenizer.ggml.eos_token_id", kind + struct.pack("<I", eos), kind + struct.pack("<I", 5))
    assert "tokenizer.ggml.eos_token_id is 5, the checkpoint's is" in reasons()


def exchange(path, one, other, after, before=None):
    """Swap the first occurrences of two strings of a GGUF file, stored with their lengths, between two keys."""
    content = bytearray(path.read_bytes())
    pair = [struct.pack("<Q", len(text.encode())) + text.encode() for text in (one, other)]
    places = [content.index(text, content.index(after)) for text in pair]
    assert before is None or max(places) < content.index(before)
    for place, text in zip(places, reversed(pair), strict=True):
        content[place : place + len(text)] = text
    path.write_bytes(content)


def test_another_models_tokenizer_in_a_gguf_file(damaged):
    made, reasons = damaged("gguf")
    exchange(made, "Ġn", "Ġg", b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges")
    assert "tokenizer.ggml.tokens: is not the checkpoint's vocabulary" in reasons()


def test_other_merges_in_a_gguf_file(damaged):
    made, reasons = damaged("gguf")
    exchange(made, "Ġ t", "Ġ a", b"tokenizer.ggml.merges")
    assert "tokenizer.ggml.merges: are not the checkpoint's" in reasons()


def test_nan_scale_in_a_gguf_file(damaged):
    made, reasons = damaged("gguf")
    place = GgufSource.open(made).header.tensors["blk.1.ffn_up.weight"].offset
    with made.open("r+b") as file:
        file.seek(place)
        file.write(b"\x00\x7e")  # the fp16 scale of the first block
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinity" in reasons()


@pytest.mark.parametrize("kind", ["gptq", "awq"])
@pytest.mark.parametrize("scale", [0.95, 1.02])
def test_a_head_of_another_scale(damaged, kind, scale):
    made, reasons = damaged(kind)
    name = "model.embed_tokens.weight"  # tied
    edit(made, lambda tensors: tensors.update({name: (tensors[name].float() * scale).half()}))
    assert f"embed_tokens.weight is {scale:.3f} times the checkpoint's weight" in reasons()


def test_a_linear_of_another_scale(damaged):
    made, reasons = damaged("gptq")
    edit(made, lambda tensors: tensors.update({f"{Q}.scales": tensors[f"{Q}.scales"] * 1.1}))
    assert "q_proj.weight is 1.091 times the checkpoint" in reasons()


def test_one_bias(damaged, built):
    """Zeroed it is a fault; a tenth off it may be meant so, and is told."""
    made, reasons = damaged("gptq")
    kept = load_file(made / "model.safetensors")[f"{Q}.bias"]
    edit(made, lambda tensors: tensors[f"{Q}.bias"].zero_())
    assert f"{Q}.bias is not the checkpoint's vector" in reasons()
    edit(made, lambda tensors: tensors.update({f"{Q}.bias": kept * 1.1}))
    checks = Checks(windows=2, length=32)
    report = pipeline.check([made], Checkpoint.open(built[0]), checks, Gates(defaults=False), CPU, quiet)
    assert [line for line in report.artifacts[0].warnings if "bias" in line] == [
        f"{Q}.bias is 10.0% off the checkpoint's vector"
    ]


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, StoppedError), (errno.EACCES, EnvironmentMissingError)])
def test_a_report_that_cannot_be_written_is_one_error(built, tmp_path, monkeypatch, number, error):
    """Of `check --out`, as of a build: a full disk is 75, a folder that may not be written is 6."""

    def fails(*_):
        raise OSError(number, os.strerror(number), str(tmp_path / "new" / "report.md"))

    monkeypatch.setattr(views, "write", fails)
    folder, out = built
    (made,) = [path for path in out.iterdir() if path.name.endswith("Int4")]
    with pytest.raises(error, match=f"report.md: {os.strerror(number)}"):
        pipeline.check(
            [made],
            Checkpoint.open(folder),
            Checks(windows=2, length=32),
            Gates(defaults=False),
            CPU,
            quiet,
            tmp_path / "new",
        )


def test_two_bits_are_no_fault():
    weight = torch.randn(64, 256)
    coarse = (weight / 0.9).round().clamp(-2, 1) * 0.9
    assert structure.fault(coarse, weight, False) == ""
