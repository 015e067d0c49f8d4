"""The GPTQ v1 layout of AutoGPTQ (`quant_method: gptq`, `checkpoint_format: gptq`), 4 and 8 bit, symmetric.

For a linear with weight [N, K], b bits, groups of g input columns (G = K / g), f = 32 / b codes a word:

    qweight int32 [K/f, N]    packed along K: word r, bits b*j .. b*j+b-1 = code of input column r*f + j
    qzeros  int32 [G, N/f]    packed along N: word c, slot j = zero point of output n = c*f + j, stored minus one (mod 2^b)
    scales  fp16  [G, N]      step; may be negative (full-range symmetric grid)
    g_idx   int32 [K]         group of every input column; k // g here, since activation order is static
    bias          [N]         only where the model has one

    W[n, k] = scales[g_idx[k], n] * (code[k, n] - ((stored zero + 1) mod 2^b))

Symmetric zeros are 2^(b-1), so qzeros words are 0x77777777 (4 bit) or 0x7f7f7f7f (8 bit). Reading also covers what other
tools write: float32 scales, zero biases, asymmetric zeros, `gptq_v2` (zeros stored as they are), activation order through g_idx.
Left out: 2 and 3 bit, and writing asymmetric zeros (a zero of 0 is stored as -1 and runs into its neighbours in some readers).
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qquant import __version__
from qquant.algorithms.grid import Integers, QuantizedTensor, UniformGrid, UniformParams
from qquant.errors import InputError
from qquant.families import Family
from qquant.formats import keeping
from qquant.formats.bits import pack_words, unpack_words
from qquant.formats.folder import Entry, FolderSource, ModelFolder, QuantizedLayout, Stated
from qquant.recipe.artifacts import GptqArtifact
from qquant.resources import lazy
from qquant.source.safetensors_file import read_tensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

HARMLESS = (
    "damp_auto_increment static_groups true_sequential model_name_or_path meta quantizer mse dataset tokenizer "
    "block_name_to_quantize cache_block_outputs use_exllama exllama_config use_cuda_fp16 max_input_length "
    "autoround_version provider iters"
)  # keys that tell how it was made, or choose a kernel


class _Share(Container[Any]):
    """Numbers between 0 and 1, neither of them included."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and 0 < value < 1


def _sym(symmetric: bool, version: str) -> Stated:
    """What `sym` may say: false where there are zero points; GPTQModel loads that of gptq_v2 only, but for what it made itself."""
    if symmetric and version == "gptq":
        return Stated((True,), "GPTQModel does not load it", True)
    return Stated((True, False) if symmetric else (False,), "the zero points are not read", True)


