"""Every Triton kernel compiled for Hopper (sm_90), without a GPU, and its machine code read.

What these tests hold: nothing spills, matrix kernels use the warpgroup instruction (HGMMA), weights travel 16 bytes at a time, and
the main loop spends no more instructions on a weight than it did when RECORDED was written (by Triton minor version, + 5 %).
A weight costs an H100 5.1 lane-instructions at its full bandwidth of 3.0 TB/s and an H200 3.4 at 4.3 TB/s, all included.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qquant.kernels import (
    between,
    column_sums,
    dequant,
    elementwise,
    ggml_search,
    gptq_block,
    gram,
    group_products,
    group_search,
    many_rows,
    scaled_half,
    wq_mm,
)
from qquant.kernels import product as float32

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
VERSION = ".".join(triton.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted, not compiled, in this process"
)


@dataclass(frozen=True)
class Machine:
    """What cuobjdump says about one kernel."""

    instructions: list[tuple[int, str]]  # address, text
    registers: int
    stack: int
    shared: int

    def count(self, pattern):
        return sum(bool(re.search(pattern, text)) for _, text in self.instructions)

    @property
    def total(self):
        return len(self.instructions) - self.count(r"^NOP")

    def loop(self, using="", inner=False):
        """The longest stretch that a branch jumps back over, of those with an instruction `using`; the shortest, if `inner`."""
        place = {address: index for index, (address, _) in enumerate(self.instructions)}
        loops = []
        for index, (_, text) in enumerate(self.instructions):
            target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
            start = place.get(int(target[1], 16), index) if target else index
            body = [text for _, text in self.instructions[start : index + 1]]
            if len(body) > 1 and any(using in text for text in body):
                loops.append(body)
        return (min if inner else max)(loops, key=len, default=[])


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Compile afresh, and leave nothing in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        yield


def build(tmp_path, kernel, arguments, constants, **options):
    """Compile for sm_90. arguments: name -> type; pointers and integers of type "i32/16" are known to divide by 16."""
    names = list(kernel.arg_names)
    divisible = {
        (names.index(n),): [["tt.divisibility", 16]] for n, t in arguments.items() if t.startswith("*") or t == "i32/16"
    }
    signature = {n: arguments[n].removesuffix("/16") if n in arguments else "constexpr" for n in names}
    source = ASTSource(kernel, signature, constants, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True} | options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    dump = {
        flag: subprocess.run([BINARIES / "cuobjdump", flag, cubin], capture_output=True, text=True, check=True).stdout
        for flag in ("-sass", "-res-usage")
    }
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", dump["-sass"], re.MULTILINE)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", dump["-res-usage"])}
    instructions = [(int(address, 16), re.sub(r"^@!?U?P\w+\s+", "", text)) for address, text in lines]
    return Machine(instructions, usage["REG"], usage["STACK"], compiled.metadata.shared)


def product(
    tmp_path,
    bits=4,
    kind="fp16",
    rows=16,
    height=64,
    warps=4,
    stages=3,
    group=128,
    symmetric=True,
    inline=True,
    ahead=1,
    unroll=1,
):
    """`wq_mm` for up to `rows` rows, and the number of weights that a thread handles in one step of the loop."""
    pointers = {
        "x_at": f"*{kind}",
        "words_at": "*i32",
        "params_at": "*fp16" if symmetric else "*i32",
        "bias_at": f"*{kind}",
        "y_at": f"*{kind}",
        "partial_at": "*fp32",
        "counters_at": "*i32",
    }
    sizes = {"M": "i32", "N": "i32/16", "K": "i32/16", "tiles": "i32", "groups": "i32", "splits": "i32"}
    config = wq_mm.Config(height, 4, warps, stages, ahead, unroll)
    constants = wq_mm.constants(rows, 4096, bits, group, config, symmetric, bias=True, early=True) | {"INLINE": inline}
    options = {name: constants.pop(name) for name in ("launch_pdl", "num_warps", "num_stages", "enable_fp_fusion")}
    machine = build(tmp_path, wq_mm._kernel, {**pointers, **sizes}, constants, **options)
    return machine, unroll * height * 512 / bits / (32 * warps)


# case -> (arguments of `product`, most registers, instructions per weight in the main loop by Triton version)
PRODUCTS = {
    "4 bit fp16": ({}, 96, {"3.6": 2.73, "3.9": 2.98}),
    "4 bit bf16": ({"kind": "bf16"}, 96, {"3.6": 2.97, "3.9": 3.23}),
    "4 bit fp16, 128 outputs": ({"height": 128}, 128, {"3.6": 2.07, "3.9": 2.14}),
    "4 bit fp16, 64 rows": ({"rows": 64, "height": 128, "warps": 8}, 128, {"3.6": 3.20, "3.9": 3.45}),
    "4 bit bf16, asymmetric": ({"kind": "bf16", "symmetric": False}, 96, {"3.6": 3.28, "3.9": 3.30}),
    "4 bit fp16, groups of 32": ({"group": 32}, 96, {"3.6": 3.77, "3.9": 3.92}),
    "8 bit fp16": ({"bits": 8}, 96, {"3.6": 4.19, "3.9": 4.44}),
    "8 bit bf16": ({"bits": 8, "kind": "bf16"}, 96, {"3.6": 5.69, "3.9": 5.94}),
    "4 bit fp16, portable": ({"inline": False}, 96, {"3.6": 3.45, "3.9": 3.36}),
}


def no_more_than(measured, recorded):
    allowed = recorded.get(VERSION, max(recorded.values()))
    assert measured <= allowed * 1.05 + 0.005, f"{measured:.2f} instructions per weight; recorded {allowed}"


@pytest.mark.parametrize("case", PRODUCTS)
def test_matrix_product(case, tmp_path):
    arguments, registers, recorded = PRODUCTS[case]
    machine, weights = product(tmp_path, **arguments)
    thread_bytes = weights * arguments.get("bits", 4) / 8
    loop = machine.loop(using="HGMMA")
    assert loop
    assert machine.stack == 0
    assert machine.count(r"^(LDL|STL)") == 0
    assert not any(re.match(r"(HMMA|I2F|F2F)[. ]", text) for text in loop), (
        "a slow conversion or the older matrix instruction"
    )
    copies = sum(bool(re.match(r"LDGSTS.*\.128", text)) for text in loop)
    assert copies >= thread_bytes // 16, "weights in 16-byte copies"
    assert machine.registers <= registers
    assert machine.shared <= 100 * 1024
    no_more_than(len(loop) / weights, recorded)


# the same for tiles of few warps, which use the instruction of a single warp (HMMA), and for two tiles a step
NARROW = {
    "16 outputs, 1 warp": ({"height": 16, "warps": 1}, {"3.6": 3.08, "3.9": 2.80}),
    "32 outputs, 1 warp": ({"height": 32, "warps": 1}, {"3.6": 2.48, "3.9": 2.20}),
    "32 outputs, 1 warp, two tiles": ({"height": 32, "warps": 1, "unroll": 2}, {"3.6": 2.21, "3.9": 2.00}),
    "64 outputs, 2 warps": ({"height": 64, "warps": 2}, {"3.6": 2.40, "3.9": 2.17}),
    "64 outputs, 4 warps, two tiles": ({"warps": 4, "unroll": 2}, {"3.6": 2.64, "3.9": 2.80}),
}


@pytest.mark.parametrize("case", NARROW)
def test_matrix_product_for_one_row(case, tmp_path):
    arguments, recorded = NARROW[case]
    machine, weights = product(tmp_path, kind="bf16", rows=1, **arguments)
    loop = machine.loop(using="MMA")
    assert machine.stack == 0
    assert machine.count(r"^(LDL|STL)") == 0
    assert any("HGMMA" in text if arguments["warps"] == 4 else text.startswith("HMMA") for text in loop)
    assert sum(bool(re.match(r"LDGSTS.*\.128", text)) for text in loop) >= weights / 2 // 16
    assert machine.registers <= 128
    no_more_than(len(loop) / weights, recorded)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "config", [many_rows.Config(), many_rows.Config(128, 64), many_rows.Config(64, 64, 2, stages=4)]
)
def test_matrix_product_for_many_rows(config, symmetric, bits, tmp_path):
    """Two programs fit a multiprocessor, x comes by whole tiles, and nothing spills."""
    arguments = {
        "x_tiles": f"tensordesc<bf16[{config.rows}, {512 // bits}]>",
        "words_at": "*i32",
        "params_at": "*fp16" if symmetric else "*i32",
        "bias_at": "*bf16",
        "y_at": "*bf16",
        "partial_at": "*fp32",
        "counters_at": "*i32",
    } | {"M": "i32", "N": "i32/16", "tiles": "i32", "groups": "i32", "splits": "i32"}
    constants = many_rows.constants(4096, bits, 128, config, symmetric, bias=True, early=True)
    options = {name: constants.pop(name) for name in ("launch_pdl", "num_warps", "num_stages", "enable_fp_fusion")}
    machine = build(tmp_path, many_rows._kernel, arguments, constants, **options)
    assert machine.stack == 0
    assert machine.count(r"^(LDL|STL)") == 0
    assert machine.count("^HGMMA") >= 512 // bits // 16
    assert machine.count("^UTMALDG") >= 1
    assert machine.count(r"^LDGSTS.*\.128") >= 1, "weights in 16-byte copies"
    assert machine.registers * 32 * config.warps * 2 <= 65536
    assert machine.shared * 2 <= 227 * 1024


@pytest.mark.parametrize(("bits", "kind", "recorded"), [(4, "fp16", 4.4), (4, "bf16", 6.7), (8, "bf16", 9.2)])
def test_dequantize(bits, kind, recorded, tmp_path):
    arguments = {"words_at": "*i32", "params_at": "*fp16", "out_at": f"*{kind}", "tiles": "i32", "groups": "i32"}
    arguments |= {"N": "i32/16", "K": "i32/16", "group_size": "i32/16"}
    constants = {"BN": dequant.ROWS, "BITS": bits, "RAGGED": False, "SYMMETRIC": True, "INLINE": True}
    machine = build(tmp_path, dequant._kernel, arguments, constants, num_warps=4)
    assert machine.stack == 0
    assert machine.count(r"^LDG\.E\.128") >= 2
    assert machine.count(r"^STG\.E\.128") == 32 // bits
    assert machine.count(r"^(STG\.E\.U16|STG\.E |STS)") == 0
    assert machine.registers <= 64
    no_more_than(machine.total / (dequant.ROWS * 512 / bits / 128), {VERSION: recorded})


@pytest.mark.parametrize(("shape", "recorded"), [(gptq_block.FEW, 17.04), (gptq_block.MANY, 11.01)])
def test_gptq_block(shape, recorded, tmp_path):
    arguments = dict.fromkeys(("w_at", "u_at", "step_at", "offset_at", "errors_at"), "*fp32") | {
        "codes_at": "*u8",
        "N": "i32",
    }
    arguments |= dict.fromkeys(("w_row", "u_row_length", "step_row", "offset_row", "codes_row", "errors_row"), "i32/16")
    rows, strip = shape
    constants = {"TOP": 15, "B": 128, "WIDTH": 128, "BR": rows, "STRIP": strip}
    machine = build(tmp_path, gptq_block._kernel, arguments, constants, num_warps=1)
    assert machine.stack == 0
    assert machine.registers <= 168
    assert machine.count(r"^LDG\.E\.128") >= 4
    no_more_than(len(machine.loop()) / strip / rows, {VERSION: recorded})  # warp-instructions for one row and column


@pytest.mark.parametrize(("symmetric", "recorded"), [(True, 18.1), (False, 18.2)])
def test_group_search(symmetric, recorded, tmp_path):
    arguments = dict.fromkeys(("weight_at", "importance_at", "plan_at", "zeros_at"), "*fp32")
    arguments |= {"scales_at": "*fp16", "N": "i32/16", "groups": "i32"}
    constants = {
        "COARSE": 13,
        "FINE_STEPS": 6,
        "G": 128,
        "WIDTH": 128,
        "TOP": 15,
        "SYMMETRIC": symmetric,
        "BR": group_search.ROWS,
    }
    machine = build(tmp_path, group_search._kernel, arguments, constants, num_warps=4)
    assert machine.stack == 0
    assert machine.registers <= 128
    assert machine.count(r"^LDG\.E\.128") >= group_search.ROWS * 128 // (4 * 128)
    no_more_than(len(machine.loop()) / (group_search.ROWS * 128 / 128), {VERSION: recorded})


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("side", "warps"), [(128, 8), (64, 4)])
def test_gram(side, warps, both, tmp_path):
    arguments = {"x_at": "*bf16", "h_at": "*fp32", "T": "i32", "K": "i32/16"}
    constants = {"SIDE": side, "DEPTH": 64, "ROWS": 2048, "STRIP": 8, "STAGES": 4, "BOTH": both, "WIDE": False}
    machine = build(tmp_path, gram._kernel, arguments, constants, num_warps=warps, num_stages=4)
    loop = machine.loop(using="HGMMA", inner=True)
    assert machine.stack == 0
    assert sum("HGMMA" in text for text in loop) == 4
    assert sum(bool(re.match(r"LDGSTS.*\.128", text)) for text in loop) == 8
    assert machine.shared <= 227 * 1024
    assert len(loop) <= 140


def test_halves(tmp_path):
    arguments = {"x_at": "*fp32", "upper_at": "*fp32", "upper16_at": "*bf16", "lower16_at": "*bf16"}
    arguments |= {"x_row": "i32/16", "K": "i32/16"}
    machine = build(tmp_path, float32._kernel, arguments, {"BLOCK": 1024, "MASK": float32.UPPER}, num_warps=4)
    assert machine.stack == 0
    assert machine.count(r"^LDG\.E\.128") >= 2
    assert machine.count(r"^STG\.E\.128") >= 2


def test_half_rows(tmp_path):
    arguments = {"x_at": "*fp32", "values_at": "*fp16", "scale_at": "*fp32", "K": "i32/16"}
    machine = build(tmp_path, scaled_half._rows_kernel, arguments, {"BLOCK": 4096, "TOP": 14}, num_warps=8)
    assert machine.stack == 0
    assert machine.count(r"^LDG\.E\.128") >= 8
    assert machine.count(r"^STG\.E\.(64|128)") >= 2


@pytest.mark.parametrize("biased", [False, True])
def test_scaled(biased, tmp_path):
    arguments = {"y_at": "*fp32", "row_at": "*fp32", "column_at": "*fp32", "bias_at": "*fp32", "N": "i32/16"}
    machine = build(tmp_path, scaled_half._scaled_kernel, arguments, {"WIDTH": 1024, "BIAS": biased}, num_warps=4)
    assert machine.stack == 0
    assert machine.count(r"^LDG\.E\.128") >= 4 + 2 * biased
    assert machine.count(r"^STG\.E\.128") >= 2


@pytest.mark.parametrize("width", group_products.WIDTHS)
def test_group_products(width, tmp_path):
    arguments = dict.fromkeys(("q_at", "r_at", "d_at", "unit_at", "out_at", "mirrored_at"), "*fp32")
    arguments |= {
        "upper_at": "*fp16",
        "lower_at": "*fp16",
        "N": "i32",
        "K": "i32/16",
        "out_row": "i32",
        "out_group": "i32",
    }
    constants = {"W": width, "BR": group_products.ROWS, "WIDE": False}
    machine = build(tmp_path, group_products._kernel, arguments, constants, num_warps=8, num_stages=2)
    assert machine.stack == 0
    assert sum("HGMMA" in text for text in machine.loop(using="HGMMA")) >= 3 * max(1, width // 32)
    assert machine.shared <= 227 * 1024


def test_column_sums(tmp_path):
    arguments = {"x_at": "*bf16", "T": "i32", "K": "i32/16"}
    arguments |= dict.fromkeys(("absolute_at", "squares_at", "largest_at"), "*fp32")
    constants = {"SIDE": column_sums.SIDE, "PART": column_sums.PART, "DEPTH": column_sums.DEPTH}
    machine = build(tmp_path, column_sums._kernel, arguments, constants, num_warps=4)
    assert machine.stack == 0
    assert machine.count(r"^LDG\.E\.128") >= 2
    assert machine.registers <= 128


# kernel -> (further pointers, sizes, constants, most registers); sizes are no constants, so that few variants have to be compiled
SEARCHES = {
    "symmetric": ("numerators_at scale_at inverse_at weight_at", ("E", "COUNT", "NMAX"), {}, 64),
    "affine": ("numerators_at out_at", ("E", "COUNT", "NMAX"), {"ABSOLUTE": False}, 64),
    "positive": ("numerators_at codes_at scale_at", ("E", "COUNT", "NMAX"), {}, 64),
    "descent": ("codes_at scale_at", ("E", "NMAX"), {}, 64),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_ggml_search(name, tmp_path):
    """Nothing spills, and half of a multiprocessor's threads fit at least."""
    pointers, sizes, constants, registers = SEARCHES[name]
    arguments = dict.fromkeys(("x_at", "w_at", *pointers.split()), "*fp32") | dict.fromkeys(("B", *sizes), "i32")
    kernel = getattr(ggml_search, f"_{name}_kernel")
    machine = build(tmp_path, kernel, arguments, constants | {"LANES": ggml_search.LANES}, **ggml_search.OPTIONS)
    assert machine.stack == 0
    assert machine.registers <= registers


