"""The GEMM layout of AutoAWQ (`quant_method: awq`, `version: gemm`), 4 bit, asymmetric.

For a linear with weight [N, K] and groups of g input columns (G = K / g):

    qweight int32 [K, N/8]    packed along N: nibble i of word c = output column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    qzeros  int32 [G, N/8]    the same interleave; the zero point itself, no minus one
    scales  fp16  [G, N]
    bias          [N]         only where the model has one

    W[n, k] = (code[k, n] - zero[k // g, n]) * scales[k // g, n]

The AWQ scales are folded into the operator before (norm, v_proj, up_proj), so a reader needs nothing else.
Left out: GEMV, GEMVFast and the original llm-awq layouts, which vLLM and SGLang do not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qquant.algorithms.grid import Integers, QuantizedTensor, UniformGrid, UniformParams
from qquant.errors import InputError
from qquant.families import Family
from qquant.formats import keeping
from qquant.formats.bits import pack_words, unpack_words
from qquant.formats.folder import Entry, FolderSource, ModelFolder, QuantizedLayout, Stated
from qquant.recipe.artifacts import AwqArtifact
from qquant.resources import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output column held by each nibble
INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble that holds each output column


def _interleave(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    return codes.view(len(codes), -1, 8)[..., list(order)].reshape(len(codes), -1)


class AwqLayout(QuantizedLayout):
    """Group size fixed; see the head of the file."""

    suffixes = ("qweight", "qzeros", "scales")

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    @property
    def label(self) -> str:
        """The format, its bits and its groups, in words for people."""
        return f"AWQ 4 bit, groups of {self.group_size}"

    @property
    def kind(self) -> str:
        """The row of `recipe.limits.LIMITS`: four bits."""
        return "int4"

    def problems(self, shape: tuple[int, int]) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""
        rows, columns = shape
        if columns % self.group_size or rows % 8:
            return f"[{rows}, {columns}] needs rows divisible by 8 and columns by the group size {self.group_size}"
        return None

    def entries(self, shape: tuple[int, int]) -> list[Entry]:
        """(suffix, dtype, shape) of the stored tensors."""
        rows, columns = shape
        groups = columns // self.group_size
        return [
            ("qweight", "I32", (columns, rows // 8)),
            ("qzeros", "I32", (groups, rows // 8)),
            ("scales", "F16", (groups, rows)),
        ]

    def pack(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """The stored tensors of a tensor on a 4-bit `UniformGrid`; the codes are kept as they are."""
        params = quantized.params
        assert isinstance(params, UniformParams)
        return {
            "qweight": pack_words(_interleave(quantized.codes.T.contiguous(), ORDER), 4),
            "qzeros": pack_words(_interleave(params.zeros.T.contiguous().to(torch.uint8), ORDER), 4),
            "scales": params.scales.T.contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """Codes and parameters of stored tensors; inverse of `pack`."""
        codes = _interleave(unpack_words(tensors["qweight"], 4), INVERSE).T.contiguous()
        zeros = _interleave(unpack_words(tensors["qzeros"], 4), INVERSE).float().T.contiguous()
        grid = UniformGrid(4, self.group_size, symmetric=False, search="minmax")
        return QuantizedTensor(codes, UniformParams(tensors["scales"].T.contiguous(), zeros), grid)

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """float32 [N, K]."""
        return self.unpack(tensors).dequantize()

    def integers(self, tensors: Mapping[str, Tensor]) -> Integers:
        """What a runtime's operators compute with."""
        quantized = self.unpack(tensors)
        assert isinstance(quantized.params, UniformParams)
        return Integers(quantized.codes, quantized.params.scales, quantized.params.zeros, 4)


class Awq(ModelFolder[AwqArtifact]):
    """The `awq` format of a recipe."""

    entry = AwqArtifact
    method = "awq"
    config_copy = None
    harmless = frozenset(("do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "backend", "meta"))
    demanded = ("zero_point",)

    def folder_suffix(self, spec: AwqArtifact) -> str:
        """The suffix of its folder, as in Qwen's repository names."""
        return "AWQ"

    def layout(self, spec: AwqArtifact) -> AwqLayout:
        """The tensor layout of an artifact."""
        return AwqLayout(spec.group_size)

    def grid(self, spec: AwqArtifact, columns: int) -> UniformGrid:
        """The values a linear with `columns` inputs can take."""
        return UniformGrid(4, spec.group_size, symmetric=False, search=spec.scale_search)

    def label(self, spec: AwqArtifact) -> str:
        """The format, its bits and its groups, in words for people."""
        return f"int4 g{spec.group_size} asymmetric"

    def quantization_config(self, spec: AwqArtifact) -> dict[str, Any]:
        """The keys that AutoAWQ writes."""
        return {
            "bits": 4,
            "group_size": spec.group_size,
            "modules_to_not_convert": None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        }

    def keeping(self, family: Family, kept: Sequence[str], quantized: Sequence[str]) -> dict[str, Any]:
        """What config.json says of linears that are kept: their names, and those of what runtimes fuse of them."""
        return {"modules_to_not_convert": keeping.skipped(family, kept)}

    def read_layout(self, config: Mapping[str, Any], where: str) -> AwqLayout:
        """The layout of a folder made by any tool, from its quantization_config.

        Raises:
            InputError: another version, bits or group size than this file describes.
        """
        version = str(config.get("version", "gemm")).lower()
        bits, group = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
        if version != "gemm" or bits != 4 or not isinstance(group, int) or group < 1:
            raise InputError(
                f"{where}: AWQ version {version!r}, bits {bits!r}, group_size {group!r}; qquant reads 4-bit GEMM"
            )
        return AwqLayout(group)

    def stated(self, source: FolderSource) -> dict[str, Stated]:
        """What readers of this layout ask for."""
        layout, (kept, _) = source.layout, keeping.numbers(source)
        assert isinstance(layout, AwqLayout)
        bits, group = "codes are cut otherwise", "columns get the scales of others"
        order, another = "codes are read in another order", "it is read as another format"
        return {
            "quant_method": Stated(("awq",), another, "awq"),
            "method": Stated(("awq",), another, "awq"),
            "version": Stated(("gemm", "GEMM"), order, "gemm"),
            "format": Stated(("gemm", "GEMM"), order, "gemm"),
            "checkpoint_format": Stated(("gemm", "GEMM"), order, "gemm"),
            "desc_act": Stated((False,), order, False),
            "pack_dtype": Stated(("int32",), bits, "int32"),
            "lm_head": Stated((False, None), "other weights are taken for quantized"),
            "bits": Stated((4,), bits, 4),
            "w_bit": Stated((4,), bits, 4),
            "group_size": Stated((layout.group_size,), group, layout.group_size),
            "q_group_size": Stated((layout.group_size,), group, layout.group_size),
            "zero_point": Stated((True,), "the zero points are not read", True),
            "modules_to_not_convert": Stated(
                (keeping.skipped(source.family, kept),)
                if kept
                else (None, [], [source.family.head.removesuffix(".weight")]),
                "quantized weights are taken for plain ones",
            ),
        }
