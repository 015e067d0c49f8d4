"""Hidden states of the calibration samples, and how they get through a block where memory or range is short.

Samples go through one by one, on a GPU a few of one length together (`pieces`), and each stage's input is added to its Gram matrix
once, in the same order with the same arithmetic, whatever happens in between; so what is written does not depend on how much memory
there was.

    memory    after an allocation that failed the same samples are tried again, and stages that were added already are passed over:
              first with caches emptied, then with the others' states in host memory, then with the Gram matrices there too;
              then the build ends with exit status 6, and what is finished is kept
    range     a sample whose activations are not finite in the dtype of the stream (bfloat16) goes through this block in float32, and
              goes on in the dtype of the stream; the report counts such samples. Float16 checkpoints are computed in float32 from
              the start, since float16 ends at 65504. What is not finite in float32 either ends the build with exit status 7
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from qquant.algorithms import coupled
from qquant.algorithms.gram import Gram, NotFiniteError
from qquant.algorithms.grid import finite
from qquant.devices import free_memory, policy
from qquant.errors import NumericalError, ShortMemoryError
from qquant.exchange import ALONE, Exchange
from qquant.families.decoder import Block, Observer, embed_each
from qquant.families.weights import WeightSource
from qquant.plan.room import states_stay

STREAM_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float32, "F32": torch.float32}  # by the checkpoint's
CACHES, STATES, GRAMS = 1, 2, 3  # what gives way, in this order
SPARE = 0.25  # of the free memory of a device for a second copy of the hidden states
LOG = logging.getLogger(__name__)
Result = TypeVar("Result")
Piece = tuple[int, ...]  # indices of the samples that go together
Add = Callable[[Gram, str, Tensor, Piece], None]  # (Gram of a stage, stage, its input [..., T, K], whose it is)


def add_unweighted(gram: Gram, stage: str, x: Tensor, piece: Piece) -> None:
    """Every token counts alike."""
    del stage, piece
    gram.add(x.flatten(0, -2))


def pieces(lengths: Sequence[int], together: int) -> list[Piece]:
    """Neighbours of one length in pieces of at most `together` tokens, or of one sample."""
    cut: list[list[int]] = []
    for index, length in enumerate(lengths):
        if cut and lengths[cut[-1][0]] == length and (len(cut[-1]) + 1) * length <= together:
            cut[-1].append(index)
        else:
            cut.append([index])
    return [tuple(piece) for piece in cut]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    refused = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return refused or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def all_finite(values: Sequence[Tensor]) -> bool:
    """Whether none of `values`, of one device, holds NaN or infinity; the host waits for a GPU once."""
    extremes = [extreme for value in values for extreme in torch.aminmax(value)]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def require_finite(layer: int, grams: Mapping[str, Gram]) -> None:
    """Raise NumericalError where the sums of a stage's input are not finite."""
    for stage, gram in grams.items():
        if not finite(gram.matrix) or not finite(gram.squares):
            raise NumericalError(
                f"block {layer}: the Gram matrix of the input of {stage} is not finite (largest |x| {gram.largest:.3g}); "
                "see the checkpoint's weights"
            )