def test_sums_in_order(tmp_path):
    arguments = {"x_at": "*fp32", "out_at": "*fp32", "E": "i32", "B": "i32"}
    constants = {"DEPTH": 16, "LANES": 128}
    machine = build(tmp_path, ggml_search._sum_kernel, arguments, constants, **ggml_search.OPTIONS)
    assert machine.stack == 0
    assert len([text for text in machine.loop() if text.startswith("LDG")]) == 16
    assert machine.count("^FFMA") == 0


BETWEEN = {
    "add_norm": (
        between._add_norm_kernel,
        {"x_at": "*bf16", "y_at": "*bf16", "weight_at": "*bf16", "sum_at": "*bf16", "norm_at": "*bf16"}
        | {"H": "i32/16", "epsilon": "fp32"},
        {"WIDTH": 4096, "ADD": True},
        16,
    ),
    "rotate": (
        between._rotate_kernel,
        {
            "qkv_at": "*bf16",
            "table_at": "*fp32",
            "rows_at": "*i32",
            "places_at": "*i32",
            "q_at": "*bf16",
            "keys_at": "*bf16",
        }
        | {"values_at": "*bf16", "capacity": "i32"},
        {"HEADS": 32, "KV": 32, "HALF": 64},
        1,
    ),
    "attend": (
        between._attend_kernel,
        {"q_at": "*bf16", "keys_at": "*bf16", "values_at": "*bf16", "position_at": "*i32", "out_at": "*bf16"}
        | {"share_at": "*fp32", "counters_at": "*i32", "capacity": "i32", "scale": "fp32"},
        {"HEADS": 32, "GROUP": 1, "WIDTH": 128, "PARTS": between.SPLITS, "BLOCK": between.SPAN},
        4,
    ),
    "gate": (
        between._gate_kernel,
        {"from_at": "*bf16", "to_at": "*bf16", "size": "i32/16"},
        {"BLOCK": 256},
        2,
    ),
}


