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
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qquant import devices
from qquant.algorithms.checksum import as_bytes
from qquant.algorithms.grid import finite
from qquant.background import write_behind
from qquant.devices import free_memory, to_host
from qquant.disk.writes import create, make_folder, put, sync, write_synced
from qquant.errors import NumericalError
from qquant.families import Family, ModelConfig
from qquant.families.decoder import Block
from qquant.kernels.gram import gram
from qquant.progress import Progress
from qquant.solve.head import HeadInput, head_gradients
from qquant.solve.layers import Layers
from qquant.solve.stream import Stream, all_finite
from qquant.source.checkpoint import Checkpoint
from qquant.source.safetensors_file import TensorInfo, read_header, read_tensor

OUTSIDE = "outside"  # the file of what lies outside the blocks
REMEDY = "set calibration.objective to output"
ROWS = 2048  # rows of a linear whose curvature is kept together
BACKWARD = (
    4  # times a block's forward pass: it runs that again, goes back, and sums G; 2.9 (float32) to 4.9 (bf16) on a CPU
)
HEAD = (
    1.3  # times a forward pass through as many weights: draws come on top of the product; 1.2 (float32) to 1.3 (bf16)
)

ON_DEVICE, ON_HOST = 1 / 8, 1 / 4  # of a GPU's free memory, and of the host's, that inputs of blocks may take

Place = Literal["device", "host", "files"]


@dataclass(frozen=True)
class RowFactors(Mapping[str, tuple[Tensor, ...]]):
    """G by linear, float32 [n, n] for its rows in turn, read from a block's file whenever it is asked for."""

    parts: Mapping[str, Sequence[TensorInfo]]
    device: torch.device
    scales: Mapping[str, Tensor] = field(default_factory=dict)  # linear -> what its rows were divided by, float32 [N]

    def divided(self, scales: Mapping[str, Tensor]) -> RowFactors:
        """The factors of linears whose rows were divided by `scales`."""
        return RowFactors(self.parts, self.device, scales)

    def __getitem__(self, linear: str) -> tuple[Tensor, ...]:
        factors = [read_tensor(factor).to(self.device).float() for factor in self.parts[linear]]
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


@dataclass(frozen=True)
class Curvature:
    """The measured factors of a whole model, in `folder`, for some of the calibration samples."""

    folder: Path
    lengths: Mapping[int, int]  # tokens of every measured sample, by its index among all

    def block(self, layer: int, device: torch.device) -> BlockCurvature:
        """The factors of block `layer`, on `device`, as they are solved with."""
        weights: dict[str, Mapping[int, Tensor]] = {}
        rows: dict[str, list[TensorInfo]] = {}
        scales: dict[str, float] = {}
        for key, info in sorted(read_header(_path(self.folder, str(layer)))[0].items()):
            kind, name, *_ = key.split(" ")
            if kind == "weights":
                samples = read_tensor(info).to(device).split(list(self.lengths.values()))
                weights[name] = dict(zip(self.lengths, samples, strict=True))
            elif kind == "scale":
                scales[name] = float(read_tensor(info))
            else:
                rows.setdefault(name, []).append(info)
        return BlockCurvature(weights, RowFactors(rows, device), scales)

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


