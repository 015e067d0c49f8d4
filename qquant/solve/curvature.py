"""What an error in a linear's output costs the model's predictions: its Fisher information, from one backward pass.

Let y = W x become y + E x at every token t. To second order the KL divergence from the checkpoint's next-token distribution is

    KL = 1/2 sum_t (E x_t)' F_t (E x_t),    F_t = expectation of g_t g_t',    g_t = d(log p_t(w) - log p_t(v)) / d y_t / sqrt 2

with v and w drawn from the checkpoint's own prediction p_t. (Half the covariance of the difference of two draws is that of one, and the
sum over the vocabulary that a single draw's gradient needs cancels.) Two factors of it are kept, so that KL is about tr(G E H E'):

    s_t = |g_t|^2, summed over the linears of a stage, mean 1    weighs the tokens in H = sum_t s_t x_t x_t'
    G   = sum_t g_t g_t'                                         [N, N]: which outputs of a linear count, and together

K-FAC (Martens and Grosse 2015, arXiv 1503.05671); in quantization GuidedQuant (arXiv 2505.07004) and YAQA (arXiv 2505.22988). G is
kept for groups of at most ROWS rows; what lies outside these blocks of its diagonal is left out.

The forward pass leaves the input of every block in scratch files, or in memory that a GPU build can spare; the backward pass takes the
blocks from the last to the first, one in memory (and the next, where it is read ahead), runs each forward again and back, and writes
one file a block:

    FOLDER/block-<n>   "weights <stage>" float32 [tokens],  "rows <linear> <k>" bfloat16 [rows, rows], trace / rows = 1
                       "scale <linear>" float32 [1]: mean of |g_t|^2, which the other two are without
    FOLDER/outside     what is known of the embedding (the gradient by the input of block 0) and of the head, see `Tables`
    FOLDER/complete    sha256 of every block file; nothing is used before it was compared

Several ranks run the samples in turn, and each sums some of the G, in the order of the samples (`qquant.exchange`); the first writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qquant import devices
from qquant.algorithms.checksum import as_bytes
from qquant.algorithms.grid import finite
from qquant.background import prefetch, write_behind
from qquant.devices import free_memory, to_host
from qquant.disk.writes import create, make_folder, put, sync, write_pieces, write_synced
from qquant.errors import NumericalError
from qquant.exchange import ALONE, Exchange
from qquant.families import Family, ModelConfig
from qquant.kernels.gram import gram
from qquant.progress import Progress
from qquant.solve.backward import REMEDY, Watched, backward
from qquant.solve.fused import block_of
from qquant.solve.head import HeadInput, head_gradients
from qquant.solve.layers import Layers
from qquant.solve.stream import Stream
from qquant.source.checkpoint import Checkpoint
from qquant.source.safetensors_file import TensorInfo, header_bytes, read_header, read_tensor

OUTSIDE = "outside"  # the file of what lies outside the blocks
BACKWARD = (
    4  # times a block's forward pass: it runs that again, goes back, and sums G; 2.9 (float32) to 4.9 (bf16) on a CPU
)
HEAD = (
    1.3  # times a forward pass through as many weights: draws come on top of the product; 1.2 (float32) to 1.3 (bf16)
)

FILED = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}
WRITERS = 4  # files that are hashed and written at a time beside a GPU: one takes longer than a block's way back

ON_DEVICE, ON_HOST = 1 / 3, 1 / 4  # of a GPU's free memory, and of the host's, that inputs of blocks may take

Place = Literal["device", "host", "files"]


@dataclass(frozen=True)
class RowFactors(Mapping[str, tuple[Tensor, ...]]):
    """G by linear, float32 [n, n] for its rows in turn, read from a block's file whenever it is asked for."""

    parts: Mapping[str, Sequence[TensorInfo]]
    device: torch.device
    scales: Mapping[str, Tensor] = field(default_factory=dict)  # linear -> what its rows were divided by, float32 [N]
    there: Mapping[str, Tensor] = field(default_factory=dict)  # what was read ahead, as it is stored

    def divided(self, scales: Mapping[str, Tensor]) -> RowFactors:
        """The factors of linears whose rows were divided by `scales`."""
        return replace(self, scales=scales)

    def __getitem__(self, linear: str) -> tuple[Tensor, ...]:
        stored = (
            self.there[part.name] if part.name in self.there else read_tensor(part) for part in self.parts[linear]
        )
        factors = [factor.to(self.device).float() for factor in stored]
        if linear in self.scales:
            scales = self.scales[linear].split([len(factor) for factor in factors])
            factors = [factor * scale[:, None] * scale for factor, scale in zip(factors, scales, strict=True)]
        return tuple(factors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@dataclass(frozen=True)
class BlockCurvature:
    """The factors of one block. `weights`: by stage and measured sample, float32 [T]; `scales`: mean |g_t|^2 by linear."""

    weights: Mapping[str, Mapping[int, Tensor]]
    rows: RowFactors
    scales: Mapping[str, float]


class _Read(NamedTuple):
    """The file of a block: what it says of its tensors, and those that were read."""

    infos: Mapping[str, TensorInfo]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Curvature:
    """The measured factors of a whole model, in `folder`, for some of the calibration samples."""

    folder: Path
    lengths: Mapping[int, int]  # tokens of every measured sample, by its index among all

    def block(self, layer: int, device: torch.device) -> BlockCurvature:
        """The factors of block `layer`, on `device`, as they are solved with."""
        return self._placed(self._read(layer, ahead=False), device)

    @contextmanager
    def blocks(self, layers: Iterable[int], device: torch.device) -> Iterator[Iterator[BlockCurvature]]:
        """The curvature of `layers` in turn; beside a GPU the next block's are read while one computes."""
        beside = devices.threads_help(device)
        with prefetch(partial(self._read, ahead=beside), layers, beside) as reads:
            yield (self._placed(read, device) for read in reads)

    def _read(self, layer: int, ahead: bool) -> _Read:
        """What the file of a block has; the rows, which are large, only `ahead`."""
        infos = read_header(_path(self.folder, str(layer)))[0]
        wanted = [key for key in infos if ahead or not key.startswith("rows ")]
        return _Read(infos, {key: read_tensor(infos[key]) for key in wanted})

    def _placed(self, read: _Read, device: torch.device) -> BlockCurvature:
        weights: dict[str, Mapping[int, Tensor]] = {}
        rows: dict[str, list[TensorInfo]] = {}
        scales: dict[str, float] = {}
        for key, info in sorted(read.infos.items()):
            kind, name, *_ = key.split(" ")
            if kind == "weights":
                samples = read.tensors[key].to(device).split(list(self.lengths.values()))
                weights[name] = dict(zip(self.lengths, samples, strict=True))
            elif kind == "scale":
                scales[name] = float(read.tensors[key])
            else:
                rows.setdefault(name, []).append(info)
        return BlockCurvature(weights, RowFactors(rows, device, there=read.tensors), scales)

    def tables(self, device: torch.device) -> Tables:
        """What is known of the embedding and the head, on `device`."""
        stored = {key: read_tensor(info) for key, info in read_header(_path(self.folder, OUTSIDE))[0].items()}
        tokens, spread, largest = stored["sums"].tolist()
        lookup, head = (stored[key].to(device) for key in ("lookup", "head"))
        return Tables(lookup, head, stored["counts"], stored["predicted"], int(tokens), spread, largest)


@dataclass(frozen=True)
class Tables:
    """What errors in the embedding and in the head cost, as sums over tokens."""

    lookup: Tensor  # sum of g g' at the embedding's output, float32 [hidden, hidden]
    head: Tensor  # H of the head's input, see `qquant.solve.head`, float32 [hidden, hidden]
    counts: Tensor  # float32 [vocab]: how often each word was looked up
    predicted: Tensor  # float32 [vocab]: how often each was drawn as a prediction
    tokens: int
    spread: float  # sum of the weights of the tokens in `head`
    largest: float  # largest |h| of the head's input


def spread(lengths: Sequence[int], tokens: int) -> list[int]:
    """Places of as many samples as hold about `tokens` tokens, evenly spread over all of them; at least one."""
    share = min(1.0, tokens / max(1, sum(lengths)))
    count = max(1, int(len(lengths) * share))
    return [index * len(lengths) // count for index in range(count)]


def measure(  # noqa: PLR0913  each is of another thing
    source: Checkpoint,
    samples: Mapping[int, Tensor],
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    blocks: Layers | None = None,
    exchange: Exchange = ALONE,
) -> Curvature:
    """Measure the factors on `samples` (int token ids [T], by index) into `folder`, or take them from there if they are complete.

    `blocks`: the decoder blocks of `source`, where another pass wants them too. All ranks of `exchange` must call this. `progress`: told of "curvature" in units of one block's forward pass, with 0 done before the first.

    Raises:
        NumericalError: a gradient is not finite.
    """
    curvature = Curvature(folder, {index: len(sample) for index, sample in samples.items()})
    layers = source.config.layers
    if exchange.ranks.once(lambda: _complete(folder, layers)):
        return curvature
    make_folder(folder)
    head = head_share(source.family, source.config)

    def tell(done: int) -> None:
        progress.advance("curvature", done, layers + head + BACKWARD * layers)
        progress.check_stop()

    beside = devices.threads_help(device)
    stream = Stream.start(source, list(samples.values()), dtype, device, exchange)
    inputs = _Inputs(folder, _place(device, layers * sum(x.nbytes for x in stream.hidden)), exchange.rank)
    tell(0)
    blocks = blocks or Layers.of(source, device)
    with blocks.walk(range(layers)) as forth:
        for layer in range(layers):
            inputs.keep(layer, stream.hidden)
            stream.advance(layer, block_of(source.family, source.config, next(forth), dtype), {})
            devices.return_freed(device)
            tell(layer + 1)
    pieces = len(stream.every)
    hidden = exchange.in_order([x.to(device) for x in stream.hidden], pieces)
    seen = HeadInput.zeros(source, device)
    kept = blocks.take_head()
    gradients = head_gradients(source, hidden, seen, lambda done, of: tell(layers + head * done // of), exchange, kept)
    del kept
    gradients = [gradients[index] for index in exchange.mine(pieces)]
    del stream, hidden
    digests: dict[str, str] = {}
    with blocks.walk(reversed(range(layers))) as back, write_behind(beside, WRITERS) as submit:
        for layer in reversed(range(layers)):
            inputs_of_block = inputs.take(layer, device)
            block = Watched(source.family, source.config, next(back), dtype)
            gradients, factors = backward(block, layer, inputs_of_block, gradients, pieces, exchange)
            if exchange.first:
                submit(partial(_write, folder, str(layer), to_host(factors), digests))
            del factors
            devices.return_freed(device)
            tell(layers + head + BACKWARD * (layers - layer))
        gradients = exchange.in_order(gradients, pieces)
        if exchange.first:
            submit(partial(_write, folder, OUTSIDE, to_host(_tables(source, samples, seen, gradients)), digests))
    if exchange.first:
        write_synced(folder / "complete", json.dumps(digests, sort_keys=True).encode())
    exchange.ranks.meet()
    return curvature


def head_share(family: Family, config: ModelConfig) -> int:
    """What the gradient of the head costs, in forward passes through a block; at least 1."""
    blocks = sum(rows * columns for rows, columns in family.matrices(config).values())
    return max(1, round(HEAD * config.vocab * config.hidden * config.layers / blocks))


def _path(folder: Path, name: str) -> Path:
    return folder / (name if name == OUTSIDE else f"block-{name}")


def _write(folder: Path, name: str, factors: Callable[[], dict[str, Tensor]], digests: dict[str, str]) -> None:
    """Write the file of a block or of what lies outside them, and add its sha256 to `digests`."""
    stored = factors()
    head, _ = header_bytes([(key, FILED[value.dtype], tuple(value.shape)) for key, value in stored.items()], {})
    pieces: list[bytes | memoryview] = [head, *map(as_bytes, stored.values())]
    write_pieces(_path(folder, name), pieces)
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    digests[name] = digest.hexdigest()


def _tables(
    source: Checkpoint, samples: Mapping[int, Tensor], seen: HeadInput, gradients: Sequence[Tensor]
) -> dict[str, Tensor]:
    """What goes into the file of the embedding and the head, from the gradients by the embedding's output."""
    lookup = torch.zeros_like(seen.matrix)
    for gradient in gradients:
        gram(lookup, gradient.flatten(0, -2).contiguous())
    if not finite(lookup) or not finite(seen.matrix):
        raise NumericalError(f"embedding: gradients are not finite in {gradients[0].dtype}; {REMEDY}")
    counts = torch.bincount(torch.cat(list(samples.values())).cpu(), minlength=source.config.vocab)
    return {
        "lookup": lookup,
        "head": seen.matrix,
        "counts": counts.float(),
        "predicted": seen.predicted,
        "sums": torch.tensor([int(counts.sum()), seen.spread, seen.largest], dtype=torch.float64),
    }


def _place(device: torch.device, nbytes: int) -> Place:
    """Where inputs of `nbytes` stay: what a GPU build can spare is faster than files, a build on the CPU keeps to one layer."""
    if device.type != "cuda":
        return "files"
    if nbytes <= ON_DEVICE * free_memory(device):
        return "device"
    return "host" if nbytes <= ON_HOST * free_memory(torch.device("cpu")) else "files"


@dataclass
class _Inputs:
    """The inputs [..., T, hidden] of every block, until the way back asks for them."""

    folder: Path
    kept_on: Place
    rank: int = 0
    kept: dict[int, list[Tensor]] = field(default_factory=dict)  # without data where that is in a file

    def keep(self, layer: int, hidden: Sequence[Tensor]) -> None:
        match self.kept_on:
            case "device":
                self.kept[layer] = list(hidden)
            case "host":
                self.kept[layer] = [x.cpu() for x in hidden]
            case "files":
                self.kept[layer] = [x.to("meta") for x in hidden]
                create(self._path(layer), sum(x.nbytes for x in hidden), b"")
                start = 0
                for x in hidden:
                    put(self._path(layer), start, as_bytes(x))
                    start += x.nbytes
                sync(self._path(layer))

    def take(self, layer: int, device: torch.device) -> list[Tensor]:
        """The inputs of block `layer`, which are forgotten here."""
        kept = self.kept.pop(layer)
        if self.kept_on == "files":
            size = sum(x.nbytes for x in kept)
            data = read_tensor(TensorInfo("input", "U8", (size,), self._path(layer), 0, size))
            self._path(layer).unlink()
            parts = data.split([x.nbytes for x in kept])
            kept = [part.view(x.dtype).view(x.shape) for part, x in zip(parts, kept, strict=True)]
        return [x.to(device) for x in kept]

    def _path(self, layer: int) -> Path:
        return self.folder / f"input-{layer}-{self.rank}"


def _complete(folder: Path, layers: int) -> bool:
    """Whether every block file is there with the bytes that were written."""
    record = folder / "complete"
    if not record.is_file():
        return False
    digests = json.loads(record.read_bytes())
    return all(
        _path(folder, name).is_file()
        and hashlib.sha256(_path(folder, name).read_bytes()).hexdigest() == digests.get(name)
        for name in (*map(str, range(layers)), OUTSIDE)
    )
