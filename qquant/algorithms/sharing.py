"""A problem that several ranks solve together: who works out what, so that all have the whole answer, in the bits of one rank.

    rows       of which each has the answer for itself (rounding, GPTQ, descent, errors): a span of the stacked rows each
    coupled    rows of one G: slopes P = (v - w) H by columns, visits by rows (`qquant.algorithms.coupled`)

A row of a product has the bits that it has among others, and a column, too, where enough of them are multiplied at a time: a BLAS takes
another way for a few rows, by thread. That is so here for LEAST rows a thread and COLUMNS columns; `keeps_bits` tries it on the machine at
hand before anything is shared out. Whatever else a step needs (factors of H, G) each rank works out for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from qquant.exchange import Exchange

LEAST = 16  # rows that a thread multiplies with a matrix at a time
COLUMNS = 64  # of a matrix that are multiplied at a time
TRIED = 12  # times LEAST rows of a trial


def spans(count: int, world: int, least: int) -> list[slice]:
    """Consecutive shares of `count` things by rank, as even as shares of at least `least` are; some may be empty."""
    each, more = divmod(count // least, world)
    sizes = [least * (each + (rank < more)) for rank in range(world)]
    last = max((rank for rank, size in enumerate(sizes) if size), default=0)
    sizes[last] += count - sum(sizes)
    stops = [sum(sizes[: rank + 1]) for rank in range(world)]
    return [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]


def rows_of(count: int, exchange: Exchange) -> list[slice]:
    """The rows of each rank."""
    return spans(count, exchange.world, LEAST * torch.get_num_threads())


def columns_of(count: int, exchange: Exchange) -> list[slice]:
    """The columns of each rank."""
    return spans(count, exchange.world, COLUMNS)


def turned(part: Tensor, rows: Sequence[slice], exchange: Exchange) -> Tensor:
    """This rank's part of `rows`, [B, rows, K], of a matrix of which each rank has some columns, [B, N, ...]."""
    received = exchange.deliver([[part[:, span].contiguous()] for span in rows])
    return torch.cat([parcel[0] for parcel in received], 2)


def shares(columns: int, exchange: Exchange) -> bool:
    """Whether ranks can share out problems of so many columns; all must ask alike."""
    if exchange.world == 1:
        return False
    return all(exchange.say(keeps_bits(columns, exchange.world, str(exchange.device), torch.get_num_threads())))


@cache
def keeps_bits(columns: int, world: int, device: str, threads: int) -> bool:
    """Whether rows and columns of products have the bits here that they have among others."""
    made = torch.Generator().manual_seed(columns)
    count = TRIED * LEAST * threads
    a = torch.randn(count, columns, generator=made).to(device)
    b = torch.randn(columns, columns, generator=made).to(device)
    whole, root = a @ b, torch.linalg.cholesky(a @ a.T + columns * torch.eye(count, device=device))
    solved = torch.linalg.solve_triangular(root, whole, upper=False)
    by_rows = [whole[span].equal(a[span] @ b) for span in spans(count, world, LEAST * threads)]
    by_columns = [
        whole[:, span].equal(a @ b[:, span])
        and solved[:, span].equal(torch.linalg.solve_triangular(root, whole[:, span].contiguous(), upper=False))
        for span in spans(columns, world, COLUMNS)
    ]
    return all(by_rows + by_columns)
