"""Kernels on a real GPU: right first, then how fast, in one run of a few minutes.

    python -m tests.bench.kernels_gpu --out FOLDER [--seconds 470] [--only correctness tune ...]

Sections, in order: ceilings (copy bandwidth, matrix rate), correctness of every Triton kernel against float64 on the shapes of four
models (random data, poisoned outputs), the tuner, `wq_mm` and `dequant` against cuBLAS and torch's int4 product, the solver's
operators on the 7B shapes against their floors, K-quants. Results go to FOLDER/kernels_gpu.json after every section, the launch
table to FOLDER/table.json, a summary to the terminal. A section that starts too late is left out and named.

`--only smoke` runs every kernel once on small shapes, for compute-sanitizer.
Timing: captured graphs over rotating weights (more than the L2 cache holds), medians of windows, contenders taking turns.
Needs torch, triton and this repository; nothing else.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import time
import traceback
import types
from functools import partial
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from qquant.kernels import dequant, gptq_block, gram, group_search, jit, many_rows, wq_mm
from qquant.kernels.unpack import pack_params, pack_runtime
from tests.bench import tune
from tests.bench.tune import GROUP, layers, random_layer, timed_graph
from tests.worlds import GOLDEN
from tests.worlds.interpreter_cases import gptq_definition, gptq_problem, weighted_error

DEVICE = "cuda"
TOKENS = 128 * 2048
BLOCKS_7B = 32
_plain_empty = torch.empty


@contextlib.contextmanager
def poisoned():
    """Fresh memory starts as NaN or as nonsense, so that an element that a kernel forgets is seen."""

    def empty(*args, **kwargs):
        made = _plain_empty(*args, **kwargs)
        return made.fill_(float("nan") if made.dtype.is_floating_point else 0x57)

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = _plain_empty


def relative(value, truth):
    """Frobenius norm of the difference over that of the truth; infinite for NaN."""
    error = float((value.double() - truth.double()).norm() / truth.double().norm())
    return error if error == error else float("inf")


def exact_layer(columns, outputs, bits, group, symmetric):
    """(qweight, params, float64 weights)."""
    codes = torch.randint(0, 1 << bits, (outputs, columns), dtype=torch.uint8, device=DEVICE)
    groups = columns // group
    sign = torch.randint(0, 2, (outputs, groups), device=DEVICE) * 2 - 1
    scales = (torch.rand(outputs, groups, device=DEVICE) * 0.02 + 0.001).half() * sign.half()
    zeros = None if symmetric else torch.randint(0, (1 << bits) + 1, (outputs, groups), device=DEVICE)
    zero = 1 << (bits - 1) if zeros is None else zeros.double().repeat_interleave(group, 1)
    truth = (codes.double() - zero) * scales.double().repeat_interleave(group, 1)
    return pack_runtime(codes, bits), pack_params(scales, zeros), truth


def microseconds(call, repeats=5):
    """Median of single calls by events, for calls of a millisecond and more."""
    call()
    torch.cuda.synchronize()
    found = []
    for _ in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) * 1e3)
    return statistics.median(found)


# -- ceilings


def ceilings(record):
    """Copy bandwidth in TB/s (read and written) and bf16 matrix rate in TFLOP/s, on random data."""
    source = torch.randn(1 << 30, device=DEVICE, dtype=torch.float32)
    copy = 2 * source.nbytes / microseconds(partial(torch.empty_like(source).copy_, source)) * 1e-6
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / microseconds(partial(torch.mm, a, b), 9) * 1e-6
    single = 2 * 8192**3 / microseconds(partial(torch.mm, a.float(), b.float()), 3) * 1e-6
    record.update(copy_tb_s=copy, bf16_tflop_s=rate, fp32_tflop_s=single)
    return [f"copy {copy:.2f} TB/s, bf16 product {rate:.0f} TFLOP/s, fp32 product {single:.0f} TFLOP/s"]


# -- correctness


def check_products(shapes, rows_list, variants, failures, worst, kinds=(torch.float16, torch.bfloat16)):
    for (columns, outputs), (bits, group, symmetric) in itertools.product(shapes, variants):
        qweight, params, truth = exact_layer(columns, outputs, bits, group, symmetric)
        label = f"{bits} bit g{group} {'sym' if symmetric else 'asym'} {columns} x {outputs}"
        for dtype, rows in itertools.product(kinds, rows_list):
            limit = 5e-4 if dtype == torch.float16 else 4e-3
            bias = torch.randn(outputs, device=DEVICE).to(dtype)
            x = torch.randn(rows, columns, device=DEVICE).to(dtype)
            with poisoned():
                y = wq_mm.wq_mm(x, qweight, params, bias, bits, group)
            again = wq_mm.wq_mm(x, qweight, params, bias, bits, group)
            error = relative(y, x.double() @ truth.T + bias.double())
            worst["wq_mm", str(dtype)] = max(worst.get(("wq_mm", str(dtype)), 0), error)
            if not error <= limit:
                failures.append(f"wq_mm {label} {dtype} {rows} rows: {error:.2e}")
            if not torch.equal(y, again):
                failures.append(f"wq_mm {label} {dtype} {rows} rows: another result the second time")
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            with poisoned():
                w = dequant.dequant(qweight, params, bits, group, dtype)
            if not torch.equal(w, truth.to(dtype)):
                failures.append(f"dequant {label} {dtype}: {relative(w, truth):.2e}, not exact")


def check_splits(failures):
    """Every configuration of the tuner on a shape with a prime number of tiles, and sums in a fixed order under load."""
    columns, outputs = 43 * 128, 1000
    counters = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    for bits in (4, 8):
        qweight, params, truth = exact_layer(columns, outputs, bits, 128, False)
        for rows in (3, 33, 64):
            x = torch.randn(rows, columns, device=DEVICE).bfloat16()
            expected = x.double() @ truth.T
            for height, warps in (*tune.SHAPES, *(tune.NARROW if rows <= 16 else ())):
                for splits in (1, 2, 5, 8, 43):
                    for stages in tune.STAGES[bits]:
                        config = wq_mm.Config(height, splits, warps, stages)
                        problem = (x, qweight, params, None, bits, 128, config, counters)
                        try:
                            with poisoned():
                                first = wq_mm.launch(*problem)
                        except OutOfResources:  # the tuner passes over it too
                            continue
                        same = all(torch.equal(first, wq_mm.launch(*problem)) for _ in range(5))
                        error = relative(first, expected)
                        if not error <= 4e-3 or not same or int(counters.abs().max()):
                            failures.append(f"{config} {bits} bit {rows} rows: {error:.2e}, repeatable {same}")
                            counters.zero_()


def check_streams(failures):
    """Two streams and a captured graph at once; each must get its own counters."""
    qweight, params, _ = exact_layer(4096, 4096, 4, 128, True)
    x = torch.randn(16, 4096, device=DEVICE).bfloat16()
    expected = wq_mm.wq_mm(x, qweight, params, None, 4, 128)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [wq_mm.wq_mm(x, qweight, params, None, 4, 128) for _ in range(20)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    outputs = []
    for turn in range(60):
        with torch.cuda.stream(streams[turn % 3]):
            if turn % 3 == 2:
                graph.replay()
            else:
                outputs.append(wq_mm.wq_mm(x, qweight, params, None, 4, 128))
    torch.cuda.synchronize()
    wrong = sum(not torch.equal(y, expected) for y in outputs + captured)
    if wrong:
        failures.append(f"wq_mm: {wrong} of {len(outputs) + len(captured)} results differ between streams")


def check_solver(rows_list, failures, worst):
    for rows in rows_list:
        for columns, levels in ((128, 16), (96, 16), (128, 256)):
            problem = [t.to(DEVICE) for t in gptq_problem(rows, columns, levels, per_column=columns == 96)]
            with poisoned():
                codes, errors = gptq_block.gptq_block(*problem, levels)
            true_codes, true_errors = (t.to(DEVICE) for t in gptq_definition(*problem, levels))
            different = float((codes != true_codes).float().mean())
            same = (codes == true_codes).all(1)
            error = relative(errors[same], true_errors[same])
            worst["gptq_block", "codes"] = max(worst.get(("gptq_block", "codes"), 0), different)
            if different > 1e-3 or not error <= 1e-4:
                failures.append(
                    f"gptq_block {rows} x {columns}, {levels} levels: {different:.2%} of codes, errors {error:.2e}"
                )
        for width, levels, symmetric in (
            (128, 16, True),
            (128, 16, False),
            (32, 16, True),
            (128, 256, True),
            (96, 16, False),
        ):
            weight = torch.randn(rows, 20 * width, device=DEVICE) * 0.02
            weight[0, :width] = 0
            importance = torch.exp(torch.randn(20 * width, device=DEVICE))
            with poisoned():
                found = group_search.group_search(weight, importance, width, levels, symmetric)
            expected = group_search.reference(weight, importance, width, levels, symmetric)
            ours, theirs = (weighted_error(weight, *pair, importance, width, levels) for pair in (found, expected))
            gap = float((ours.sum() - theirs.sum()).abs() / theirs.sum())
            worst["group_search", "error"] = max(worst.get(("group_search", "error"), 0), gap)
            if not gap <= 1e-4:
                failures.append(
                    f"group_search g{width}, {levels} levels, symmetric {symmetric}: error differs by {gap:.2e}"
                )


def check_gram(shapes, failures, worst):
    for rows, columns in shapes:
        for dtype in (torch.bfloat16, torch.float16):
            x = torch.randn(rows, columns, device=DEVICE).to(dtype)
            h = torch.randn(columns, columns, device=DEVICE)
            h += h.T.clone()
            expected = h.double() + x.double().T @ x.double()
            gram.gram(h, x)
            error = relative(h, expected)
            worst["gram", str(dtype)] = max(worst.get(("gram", str(dtype)), 0), error)
            if not error <= 1e-5 or not torch.equal(h, h.T):
                failures.append(f"gram {rows} x {columns} {dtype}: {error:.2e}, symmetric {torch.equal(h, h.T)}")


def correctness(record):
    """Every kernel against float64."""
    failures, worst = [], {}
    begun = time.monotonic()
    compiled = tune.compile_all(14)
    record["compile_seconds"] = time.monotonic() - begun
    if any(compiled):
        failures.append(f"{sum(map(bool, compiled))} of {len(compiled)} compiling processes failed")
    shapes = sorted({shape for model in ("0.5B", "1.8B", "7B", "14B") for shape in layers(model).values()})
    check_products(shapes, (1, 3, 16, 17, 64), tune.VARIANTS, failures, worst)
    uneven = ((4, 32, False), (8, 32, True), (4, 1376, True))
    check_products([(43 * 32, 100)], (1, 64), uneven, failures, worst, [torch.float16])
    check_splits(failures)
    check_streams(failures)
    check_solver((300, 4096), failures, worst)
    check_gram([(1000, 1024), (4096, 4096), (130, 200), (1, 64)], failures, worst)
    torch.cuda.synchronize()
    worst = {" ".join(key): value for key, value in worst.items()}
    record.update(failures=failures, worst=worst)
    return [
        f"kernels compiled in {record['compile_seconds']:.0f} s",
        f"correctness: {len(failures)} failures; worst "
        + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()),
        *(f"  FAILED {failure}" for failure in failures[:12]),
    ]


def smoke(record):
    """Every kernel once on small shapes with uneven edges, for compute-sanitizer."""
    failures, worst = [], {}
    variants = ((4, 128, False), (8, 128, True), (4, 32, True))
    check_products([(384, 200)], (1, 17), variants, failures, worst, [torch.bfloat16])
    check_solver((40,), failures, worst)
    check_gram([(130, 200)], failures, worst)
    record.update(failures=failures)
    return [f"smoke: {len(failures)} failures", *failures]


# -- the tuner


def tuner(record, folder, seconds):
    """Fill the launch table, and use it for the rest of this run."""
    table, times = tune.fill(["7B", "14B", "0.5B", "1.8B", "4B"], seconds, report=partial(print, flush=True))
    tune.write(table, folder / "table.json")
    jit.TABLE = folder / "table.json"
    wq_mm._table.cache_clear()
    wq_mm.config_for.cache_clear()
    gain = [rule / best for best, rule in times.values()]
    record.update(times={key: list(value) for key, value in times.items()})
    return [
        f"tuner: {len(times)} shapes, median gain over the rule of thumb {statistics.median(gain):.2f}x, at most {max(gain):.2f}x"
    ]


# -- speed of the runtime's operators


def torch_int4(columns, outputs, copies):
    """Calls of torch's int4 product on random weights, or None where this torch has none."""
    packed = []
    for _ in range(copies):
        raw = torch.randint(0, 256, (outputs, columns // 2), dtype=torch.uint8, device=DEVICE)
        affine = torch.rand(columns // GROUP, outputs, 2, device=DEVICE).bfloat16()
        packed.append((torch.ops.aten._convert_weight_to_int4pack(raw, 8), affine))
    return packed


def contest(contenders, rounds=3):
    """name -> (median us, spread) with the contenders taking turns."""
    found = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, calls in contenders.items():
            found[name].append(timed_graph(calls, windows=3)[0])
    return {name: (statistics.median(us), (max(us) - min(us)) / statistics.median(us)) for name, us in found.items()}


def products(record, bandwidth, deadline):
    """`wq_mm` against cuBLAS and torch's int4 product."""
    lines = [
        "us: ours int4 / int8, cuBLAS bf16 / fp16, torch int4; x = speed-up over bf16; floor = int4 bytes at copy bandwidth"
    ]
    for model in ("7B", "0.5B", "14B", "1.8B"):
        for name, (columns, outputs) in layers(model).items():
            if time.monotonic() > deadline:
                lines.append(f"{model} {name}: left out, no time")
                continue
            size = columns * outputs
            ours4 = random_layer(columns, outputs, 4, tune.copies_for(size / 2))
            ours8 = random_layer(columns, outputs, 8, tune.copies_for(size))
            wide = [
                torch.randn(outputs, columns, device=DEVICE, dtype=torch.bfloat16)
                for _ in range(tune.copies_for(size * 2))
            ]
            tiny = torch_int4(columns, outputs, tune.copies_for(size / 2))
            wq_mm.counters_of.cache_clear()  # every captured call below takes counters for good
            for rows in (1, 4, 16, 64):
                x = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
                contenders = {
                    "int4": [partial(wq_mm.wq_mm, x, *w, None, 4, GROUP) for w in ours4],
                    "int8": [partial(wq_mm.wq_mm, x, *w, None, 8, GROUP) for w in ours8],
                    "bf16": [partial(torch.nn.functional.linear, x, w) for w in wide],
                    "fp16": [partial(torch.nn.functional.linear, x.half(), w.half()) for w in wide],
                    "torch int4": [
                        partial(torch.ops.aten._weight_int4pack_mm, x, raw, GROUP, affine) for raw, affine in tiny
                    ],
                }
                found = contest(contenders)
                floor = (size * (0.5 + 2 / GROUP) + 2 * rows * (columns + outputs)) / bandwidth * 1e-6
                entry = {name: list(value) for name, value in found.items()} | {
                    "floor_us": floor,
                    "bytes_int4": size * (0.5 + 2 / GROUP),
                }
                record[f"{model} {name} {rows}"] = entry
                us = {key: value[0] for key, value in found.items()}
                lines.append(
                    f"{model:5}{name:8} M={rows:<3} {us['int4']:7.2f} {us['int8']:7.2f} | {us['bf16']:7.2f} {us['fp16']:7.2f} | "
                    f"{us['torch int4']:7.2f} | int4 {us['bf16'] / us['int4']:4.2f}x, {floor / us['int4']:4.0%} of floor {floor:.2f}; "
                    f"int8 {us['bf16'] / us['int8']:4.2f}x; spread {max(v[1] for v in found.values()):.0%}"
                )
            del ours4, ours8, wide, tiny
    return lines


def dequantizations(record, bandwidth):
    """`dequant` against the bandwidth of a copy, and the path for many rows against plain cuBLAS."""
    lines = []
    for model, name in (("7B", "gate_up"), ("7B", "o"), ("14B", "down"), ("0.5B", "gate_up")):
        columns, outputs = layers(model)[name]
        size = columns * outputs
        for bits in (4, 8):
            weights = random_layer(columns, outputs, bits, tune.copies_for(size * 2))
            us, _ = timed_graph([partial(dequant.dequant, *w, bits, GROUP, torch.bfloat16) for w in weights])
            moved = size * (2 + bits / 8 + 2 / GROUP)
            share = moved / us * 1e-6 / bandwidth
            record[f"dequant {bits} {model} {name}"] = {"us": us, "share_of_copy": share}
            lines.append(f"dequant {bits} bit {model} {name}: {us:.1f} us, {share:.0%} of copy bandwidth")
            if bits == 4 and model == "7B":
                wide = [dequant.dequant(*w, bits, GROUP, torch.bfloat16) for w in weights[:3]]
                for rows in (65, 512, 2048, 8192):
                    x = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
                    ours, _ = timed_graph(
                        [partial(many_rows.quantized_linear, x, *w, None, bits, GROUP) for w in weights[:3]]
                    )
                    plain, _ = timed_graph([partial(torch.nn.functional.linear, x, w) for w in wide])
                    record[f"many rows {name} {rows}"] = {"us": ours, "bf16_us": plain}
                    lines.append(
                        f"  {name} {rows} rows: {ours:.0f} us, cuBLAS bf16 {plain:.0f} us, {plain / ours:.2f}x"
                    )
    return lines


# -- the solver's operators


def add_product(h, x):
    h.add_(torch.mm(x.t(), x, out_dtype=torch.float32))


def factor(h):
    """U with U' U = H^-1, by one reversed Cholesky factor and one triangular inverse."""
    lower = torch.linalg.cholesky(h.flip(0, 1))
    return torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(h), device=h.device), upper=True)


def solve(weight, upper, step, offset):
    """GPTQ's loop over blocks, as the solver runs it."""
    work = weight.clone()
    for start in range(0, weight.shape[1], gptq_block.MAX_COLUMNS):
        stop = start + gptq_block.MAX_COLUMNS
        some = slice(start, stop)
        _, errors = gptq_block.gptq_block(work[:, some], upper[some, some], step[:, some], offset[:, some], 16)
        work[:, stop:].addmm_(errors, upper[some, stop:], alpha=-1)


def time_stage(columns, record, lines, matrix, single):
    """Gram matrix and factor for one width; microseconds of both for all calibration tokens, and (h, upper)."""
    x = torch.randn(16384, columns, device=DEVICE, dtype=torch.bfloat16)
    h = torch.zeros(columns, columns, device=DEVICE)
    ours, theirs = microseconds(partial(gram.gram, h, x)), microseconds(partial(add_product, h, x))
    floor = len(x) * columns**2 / matrix * 1e-6
    record[f"gram {columns}"] = {"us": ours, "mm_us": theirs, "floor_us": floor}
    lines.append(
        f"gram K={columns}: {ours / 1e3:.2f} ms for {len(x)} tokens ({2 * floor * matrix / ours:.0f} TFLOP/s counted as a full product), "
        f"torch.mm {theirs / 1e3:.2f}, floor {floor / 1e3:.2f}"
    )
    h.diagonal().add_(0.01 * h.diagonal().mean())
    whole, cholesky = microseconds(partial(factor, h), 3), microseconds(partial(torch.linalg.cholesky_ex, h), 3)
    floor = 2 / 3 * columns**3 / single * 1e-6
    record[f"factor {columns}"] = {"us": whole, "cholesky_us": cholesky, "floor_us": floor}
    lines.append(
        f"factor K={columns}: {whole / 1e3:.1f} ms (its Cholesky {cholesky / 1e3:.1f}), floor {floor / 1e3:.1f}"
    )
    return ours * TOKENS / len(x), whole, h, factor(h)


def time_matrix(name, outputs, h, upper, record, lines, single):
    """Search, one block and the whole solve of one stacked 7B matrix; microseconds."""
    columns = len(h)
    weight = torch.randn(outputs, columns, device=DEVICE) * 0.02
    importance = h.diagonal().contiguous()
    search = microseconds(partial(group_search.group_search, weight, importance, GROUP, 16, True), 3)
    scales, zeros = group_search.group_search(weight, importance, GROUP, 16, True)
    step = scales.float().repeat_interleave(GROUP, 1)
    offset = step * zeros.repeat_interleave(GROUP, 1)
    block = [t[:, :128].contiguous() for t in (weight, upper[:128], step, offset)]
    one, _ = timed_graph([partial(gptq_block.gptq_block, *block, 16)] * 8)
    whole = microseconds(partial(solve, weight, upper, step, offset), 3)
    record[f"solve 7B {name}"] = {"search_us": search, "block_us": one, "solve_us": whole}
    lines.append(
        f"7B {name}: search {search / 1e3:.2f} ms, one block {one:.0f} us ({one / 128:.2f} a column), solve {whole / 1e3:.1f} ms, "
        f"its trailing products' floor {outputs * columns**2 / single * 1e-9:.1f}"
    )
    return search, one * columns / 128, whole


def solver(record, rates):
    """Times on the 7B shapes against their floors."""
    lines, total = [], dict.fromkeys(("gram", "factor", "search", "column loop", "solve"), 0.0)
    for columns in (1024, 4096, 5120, 11008, 13696):
        grams, factors, h, upper = time_stage(columns, record, lines, rates["bf16_tflop_s"], rates["fp32_tflop_s"])
        stages = [(name, outputs) for name, (inputs, outputs) in layers("7B").items() if inputs == columns]
        total["gram"] += grams * len(stages)
        total["factor"] += factors * len(stages)
        for name, outputs in stages:
            search, loop, whole = time_matrix(name, outputs, h, upper, record, lines, rates["fp32_tflop_s"])
            total["search"] += search
            total["column loop"] += loop
            total["solve"] += whole
    record["7B seconds"] = {part: value * BLOCKS_7B * 1e-6 for part, value in total.items()}
    lines.append(
        "7B, 128 x 2048 tokens: " + ", ".join(f"{part} {value:.2f} s" for part, value in record["7B seconds"].items())
    )
    return lines


# -- K-quants


def gguf_types():
    """The module, also where what surrounds it (pydantic) is not installed."""
    try:
        return importlib.import_module("qquant.formats.gguf_types")
    except ModuleNotFoundError:
        package = types.ModuleType("qquant.formats")
        package.__path__ = [str(Path(__file__).parents[2] / "qquant" / "formats")]
        sys.modules["qquant.formats"] = package
        return importlib.import_module("qquant.formats.gguf_types")


def kquants(record):
    """Byte identity with ggml's blocks on the GPU, and speed against the CPU."""
    import numpy

    module = gguf_types()
    golden = numpy.load(GOLDEN / "ggml_blocks.npz")
    weight, importance = (torch.from_numpy(golden[name]) for name in ("weight", "importance"))
    names = sorted({key.split(".")[0] for key in golden.files if "." in key})
    lines, wrong = [], []
    big = torch.randn(2048, 8192, device=DEVICE) * 0.02
    weights = torch.rand(8192, device=DEVICE) + 0.1
    for name in names:
        for kind, used in (("none", None), ("importance", importance)):
            found = module.quantize(weight.to(DEVICE), name.lower(), None if used is None else used.to(DEVICE)).cpu()
            expected = torch.from_numpy(golden[f"{name}.{kind}"])
            if not torch.equal(found, expected):
                blocks = (found != expected).float().mean()
                wrong.append(f"{name} {kind}: {float(blocks):.3%} of bytes differ")
        us = microseconds(partial(module.quantize, big, name.lower(), weights), 3)
        start = time.perf_counter()
        module.quantize(big[:64].cpu(), name.lower(), weights.cpu())
        cpu = (time.perf_counter() - start) * 1e6 * len(big) / 64
        rates = big.numel() / us, big.numel() / cpu
        record[name] = {"gpu_million_per_s": rates[0], "cpu_million_per_s": rates[1]}
        lines.append(
            f"{name}: {rates[0]:.0f} million weights/s, on {torch.get_num_threads()} CPU threads {rates[1]:.1f}"
        )
    record["different"] = wrong
    return [
        f"K-quants: {2 * len(names) - len(wrong)} of {2 * len(names)} byte-identical",
        *(f"  {line}" for line in wrong),
        *lines,
    ]


# -- the run


def machine():
    """What the numbers belong to."""
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw",
        "--format=csv,noheader",
    ]
    try:
        card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as problem:
        card = f"nvidia-smi: {problem}"
    return {
        "card": card,
        "torch": torch.__version__,
        "triton": jit.triton.__version__,
        "path": jit.path("wq_mm", DEVICE),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=470)
    sections = ("ceilings", "correctness", "tune", "products", "dequant", "solver", "kquants")
    parser.add_argument("--only", nargs="+", choices=(*sections, "smoke"), default=sections)
    parser.add_argument("--table", type=Path, help="a launch table to use instead of the package's")
    options = parser.parse_args()
    if options.table and options.table.is_file():
        jit.TABLE = options.table
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    torch.manual_seed(0)
    results, summary = {"machine": machine()}, []
    rates = {"copy_tb_s": 4.3, "bf16_tflop_s": 790.0, "fp32_tflop_s": 50.0}

    def left():
        return options.seconds - (time.monotonic() - started)

    def run(name, least, section):
        if name not in options.only:
            return
        if left() < least:
            summary.append(f"{name}: left out, {left():.0f} s are too few")
            return
        begun, record = time.monotonic(), {}
        try:
            lines = section(record)
        except Exception:  # noqa: BLE001 one broken section must not cost the others their turn on the machine
            record["failed"] = traceback.format_exc()
            lines = [f"{name} FAILED", *record["failed"].splitlines()[-6:]]
        record["seconds"] = time.monotonic() - begun
        results[name] = record
        summary.extend([f"== {name} ({record['seconds']:.0f} s)", *lines])
        print("\n".join(summary[-len(lines) - 1 :]), flush=True)
        (options.out / "kernels_gpu.json").write_text(json.dumps(results, indent=1))
        torch.cuda.empty_cache()

    run("ceilings", 20, lambda record: ceilings(rates) if record.update(rates=rates) is None else [])
    run("smoke", 0, smoke)
    run("correctness", 60, correctness)
    run("tune", 150, lambda record: tuner(record, options.out, min(130, left() - 150)))
    run("products", 60, lambda record: products(record, rates["copy_tb_s"], time.monotonic() + min(90, left() - 60)))
    run("dequant", 20, lambda record: dequantizations(record, rates["copy_tb_s"]))
    run("solver", 20, lambda record: solver(record, rates))
    run("kquants", 20, kquants)
    results["machine after"] = machine()
    results["seconds"] = time.monotonic() - started
    (options.out / "kernels_gpu.json").write_text(json.dumps(results, indent=1))
    (options.out / "summary.txt").write_text("\n".join(summary) + "\n")
    print(f"\n{json.dumps(results['machine after'])}\n{results['seconds']:.0f} s\n" + "\n".join(summary))


if __name__ == "__main__":
    main()