ELEMENTWISE = {
    "rms_norm": (
        dict.fromkeys(("x_at", "weight_at", "out_at"), "*bf16") | {"H": "i32/16", "epsilon": "fp32"},
        {"WIDTH": 4096},
        8,
    ),
    "rotate": (
        dict.fromkeys(("x_at", "cosine_at", "sine_at"), "*bf16")
        | {"heads": "i32", "length": "i32"}
        | dict.fromkeys(("x_sequence", "x_head", "x_token"), "i32/16"),
        {"HALF": 64, "WIDTH": 64, "BH": elementwise.HEADS},
        4,
    ),
    "rotated": (
        dict.fromkeys(("query_at", "key_at", "cosine_at", "sine_at", "query_to", "key_to"), "*bf16")
        | dict.fromkeys(("query_apart", "key_apart"), "i32/16")
        | {"length": "i32"},
        {"HEADS": 32, "KV": 32, "HALF": 64, "WIDTH": 64, "SHARED": False},
        1,
    ),
    "gate": (
        dict.fromkeys(("g_at", "u_at", "out_at"), "*bf16") | dict.fromkeys(("size", "apart"), "i32/16"),
        {"BLOCK": elementwise.BLOCK},
        4,
    ),
}


@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name, kind, tmp_path):
    """Nothing spills, and values travel 8 bytes at a time at least; a warp of a head 4 bytes a thread of 16 bits, one line of memory."""
    arguments, constants, warps = ELEMENTWISE[name]
    arguments = {argument: kind if asked == "*bf16" else asked for argument, asked in arguments.items()}
    kernel, fused = getattr(elementwise, f"_{name}_kernel"), not name.startswith("rotate")
    machine = build(tmp_path, kernel, arguments, constants, num_warps=warps, enable_fp_fusion=fused)
    assert machine.stack == 0
    assert machine.registers <= 64
    assert machine.count(r"^LDG\.E(\.64)? " if name == "rotated" else r"^LDG\.E\.(64|128)") >= 2
    assert machine.count(r"^LDG\.E\.U16") == 0


@pytest.mark.parametrize("name", BETWEEN)
def test_between_products(name, tmp_path):
    """Nothing spills, and each waits for the kernel before it once, after it let the next one start."""
    kernel, arguments, constants, warps = BETWEEN[name]
    machine = build(tmp_path, kernel, arguments, constants | {"EARLY": True}, num_warps=warps, launch_pdl=True)
    assert machine.stack == 0
    assert machine.registers <= 128
    assert machine.count("^PREEXIT") == machine.count("^ACQBULK") == 1
