"""The operators: torch references against float64, Triton kernels in the interpreter, the runtime layout bit by bit."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from qquant.errors import InputError, UsageError
from qquant.kernels import cpu_int4, jit, wq_mm
from qquant.kernels.column_sums import column_sums
from qquant.kernels.dequant import dequant
from qquant.kernels.gptq_block import gptq_block, in_strips
from qquant.kernels.gram import gram
from qquant.kernels.group_search import group_search
from qquant.kernels.unpack import pack_params, pack_runtime, repack, tile, unpack_params, unpack_runtime
from tests.worlds import ROOT
from tests.worlds.interpreter_cases import CASES, gptq_definition, gptq_problem, relative, weighted_error, weights


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
@pytest.mark.parametrize("rows", [1, 3, 16, 64])
def test_product_sums_in_float32(bits, groups, width, symmetric, rows):
    qweight, params, truth = weights(40, groups, width, bits, symmetric)
    bias = torch.randn(40).half()
    for dtype, limit in ((torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        x = torch.randn(rows, groups * width).to(dtype)
        y = wq_mm.wq_mm(x, qweight, params, bias, bits, width)
        assert y.dtype == dtype
        assert relative(y, x.double() @ truth.T + bias.double()) <= limit


def test_linear_takes_any_number_of_rows():
    qweight, params, truth = weights(48, 2, 128, 4, False)
    bias = torch.randn(48).bfloat16()
    for shape in ((1,), (2, 3), (5, 40)):
        x = torch.randn(*shape, 256).bfloat16()
        y = wq_mm.quantized_linear(x, qweight, params, bias, 4, 128)
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
def test_cpu_int4_refuses_what_the_operator_cannot_do():
    codes, scales, zeros, _ = cpu_weights(4, 128, True, rows=70)
    assert not cpu_int4.available(70, 512, 128)
    assert not cpu_int4.available(64, 480, 96)
    assert cpu_int4.operator_group(1024, 512) == 128
    with pytest.raises(InputError, match="rows in blocks"):
        cpu_int4.pack_cpu(codes, scales, zeros, 4)


# -- the solver's operators


@pytest.mark.parametrize("columns", [1, 16, 40, 128])
@pytest.mark.parametrize("levels", [16, 256])
def test_gptq_block_is_its_definition(columns, levels):
    problem = gptq_problem(300, columns, levels, per_column=columns == 40)
    before = [t.clone() for t in problem]
    codes, errors = gptq_block(*problem, levels)
    true_codes, true_errors = gptq_definition(*problem, levels)
    assert (codes == true_codes).float().mean() >= 0.999
    same = (codes == true_codes).all(1)
    assert relative(errors[same], true_errors[same]) <= 1e-4
    assert codes.is_contiguous()
    assert errors.is_contiguous()
    for now, then in zip(problem, before, strict=True):
        assert torch.equal(now, then), "an input changed"


def test_gptq_block_takes_views():
    w, u, step, offset = gptq_problem(50, 64, 16, per_column=False)
    expected = gptq_block(w, u, step, offset, 16)
    column_major = u.T.contiguous().T
    one_step = step[:, :1].expand(-1, 64)
    found = gptq_block(torch.cat([w, w], 1)[:, :64], column_major, one_step, offset, 16)
    assert torch.equal(found[0], expected[0])


def scan(weight, importance, width, levels, symmetric):
    """The least error of every group over a dense scan."""
    grouped = weight.view(len(weight), -1, width)
    if symmetric:
        span, zero = 2 * grouped.abs().amax(-1) / (levels - 1), torch.full(grouped.shape[:2], levels // 2.0)
        trials = [(span * f * sign, zero) for f in torch.linspace(0.4, 1.15, 150).tolist() for sign in (1, -1)]
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        span = (high - low) / (levels - 1)
        zero = (-low / span.clamp_min(1e-12)).round()
        trials = [
            (span * f, (zero + shift).clamp(0, levels - 1))
            for f in torch.linspace(0.4, 1.15, 75).tolist()
            for shift in range(-2, 3)
        ]
    errors = [
        weighted_error(weight, s.half().clamp(-65504, 65504) + (s == 0), z, importance, width, levels)
        for s, z in trials
    ]
    return torch.stack(errors).amin(0)


def minmax(weight, importance, width, levels, symmetric):
    grouped = weight.view(len(weight), -1, width)
    if symmetric:
        scale, zero = 2 * grouped.abs().amax(-1) / (levels - 1), torch.full(grouped.shape[:2], levels // 2.0)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / (levels - 1)
        zero = (-low / scale.half().float()).round().clamp(0, levels - 1)
    return weighted_error(weight, scale.half(), zero, importance, width, levels)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [32, 128])
def test_group_search_is_nearly_the_best(symmetric, width):
    weight = torch.distributions.StudentT(4.0).sample((40, 256)) * 0.02
    importance = torch.exp(torch.randn(256))
    scales, zeros = group_search(weight, importance, width, 16, symmetric)
    found = weighted_error(weight, scales, zeros, importance, width, 16)
    assert found.sum() <= 1.02 * scan(weight, importance, width, 16, symmetric).sum()
    assert (found <= minmax(weight, importance, width, 16, symmetric) * (1 + 1e-5)).all()
    assert ((zeros == zeros.round()) & (zeros >= 0) & (zeros <= 15)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_group_search_at_eight_bits_is_no_worse_than_minmax(symmetric):
    weight = torch.randn(64, 512) * 0.02
    importance = torch.exp(torch.randn(512))
    scales, zeros = group_search(weight, importance, 128, 256, symmetric)
    found = weighted_error(weight, scales, zeros, importance, 128, 256)
    assert (found <= minmax(weight, importance, 128, 256, symmetric) * (1 + 1e-4)).all()
    assert found.sum() <= 0.95 * minmax(weight, importance, 128, 256, symmetric).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_group_search_survives_odd_groups(symmetric):
    weight = torch.randn(6, 64) * 0.02
    weight[0], weight[1], weight[2], weight[3], weight[4] = 0, 0.5, -0.5, weight[3] * 1e-8, weight[4] * 1e8
    scales, zeros = group_search(weight, torch.ones(64), 32, 16, symmetric)
    assert torch.isfinite(scales).all()
    assert (scales != 0).all()
    assert (scales[0] == 1).all()
    constant = weighted_error(weight, scales, zeros, torch.ones(64), 32, 16)[1:3]
    assert (constant <= 32 * (0.5 * 2**-10) ** 2).all(), "a constant group is one level, up to float16"


def test_group_search_does_not_depend_on_the_company():
    """Rows are searched in chunks; a row's result must not depend on where it falls."""
    weight, importance = torch.randn(1500, 256) * 0.02, torch.rand(256) + 0.1
    scales, zeros = group_search(weight, importance, 128, 16, False)
    some = torch.tensor([3, 700, 1499])
    alone = group_search(weight[some], importance, 128, 16, False)
    errors = [weighted_error(weight[some], *pair, importance, 128, 16) for pair in (alone, (scales[some], zeros[some]))]
    assert torch.allclose(*errors, rtol=1e-6)


