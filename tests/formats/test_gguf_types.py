"""Block types: ggml's bytes for ggml's weights, the `gguf` package's values for any bytes, and grids that say the same."""

import subprocess
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qquant.devices import POLICIES
from qquant.errors import InputError, NumericalError, UsageError
from qquant.formats.gguf import exact, fields, search
from qquant.formats.gguf.blocks import BlockParams
from qquant.formats.gguf.quantize import dequantize, grid, pack, quantize, unpack
from qquant.formats.gguf.types import TYPES
from tests.worlds import GOLDEN

VECTORS = np.load(GOLDEN / "ggml_blocks.npz")
WEIGHT, IMPORTANCE = torch.from_numpy(VECTORS["weight"]), torch.from_numpy(VECTORS["importance"])
FLOATS = ("f32", "f16", "bf16")
GRIDS = [name for name, kind in TYPES.items() if kind.levels]
BLOCKS = [name for name in TYPES if name not in FLOATS]
WEIGHTED = {"none": None, "importance": IMPORTANCE}
CASES = [key for key in VECTORS if "." in key]
BY_ROW = ["Q4_0.importance", "Q4_1.importance", "Q5_0.importance", "Q5_1.importance"]  # weights depend on the whole row


def reference(name):
    return gguf.GGMLQuantizationType[name.upper()]


