"""One layer of 4-bit weights, packed as each library's product wants it; the contenders of `kernel_peers`.

Everybody multiplies by (code - 8) * scale in groups of 128. A scale has the eight bits of a bfloat16 and lies where a half float holds
it too, so that no format rounds it, and all have the same weights to the last bit; cuBLAS has them rounded to bf16.

Nothing of the libraries is copied here. Marlin has no wheel of its own: its operator is compiled of gptqmodel's sources, from a folder
that holds them (gptqmodel_ext/marlin), and of the hundreds of kernels that its dispatcher names only the fifteen of 4 bits, bf16 and groups
of 128, a file each, so that they compile side by side.
"""

import functools
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import cpp_extension

from qquant.formats.bits import pack_words
from qquant.kernels import direct, wq_mm
from qquant.kernels.unpack import pack_params, pack_runtime
from tests.bench.tune import GROUP


@dataclass
class Layer:
    """Random weights (codes - 8) * scales: codes uint8 [N, K], scales bf16 [N, K / GROUP]."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def random(cls, columns, outputs, device="cuda"):
        codes = torch.randint(0, 16, (outputs, columns), dtype=torch.uint8, device=device)
        return cls(codes, (torch.rand(outputs, columns // GROUP, device=device) * 0.01 + 0.001).bfloat16())

    @property
    def shape(self):
        """(columns, outputs)."""
        return self.codes.shape[1], self.codes.shape[0]

    @functools.cached_property
    def weight(self):
        """The weights as float32, exactly."""
        return (self.codes.float() - 8) * self.scales.float().repeat_interleave(GROUP, 1)

    @functools.cached_property
    def words(self):
        """The codes as int32 [N, K / 8]: GPTQ's `qweight`, transposed."""
        return pack_words(self.codes, 4)


@dataclass
class Prepared:
    """How one peer multiplies by a layer: `product(x, *packed)`."""

    product: Callable
    packed: tuple[Tensor, ...]
    weight: Tensor | None = None  # what it multiplies by, where that is not the layer's
    again: Callable | None = None  # (x, *packed) -> a call for the host's clock, where that is not `product`


def ours(layer, options):
    """`wq_mm`; outside graphs as our linear calls it again."""

    def again(x, qweight, params):
        _, call = direct.Call.first(x, direct.PackedWeights(qweight, params, None, 4, GROUP))
        if call(x) is None:
            raise RuntimeError("direct.Call takes the ordinary way here")
        return functools.partial(call, x)

    packed = pack_runtime(layer.codes, 4), pack_params(layer.scales.half(), None)
    return Prepared(lambda x, qweight, params: wq_mm.wq_mm(x, qweight, params, None, 4, GROUP), packed, again=again)


def cublas(layer, options):
    """`torch.nn.functional.linear` in bf16."""
    wide = layer.weight.bfloat16()
    return Prepared(torch.nn.functional.linear, (wide,), weight=wide)


def torch_int4(layer, options):
    """The product that comes with torch: the even column in the high half of a byte; a zero point that is added, 0 here."""
    pairs = layer.codes[:, ::2] << 4 | layer.codes[:, 1::2]
    affine = torch.stack([layer.scales.T, torch.zeros_like(layer.scales.T)], -1).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8), affine
    multiply = torch.ops.aten._weight_int4pack_mm.default
    return Prepared(lambda x, codes, affine: multiply(x, codes, GROUP, affine), packed)


UINT4_WITH_BIAS_8 = 4 << 8 | 8 << 17 | 1 << 50  # Marlin's number of the type: bits of the mantissa, bias, kind of NaN