class _Watched(Block):
    """A block that reports the gradient of every linear's output."""

    def __init__(self, family: Family, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(family, config, weights, dtype)
        self.gradients: dict[str, Tensor] = {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = super().linear(name, x)
        y.register_hook(lambda gradient: self.gradients.__setitem__(name, gradient))
        return y


def spread(lengths: Sequence[int], tokens: int) -> list[int]:
    """Places of as many samples as hold about `tokens` tokens, evenly spread over all of them; at least one."""
    share = min(1.0, tokens / max(1, sum(lengths)))
    count = max(1, int(len(lengths) * share))
    return [index * len(lengths) // count for index in range(count)]


def measure(
    source: Checkpoint,
    samples: Mapping[int, Tensor],
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    blocks: Layers | None = None,
) -> Curvature:
    """Measure the factors on `samples` (int token ids [T], by index) into `folder`, or take them from there if they are complete.

    `blocks`: the decoder blocks of `source`, where another pass wants them too. `progress`: told of "curvature" in units of one block's forward pass, with 0 done before the first.

    Raises:
        NumericalError: a gradient is not finite.
    """
    curvature = Curvature(folder, {index: len(sample) for index, sample in samples.items()})
    layers = source.config.layers
    if _complete(folder, layers):
        return curvature
    make_folder(folder)
    head = head_share(source.family, source.config)

    def tell(done: int) -> None:
        progress.advance("curvature", done, layers + head + BACKWARD * layers)
        progress.check_stop()

    beside = devices.threads_help(device)
    stream = Stream.start(source, list(samples.values()), dtype, device)
    inputs = _Inputs(folder, _place(device, layers * sum(x.nbytes for x in stream.hidden)))
    tell(0)
    blocks = blocks or Layers.of(source, device)
    with blocks.walk(range(layers)) as forth:
        for layer in range(layers):
            inputs.keep(layer, stream.hidden)
            stream.advance(layer, Block(source.family, source.config, next(forth), dtype), {})
            tell(layer + 1)
    hidden = [x.to(device) for x in stream.hidden]
    seen = HeadInput.zeros(source, device)
    gradients = head_gradients(source, hidden, seen, lambda done, of: tell(layers + head * done // of))
    del stream, hidden
    digests: dict[str, str] = {}
    with blocks.walk(reversed(range(layers))) as back, write_behind(beside) as submit:
        for layer in reversed(range(layers)):
            inputs_of_block = inputs.take(layer, device)
            block = _Watched(source.family, source.config, next(back), dtype)
            gradients, factors = _backward(block, layer, inputs_of_block, gradients)
            submit(partial(_write, folder, str(layer), factors, digests))
            del factors
            tell(layers + head + BACKWARD * (layers - layer))
        submit(partial(_write, folder, OUTSIDE, to_host(_tables(source, samples, seen, gradients)), digests))
    write_synced(folder / "complete", json.dumps(digests).encode())
    return curvature


def head_share(family: Family, config: ModelConfig) -> int:
    """What the gradient of the head costs, in forward passes through a block; at least 1."""
    blocks = sum(rows * columns for rows, columns in family.matrices(config).values())
    return max(1, round(HEAD * config.vocab * config.hidden * config.layers / blocks))


def _path(folder: Path, name: str) -> Path:
    return folder / (name if name == OUTSIDE else f"block-{name}")


def _write(folder: Path, name: str, factors: Callable[[], dict[str, Tensor]], digests: dict[str, str]) -> None:
    """Write the file of a block or of what lies outside them, and add its sha256 to `digests`."""
    content = save(factors())
    write_synced(_path(folder, name), content)
    digests[name] = hashlib.sha256(content).hexdigest()


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
        return self.folder / f"input-{layer}"


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


@contextmanager
def _repeatable(x: Tensor) -> Iterator[None]:
    """Attention to x whose gradients are added in an order that does not change from run to run.

    Plain products do so; on a GPU flash attention that is asked to, and 16-bit operators beside it do anyway.
    """
    if not x.is_cuda or x.dtype == torch.float32:
        with sdpa_kernel(SDPBackend.MATH):
            yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            warnings.simplefilter("ignore")  # of cuBLAS, which is repeatable on one stream
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _backward(
    block: _Watched, layer: int, inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[list[Tensor], Callable[[], dict[str, Tensor]]]:
    """Gradients by the input of a block from those by its output, and what goes into the block's file, when it is in host memory."""
    family = block.family
    rows: dict[str, list[Tensor]] = {}
    weights: dict[str, list[Tensor]] = {stage.name: [] for stage in family.stages}
    before = []
    for x, gradient in zip(inputs, gradients, strict=True):
        leaf = x.clone().requires_grad_()
        with _repeatable(leaf):
            block.forward(leaf).backward(gradient)
        assert leaf.grad is not None
        before.append(leaf.grad)
        for stage in family.stages:
            by_linear = {name: block.gradients[name].flatten(0, -2) for name in stage.linears}
            weights[stage.name].append(sum(by_linear[name].float().square().sum(1) for name in stage.linears))  # type: ignore[arg-type]  # sum of a non-empty sequence
            for name in stage.linears:
                parts = by_linear[name].split(ROWS, dim=1)
                known = rows.setdefault(
                    name, [torch.zeros(part.shape[1], part.shape[1], device=x.device) for part in parts]
                )
                for total, part in zip(known, parts, strict=True):
                    gram(total, part.contiguous())
        block.gradients.clear()
    stored = {f"weights {name}": _mean_one(torch.cat(values)) for name, values in weights.items()}
    stored |= {
        f"rows {name} {index:04d}": _mean_one(part, part.diagonal()).bfloat16()
        for name, parts in rows.items()
        for index, part in enumerate(parts)
    }
    tokens = sum(x.shape[:-1].numel() for x in inputs)
    stored |= {
        f"scale {name}": torch.stack([part.diagonal().sum() for part in parts]).sum().view(1) / tokens
        for name, parts in rows.items()
    }
    if not all_finite(list(stored.values())):
        raise NumericalError(f"block {layer}: gradients are not finite in {inputs[0].dtype}; {REMEDY}")
    return before, to_host(stored)


def _mean_one(value: Tensor, of: Tensor | None = None) -> Tensor:
    """`value` over the mean of `of` (of itself); zeros stay as they are."""
    mean = (value if of is None else of).mean()
    return value / torch.where(mean == 0, torch.ones_like(mean), mean)