class GptqLayout(QuantizedLayout):
    """Bits and group size fixed; see the head of the file."""

    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, bits: int, group_size: int, shift: int = 1) -> None:
        self.bits = bits
        self.group_size = group_size
        self.shift = shift  # what v1 subtracts from a zero point before storing it; 0 in gptq_v2

    @property
    def label(self) -> str:
        """The format, its bits and its groups, in words for people."""
        groups = "one group a row" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"GPTQ {self.bits} bit, {groups}"

    @property
    def kind(self) -> str:
        """The row of `recipe.limits.LIMITS`, by bits."""
        return f"int{self.bits}"

    @property
    def slots(self) -> int:
        """Codes in a word."""
        return 32 // self.bits

    def width(self, columns: int) -> int:
        """Columns of a group."""
        return columns if self.group_size == -1 else self.group_size

    def problems(self, shape: tuple[int, int]) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""
        rows, columns = shape
        if columns % self.width(columns) or columns % 32 or rows % 32:
            return f"[{rows}, {columns}] needs rows and columns divisible by 32 and columns by the group size {self.group_size}"
        return None

    def entries(self, shape: tuple[int, int]) -> list[Entry]:
        """(suffix, dtype, shape) of the stored tensors."""
        rows, columns = shape
        groups = columns // self.width(columns)
        return [
            ("qweight", "I32", (columns // self.slots, rows)),
            ("qzeros", "I32", (groups, rows // self.slots)),
            ("scales", "F16", (groups, rows)),
            ("g_idx", "I32", (columns,)),
        ]

    def pack(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """The stored tensors of a tensor on a symmetric `UniformGrid`; the codes are kept as they are."""
        params = quantized.params
        assert isinstance(params, UniformParams)
        codes = quantized.codes
        stored = (params.zeros.to(torch.int32) - self.shift) & ((1 << self.bits) - 1)
        columns = codes.shape[1]
        return {
            "qweight": pack_words(codes, self.bits).T.contiguous(),
            "qzeros": pack_words(stored.T.contiguous(), self.bits),
            "scales": params.scales.T.contiguous(),
            "g_idx": (torch.arange(columns, dtype=torch.int32) // quantized.grid.width).to(torch.int32),
        }

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """Codes and parameters of stored tensors in natural group order; inverse of `pack`."""
        codes = unpack_words(tensors["qweight"].T.contiguous(), self.bits)
        zeros = (unpack_words(tensors["qzeros"], self.bits).float() + self.shift) % (1 << self.bits)
        scales = tensors["scales"].T.contiguous()
        columns = codes.shape[1]
        grid = UniformGrid(self.bits, self.width(columns), symmetric=True, search="minmax")
        return QuantizedTensor(codes, UniformParams(scales, zeros.T.contiguous()), grid)

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """float32 [N, K], whatever the order of `g_idx`."""
        quantized = self.unpack(tensors)
        columns = quantized.codes.shape[1]
        index = tensors.get("g_idx")
        natural = torch.arange(columns, device=quantized.codes.device) // quantized.grid.width
        if index is None or bool((index.to(natural) == natural).all()):
            return quantized.dequantize()
        step, offset = quantized.params.step_and_offset()
        _require_groups(index, step.shape[1])
        return quantized.codes.float() * step[:, index.long()] - offset[:, index.long()]

    def integers(self, tensors: Mapping[str, Tensor]) -> Integers:
        """Codes by groups: with activation order, a group's columns are brought together and `order` says where they were.

        Raises:
            InputError: g_idx names a group that is not there, or gives groups of different sizes.
        """
        quantized = self.unpack(tensors)
        params = quantized.params
        assert isinstance(params, UniformParams)
        codes, width, index = quantized.codes, quantized.grid.width, tensors.get("g_idx")
        natural = torch.arange(codes.shape[1], device=codes.device) // width
        order = None
        if index is not None and bool((index != natural).any()):
            _require_groups(index, params.scales.shape[1])
            order = index.argsort(stable=True)
            if bool((index[order] != natural).any()):
                raise InputError(f"g_idx gives groups of different sizes; every group must hold {width} columns")
            codes = codes[:, order]
        return Integers(codes, params.scales, params.zeros, self.bits, order)


def _require_groups(index: Tensor, groups: int) -> None:
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise InputError(f"g_idx holds group {int(index.max())}; there are {groups} groups")


def _natural(source: FolderSource, layout: GptqLayout) -> bool:
    """Whether every g_idx is k // g."""
    for name, info in source.tensors.items():
        if name.endswith(".g_idx"):
            index = read_tensor(info)
            if bool((index != torch.arange(len(index)) // layout.width(len(index))).any()):
                return False
    return True


def _symmetric(source: FolderSource, layout: GptqLayout) -> bool:
    """Whether every zero point is 2^(b-1)."""
    word = pack_words(
        torch.full((1, layout.slots), (1 << (layout.bits - 1)) - layout.shift, dtype=torch.uint8), layout.bits
    )
    return all(
        bool((read_tensor(info) == word).all()) for name, info in source.tensors.items() if name.endswith(".qzeros")
    )


class Gptq(ModelFolder[GptqArtifact]):
    """The `gptq` format of a recipe."""

    entry = GptqArtifact
    method = "gptq"

    def folder_suffix(self, spec: GptqArtifact) -> str:
        """The suffix of its folder, as in Qwen's repository names."""
        return f"GPTQ-Int{spec.bits}"

    def layout(self, spec: GptqArtifact) -> GptqLayout:
        """The tensor layout of an artifact."""
        return GptqLayout(spec.bits, spec.group_size)

    def grid(self, spec: GptqArtifact, columns: int) -> UniformGrid:
        """The values a linear with `columns` inputs can take."""
        return UniformGrid(spec.bits, self.layout(spec).width(columns), symmetric=True, search=spec.scale_search)

    def label(self, spec: GptqArtifact) -> str:
        """The format, its bits and its groups, in words for people."""
        return f"int{spec.bits} g{spec.group_size}"

    def quantization_config(self, spec: GptqArtifact) -> dict[str, Any]:
        """AutoGPTQ's keys; the last two are what newer readers look for."""
        return {
            "bits": spec.bits,
            "group_size": spec.group_size,
            "damp_percent": spec.damping,
            "desc_act": False,
            "static_groups": False,
            "sym": True,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "meta": {"quantizer": [f"qquant:{__version__}"]},
        }

    def keeping(self, family: Family, kept: Sequence[str], quantized: Sequence[str]) -> dict[str, Any]:
        """What config.json says of linears that are kept: `dynamic` for GPTQModel and vLLM, the names of all others for optimum."""
        dynamic: dict[str, Any] = {keeping.expression(name): {} for name in keeping.skipped(family, kept)}
        return {"dynamic": dynamic, "modules_in_block_to_quantize": [list(quantized)]}

    config_copy = "quantize_config.json"
    harmless = frozenset(HARMLESS.split())
    demanded = ("desc_act", "sym")

    def stated(self, source: FolderSource) -> dict[str, Stated]:
        """Order and zero points as the tensors have them: where a runtime is told there are none, it does not read them."""
        layout = source.layout
        assert isinstance(layout, GptqLayout)
        ordered, symmetric = _natural(source, layout), _symmetric(source, layout)
        version = "gptq" if layout.shift else "gptq_v2"
        files = {file.file.stem for file in source.tensors.values()}
        linears, shift = source.family.linears, "zero points are off by one"
        kept, coded = keeping.numbers(source)
        ours = self.keeping(source.family, kept, coded)
        quantized = "other weights are taken for quantized"
        return {
            "quant_method": Stated(("gptq",), "it is read as another format", "gptq"),
            "method": Stated(("gptq",), "it is read as another format", "gptq"),
            "bits": Stated((layout.bits,), "codes are cut otherwise"),
            "group_size": Stated((layout.group_size,), "columns get the scales of others"),
            "desc_act": Stated(
                (False, True) if ordered else (True,), "the order of columns in g_idx is not read", False
            ),
            "sym": _sym(symmetric, version),
            "damp_percent": Stated(_Share(), "transformers and GPTQModel do not load it", 0.1),
            "checkpoint_format": Stated((version,), shift, version),
            "format": Stated((version,), shift, version),
            "lm_head": Stated((False, None), quantized),
            "dynamic": Stated((ours["dynamic"],) if kept else (None, {}), quantized),
            "modules_to_not_convert": Stated((None, [], [source.family.head.removesuffix(".weight")]), quantized),
            "modules_in_block_to_quantize": Stated(
                (ours["modules_in_block_to_quantize"],)
                if kept
                else (None, [list(stage.linears) for stage in source.family.stages], [list(linears)]),
                quantized,
            ),
            "data_type": Stated((None, "int"), "codes are taken for numbers of another kind"),
            "is_marlin_format": Stated((False, None), "codes are read in another order"),
            "pack_dtype": Stated(("int32",), "codes are cut otherwise", "int32"),
            "model_file_base_name": Stated((None, "model", *sorted(files)), "AutoGPTQ looks for a file of that name"),
        }

    def read_layout(self, config: Mapping[str, Any], where: str) -> GptqLayout:
        """The layout of a folder made by any tool, from its quantization_config.

        Raises:
            InputError: bits or a group size that this file does not describe.
        """
        bits, group = config.get("bits"), config.get("group_size")
        if bits not in (4, 8) or not isinstance(group, int) or (group != -1 and group < 1):
            raise InputError(f"{where}: GPTQ with bits {bits!r}, group_size {group!r}; qquant reads bits 4 or 8")
        kind = config.get("checkpoint_format", config.get("format", "gptq"))
        if kind not in ("gptq", "gptq_v2"):
            raise InputError(f"{where}: GPTQ checkpoint_format {kind!r}; qquant reads 'gptq' and 'gptq_v2'")
        return GptqLayout(bits, group, shift=1 if kind == "gptq" else 0)
