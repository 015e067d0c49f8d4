"""What a stage of an artifact's own stream has to make up for: sums over the samples of its inputs without quantization and with it.

    H~ = sum_t s_t x~ x~'        cross = sum_t s_t (x - x~) x~'        residuals = sum_t s_t (r - r~) x~'

x: the input of the stage, r: the residual stream that its output is added to, s: the weight of the token; ~: with quantization. Terms are
added piece by piece of the samples, in order. `cross` is made of products of TILE rows. Of several ranks each runs some of the samples, and owns one
of the sums, or tiles of one; all of x~ goes to every owner, and of x the columns of its tiles. Sums by column of x itself, where they are wanted, go to the first.

On a GPU the differences x - x~, and s x~, are rounded to bfloat16 each: 2^-9 of a correction that is damped anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qquant.algorithms.gram import Gram, NotFiniteError
from qquant.devices import policy
from qquant.exchange import Parcels
from qquant.families import Stage
from qquant.families.forward import StageInput
from qquant.kernels.column_sums import column_sums
from qquant.kernels.elementwise import difference
from qquant.kernels.product import add_products
from qquant.solve.block import View
from qquant.solve.stream import Piece, Stream

TILE = 2048  # rows of `cross` that are one product
GRAM, RESIDUALS = "gram", "residuals"


class Inputs(NamedTuple):
    """What a piece of the samples brings to a stage: without quantization, and with it."""

    piece: Piece
    exact: StageInput[Tensor]
    own: StageInput[Tensor]


@dataclass
class Drift:
    """The sums of a stage."""

    gram: Gram  # H~
    cross: Tensor  # float32 [K, K]
    residuals: Tensor | None  # float32 [N, K], where there is a residual


class _DriftSums:
    """The sums of one stage that this rank owns, and whose the others are."""

    def __init__(self, view: View, stage: Stage, stream: Stream, seen: Gram | None) -> None:
        self.view, self.stage, self.stream, self.seen, exchange = view, stage, stream, seen, stream.exchange
        weight = view.weights[f"{stage.linears[0]}.weight"]
        rows, columns = weight.shape
        self.tiles = {f"rows {start}": slice(start, min(start + TILE, columns)) for start in range(0, columns, TILE)}
        costs = {name: float(tile.stop - tile.start) for name, tile in self.tiles.items()} | {GRAM: float(columns)}
        costs |= {RESIDUALS: float(rows)} if stage.into_residual else {}
        self.owners = exchange.owners(costs)
        self.mine = [name for name, owner in self.owners.items() if owner == exchange.rank]
        sizes = [tile.stop - tile.start for name, tile in self.tiles.items() if name in self.mine]
        device = weight.device
        self.gram = Gram.zeros(columns if GRAM in self.mine else 0, device)
        for gram in self.watched:
            gram.unseen = [] if policy(device).waits or exchange.world > 1 else None
        self.cross = torch.zeros(sum(sizes), columns, device=device)
        pieces = zip((name for name in self.tiles if name in self.mine), self.cross.split(sizes or [0]), strict=False)
        self.pieces = dict(pieces)
        self.residuals = torch.zeros(rows if RESIDUALS in self.mine else 0, columns, device=device)

    @property
    def watched(self) -> list[Gram]:
        """What looks whether something is finite."""
        return [self.gram] if self.seen is None else [self.gram, self.seen]

    def parcels(self, inputs: Inputs) -> Parcels:
        """What the owners need of a piece."""
        _, (_, x, r), (_, y, q) = inputs
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        parcels: list[list[Tensor]] = [[] for _ in range(self.stream.exchange.world)]
        for name, owner in self.owners.items():
            parcel = parcels[owner]
            if not parcel:
                parcel.append(y)
            if name in self.tiles:
                parcel.append(x[:, self.tiles[name]])
            elif name == RESIDUALS and r is not None and q is not None:
                parcel += [r.flatten(0, -2), q.flatten(0, -2)]
        if self.seen is not None:
            parcels[0] = [together(column_sums(x)), *parcels[0]]
        return parcels

    def add(self, index: int, parcel: Iterator[Tensor]) -> None:
        """Add what came of piece `index`, in the order of `parcels`."""
        piece = self.stream.every[index]
        if self.seen is not None and self.stream.exchange.first:
            sums = next(parcel)
            y = next(parcel, None)
            self.seen.add_sums(apart(sums), self.stream.tokens(index))
        else:
            y = next(parcel)
        if y is None:
            return
        weights = self.view.token_weights(self.stage.name, piece, len(y) // len(piece))
        weighted = _weighted(y, weights)
        for name in self.mine:
            if name == GRAM:
                self.gram.add(y, weights)
            elif name in self.tiles:
                add_products(self.pieces[name], _difference(next(parcel), y[:, self.tiles[name]]), weighted)
            else:
                add_products(self.residuals, _difference(next(parcel), next(parcel)), weighted)

    def collected(self, everywhere: bool) -> Drift | None:
        """All sums, on the first rank, or `everywhere`.

        Raises:
            NotFiniteError: something that was added on any rank was not finite.
        """
        exchange, finite = self.stream.exchange, True
        try:
            for gram in self.watched:
                gram.settle()
        except NotFiniteError:
            finite = False
        said = exchange.say([finite, self.gram.tokens, self.gram.largest])
        if not all(finite for finite, _, _ in said):
            raise NotFiniteError(f"the input of {self.stage.name} is not finite")
        gram = self.gram
        parts = {GRAM: [gram.matrix, gram.absolute, gram.squares], RESIDUALS: [self.residuals]}
        parts |= {name: [piece] for name, piece in self.pieces.items()}
        if exchange.world > 1:
            given = [x for name in self.mine for x in parts[name]]
            received = [iter(parcel) for parcel in (exchange.share if everywhere else exchange.to_first)(given)]
            if not everywhere and not exchange.first:
                return None
            sizes = {GRAM: 3}
            parts = {
                name: [next(received[owner]) for _ in range(sizes.get(name, 1))] for name, owner in self.owners.items()
            }
            _, tokens, largest = said[self.owners[GRAM]]
            matrix, absolute, squares = parts[GRAM]
            gram = Gram(matrix, absolute, squares, tokens, largest)
            self.cross = torch.cat([parts[name][0] for name in self.tiles])
        return Drift(gram, self.cross, parts[RESIDUALS][0] if self.stage.into_residual else None)


def drift(
    view: View,
    stage: Stage,
    inputs: Iterator[Inputs],
    stream: Stream,
    seen: Gram | None = None,
    everywhere: bool = False,
) -> Drift | None:
    """The sums over all samples, on the first rank, or `everywhere`; `inputs`: those of the pieces of `stream` in turn.

    Sums by column of the inputs without quantization go into `seen`, on the first rank.

    Raises:
        NotFiniteError: an input is not finite.
    """
    sums = _DriftSums(view, stage, stream, seen)
    for index, parcel in stream.exchange.in_turn(len(stream.every), lambda _: sums.parcels(next(inputs))):
        if parcel:
            sums.add(index, iter(parcel))
    next(inputs, None)  # it ends
    return sums.collected(everywhere)


def together(sums: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """`column_sums` as one tensor, float32 [2 K + 1]."""
    return torch.cat([*sums[:2], sums[2].view(1)])


def apart(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reverse of `together`."""
    absolute, squares = sums[:-1].chunk(2)
    return absolute, squares, sums[-1]


def _weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    """Rows of x [T, K] times their weights, in float32; in bfloat16 on a GPU."""
    if not x.is_cuda:
        return x.float() if weights is None else x.float() * weights.unsqueeze(1)
    if weights is None:
        return x.bfloat16()
    return torch.mul(x, weights.to(x.dtype).unsqueeze(1), out=torch.empty_like(x, dtype=torch.bfloat16))


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """X - y, in float32; in bfloat16 on a GPU."""
    if not x.is_cuda:
        return x.float() - y.float()
    return difference(x, y)
