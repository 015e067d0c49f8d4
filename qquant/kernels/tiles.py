"""What the kernels of `wq_mm` and `many_rows` share: a group's place, a tile's product, and sums of parts in their order.

Device functions, called from kernels alone. Shapes are of a program's block: weights [BN, SPAN], x [BM, SPAN], sums [BN, BM].
"""

from __future__ import annotations

from qquant.kernels.jit import jit, tl


@jit
def group(row: tl.tensor, t: tl.tensor, groups: tl.tensor, TILES_PER_GROUP: tl.constexpr) -> tl.tensor:
    """Where the parameters [BN] of rows `row` in tile `t` are."""
    if TILES_PER_GROUP == 0:
        return row
    return row * groups + tl.minimum(t // TILES_PER_GROUP, groups - 1)


@jit
def dot(weights: tl.tensor, x: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """Float32 [BN, BM] of `weights` and `x`."""
    if WIDE:
        product = tl.dot(weights.to(tl.float32), tl.trans(x.to(tl.float32)), input_precision="ieee")
    else:
        product = tl.dot(weights, tl.trans(x))
    return product


@jit
def write(
    acc: tl.tensor,
    bias_at: tl.tensor,
    row: tl.tensor,
    y_at: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    BIAS: tl.constexpr,
) -> None:
    """Store `acc`, with the bias of its rows, at `at`."""
    if BIAS:
        acc += tl.load(bias_at + row).to(tl.float32)[:, None]
    tl.store(y_at + at, acc.to(y_at.dtype.element_ty), mask=inside)


@jit
def last_to_arrive(counter_at: tl.tensor, splits: tl.tensor) -> tl.tensor:
    """Announce this program's sums; whether all others are there. The counter is zero again after the last."""
    tl.debug_barrier()  # every thread's sums are written before one thread announces them
    arrived = tl.atomic_add(counter_at, 1, sem="acq_rel")
    last = arrived == splits - 1
    tl.store(counter_at, 0, mask=last)
    return last


@jit
def sum_of_parts(at: tl.tensor, inside: tl.tensor, stride: tl.tensor, splits: tl.tensor, like: tl.tensor) -> tl.tensor:
    """The sums of all programs of a block of rows, in the order of the programs."""
    acc = tl.zeros_like(like)
    for s in range(splits):
        acc += tl.load(at + s * stride, mask=inside, other=0.0, cache_modifier=".cg")
    return acc
