"""The operators: torch references against float64, Triton kernels in the interpreter, the runtime layout bit by bit."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from qquant.errors import InputError, UsageError
from qquant.kernels import cpu_int4, jit, many_rows, wq_mm
from qquant.kernels.column_sums import column_sums
from qquant.kernels.dequant import dequant
from qquant.kernels.gptq_block import gptq_block
from qquant.kernels.gram import gram
from qquant.kernels.group_products import group_products
from qquant.kernels.group_search import group_search
from qquant.kernels.unpack import pack_params, pack_runtime, repack, tile, unpack_params, unpack_runtime
from tests.worlds import ROOT
from tests.worlds.interpreter_cases import CASES, gptq_problem, relative, weights


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=str(ROOT),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# -- Triton, interpreted


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory):
    """Results of `tests/worlds/interpreter_cases.py`, run once for all workers of a session."""
    triton, numpy = (tuple(map(int, importlib.metadata.version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        pytest.skip("this triton's interpreter cannot loop to a run-time bound with this numpy")
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    results = shared / "interpreter.json"
    with FileLock(f"{results}.lock"):
        if not results.exists():
            done = run_python("-m", "tests.worlds.interpreter_cases", TRITON_INTERPRET="1")
            assert done.returncode == 0, done.stderr
            results.write_text(done.stdout)
    return json.loads(results.read_text())


@pytest.mark.parametrize("case", CASES)
def test_triton_kernel_in_the_interpreter(case, interpreted):
    result = interpreted[case]
    assert "failed" not in result, result["failed"]
    assert result["error"] <= result["limit"]


# -- the runtime layout


def test_layout_is_what_its_head_says():
    """Column 32 i + 2 r + h of a tile is at bit b * i + 16 h of word r."""
    for bits in (4, 8):
        codes = torch.randint(0, 1 << bits, (2, 2 * tile(bits)), dtype=torch.uint8)
        words = pack_runtime(codes, bits).tolist()
        for row in range(2):
            for column, code in enumerate(codes[row].tolist()):
                block, inside = divmod(column, tile(bits))
                plane, pair = divmod(inside, 32)
                word = words[row][16 * block + pair // 2] & 0xFFFFFFFF
                assert word >> (bits * plane + 16 * (pair % 2)) & ((1 << bits) - 1) == code


@given(st.sampled_from((4, 8)), st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_packing_is_exact(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack_runtime(codes, bits)
    assert packed.shape == (rows, 16 * -(-columns // tile(bits)))
    assert torch.equal(unpack_runtime(packed, bits, columns), codes.to(torch.int16))


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_params_are_exact(rows, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randint(-32768, 32768, (rows, groups), dtype=torch.int16, generator=generator).view(torch.float16)
    scales = torch.where(scales.isnan(), torch.ones_like(scales), scales)
    zeros = torch.randint(0, 257, (rows, groups), generator=generator)
    found, found_zeros = unpack_params(pack_params(scales, zeros), 8)
    assert torch.equal(found, scales.float())
    assert torch.equal(found_zeros, zeros.float())
    found, found_zeros = unpack_params(pack_params(scales, None), 4)
    assert torch.equal(found, scales.float())
    assert (found_zeros == 8).all()


def test_zero_points_in_the_middle_need_no_room():
    codes, scales = torch.zeros(4, 128, dtype=torch.uint8), torch.ones(4, 1, dtype=torch.float16)
    assert repack(codes, scales, torch.full((4, 1), 8.0), 4)[1].dtype == torch.float16
    assert repack(codes, scales, torch.tensor([[8.0], [8], [8], [7]]), 4)[1].dtype == torch.int32


@pytest.mark.parametrize(
    ("bits", "columns", "group"), [(4, 128, 16), (4, 256, 96), (8, 128, 48), (3, 128, 128), (4, 128, 0)]
)
def test_groups_that_the_layout_lacks_are_refused(bits, columns, group):
    with pytest.raises(InputError, match="no kernel layout"):
        wq_mm.check_group(columns, group, bits)


def test_scales_of_another_type_are_refused():
    with pytest.raises(InputError, match="float16"):
        repack(torch.zeros(4, 128, dtype=torch.uint8), torch.ones(4, 1), None, 4)


# -- products and dequantization

SHAPES = [
    (4, 5, 128, True),
    (4, 43, 32, False),
    (4, 3, 64, False),
    (4, 1, 96, True),
    (8, 107, 32, False),
    (8, 2, 128, True),
]


@pytest.mark.parametrize(("bits", "groups", "width", "symmetric"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantization_rounds_once(bits, groups, width, symmetric, dtype):
    qweight, params, truth = weights(70, groups, width, bits, symmetric)
    out = dequant(qweight, params, bits, width, dtype)
    assert out.shape == truth.shape
    assert torch.equal(out, truth.to(dtype))


@pytest.mark.parametrize(("bits", "groups", "width", "symmetric"), SHAPES)
@pytest.mark.parametrize(("operator", "rows"), [*[(wq_mm.wq_mm, n) for n in (1, 3, 16, 64)], (many_rows.many_rows, 70)])
def test_product_sums_in_float32(bits, groups, width, symmetric, operator, rows):
    qweight, params, truth = weights(40, groups, width, bits, symmetric)
    bias = torch.randn(40).half()
    for dtype, limit in ((torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        x = torch.randn(rows, groups * width).to(dtype)
        y = operator(x, qweight, params, bias, bits, width)
        assert y.dtype == dtype
        assert relative(y, x.double() @ truth.T + bias.double()) <= limit


def test_linear_takes_any_number_of_rows():
    qweight, params, truth = weights(48, 2, 128, 4, False)
    bias = torch.randn(48).bfloat16()
    for shape in ((1,), (2, 3), (5, 40)):
        x = torch.randn(*shape, 256).bfloat16()
        y = many_rows.quantized_linear(x, qweight, params, bias, 4, 128)
        assert y.shape == (*shape, 48)
        assert relative(y, x.double() @ truth.T + bias.double()) <= 8e-3


def cpu_weights(bits, width, symmetric, rows=128, groups=4):
    codes = torch.randint(0, 1 << bits, (rows, groups * width), dtype=torch.uint8)
    scales = (torch.rand(rows, groups) * 0.02 + 0.001).half()
    zeros = None if symmetric else torch.randint(0, 1 << bits, (rows, groups)).float()
    zero = 1 << (bits - 1) if zeros is None else zeros.double().repeat_interleave(width, 1)
    return codes, scales, zeros, (codes.double() - zero) * scales.double().repeat_interleave(width, 1)


needs_int4 = (
    pytest.mark.skipif(  # not block_rows() is None: where it should find the packing and does not, tests have to fail
        torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
        reason="torch's int4 product is known for AVX2 and AVX512",
    )
)


@needs_int4
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [32, 128, 512])
def test_cpu_products_are_close_and_the_codes_stay(bits, symmetric, width):
    codes, scales, zeros, truth = cpu_weights(bits, width, symmetric)
    packed = cpu_int4.pack_cpu(codes, scales, zeros, bits)
    assert torch.equal(cpu_int4.unpack_cpu(packed), codes)
    assert torch.equal(cpu_int4.dequantize_cpu(packed, torch.float32).double(), truth)
    block = cpu_int4.block_rows()
    assert torch.equal(cpu_int4.dequantize_cpu(packed, torch.float32, slice(block, None)).double(), truth[block:])
    bias = torch.randn(128)
    for rows in (3, cpu_int4.MAX_ROWS[bits] + 1):
        x = torch.randn(rows, 4 * width).bfloat16()
        y = cpu_int4.cpu_linear(x, packed, bias)
        assert relative(y, x.double() @ truth.T + bias.double()) <= 8e-3
        assert cpu_int4.cpu_linear(x.half(), packed, bias.half()).dtype == torch.float16


@needs_int4
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "groups"), [(32, 5), (128, 9), (512, 3)])
@pytest.mark.parametrize("unpacks", [True, False])
def test_weights_of_many_rows_are_the_dequantized_ones(bits, symmetric, width, groups, unpacks, monkeypatch):
    """To the bit, whatever is unpacked at a time; of a product by float32 too, which is rounded once."""
    assert cpu_int4.unpacks()
    monkeypatch.setattr(cpu_int4, "unpacks", lambda: unpacks)
    monkeypatch.setattr(cpu_int4, "CHUNK", 192)
    codes, scales, zeros, truth = cpu_weights(bits, width, symmetric, 256, groups)
    packed = cpu_int4.pack_cpu(codes, scales, zeros, bits)
    order = cpu_int4._unpacked_order(128, cpu_int4.block_rows())
    for dtype in (torch.float32, torch.bfloat16):
        weight = cpu_int4.transposed_cpu(packed, dtype, slice(64, 192))
        assert torch.equal(weight, truth[64:192][order].T.to(dtype))
    x = torch.randn(7, width * groups).bfloat16()
    for quick in (True, False):
        monkeypatch.setattr(cpu_int4, "multiplies", lambda dtype, quick=quick: quick)
        y = cpu_int4.many_rows(x, packed)
        assert y.dtype == torch.bfloat16
        wanted = x.double() @ truth.T
        assert relative(y, wanted) <= (4e-3 if quick else 1.7e-3)


@needs_int4
def test_cpu_int4_refuses_what_the_operator_cannot_do():
    codes, scales, zeros, _ = cpu_weights(4, 128, True, rows=70)
    assert not cpu_int4.available(70, 512, 128)
    assert not cpu_int4.available(64, 480, 96)
    assert cpu_int4.operator_group(1024, 512) == 128
    with pytest.raises(InputError, match="rows in blocks"):
        cpu_int4.pack_cpu(codes, scales, zeros, 4)


# -- sums of the calibration pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gram_adds_in_place(dtype):
    h = torch.randn(40, 40)
    h = h + h.T
    x = torch.randn(5000, 40).to(dtype)
    expected = h.double() + x.double().T @ x.double()
    gram(h, x)
    assert relative(h, expected) <= 1e-6
    again = h.clone()
    gram(again, x[:0])
    assert torch.equal(again, h)


def test_gram_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="gram adds"):
        gram(torch.zeros(4, 4), torch.zeros(3, 5))
    with pytest.raises(InputError, match="gram adds"):
        gram(torch.zeros(5, 5).double(), torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_column_sums(dtype):
    x = torch.randn(500, 40).to(dtype)
    x[7, 3] = -30
    absolute, squares, largest = column_sums(x)
    assert relative(absolute, x.double().abs().sum(0)) <= 1e-6
    assert relative(squares, x.double().square().sum(0)) <= 1e-6
    assert float(largest) == 30
    x[0, 0] = torch.nan
    assert bool(column_sums(x)[2].isnan())
    with pytest.raises(InputError, match="column_sums takes"):
        column_sums(x[:0])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 4096), (300, 11008), (1, 64)])
def test_column_sums_on_a_gpu(shape):
    x = torch.randn(shape).bfloat16()
    x[0, 1] = -30
    absolute, squares, largest = column_sums(x.cuda())
    assert relative(absolute.cpu(), x.double().abs().sum(0)) <= 1e-6
    assert relative(squares.cpu(), x.double().square().sum(0)) <= 1e-6
    assert float(largest) == 30
    x[0, 0] = torch.nan
    assert bool(column_sums(x.cuda())[2].isnan())


# -- the operators as torch sees them


def samples():
    qweight, params, _ = weights(16, 2, 128, 4, False)
    problem = gptq_problem(8, 16, 16, per_column=False)
    x = torch.randn(3, 256).half()
    yield wq_mm.wq_mm, (x, qweight.clone(), params.clone(), None, 4, 128)
    yield wq_mm.wq_mm, (x, qweight.clone(), params.clone(), torch.randn(16).half(), 4, 128)
    yield many_rows.many_rows, (x, qweight.clone(), params.clone(), torch.randn(16).half(), 4, 128)
    yield dequant, (qweight.clone(), params.clone(), 4, 128, torch.bfloat16)
    yield gptq_block, (*problem, 16)
    yield group_search, (torch.randn(4, 64), torch.rand(64), 32, 16, True)
    yield gram, (torch.zeros(8, 8), torch.randn(3, 8))
    yield column_sums, (torch.randn(3, 8).half(),)
    yield group_products, (torch.zeros(3, 1, 2, 1, 2), [torch.randn(3, 8)], torch.randn(8, 8), 4)


@pytest.mark.parametrize("index", range(9))
def test_opcheck(index):
    operator, arguments = list(samples())[index]
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_path_says_what_runs():
    assert jit.path("wq_mm", "cpu") == "torch reference"
    assert jit.path("gptq_block", torch.device("cuda", 1)) == ("triton" if jit.AVAILABLE else "torch reference")
    with pytest.raises(UsageError, match="wq_mn"):
        jit.path("wq_mn", "cpu")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from qquant.kernels import column_sums, cpu_int4, dequant, gptq_block, gram, group_products, group_search, jit, wq_mm
from qquant.kernels.unpack import repack
qweight, params = repack(torch.full((16, 128), 9, dtype=torch.uint8), torch.ones(16, 1).half(), None, 4)
assert (wq_mm.wq_mm(torch.ones(1, 128).half(), qweight, params, None, 4, 128) == 128).all()
print(jit.path("wq_mm", "cuda"))
"""


