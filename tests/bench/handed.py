"""What ranks hand each other, by what it is for, beside the least that the scheme of `qquant.exchange` needs; for tests.bench.ranks.

Of W ranks together, for a block of one artifact with a stream of its own: what a rank cannot make from what it has, once, no wider than it is

    curvature   (W - 1) / W of the gradients of measured tokens at every linear's output, and of G in bfloat16
    inputs      (W - 1) / W of a stage's inputs without quantization and with it; of the residual stream where it is written into
    sums        W - 1 times H~ (a half: it is symmetric), cross, and what is summed of residuals
    targets     W - 1 times the corrections of all weights
    codes       W - 1 times a byte for every weight
    slopes      of every sweep over coupled rows (W - 1) / W of P
    changes     of every such sweep W - 1 times a byte, the code, and four, the gain, for every weight
    errors      W - 1 times a number for every row

Outside the blocks (states before the head, gradients behind it) is one part: hidden states of the measured tokens to all, and theirs back.
"""

import sys
from collections import Counter

KINDS = {
    "solve/curvature.py measure": "outside",
    "solve/head.py head_gradients": "outside",
    "solve/backward.py backward": "curvature",
    "solve/backward.py _factors": "curvature",
    "solve/sharing.py advance": "inputs",
    "solve/drift.py drift": "inputs",
    "solve/drift.py collected": "sums",
    "solve/sharing.py to_all": "sums",
    "solve/propagate.py _targets": "targets",
    "solve/sharing.py solve": "codes",
    "solve/sharing.py solve_stage": "codes",
    "algorithms/problem.py of_all": "codes",
    "algorithms/problem.py _of_all_rows": "errors",
    "algorithms/coupled.py swept": "codes",
    "algorithms/coupled.py lowers": "changes",
    "algorithms/sharing.py turned": "slopes",
}


class Handed:
    """Bytes that this rank sent, and how often something was handed over, by what it is for."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.bytes, self.times = Counter(), Counter()

    def watch(self, exchange):
        """Count in every call of `exchange.deliver`, whoever asks for it."""
        inner = exchange.deliver

        def deliver(this, parcels):
            kind, before = asked_by(sys._getframe(1)), self.ranks.sent
            received = inner(this, parcels)
            self.bytes[kind] += self.ranks.sent - before
            self.times[kind] += 1
            return received

        exchange.deliver = deliver


def asked_by(frame):
    """What a call is for, by the first function of a module that is known."""
    while frame is not None:
        code = frame.f_code
        kind = KINDS.get(f"{'/'.join(code.co_filename.split('/')[-2:])} {code.co_name}")
        if kind:
            return kind
        frame = frame.f_back
    return "other"


def least(recipe, checkpoint, plan, world):
    """Bytes by kind of all ranks together that all blocks need, for the one artifact of `plan`, whose stream is its own."""
    family, config = checkpoint.family, checkpoint.config
    item = 2 if checkpoint.dtype == "BF16" else 4
    spec = plan.artifacts[0].spec
    measured = min(plan.tokens, recipe.calibration.gradient_tokens)
    found = Counter()
    part, others = (world - 1) / world, world - 1
    for layer in range(config.layers):
        shapes = family.linear_shapes(config, layer)
        for stage in family.stages:
            rows = [shapes[linear][0] for linear in stage.linears]
            columns, weights = shapes[stage.linears[0]][1], sum(rows) * shapes[stage.linears[0]][1]
            written = stage.into_residual * config.hidden
            summed = columns * (columns + 1) / 2 + columns**2 + stage.into_residual * weights
            spans = [min(2048, count - start) for count in rows for start in range(0, count, 2048)]
            found["curvature"] += part * (measured * item * sum(rows) + 2 * sum(span**2 for span in spans))
            found["inputs"] += part * plan.tokens * item * 2 * (columns + written)
            found["sums"] += others * 4 * summed
            found["targets"] += others * 4 * weights
            found["codes"] += others * weights
            found["errors"] += others * 4 * sum(rows)
            found["slopes"] += spec.sweeps * part * 4 * weights
            found["changes"] += spec.sweeps * others * 5 * weights
    found["outside"] = others * 2 * measured * item * config.hidden
    return found


def told(ranks, needed, layers):
    """Lines for people: megabytes a layer by kind, of all ranks together, against the least."""
    kinds = sorted({kind for rank in ranks for kind in rank["handed"]}, key=lambda kind: -needed.get(kind, 0))
    lines = []
    for kind in kinds:
        sent, times = (sum(rank[what].get(kind, 0) for rank in ranks) for what in ("handed", "times"))
        if sent:
            many = layers if kind != "outside" else 1
            over = (
                f", {sent / needed[kind]:.2f} times the least, {needed[kind] / many / 1e6:.2f}"
                if needed.get(kind)
                else ""
            )
            lines.append(
                f"  {kind}: {sent / many / 1e6:.2f} MB{' a layer' if many == layers else ''}{over} ({times / len(ranks):.0f} times)"
            )
    whole, all_needed = sum(sum(rank["handed"].values()) for rank in ranks), sum(needed.values())
    if all_needed:
        lines.append(f"  all: {whole / 1e6:.1f} MB, {whole / all_needed:.2f} times the least, {all_needed / 1e6:.1f}")
    return lines