def test_group_search_with_a_gram_matrix():
    weight = torch.randn(40, 96) * 0.02
    x = torch.randn(500, 96) @ (torch.eye(96) + 0.5 * torch.randn(96, 96))
    whole = (x.T @ x / len(x)).double()
    blocks = torch.stack([whole[i : i + 32, i : i + 32] for i in range(0, 96, 32)]).float()

    def output_error(scales, zeros):
        grouped = weight.double().view(40, 3, 32)
        scale, zero = scales.double().unsqueeze(-1), zeros.double().unsqueeze(-1)
        e = grouped - scale * ((grouped / scale + zero).round().clamp(0, 15) - zero)
        return torch.einsum("ngk,gkl,ngl->ng", e, blocks.double(), e)

    with_blocks = output_error(*group_search(weight, blocks, 32, 16, True))
    with_diagonal = output_error(*group_search(weight, whole.diagonal().float(), 32, 16, True))
    assert with_blocks.sum() < with_diagonal.sum()
    diagonal_blocks = torch.diag_embed(whole.diagonal().float().view(3, 32))
    assert torch.equal(
        group_search(weight, diagonal_blocks, 32, 16, True)[0],
        group_search(weight, whole.diagonal().float(), 32, 16, True)[0],
    )


def test_group_search_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="do not divide"):
        group_search(torch.randn(4, 100), torch.ones(100), 32, 16, True)
    with pytest.raises(InputError, match="importance of shape"):
        group_search(torch.randn(4, 96), torch.ones(95), 32, 16, True)


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


def test_gptq_block_in_strips():
    w, u, step, offset = gptq_problem(40, 300, 16, per_column=True)

    def work(*arguments):
        *given, into = arguments
        for target, value in zip(into, gptq_block(*given), strict=True):
            target.copy_(value)

    codes, errors = in_strips(work, w, u, step, offset, 16)
    expected_codes, expected = gptq_block(w, u, step, offset, 16)
    assert float((codes != expected_codes).float().mean()) < 1e-3  # ties
    same = (codes == expected_codes).all(1)
    assert relative(errors[same], expected[same].double()) < 1e-4


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
    yield dequant, (qweight.clone(), params.clone(), 4, 128, torch.bfloat16)
    yield gptq_block, (*problem, 16)
    yield group_search, (torch.randn(4, 64), torch.rand(64), 32, 16, True)
    yield gram, (torch.zeros(8, 8), torch.randn(3, 8))
    yield column_sums, (torch.randn(3, 8).half(),)


@pytest.mark.parametrize("index", range(7))
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
from qquant.kernels import column_sums, cpu_int4, dequant, gptq_block, gram, group_search, jit, wq_mm
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


def test_kernels_start_early_on_hopper_only(monkeypatch):
    assert not jit.starts_early(torch.device("cpu"))
    monkeypatch.setattr(jit, "_capability", lambda _: (9, 0))
    assert jit.starts_early(torch.device("cuda")) == json.loads(jit.TABLE.read_text())["early"]
    monkeypatch.setattr(jit, "early", False)
    assert not jit.starts_early(torch.device("cuda"))
    monkeypatch.setattr(jit, "early", True)
    monkeypatch.setattr(jit, "_capability", lambda _: (8, 0))
    assert not jit.starts_early(torch.device("cuda"))