def test_everything_works_without_triton():
    done = run_python("-c", WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch reference"


# -- launch choices


def test_table_is_well_formed():
    table = json.loads(jit.TABLE.read_text())
    assert set(table) == {"device", "capability", "date", "early", "entries"}
    for key, entry in table["entries"].items():
        operator, bits, rows, columns, outputs = key.split("/")
        config = wq_mm.Config(*entry)
        assert operator == "wq_mm"
        assert int(bits) in (4, 8)
        assert int(rows) in wq_mm.BUCKETS
        assert int(columns) % 32 == 0
        assert int(outputs) > 0
        assert config.rows in (16, 32, 64, 128, 256)
        assert config.warps in (1, 2, 4, 8)
        assert 1 <= config.splits <= 64
        assert 2 <= config.stages <= 8
    if table["entries"]:
        assert table["device"]
        time.strptime(table["date"], "%Y-%m-%d")


def test_rule_of_thumb_fills_the_device():
    for bits in (4, 8):
        for rows in (1, 16, 17, 64):
            for columns, outputs in ((1024, 1024), (2816, 1024), (4096, 22016), (13696, 5120)):
                config = wq_mm.rule_of_thumb(bits, rows, columns, outputs, 132)
                tiles = columns // tile(bits)
                assert tiles // config.splits >= 4
                assert config.splits * -(-outputs // config.rows) >= min(132, tiles // 4 * -(-outputs // config.rows))
    assert [wq_mm.bucket(rows) for rows in (1, 2, 4, 5, 16, 17, 64)] == [1, 4, 4, 16, 16, 64, 64]


def test_blocks_of_many_rows_fill_the_device_and_pad_little(monkeypatch):
    many_rows.config_for.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    for bits, most in many_rows.MOST_ROWS.items():
        for rows in range(wq_mm.MAX_ROWS + 1, most + 1):
            for columns, outputs in ((1024, 1024), (2816, 1024), (4096, 22016), (11008, 4096)):
                config = many_rows.config_for(torch.device("cuda"), bits, rows, columns, outputs)
                across, down, splits = many_rows.grid(rows, outputs, config)
                assert across * config.rows - rows < 64
                assert columns // tile(bits) // splits >= 8 or splits == 1
                assert across * down * splits >= 132 or splits in (4, 8) or columns // tile(bits) < 22 * splits
    many_rows.config_for.cache_clear()


def test_only_hopper_multiplies_many_rows_packed(monkeypatch):
    def asked(bits=4, columns=4096, device="cuda"):
        many_rows.most_rows.cache_clear()
        return many_rows.most_rows(torch.device(device), bits, columns)

    monkeypatch.setattr(many_rows, "AVAILABLE", True)
    monkeypatch.setattr(many_rows, "capability", lambda _: (9, 0))
    assert (asked(4), asked(8)) == (many_rows.MOST_ROWS[4], many_rows.MOST_ROWS[8])
    assert asked(columns=4100) == wq_mm.MAX_ROWS, "rows of x begin at odd addresses"
    assert asked(device="cpu") == wq_mm.MAX_ROWS
    monkeypatch.setattr(many_rows, "capability", lambda _: (8, 0))
    assert asked() == wq_mm.MAX_ROWS
    many_rows.most_rows.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("groups", "width", "outputs"), [(32, 128, 4096), (43, 64, 1000), (8, 128, 11008), (5, 512, 72)]
)
def test_many_rows_on_a_gpu(bits, symmetric, groups, width, outputs):
    qweight, params, truth = weights(outputs, groups, width, bits, symmetric)
    qweight, params, truth = qweight.clone().cuda(), params.clone().cuda(), truth.cuda()
    bias = torch.randn(outputs, device="cuda")
    for dtype, limit in ((torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        whole = torch.randn(513, groups * width, device="cuda").to(dtype)
        for rows in (65, 96, 128, 129, 192, 256, many_rows.MOST_ROWS[bits]):
            x = whole[1 : rows + 1]
            y = many_rows.many_rows(x, qweight, params, bias.to(dtype), bits, width)
            assert relative(y, x.double() @ truth.T + bias.to(dtype).double()) <= limit
            assert torch.equal(y, many_rows.many_rows(x, qweight, params, bias.to(dtype), bits, width))
    with pytest.raises(UsageError, match="at most"):
        many_rows.many_rows(whole, qweight, params, None, bits, width)


def test_kernels_start_early_on_hopper_only(monkeypatch):
    assert not jit.starts_early(torch.device("cpu"))
    monkeypatch.setattr(jit, "capability", lambda _: (9, 0))
    assert jit.starts_early(torch.device("cuda")) == json.loads(jit.TABLE.read_text())["early"]
    monkeypatch.setattr(jit, "early", False)
    assert not jit.starts_early(torch.device("cuda"))
    monkeypatch.setattr(jit, "early", True)
    monkeypatch.setattr(jit, "capability", lambda _: (8, 0))
    assert not jit.starts_early(torch.device("cuda"))