def marlin(layer, options):
    """Marlin's operator as gptqmodel calls it: sums in float32, no atomics."""
    load_marlin(options.marlin)
    operators, (columns, outputs) = torch.ops.gptqmodel_marlin_bf16, layer.shape
    order = layer.words.new_empty(0)
    qweight = operators.gptq_marlin_repack(layer.words.T.contiguous(), order, columns, outputs, 4)
    locks = layer.words.new_zeros(torch.cuda.get_device_properties(layer.words.device).multi_processor_count)
    multiply = operators.gptq_marlin_gemm_bf16.default
    sums = (True, False, True, False)  # whole K here, no atomics, float32, whole zero points

    def product(x, qweight, scales, locks):
        middle = (qweight, None, scales, None, None, None, None, locks, UINT4_WITH_BIAS_8)
        return multiply(x, None, *middle, len(x), outputs, columns, *sums)

    return Prepared(product, (qweight, marlin_scales(layer.scales), locks))


def marlin_scales(scales):
    """Scales [N, K / GROUP] in Marlin's order [K / GROUP, N]: every 64 neighbours are a matrix of 8 x 8, transposed."""
    outputs, groups = scales.shape
    return scales.T.reshape(-1, 8, 8).transpose(1, 2).reshape(groups, outputs).contiguous()


BLOCKS = GROUP // 16  # of Marlin in a group
MARLIN_TILES = (  # threads, and blocks of 16 along M, N and K; the first three also with 8 rows in a block of M
    *((256, 1, 8, 8), (128, 1, 8, 4), (128, 1, 4, 8)),
    *((*tile[:1], m, *tile[1:]) for m in (2, 3, 4) for tile in ((256, 16, 4), (128, 8, 4), (128, 4, 8))),
)


