"""Norms and gated MLPs of a loaded model: one kernel each where transformers' have six and two.

They round where transformers' do, have the same parts under the same names, and use a part that somebody replaced or hooked. The kernels
(`qquant.kernels.elementwise`) run on CUDA for 16 bits; plain torch elsewhere, where a gradient is wanted, and under torch.compile.
`generate` of ours does without them (`qquant.runtime.fused`): they are for transformers' own loop, and for anybody else's.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from qquant.kernels import elementwise


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon), rounded to the dtype of x, times weight [H]."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.variance_epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """X [..., H] -> [..., H]."""
        return elementwise.rms_norm(x, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        """Width and epsilon."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), of the modules of a transformers class that computes this."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = theirs.gate_proj, theirs.up_proj, theirs.down_proj
        self.act_fn = theirs.act_fn
        self._silu = type(theirs.act_fn)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., hidden] -> [..., hidden]."""
        g, u = self.gate_proj(x), self.up_proj(x)
        act = self.act_fn
        if type(act) is not self._silu or act._forward_hooks or act._forward_pre_hooks:
            return cast(Tensor, self.down_proj(act(g) * u))
        return cast(Tensor, self.down_proj(elementwise.gate(g, u)))
