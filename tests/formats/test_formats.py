"""GPTQ and AWQ layouts: the bytes of the reference libraries, round trips, and what other tools write."""

import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qquant.algorithms.grid import QuantizedTensor, UniformGrid, UniformParams, finite
from qquant.formats.awq import AwqLayout
from qquant.formats.bits import pack_words, unpack_words
from qquant.formats.gptq import GptqLayout
from tests.worlds import GOLDEN


def cases(file):
    names = {name.split(".")[0] for name in zipfile.ZipFile(GOLDEN / file).namelist()}
    return sorted(names)


def load(file, case):
    with np.load(GOLDEN / file) as archive:
        return {
            name.removeprefix(f"{case}."): torch.from_numpy(archive[name])
            for name in archive.files
            if name.split(".")[0] == case
        }


def parse(case):
    parts = {part[0]: int(part[1:]) for part in case.replace("group", "g").split("_")}
    return parts["w"], parts["g"]


def quantized(golden, bits, width, symmetric):
    params = UniformParams(golden["scales"].half(), golden["zeros"].float())
    return QuantizedTensor(golden["codes"].to(torch.uint8), params, UniformGrid(bits, width, symmetric, "minmax"))


@pytest.mark.parametrize("case", cases("autogptq_pack.npz"))
def test_gptq_bytes_equal_autogptq(case):
    golden = load("autogptq_pack.npz", case)
    bits, group = parse(case)
    tensor = quantized(golden, bits, golden["codes"].shape[1] // golden["scales"].shape[1], symmetric=True)
    layout = GptqLayout(bits, group)
    packed = layout.pack(tensor)
    for suffix in layout.suffixes:
        assert torch.equal(packed[suffix], golden[f"packed.{suffix}"].to(packed[suffix].dtype)), suffix
    assert torch.equal(tensor.dequantize(), golden["dequantized"])
    assert torch.equal(layout.dequantize(packed), golden["dequantized"])


@pytest.mark.parametrize("case", cases("autoawq_pack.npz"))
def test_awq_bytes_equal_autoawq(case):
    golden = load("autoawq_pack.npz", case)
    _, group = parse(case)
    tensor = quantized(golden, 4, golden["codes"].shape[1] // golden["scales"].shape[1], symmetric=False)
    layout = AwqLayout(group)
    packed = layout.pack(tensor)
    for suffix in layout.suffixes:
        assert torch.equal(packed[suffix], golden[f"packed.{suffix}"].to(packed[suffix].dtype)), suffix
    assert torch.equal(tensor.dequantize(), golden["dequantized"])
    assert torch.equal(layout.dequantize(packed), golden["dequantized"])


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_words_hold_every_code(bits, rows, words, seed):
    codes = torch.randint(0, 1 << bits, (rows, words * 32 // bits), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    packed = pack_words(codes, bits)
    slots = 32 // bits
    by_hand = [
        [sum(int(codes[r, w * slots + j]) << (bits * j) for j in range(slots)) for w in range(words)]
        for r in range(rows)
    ]
    assert [[word & 0xFFFFFFFF for word in row] for row in packed.tolist()] == by_hand
    assert torch.equal(unpack_words(packed, bits), codes)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(["gptq4", "gptq8", "awq"]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_round_trip(kind, groups, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = 8 if kind == "gptq8" else 4
    shape = (rows * 32, groups * 32)
    codes = torch.randint(0, 1 << bits, shape, generator=generator).to(torch.uint8)
    scales = torch.randn(shape[0], groups, generator=generator).half()
    zeros = torch.full((shape[0], groups), 1 << (bits - 1)).float()
    if kind == "awq":
        zeros = torch.randint(0, 16, zeros.shape, generator=generator).float()
    tensor = QuantizedTensor(codes, UniformParams(scales, zeros), UniformGrid(bits, 32, kind != "awq", "minmax"))
    layout = AwqLayout(32) if kind == "awq" else GptqLayout(bits, 32)
    packed = layout.pack(tensor)
    assert {suffix: tuple(value.shape) for suffix, value in packed.items()} == {
        s: shape for s, _, shape in layout.entries(shape)
    }
    back = layout.unpack(packed)
    assert torch.equal(back.codes, codes)
    assert torch.equal(back.dequantize(), tensor.dequantize())


def test_gptq_activation_order_of_other_tools():
    """A file with a permuted g_idx dequantizes by g_idx, not by position."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 64), generator=generator).to(torch.uint8)
    scales = torch.rand(32, 2, generator=generator).half()
    grid = UniformGrid(4, 32, symmetric=True, search="minmax")
    packed = GptqLayout(4, 32).pack(QuantizedTensor(codes, UniformParams(scales, torch.full((32, 2), 8.0)), grid))
    index = torch.randint(0, 2, (64,), generator=generator).to(torch.int32)
    expected = (codes.float() - 8) * scales.float()[:, index.long()]
    assert torch.equal(GptqLayout(4, 32).dequantize(packed | {"g_idx": index}), expected)


def test_gptq_v2_zeros_are_not_shifted():
    packed = GptqLayout(4, 32).pack(
        QuantizedTensor(
            torch.full((32, 32), 9, dtype=torch.uint8),
            UniformParams(torch.ones(32, 1).half(), torch.full((32, 1), 8.0)),
            UniformGrid(4, 32, symmetric=True, search="minmax"),
        )
    )
    assert packed["qzeros"].unique().item() == 0x77777777
    as_v2 = packed | {"qzeros": torch.full_like(packed["qzeros"], -0x77777778)}  # 0x88888888
    assert torch.equal(GptqLayout(4, 32, shift=0).dequantize(as_v2), GptqLayout(4, 32).dequantize(packed))


@pytest.mark.parametrize("shape", [(32, 64), (32, 48), (33, 64), (32, 96)])
def test_shapes_that_do_not_fit_are_refused(shape):
    rows, columns = shape
    said = f"[{rows}, {columns}] needs rows and columns divisible by 32 and columns by the group size 32"
    assert GptqLayout(4, 32).problems(shape) == (None if rows % 32 == columns % 32 == 0 else said)
    said = f"[{rows}, {columns}] needs rows divisible by 8 and columns by the group size 32"
    assert AwqLayout(32).problems(shape) == (None if rows % 8 == columns % 32 == 0 else said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
def test_one_odd_element_is_found_anywhere(dtype, odd):
    for place in (0, 17, 998):
        value = torch.randn(999).to(dtype)
        assert finite(value)
        value[place] = odd
        assert not finite(value)
    assert finite(torch.empty(0))
