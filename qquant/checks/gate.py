"""From measurements to verdicts: each limit of the recipe against its number."""

from __future__ import annotations

import math

from qquant.checks.fidelity import Fidelity
from qquant.recipe import Gates
from qquant.report import Verdict


def judge(gates: Gates, fidelity: Fidelity) -> Verdict:
    """Fail with every limit that is exceeded; a number that is not finite exceeds every limit."""
    numbers = (
        ("perplexity ratio", fidelity.perplexity_ratio, gates.perplexity_ratio, 1),
        ("mean KL divergence", fidelity.mean_kl, gates.kl_divergence, 1),
        ("top-1 agreement", fidelity.top1, gates.top1_agreement, -1),
    )
    reasons = []
    for name, value, limit, direction in numbers:
        if limit is not None and not (math.isfinite(value) and (value - limit) * direction <= 0):
            reasons.append(f"{name} {value:.5g} is {'above' if direction > 0 else 'below'} the limit {limit:g}")
    return Verdict("fail" if reasons else "pass", tuple(reasons))
