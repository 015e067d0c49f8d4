"""A padded build is the unpadded build with zeros beside it, and computes the same function."""

import json

import pytest
import torch

from qquant import pipeline, recipe
from qquant.algorithms.grid import QuantizedTensor, UniformGrid, nearest
from qquant.artifact.opening import open_weights
from qquant.errors import UsageError
from qquant.families import FAMILIES, parse_config
from qquant.families.decoder import Block, embed
from qquant.plan.parallel import parallel_sizes
from qquant.plan.plan import Plan
from qquant.recipe import AwqArtifact, GgufArtifact, GptqArtifact
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import padded, padded_size, zero_padded_codes
from tests.conftest import SMALL
from tests.worlds.builds import CPU, HEAD, quiet

QWEN2 = FAMILIES["qwen2"]
ARTIFACTS = {
    "GPTQ-Int4": "{name: a, format: gptq, bits: 4, group_size: 32}",
    "GPTQ-Int8": "{name: b, format: gptq, bits: 8, group_size: -1}",
    "AWQ": "{name: c, format: awq, group_size: 64, ratios: 4}",
    "GGUF/model-q8_0.gguf": "{name: d, format: gguf, type: q8_0}",
    "GGUF/model-q4_0.gguf": "{name: e, format: gguf, type: q4_0}",
}
ALL = tuple(ARTIFACTS.values())
EXACT = ("GPTQ-Int4", "GPTQ-Int8", "AWQ", "GGUF/model-q8_0.gguf")


def load(tmp_path, pad, entries=ALL):
    path = tmp_path / "recipe.yaml"
    head = HEAD.replace("calibration:", f"pad_intermediate: {pad}\ncalibration:").replace(
        "windows: 3", "windows: 1, answer_length: 0"
    )
    ungated = (entry.replace("{", "{gates: {defaults: false}, ", 1) for entry in entries)  # random weights pass no gate
    path.write_text(head + "".join(f"  - {entry}\n" for entry in ungated))
    return recipe.load(str(path))


def build(tmp_path, folder, pad, entries=ALL):
    loaded = load(tmp_path, pad, entries)
    checkpoint = padded(Checkpoint.open(folder), loaded)
    out = tmp_path / f"out-{pad}"
    return pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), out, CPU, quiet), out


def test_a_padded_build_is_the_unpadded_one_with_zeros(make_checkpoint, tmp_path):
    folder = make_checkpoint(intermediate_size=192, num_hidden_layers=1, vocab_size=8192)
    plain, before = build(tmp_path, folder, "none")
    report, after = build(tmp_path, folder, "256")
    assert report.passed
    for name in ARTIFACTS:
        narrow, wide = open_weights(before / f"model-{name}"), open_weights(after / f"model-{name}")
        assert (narrow.config.intermediate, wide.config.intermediate) == (192, 256)
        changed = 0
        for tensor in narrow.family.shapes(narrow.config):
            old, new = narrow.tensor(tensor), wide.tensor(tensor)
            inside = new[tuple(slice(0, size) for size in old.shape)]
            assert inside.count_nonzero() == new.count_nonzero(), f"{name} {tensor}: padding is not zero"
            if name in EXACT:
                assert torch.equal(inside, old), f"{name} {tensor}"
            changed += old.shape != new.shape
        assert changed == 3
    for old, new in zip(plain.artifacts, report.artifacts, strict=True):
        assert new.kl_divergence < 1.1 * old.kl_divergence + 1e-6


def test_config_and_index_say_the_new_size(make_checkpoint, tmp_path):
    _, out = build(tmp_path, make_checkpoint(intermediate_size=192), "auto", [ARTIFACTS["AWQ"]])
    assert json.loads((out / "model-AWQ" / "config.json").read_text())["intermediate_size"] == 512


@pytest.mark.slow
def test_an_interrupted_padded_build_of_an_own_stream_continues(make_checkpoint, tmp_path, monkeypatch):
    from qquant.solve import solver

    folder = make_checkpoint(intermediate_size=192)
    entry = "{name: a, format: gptq, bits: 4, group_size: 32, propagate: true}"
    _, whole = build(tmp_path, folder, "256", [entry])
    expected = (whole / "model-GPTQ-Int4" / "model.safetensors").read_bytes()
    finish, done = solver.Solver.finish, []

    def dying(self, *given):
        if done:
            raise KeyboardInterrupt
        finish(self, *given)
        done.append(self.layer)

    monkeypatch.setattr(solver.Solver, "finish", dying)
    (tmp_path / "again").mkdir()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "again", folder, "256", [entry])
    monkeypatch.undo()
    _, out = build(tmp_path / "again", folder, "256", [entry])
    assert (out / "model-GPTQ-Int4" / "model.safetensors").read_bytes() == expected