def random_blocks(name, rows=3, blocks=4, seed=0, finite=True):
    """Any bytes; with `finite`, float16 fields without infinity and NaN."""
    kind = TYPES[name]
    data = torch.randint(
        0, 256, (rows, blocks * kind.bytes), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    if finite:
        start = 0
        for field in kind.fields:
            if isinstance(field, fields.Half):
                data.view(rows, blocks, kind.bytes)[:, :, start + 1] &= 0xBB
            start += field.bytes
    return data


def same_bits(a, b):
    """Equal bit for bit, any NaN being equal to any other."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    nan = np.isnan(a) & np.isnan(b)
    return a.shape == b.shape and bool((nan | (a.view(np.uint32) == b.view(np.uint32))).all())


def test_golden_covers_every_type():
    assert sorted(CASES) == sorted(f"{reference(name).name}.{mode}" for name in BLOCKS for mode in WEIGHTED)
    assert len(CASES) == 24


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_ggmls(case):
    name, mode = case.split(".")
    blocks = quantize(WEIGHT, name.lower(), WEIGHTED[mode])
    assert np.array_equal(blocks.numpy(), VECTORS[case])


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_ggmls_without_numpy(case, monkeypatch):
    """What an accelerator runs: torch alone, element by element."""
    monkeypatch.setattr(exact, "on_cpu", lambda x: False)
    name, mode = case.split(".")
    assert np.array_equal(quantize(WEIGHT, name.lower(), WEIGHTED[mode]).numpy(), VECTORS[case])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_bytes_are_ggmls_on_a_gpu(case):
    name, mode = case.split(".")
    importance = None if mode == "none" else IMPORTANCE.cuda()
    assert np.array_equal(quantize(WEIGHT.cuda(), name.lower(), importance).cpu().numpy(), VECTORS[case])


def test_threads_do_not_matter():
    weight, importance = WEIGHT.repeat(9, 1), IMPORTANCE
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(
                (quantize(weight, "q4_k", importance), grid("q4_k").fit(weight, importance).step_and_offset())
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_einsum_is_used_only_if_it_rounds_products(monkeypatch):
    """On a machine where numpy fuses multiply and add, the slower sums give the same bytes."""
    monkeypatch.setattr(exact, "_einsum_rounds_products", lambda: False)
    for name in ("q4_k", "q6_k", "iq4_nl"):
        assert np.array_equal(quantize(WEIGHT, name, IMPORTANCE).numpy(), VECTORS[f"{reference(name).name}.importance"])


@pytest.mark.parametrize("name", TYPES)
def test_constants_are_ggufs(name):
    kind = TYPES[name]
    assert kind.ggml_id == reference(name).value
    assert (kind.block, kind.bytes) == gguf.GGML_QUANT_SIZES[reference(name)]
    assert sum(field.bytes for field in kind.fields) in (0, kind.bytes)


@pytest.mark.parametrize("name", FLOATS)
def test_plain_numbers_are_ggufs(name):
    expected = gguf.quants.quantize(WEIGHT.numpy(), reference(name)).view(np.uint8)
    blocks = quantize(WEIGHT, name)
    assert np.array_equal(blocks.numpy(), expected)
    assert same_bits(dequantize(blocks, name), gguf.quants.dequantize(expected.view(gguf_view(name)), reference(name)))


def gguf_view(name):
    return {"f32": np.float32, "f16": np.float16, "bf16": np.uint8}[name]


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_decoder_is_ggufs_on_any_bytes(name, finite):
    with np.errstate(all="ignore"):
        for seed in range(4):
            blocks = random_blocks(name, seed=seed, finite=finite)
            assert same_bits(dequantize(blocks, name), gguf.quants.dequantize(blocks.numpy(), reference(name)))


@pytest.mark.parametrize("case", CASES)
def test_decoder_is_ggufs_on_golden_blocks(case):
    name = case.split(".")[0]
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(VECTORS[case], reference(name))
    assert same_bits(dequantize(torch.from_numpy(VECTORS[case]), name.lower()), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_unpack_and_pack_are_inverse_on_any_bytes(name):
    blocks = random_blocks(name, finite=False)
    assert torch.equal(pack(*unpack(blocks, name)), blocks)


@pytest.mark.parametrize("name", GRIDS)
def test_levels_give_the_decoded_values(name):
    for blocks in (random_blocks(name), quantize(WEIGHT[:16], name, IMPORTANCE)):
        codes, params = unpack(blocks, name)
        step, offset = params.step_and_offset()
        assert int(codes.max()) < grid(name).levels
        shape = (len(codes), -1, grid(name).width)
        values = codes.view(shape).float() * step.unsqueeze(-1) - offset.unsqueeze(-1)
        assert torch.equal(values.view(len(codes), -1), dequantize(blocks, name))


@pytest.mark.parametrize("mode", WEIGHTED)
@pytest.mark.parametrize("name", GRIDS)
def test_fit_is_what_quantize_stores(name, mode):
    blocks = torch.from_numpy(VECTORS[f"{reference(name).name}.{mode}"])
    codes, stored = unpack(blocks, name)
    fitted = grid(name).fit(WEIGHT, WEIGHTED[mode])
    for field in ("d", "dmin", "scales", "mins"):
        a, b = getattr(fitted, field), getattr(stored, field)
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert torch.equal(pack(codes, fitted), blocks)


@pytest.mark.parametrize("name", GRIDS)
def test_zero_step_keeps_the_codes_of_the_search(name):
    """A scale too small for float16 is stored as zero; ggml keeps the codes it had."""
    tiny = torch.linspace(-1e-9, 1e-9, 256).view(1, 256).clone()
    blocks = quantize(tiny, name)
    assert not dequantize(blocks, name).any()
    assert unpack(blocks, name)[0].unique().numel() > 1


@pytest.mark.parametrize("name", BLOCKS)
def test_pieces_and_neighbours_do_not_matter(name, monkeypatch):
    whole = quantize(WEIGHT, name, IMPORTANCE)
    tiny = replace(POLICIES["cpu"], coded=1, rounded=3 * 1024)
    monkeypatch.setitem(POLICIES, "cpu", tiny)
    assert torch.equal(quantize(WEIGHT, name, IMPORTANCE), whole)
    assert torch.equal(dequantize(whole, name), torch.cat([dequantize(row[None], name) for row in whole]))
    assert torch.equal(quantize(WEIGHT[5:6], name, IMPORTANCE), whole[5:6])


@pytest.mark.parametrize("case", [case for case in CASES if case not in BY_ROW])
def test_one_block_alone_has_the_same_bytes(case):
    """Sums over a single block must not fall into numpy's pairwise summation."""
    name, mode = case.split(".")
    name = name.lower()
    kind, importance = TYPES[name], WEIGHTED[mode]
    expected = VECTORS[f"{reference(name).name}.{mode}"]
    for row, block in ((0, 0), (3, 1), (20, 2), (31, 3)):
        columns = slice(block * kind.block, (block + 1) * kind.block)
        part = quantize(WEIGHT[row : row + 1, columns], name, None if importance is None else importance[columns])
        assert np.array_equal(part.numpy()[0], expected[row, block * kind.bytes : (block + 1) * kind.bytes])


@pytest.mark.parametrize("name", TYPES)
def test_no_rows(name):
    kind = TYPES[name]
    blocks = quantize(torch.empty(0, 512), name)
    assert blocks.shape == (0, 512 // kind.block * kind.bytes)
    assert dequantize(blocks, name).shape == (0, 512)
    if kind.levels:
        assert grid(name).fit(torch.empty(0, 512)).step_and_offset()[0].shape == (0, 512 // kind.width)


def test_bfloat16_is_upcast():
    weight = WEIGHT.bfloat16()
    assert torch.equal(quantize(weight, "q4_k", IMPORTANCE), quantize(weight.float(), "q4_k", IMPORTANCE))


def test_input_is_left_alone():
    for name in BLOCKS:
        weight, importance = WEIGHT[:1].clone(), IMPORTANCE.clone()
        quantize(weight, name, importance)
        assert torch.equal(weight, WEIGHT[:1])
        assert torch.equal(importance, IMPORTANCE)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(GRIDS),
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 3),
    blocks=st.integers(1, 3),
)
def test_pack_keeps_codes_and_params(name, seed, rows, blocks):
    data = random_blocks(name, rows, blocks, seed)
    _, params = unpack(data, name)
    columns = blocks * TYPES[name].block
    codes = torch.randint(
        0, TYPES[name].levels, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    again, stored = unpack(pack(codes, params), name)
    assert torch.equal(again, codes)
    for a, b in zip(stored.step_and_offset(), params.step_and_offset(), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]),
    exponent=st.integers(-8, 4),
    seed=st.integers(0, 2**31),
)
def test_values_on_a_grid_survive(name, exponent, seed):
    """Without importance: a block that uses the ends of a float16 grid is stored without loss."""
    kind = TYPES[name]
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, kind.levels, (2, 64), generator=generator)
    codes[:, ::32], codes[:, 1::32] = 1 if name == "q8_0" else 0, kind.levels - 1
    weight = (codes - kind.centre).float() * 2.0**exponent
    assert torch.equal(dequantize(quantize(weight, name), name), weight)


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(BLOCKS), seed=st.integers(0, 2**31), weighted=st.booleans())
def test_rows_are_independent(name, seed, weighted):
    order = torch.randperm(len(WEIGHT), generator=torch.Generator().manual_seed(seed))[:7]
    mode = "importance" if weighted else "none"
    blocks = quantize(WEIGHT[order], name, WEIGHTED[mode])
    assert np.array_equal(blocks.numpy(), VECTORS[f"{reference(name).name}.{mode}"][order.numpy()])