def marlin_sources(root, folder):
    """Write what is compiled of gptqmodel's Marlin to `folder`: of its table of kernels the fifteen of this bench; the files' paths."""
    kernels = [(tile, "false") for tile in MARLIN_TILES] + [(tile, "true") for tile in MARLIN_TILES[:3]]
    rows = "".join(
        f"_GET_IF(vllm::kU4B8, {m}, {n}, {k}, {eight}, pipe_stages, {BLOCKS}, {threads}, false)\n"
        for (threads, m, n, k), eight in kernels
    )
    place = "COMMON_GET_IF(vllm::kU4B8, pipe_stages)"
    table = re.compile(r"^ *([A-Z0-9]+_GET_IF\(vllm::\w+, \w+\))$", re.MULTILINE)
    choice = table.sub(lambda found: rows if found[1] == place else "", (root / "gptq_marlin.cu").read_text())
    if rows not in choice:
        raise ValueError(f"{root}: not the Marlin of gptqmodel 7.7, which has a line {place}")
    files = {"gptq_marlin.cu": choice, "gptq_marlin_bf16.cu": (root / "gptq_marlin_bf16.cu").read_text()}
    for index, ((threads, m, n, k), eight) in enumerate(kernels):
        kind = f"nv_bfloat16, vllm::kU4B8.id(), vllm::kBFloat16.id(), {threads}, {m}, {n}, {k}, {eight}"
        line = f"template __global__ void Marlin<{kind}, pipe_stages, {BLOCKS}, false>(MARLIN_KERNEL_PARAMS);"
        files[f"kernel_{index}.cu"] = (
            f'#include "kernel.h"\n#include "marlin_template.h"\nnamespace MARLIN_NAMESPACE_NAME {{\n{line}\n}}\n'
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name
        if not path.is_file() or path.read_text() != text:  # what is newer than its object is compiled again
            path.write_text(text)
    there = [root / name for name in ("gptq_marlin_repack.cu", "awq_marlin_repack.cu", "marlin_torch_bf16.cpp")]
    return [*there, *(folder / name for name in files if name != "gptq_marlin.cu")]


@functools.cache
def load_marlin(given):
    """Register Marlin's operators from a library, or from sources that are compiled once a machine."""
    if given.is_file():
        torch.ops.load_library(given)
        return
    root = next((path.parent for path in given.rglob("gptq_marlin.cu")), None)
    if root is None:
        raise FileNotFoundError(f"no gptq_marlin.cu below {given}")
    folder = Path(tempfile.gettempdir()) / "kernel-peers-marlin"
    headers = [root.resolve()]
    if not Path(cpp_extension.CUDA_HOME, "include", "cublas_v2.h").is_file():  # then cuBLAS came with torch, as wheels
        headers += Path(torch.__file__).parents[1].glob("nvidia/*/include")
    major, minor = torch.cuda.get_device_capability()
    flags = f"-arch=sm_{major}{minor} -Xptxas -O3,-dlcm=ca -static-global-template-stub=false -diag-suppress=179,39,177"
    cpp_extension.load(
        "marlin_of_gptqmodel",
        [str(path.resolve()) for path in marlin_sources(root, folder)],
        extra_cflags=["-O3", "-DENABLE_BF16"],
        extra_cuda_cflags=["-O3", "-DENABLE_BF16", *flags.split()],
        extra_include_paths=[str(path) for path in headers],
        build_directory=str(folder),
        is_python_module=False,
    )


def humming(layer, options):
    """humming's layer of a GPTQ artifact; it would compile for every number of rows up to 8,192, here for the number that is asked for."""
    os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")  # its import starts a process otherwise
    from humming.forward import humming_forward
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    columns, outputs = layer.shape
    kind = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    made = HummingLayer(shape_n=outputs, shape_k=columns, weight_config=kind, torch_dtype=torch.bfloat16).cuda()
    zeros = torch.full((columns // GROUP, outputs // 8), 0x77777777, dtype=torch.int32, device="cuda")
    groups = torch.arange(columns, dtype=torch.int32, device="cuda") // GROUP
    tensors = {"qweight": layer.words.T.contiguous(), "scales": layer.scales.T.contiguous(), "qzeros": zeros}
    made.load_from_tensors(tensors | {"g_idx": groups})
    made.transform()
    config, names = made.humming_metas[""], ("weight", "weight_scale", "zero_point", "weight_scale_2", "locks")
    names = [name for name in names if getattr(made, name, None) is not None]
    tuned = functools.cache(lambda rows: json.dumps(get_heuristics_config(config, shape_m=rows), default=int))

    def product(x, *packed):
        return humming_forward(config, x, tuning_config=tuned(len(x)), **dict(zip(names, packed, strict=True)))

    return Prepared(product, tuple(getattr(made, name).data for name in names))


def gemlite(layer, options):
    """gemlite's linear with a zero point that is one number; a child calls each candidate once, to have it compiled."""
    import gemlite as library
    from gemlite.core import GEMLITE_TRITON_KERNELS, DType
    from triton.testing import do_bench

    library.load_config(str(Path(library.__file__).parent / "configs" / "h100.json"))
    once = lambda call, quantiles: (call(), [1.0, 1.0, 1.0])[1]
    brief = functools.partial(do_bench, warmup=5, rep=25)
    for tuner in itertools.chain.from_iterable(family.kernel for family in GEMLITE_TRITON_KERNELS):
        tuner.do_bench = once if options.compile else brief
    columns, outputs = layer.shape
    kind = {"input_dtype": DType.BF16, "output_dtype": DType.BF16, "in_features": columns, "out_features": outputs}
    made = library.GemLiteLinear(4, group_size=GROUP, **kind)
    made.pack(layer.codes, layer.scales, 8)
    meta = made.get_meta_args()
    packed = tuple(tensor.data for tensor in made.get_tensor_args())
    return Prepared(lambda x, *packed: library.forward_functional(x, None, list(packed), meta), packed)


class Peer(NamedTuple):
    """A contender, and where it comes from."""

    prepare: Callable
    module: str = "torch"
    install: str = ""


PEERS = {
    "ours": Peer(ours),
    "cublas": Peer(cublas),
    "torch": Peer(torch_int4),
    "marlin": Peer(
        marlin, install="pip download --no-deps --no-binary :all: gptqmodel==7.7.0, unpacked: --marlin FOLDER"
    ),
    "humming": Peer(humming, "humming", "pip install humming-kernels==0.1.19"),
    "gemlite": Peer(gemlite, "gemlite", "pip install gemlite==0.6.0.post2"),
}