def test_the_view_pads_and_computes_the_same(make_checkpoint, tmp_path):
    plain = Checkpoint.open(make_checkpoint(intermediate_size=192, dtype=torch.float32))
    view = padded(plain, load(tmp_path, 256))
    assert view.raw_config["intermediate_size"] == view.config.intermediate == 256
    assert view.fingerprint != plain.fingerprint
    gate, down = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "down"))
    for name, shape in ((gate, (256, 64)), (down, (64, 256))):
        value, original = view.tensor(name), plain.tensor(name)
        assert value.shape == shape
        assert torch.equal(value[: original.shape[0], : original.shape[1]], original)
        assert value.count_nonzero() == original.count_nonzero()
        for start, stop in ((0, 10), (60, 64), (180, 200), (200, 256)):
            assert torch.equal(view.rows(name, start, stop), value[start:stop])
    tokens = torch.arange(40)
    x = embed(plain, tokens, torch.float32)
    outputs = [Block(c.family, c.config, c.block(0), torch.float32).forward(x) for c in (plain, view)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_nothing_to_pad_is_the_same_checkpoint(make_checkpoint, tmp_path):
    plain = Checkpoint.open(make_checkpoint(intermediate_size=256))
    assert padded(plain, load(tmp_path, 256)) is plain
    assert padded(plain, load(tmp_path, "none")) is plain


GPTQ128 = GptqArtifact(name="a", format="gptq", bits=4)
SIZES = [  # Qwen1.5: 0.5B, 1.8B, 4B, 7B, 14B, 32B, 72B, 110B, and what 1024 makes of them
    (2816, 3072), (5504, 6144), (6912, 7168), (11008, 11264), (13696, 14336), (27392, 27648), (24576, 24576), (49152, 49152),
]  # fmt: skip


@pytest.mark.parametrize(("size", "expected"), SIZES)
def test_sizes_of_qwen(size, expected):
    assert padded_size(size, 1024, [GPTQ128]) == padded_size(size, "auto", [GPTQ128]) == expected
    assert padded_size(size, "none", [GPTQ128]) == size


def test_auto_looks_at_every_artifact():
    awq = AwqArtifact(name="b", format="awq", group_size=64)
    assert padded_size(5504, "auto", [awq]) == 5632
    assert padded_size(5504, "auto", [awq, GgufArtifact(name="c", format="gguf", type="q4_k_m")]) == 6144
    assert padded_size(5504, "auto", [GgufArtifact(name="c", format="gguf", type="q4_0")]) == 5632


def config(**changes):
    return parse_config(SMALL | changes, "test")


def test_parallel_sizes_of_qwen():
    seven = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32}
    fourteen = {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 40}
    assert parallel_sizes(QWEN2, config(**seven, intermediate_size=11008), 128) == (1, 2)
    assert parallel_sizes(QWEN2, config(**fourteen, intermediate_size=13696), 128) == (1,)
    assert parallel_sizes(QWEN2, config(**fourteen, intermediate_size=14336), 128) == (1, 2, 4, 8)
    four = {"hidden_size": 2560, "num_attention_heads": 20, "num_key_value_heads": 20}
    assert parallel_sizes(QWEN2, config(**four, intermediate_size=7168), 128) == (
        1,
        2,
        4,
    )  # 20 heads do not divide by 8
    shared = fourteen | {"num_key_value_heads": 8}
    assert parallel_sizes(QWEN2, config(**shared, intermediate_size=27392), 128) == (1, 2)
    assert parallel_sizes(QWEN2, config(**shared, intermediate_size=27648), 128) == (1, 2, 4, 8)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [8, 32])
def test_widened_codes_mean_zero(symmetric, width):
    grid = UniformGrid(4, width, symmetric, "minmax")
    weight = torch.randn(6, 32)
    params = grid.fit(weight)
    quantized = QuantizedTensor(nearest(weight, *params.step_and_offset(), grid), params, grid)
    wide = zero_padded_codes(quantized, (9, 48)).dequantize()
    assert torch.equal(wide[:6, :32], quantized.dequantize())
    assert wide.count_nonzero() == quantized.dequantize().count_nonzero()


@pytest.mark.parametrize("value", ["1000", "1024.0", "true", "yes", "-1"])
def test_other_values_are_refused(tmp_path, value):
    with pytest.raises(
        UsageError, match=r"recipe\.yaml:4:\d+: pad_intermediate: .* allowed: none, auto, 256, 512, 1024, 2048"
    ):
        load(tmp_path, value)