@pytest.mark.parametrize("name", GRIDS)
def test_importance_lowers_the_weighted_error(name):
    """ggml's search weighs errors with importance * sqrt(energy + x^2); on Gaussian rows that helps the plain measure too."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)) * 0.02
    importance = torch.exp(torch.randn(1024, generator=torch.Generator().manual_seed(2)) * 1.5)

    def error(blocks):
        return float(((dequantize(blocks, name) - weight).square() * importance).sum())

    plain, weighted = error(quantize(weight, name)), error(quantize(weight, name, importance))
    assert weighted == plain if name == "q8_0" else weighted < 0.97 * plain


def test_rounding_wraps_as_ggml_does():
    x = torch.tensor([0.5, 1.5, -2.5, 4194303.0, torch.inf, -torch.inf, torch.nan, 1e30])
    bits = (x.numpy() + np.float32(12582912.0)).view(np.int32) & 0x7FFFFF
    expected = np.where(np.isnan(x.numpy()), 0, bits - 0x400000)
    assert exact.nearest_int(x).tolist() == expected.tolist()
    assert exact.nearest_int(x)[:4].tolist() == [0, 2, -2, 4194303]


def test_sums_run_from_left_to_right():
    for columns in (1, 2, 33):
        x = torch.randn(100, columns) * 10.0 ** torch.randint(-5, 5, (100, columns))
        total, product = torch.zeros(2, columns)
        for row in x:
            total += row
            product += row * (row + 1)
        assert torch.equal(exact.sum_in_order(x), total)
        assert torch.equal(exact.sum_in_order(x.t().contiguous().t()), total)
        assert np.array_equal(exact.dot(x, x + 1), product)


def test_square_roots_are_correctly_rounded():
    x = torch.rand(10000) * 10.0 ** torch.randint(-30, 30, (10000,))
    assert torch.equal(exact.square_root(x.clone()), x.double().sqrt().float())


def test_slow_rounding_agrees_with_fast_rounding():
    x = WEIGHT[:16].reshape(-1, 32).t().contiguous()
    fast, slow = (search._affine(x, x.abs(), 15, search.IMPORTANCE, exact) for exact in (False, True))
    for a, b in zip(fast, slow, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: quantize(WEIGHT, "q9_9"), UsageError, "no GGUF block type 'q9_9'"),
        (lambda: dequantize(torch.zeros(1, 18, dtype=torch.uint8), "Q4_0"), UsageError, "no GGUF block type 'Q4_0'"),
        (lambda: quantize(torch.zeros(2, 288), "q4_k"), UsageError, "288 is no multiple"),
        (lambda: quantize(torch.zeros(256), "q4_k"), InputError, "two dimensions"),
        (lambda: quantize(WEIGHT, "q4_k", IMPORTANCE[:-1]), InputError, r"importance has shape \(1023,\)"),
        (lambda: quantize(WEIGHT, "q4_k", -IMPORTANCE), NumericalError, "finite and not negative"),
        (lambda: quantize(WEIGHT, "q4_k", IMPORTANCE / 0), NumericalError, r"importance \["),
        (lambda: quantize(torch.tensor([[0.0, float("nan")] * 16]), "q4_0"), NumericalError, r"weight \[0, 1\] is nan"),
        (
            lambda: quantize(torch.tensor([[1.0] * 31 + [float("-inf")]]), "q8_0"),
            NumericalError,
            r"weight \[0, 31\] is -inf",
        ),
        (lambda: dequantize(torch.zeros(1, 19, dtype=torch.uint8), "q4_0"), InputError, "18 bytes"),
        (lambda: grid("iq4_nl"), UsageError, "not an evenly spaced grid"),
        (lambda: grid("f16"), UsageError, "not an evenly spaced grid"),
        (lambda: unpack(torch.zeros(1, 32, dtype=torch.uint8), "f16"), UsageError, "plain number format"),
        (lambda: unpack(random_blocks("iq4_xs"), "iq4_xs")[1].step_and_offset(), UsageError, "not evenly spaced"),
        (
            lambda: pack(torch.zeros(2, 64, dtype=torch.uint8), BlockParams(TYPES["q4_0"], torch.zeros(2, 1).half())),
            InputError,
            r"need d of shape \(2, 2\)",
        ),
    ],
)
def test_errors_are_typed(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_constants_need_no_torch():
    """`qquant plan` reads block sizes; torch and numpy would cost it seconds."""
    code = (
        "import sys, types, qquant\n"
        "package = types.ModuleType('qquant.formats'); package.__path__ = [qquant.__path__[0] + '/formats']\n"
        "sys.modules['qquant.formats'] = package\n"
        "from qquant.formats.gguf import mix, types\n"
        "assert types.TYPES['q4_k'].row_bytes(512) == 288\n"
        "assert not {'torch', 'numpy', 'gguf'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