@dataclass
class Stream:
    """Hidden states of the samples after the blocks walked so far, on `device` while there is room.

    Those of a piece are one tensor: [T, hidden] of one sample, [B, T, hidden] of more. float32 streams have no such.
    """

    hidden: list[Tensor]
    device: torch.device
    pressure: int = 0  # what has given way
    overflowed: set[int] = field(default_factory=set)  # samples that went through the last block in float32
    pieces: list[Piece] = field(
        default_factory=list
    )  # whose the hidden states are; a sample each, where it is not said
    exchange: Exchange = ALONE  # among whose ranks the pieces are shared out
    every: Sequence[Piece] = ()  # pieces of all ranks
    lengths: Sequence[int] = ()  # tokens of every sample, where ranks share them out

    def __post_init__(self) -> None:
        """A sample each."""
        self.pieces = self.pieces or [(index,) for index in range(len(self.hidden))]
        self.every = self.every or self.pieces

    @classmethod
    def start(
        cls,
        source: WeightSource,
        samples: Sequence[Tensor],
        dtype: torch.dtype,
        device: torch.device,
        exchange: Exchange = ALONE,
    ) -> Stream:
        """The embeddings of this rank's samples among `samples`, int token ids [T] each, for which the table is read once."""
        lengths = [len(sample) for sample in samples]
        together = policy(device).together if dtype != torch.float32 else 1
        every = pieces(lengths, together)
        cut = [every[index] for index in exchange.mine(len(every))]
        if not cut:  # there are more ranks than pieces
            return cls([], device, exchange=exchange, every=every, lengths=lengths)
        shapes = [(len(piece), lengths[piece[0]], -1) if len(piece) > 1 else (lengths[piece[0]], -1) for piece in cut]
        rows = embed_each(source, [torch.cat([samples[index] for index in piece]) for piece in cut], dtype, device)
        hidden = [own.view(shape) for own, shape in zip(rows, shapes, strict=True)]
        return cls(hidden, device, pieces=cut, exchange=exchange, every=every, lengths=lengths)

    def branch(self) -> Stream:
        """A stream of its own that begins where this one is."""
        return replace(self, hidden=list(self.hidden), pressure=0, overflowed=set())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states; float32 where a rank has none."""
        return self.hidden[0].dtype if self.hidden else torch.float32

    def tokens(self, index: int) -> int:
        """Tokens of a piece of any rank's."""
        return sum(self.lengths[sample] for sample in self.every[index])

    @property
    def by_piece(self) -> dict[Piece, Tensor]:
        """The hidden states, by whose they are."""
        return dict(zip(self.pieces, self.hidden, strict=True))

    def advance(self, layer: int, block: Block, grams: Mapping[str, Gram], add: Add = add_unweighted) -> None:
        """Run every piece through `block`, adding stage inputs to `grams` (may be empty) by `add`.

        Raises:
            NumericalError: activations are not finite in float32 either.
            ShortMemoryError: there is not enough memory for one sample.
        """
        self.overflowed = set()
        if not self._unchecked(block, grams, add):
            for index in range(len(self.hidden)):
                observe = self._observer(grams, index, add) if grams else None
                self.hidden[index] = self.with_less_memory(layer, partial(self.through, layer, block, index, observe))
        for gram in grams.values():
            gram.move(self.device)
        require_finite(layer, grams)

    def _unchecked(self, block: Block, grams: Mapping[str, Gram], add: Add) -> bool:
        """All pieces through `block` without a look at any number, for which a GPU would have to wait for the host.

        False where this gains nothing, memory is short or something was not finite; nothing has changed then.
        """
        if not policy(self.device).waits or self.pressure or any(gram.tokens for gram in grams.values()):
            return False
        if sum(x.nbytes for x in self.hidden) > SPARE * free_memory(self.device):
            return False
        for gram in grams.values():
            gram.unseen = []
        try:
            hidden = []
            for index, x in enumerate(self.hidden):
                observe = self._observer(grams, index, add) if grams else None
                hidden.append(block.forward(x.to(block.dtype), observe).to(x.dtype))
            for gram in grams.values():
                gram.settle()
            in_range = all_finite(hidden)
        except (RuntimeError, MemoryError, NotFiniteError) as error:
            if not isinstance(error, NotFiniteError) and not is_out_of_memory(error):
                raise
            in_range = False
        if in_range:
            self.hidden = hidden
        else:
            for gram in grams.values():
                gram.clear()
        return in_range

    def through(self, layer: int, block: Block, index: int, observe: Observer | None) -> Tensor:
        """What `block` makes of a piece, in float32 where the dtype of the stream does not hold it: one step of `advance`.

        `observe` may raise NotFiniteError, and is asked again then for the stages that it did not take.
        """
        x = self.hidden[index].to(self.device)
        for in_float32 in (False, True):
            attempt = block.in_float32() if in_float32 else block
            try:
                y = attempt.forward(x.to(attempt.dtype), observe).to(x.dtype)
                if not finite(y):
                    raise NotFiniteError(f"its output is not finite in {x.dtype}")
            except NotFiniteError as failure:
                if attempt.dtype == torch.float32:
                    raise NumericalError(
                        f"block {layer}: activations of sample {', '.join(map(str, self.pieces[index]))} are not finite in float32 either: {failure}; "
                        "see the checkpoint's weights"
                    ) from None
                self.overflowed.update(self.pieces[index])
            else:
                break
        return y.cpu() if self.pressure >= STATES else y

    def _observer(self, grams: Mapping[str, Gram], index: int, add: Add) -> Observer:
        seen: set[str] = set()

        def observe(stage: str, value: Tensor) -> None:
            if stage in seen:
                return
            grams[stage].move(self.device)
            add(grams[stage], stage, value, self.pieces[index])
            seen.add(stage)
            if self.pressure >= GRAMS:
                grams[stage].move("cpu")

        return observe

    def with_less_memory(self, layer: int, work: Callable[[], Result]) -> Result:
        """`work()`, again with less in memory where an allocation fails; it must give the same when it is called again.

        Work on several ranks is not done again: they would have to agree.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.pressure == GRAMS or self.exchange.world > 1:
                    raise ShortMemoryError(
                        f"block {layer}: out of memory ({str(error).splitlines()[0] if str(error) else 'host'}). What is finished is kept: "
                        "the same command continues where there is more, or with --device cpu"
                    ) from None
            self._relieve(layer)

    def leave_device(self) -> None:
        """Have the states in host memory from now on; pieces come to the device one at a time."""
        self.pressure = max(self.pressure, STATES)
        self.hidden = [x.cpu() for x in self.hidden]

    def _relieve(self, layer: int) -> None:
        self.pressure += 1
        LOG.warning("block %d: out of memory, tried again with less in it (%d of %d)", layer, self.pressure, GRAMS)
        if self.pressure >= STATES:
            self.leave_device()
        coupled.visited.forget()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def make_room(streams: Sequence[Stream]) -> None:
    """Have the states of all streams in host memory where they would take too much of their device's."""
    device = streams[0].device
    each = [sum(x.nbytes for x in stream.hidden) for stream in streams]
    if not policy(device).apart or states_stay(sum(each) + max(each), free_memory(device)):
        return
    for stream in streams:
        stream.leave_device()
