"""Type mixes: llama-quantize's own maps for every Qwen1.5 size, and exact sizes."""

import json
import math
from typing import get_args

import gguf
import pytest

from qquant.errors import UsageError
from qquant.families import FAMILIES, ModelConfig
from qquant.formats.gguf.mix import FILE_TYPES, MIXES, ModelShape, fitting, tensor_types
from qquant.formats.gguf.types import TYPES
from qquant.recipe import GgufType
from tests.worlds import GOLDEN

SIZES = json.loads((GOLDEN / "type_maps.json").read_text())["sizes"]
HIDDEN = {"0.5B": 1024, "1.8B": 2048, "4B": 2560, "7B": 4096, "14B": 5120, "32B": 5120, "72B": 8192, "110B": 8192}
VOCAB = {"0.5B": 151936, "1.8B": 151936, "4B": 151936, "7B": 151936}  # the larger ones: 152064


def shape_of(size, **changes):
    entry = SIZES[size]
    values = {name: entry[name] for name in ("layers", "heads", "kv_heads", "intermediate", "tied")}
    values |= {"hidden": HIDDEN[size], "vocab": VOCAB.get(size, 152064)} | changes
    values |= {"head_dim": values["hidden"] // values["heads"], "epsilon": 1e-6, "rope_theta": 1e6, "positions": 32768}
    return ModelShape(FAMILIES["qwen2"], ModelConfig(**values))


def expected_types(roles):
    types = {}
    for role, runs in roles.items():
        if isinstance(runs, str):
            types[role] = runs.lower()
        else:
            layers = [name.lower() for name, count in runs for _ in range(count)]
            types |= {f"blk.{layer}.{role}.weight": name for layer, name in enumerate(layers)}
    return types


@pytest.mark.parametrize("size", SIZES)
def test_maps_are_llama_quantizes(size):
    maps = SIZES[size]["maps"]
    assert len(maps) == 32
    for key, roles in maps.items():
        file_type, _, imatrix = key.partition("+")
        types = tensor_types(file_type.lower(), shape_of(size), bool(imatrix)).types
        matrices = {name: kind for name, kind in types.items() if name.endswith(".weight") and "norm" not in name}
        assert matrices == expected_types(roles), key


def test_every_file_type_of_a_recipe_has_a_mix():
    assert set(get_args(GgufType)) <= set(MIXES)
    assert set(MIXES) == set(FILE_TYPES)


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_file_types_have_llama_cpps_numbers(file_type):
    names = {
        name.removeprefix("MOSTLY_").removeprefix("ALL_").lower(): member.value
        for name, member in gguf.LlamaFileType.__members__.items()
    }
    assert FILE_TYPES[file_type] == names[file_type]


def nbytes(mix, shape):
    """Bytes of every tensor in the type that it has."""
    shapes = shape.matrices() | {name: (length,) for name, length in shape.vectors().items()}
    return {name: TYPES[mix.types[name]].nbytes(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("size", "file_type", "gigabytes", "bits"),
    [
        ("7B", "q4_k_m", 4.761, 4.93),
        ("7B", "q2_k", 3.098, 3.21),
        ("14B", "q4_k_m", 9.185, 5.19),
        ("14B", "q3_k_m", 7.412, 4.19),
        ("1.8B", "q5_k_m", 1.371, 5.97),
        ("0.5B", "q4_k_m", 0.314, 5.41),
        ("32B", "iq4_xs", 17.729, 4.36),
        ("72B", "q6_k", 59.309, 6.56),
        ("72B", "q8_0", 76.816, 8.50),
    ],
)
def test_sizes_are_known(size, file_type, gigabytes, bits):
    shape = shape_of(size)
    total = sum(nbytes(tensor_types(file_type, shape, imatrix=False), shape).values())
    count = sum(map(math.prod, shape.matrices().values())) + sum(shape.vectors().values())
    assert total / 1e9 == pytest.approx(gigabytes, abs=6e-4)
    assert 8 * total / count == pytest.approx(bits, abs=6e-3)


def test_bytes_are_exact():
    mix = tensor_types("q4_k_m", shape_of("14B"), imatrix=True)
    assert mix.types["blk.0.ffn_down.weight"] == "q8_0"
    sizes = nbytes(mix, shape_of("14B"))
    assert sizes["blk.0.ffn_down.weight"] == 5120 * 13696 // 32 * 34
    assert sizes["token_embd.weight"] == 152064 * 5120 // 256 * 144
    assert sizes["blk.3.attn_k.bias"] == 4 * 5120
    assert set(sizes) == set(mix.types)
    assert len(mix.types) == 40 * 12 + 3


@pytest.mark.parametrize(
    ("size", "count"), [("0.5B", 0), ("1.8B", 24), ("4B", 0), ("7B", 0), ("14B", 40), ("32B", 0), ("72B", 0)]
)
def test_fallbacks_are_listed(size, count):
    mix = tensor_types("q4_k_m", shape_of(size), imatrix=True)
    assert len(mix.fallbacks) == count
    for tensor, wanted, given in mix.fallbacks:
        assert tensor.endswith("ffn_down.weight")
        assert (wanted, given) in {("q4_k", "q5_0"), ("q6_k", "q8_0")}
        assert mix.types[tensor] == given


def test_fallback_ends_at_f16():
    assert fitting("q4_k", 512) == "q4_k"
    assert fitting("q4_k", 96) == "q5_0"
    assert fitting("q4_0", 96) == "q4_0"
    assert fitting("q4_k", 40) == "f16"
    assert fitting("q8_0", 40) == "f16"
    assert {fitting(name, 96) for name in TYPES} <= {
        "f32",
        "f16",
        "bf16",
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q8_0",
        "iq4_nl",
    }


def test_head_is_better_than_the_rest():
    untied = tensor_types("q2_k", shape_of("7B"), imatrix=True).types
    assert (untied["token_embd.weight"], untied["output.weight"]) == ("q2_k", "q6_k")
    tied = tensor_types("q2_k", shape_of("7B", tied=True), imatrix=True).types
    assert tied["token_embd.weight"] == "q6_k"
    assert "output.weight" not in tied
    small = tensor_types("q2_k", shape_of("7B", hidden=96, heads=3, kv_heads=3), imatrix=True)
    assert small.types["output.weight"] == "q8_0"
    assert ("token_embd.weight", "q2_k", "q4_0") in small.fallbacks


def test_plain_formats_are_uniform():
    for name in ("f32", "f16", "bf16"):
        types = tensor_types(name, shape_of("0.5B"), imatrix=True).types
        assert {kind for tensor, kind in types.items() if tensor.endswith(".weight") and "norm" not in tensor} == {name}
        assert types["blk.0.attn_q.bias"] == types["output_norm.weight"] == "f32"


def test_errors_are_typed():
    with pytest.raises(UsageError, match="unknown GGUF file type 'q4_k'"):
        tensor_types("q4_k", shape_of("7B"), imatrix=True)
    with pytest.raises(UsageError, match="q2_k_s needs an importance matrix"):
        tensor_types("q2_k_s", shape_of("7B"), imatrix=False)
    assert tensor_types("q2_k_s", shape_of("110B"), imatrix=True).types["blk.0.attn_v.weight"] == "q5_k"
