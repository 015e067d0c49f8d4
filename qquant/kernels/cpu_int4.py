"""`cpu_int4_mm`: torch's own int4 matrix product for the CPU, for few rows.

    y = x @ W',    W[n, k] = (code[n, k] - 8) * scale[n, k // g] + shift[n, k // g],    shift = (8 - zero) * scale

`aten::_weight_int4pack_mm_for_cpu` wants bfloat16 activations (float16 and float32 run on a scalar path, some 80 times
slower), its own packing, and scale and shift in bfloat16. That moves every scale by up to 2^-9 of itself, and a shift by up to
2^-6 of a step: small against the half step that rounding the weights cost, but not exact. So this is for generating text;
fidelity is measured on `qquant::dequant`, which is exact. `rounding` says what it costs for given parameters.

The product wins where reading weights is the time: with AVX-512 up to about 48 rows against dequantizing and the bfloat16
product (MAX_ROWS), 4 times faster at one row. With AVX2 it gains little at one row and nothing above. 8-bit groups have no
such operator: dequantize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qquant.errors import InputError
from qquant.kernels.unpack import unpack_params, unpack_runtime

GROUP_SIZES = (32, 64, 128, 256)
MAX_ROWS = 48


def available(outputs: int, group_size: int) -> bool:
    """Whether the operator takes 4-bit weights with this many rows and this group size."""
    return group_size in GROUP_SIZES and outputs % 16 == 0 and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


def pack_cpu_int4(qweight: Tensor, params: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(packed uint8 [N, K/2], affine bf16 [K/g, N, 2]) of 4-bit weights in the runtime layout.

    The packing depends on the instruction set of this machine; it is for this process, not for a file.

    Raises:
        InputError: rows or a group size that the operator does not take.
    """
    rows, groups = params.shape
    if not available(rows, group_size):
        raise InputError(
            f"int4 on the CPU takes groups of {GROUP_SIZES} and rows in sixteens, not {group_size} and {rows}"
        )
    codes = unpack_runtime(qweight, 4, groups * group_size)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    scales, zeros = unpack_params(params, 4)
    affine = torch.stack([scales, (8 - zeros) * scales], dim=-1).to(torch.bfloat16)
    return packed, affine.transpose(0, 1).contiguous()


def cpu_int4_mm(x: Tensor, packed: Tensor, affine: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """X [M, K] times packed weights -> [M, N] of x's dtype; computed with bfloat16 activations and float32 sums."""
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16).contiguous(), packed, group_size, affine)
    if bias is not None:
        y += bias.to(y.dtype)
    return y.to(x.dtype)
