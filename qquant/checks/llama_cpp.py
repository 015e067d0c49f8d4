"""The numbers of `llama-perplexity --kl-divergence`, in its own arithmetic, and its file of base logits.

Our own KL divergence (fidelity.py) is exact. llama-perplexity's is not: the base model's log probabilities go through 16-bit
codes in a file, cut at 16 below the largest logit, and only tokens with log p_base > -16 count. To compare with numbers
that people publish, this module repeats that arithmetic.

    file   "_logits_" | i32 context, vocabulary V, chunks C | i32 tokens[C * context] | per chunk context - 1 - context / 2 rows
    row    f32 scale, f32 least | u16 code[V], one more if V is odd       log p = scale * code + least
           low = max(min, max - 16), scale = (max - low) / 65535, code = nearest((logit - low) / scale), 0 at or below low
           least = low - max - ln sum exp(logit - max)

Per token: nll, nll_base (from the codes), kl = sum over log p_base > -16 of p_base (log p_base - log p), the same largest, and the
right token's p - p_base. Means come with sd / sqrt(n - 1), percentiles by interpolation at f (n - 1). The whole vocabulary of the
file counts, padding included.

llama.cpp rounds the input of a product to 8 bits to match the weight's type (`ROUNDED`), which near 8-bit weights costs more than the
weights do: 65 % of the KL divergence that it prints for q8_0 on the demo model. `rounded=True` repeats that for GGUF files:

    q8_0   blocks of 32:  d = max |x| / 127, code = round(x / d), d kept in fp16
    q8_k   blocks of 256: m = the x of largest |x|, code = round(-127 x / m) <= 127, d = -m / 127 in fp32

Left out: the fp16 cache of keys and values. Reference: tools/perplexity and the CPU backend of llama.cpp.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qquant.checks.fidelity import Scored, final_states, plain_block
from qquant.errors import EnvironmentMissingError, InputError
from qquant.families.decoder import Block
from qquant.families.weights import WeightSource
from qquant.formats.gguf.source import GgufSource
from qquant.progress import Progress

MAGIC = b"_logits_"
DEPTH = 16.0  # nats below the largest that are kept
ROWS = 4096  # rows of the head at a time
LIMIT = 1 << 20  # of each number in the head of a file
ROUNDED = {  # type of the weights -> type that inputs are rounded to
    "f16": "f16", "bf16": "bf16",
    **dict.fromkeys(("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"), "q8_0"),
    **dict.fromkeys(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"), "q8_k"),
}  # fmt: skip


def rounded_inputs(x: Tensor, kind: str | None) -> Tensor:
    """Inputs float32 [..., K] of a product as llama.cpp's CPU backend sees them; None: as they are."""
    match kind:
        case "f16":
            return x.half().float()
        case "bf16":
            return x.bfloat16().float()
        case "q8_0":
            blocks = x.unflatten(-1, (-1, 32))
            step = blocks.abs().amax(-1, keepdim=True) / 127
            codes = torch.where(step > 0, blocks * (1 / step), torch.zeros(())).round()
            return (codes * step.half().float()).flatten(-2)
        case "q8_k":
            blocks = x.unflatten(-1, (-1, 256))
            extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
            inverse = torch.where(extreme != 0, -127 / extreme, torch.zeros(()))
            codes = (blocks * inverse).round().clamp(max=127)
            return torch.where(inverse != 0, codes * (1 / inverse), torch.zeros(())).flatten(-2)
    return x


class RoundedBlock(Block):
    """A decoder block whose linears round their inputs to what llama.cpp pairs with their weights."""

    kinds: Mapping[str, str | None]  # by linear

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Linear `name` as in every block, of rounded inputs."""
        return super().linear(name, rounded_inputs(x, self.kinds[name]))


def _rounding(source: WeightSource, name: str) -> str | None:
    return ROUNDED.get(source.stored_as(name)) if isinstance(source, GgufSource) else None


def rounded_block(source: WeightSource, layer: int, device: torch.device) -> Block:
    """A block as llama.cpp computes it; checkpoints and folders compute in float32."""
    plain = plain_block(source, layer, device)
    block = RoundedBlock(plain.family, plain.config, plain.weights, torch.float32)
    prefix = source.family.block.format(layer)
    linears = [linear for stage in source.family.stages for linear in stage.linears]
    block.kinds = {linear: _rounding(source, f"{prefix}{linear}.weight") for linear in linears}
    return block


def encode(logits: Tensor) -> NDArray[np.uint16]:
    """Rows of the file, uint16 [T, 4 + V (+ 1)], for float32 logits [T, V]."""
    count, vocabulary = logits.shape
    largest = logits.amax(1)
    low = torch.maximum(logits.amin(1), largest - DEPTH)
    total = (logits - largest[:, None]).exp().double().sum(1)
    scale = (largest - low) / 65535
    least = (low - largest).double() - total.log()
    codes = ((logits - low[:, None]) / scale[:, None]).round().clamp_(0, 65535).nan_to_num_(0)
    rows = np.zeros((count, 4 + vocabulary + vocabulary % 2), np.uint16)
    head = torch.stack((scale, least.float()), 1).cpu().numpy()
    rows[:, :4] = head.view(np.uint16)
    rows[:, 4 : 4 + vocabulary] = codes.cpu().numpy().astype(np.uint16)
    return rows


def decode(rows: NDArray[np.uint16], vocabulary: int) -> Tensor:
    """Log probabilities float32 [T, V] of rows of the file."""
    head = torch.from_numpy(np.ascontiguousarray(rows[:, :4]).view(np.float32))
    codes = torch.from_numpy(rows[:, 4 : 4 + vocabulary].astype(np.float32))
    return codes * head[:, :1] + head[:, 1:]


@dataclass
class BaseLogits:
    """A file of base logits: windows int32 [C, context], and their rows, read one chunk at a time."""

    path: Path
    windows: NDArray[np.int32]
    vocabulary: int

    @classmethod
    def open(cls, path: Path) -> BaseLogits:
        """Read the head of a file.

        Raises:
            InputError: it is no such file, or has another size than its head says.
        """
        with path.open("rb") as file:
            head = file.read(len(MAGIC) + 12)
            if len(head) < len(MAGIC) + 12 or not head.startswith(MAGIC):
                raise InputError(f"{path}: is not a file of base logits (llama-perplexity --kl-divergence-base)")
            context, vocabulary, chunks = struct.unpack("<3i", head[len(MAGIC) :])
            if not all(0 < number <= LIMIT for number in (context, vocabulary, chunks)):
                raise InputError(f"{path}: context {context}, vocabulary {vocabulary}, {chunks} chunks: damaged")
            expected = len(head) + 4 * context * chunks + 2 * chunks * _scored(context) * _width(vocabulary)
            if path.stat().st_size != expected:
                raise InputError(f"{path}: {path.stat().st_size:,} bytes, its head describes {expected:,}: truncated")
            windows = np.frombuffer(file.read(4 * context * chunks), "<i4").reshape(chunks, context)
        return cls(path, windows, vocabulary)

    def rows(self) -> Iterator[NDArray[np.uint16]]:
        """Rows of each chunk, uint16 [scored, width]."""
        chunks, context = self.windows.shape
        shape = (_scored(context), _width(self.vocabulary))
        with self.path.open("rb") as file:
            file.seek(len(MAGIC) + 12 + 4 * context * chunks)
            for _ in range(chunks):
                yield np.frombuffer(file.read(2 * math.prod(shape)), "<u2").reshape(shape)


def _scored(context: int) -> int:
    return context - 1 - context // 2


def _width(vocabulary: int) -> int:
    return 4 + vocabulary + vocabulary % 2


@dataclass
class Statistics:
    """Per token, float64 [n]; filled chunk by chunk."""

    nll: list[Tensor] = field(default_factory=list)
    nll_base: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    delta_p: list[Tensor] = field(default_factory=list)
    same_top: list[Tensor] = field(default_factory=list)

    def add(self, base: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Take in log probabilities of the base [T, V], logits of the artifact [T, V], and the next tokens [T]."""
        largest = logits.amax(1, keepdim=True)
        log_sum = (logits - largest).exp().double().sum(1, keepdim=True).log().float()
        log_p = logits - largest - log_sum
        at = targets[:, None]
        p_base = torch.where(base > -DEPTH, base.exp(), torch.zeros(()))
        self.nll.append(-log_p.gather(1, at)[:, 0].double())
        self.nll_base.append(-base.gather(1, at)[:, 0].double())
        self.kl.append((p_base * (base - log_p)).double().sum(1))
        self.delta_p.append((log_p.gather(1, at).exp() - base.gather(1, at).exp())[:, 0].double())
        self.same_top.append((base.argmax(1) == log_p.argmax(1)).double())

    def summary(self) -> dict[str, float]:
        """The numbers that llama-perplexity prints, under short names; probabilities as shares, not per cent."""
        columns = {name: torch.cat(column).numpy() for name, column in vars(self).items()}
        nll, base, kl, move = (columns[name] for name in ("nll", "nll_base", "kl", "delta_p"))
        numbers = {"ppl": math.exp(nll.mean()), "ppl_error": math.exp(nll.mean()) * _error(nll)}
        numbers |= {"ppl_base": math.exp(base.mean()), "ln_ppl_ratio": float(nll.mean() - base.mean())}
        numbers |= {"ln_ppl_ratio_error": _error(nll - base), "correlation": float(np.corrcoef(nll, base)[0, 1])}
        numbers |= {"kld_mean": float(kl.mean()), "kld_error": _error(kl), "kld_max": float(kl.max())}
        for name, values in (("kld", kl), ("dp", move)):
            quantiles = np.percentile(values, PERCENTILES)
            numbers |= {f"{name}_{f:g}": float(value) for f, value in zip(PERCENTILES, quantiles, strict=True)}
        rms = float(np.sqrt((move**2).mean()))
        numbers |= {"dp_mean": float(move.mean()), "dp_rms": rms}
        numbers |= {"dp_rms_error": _error(move**2) / (2 * rms) if rms else 0.0}
        share = float(columns["same_top"].mean())
        numbers |= {"same_top": share, "same_top_error": math.sqrt(share * (1 - share) / (len(nll) - 1))}
        return numbers


PERCENTILES = (0.1, 1, 5, 10, 50, 90, 95, 99, 99.9)


def _error(values: NDArray[np.float64]) -> float:
    return math.sqrt(max(float((values**2).mean() - values.mean() ** 2), 0.0) / (len(values) - 1))


@dataclass(frozen=True)
class Run:
    """What is read, and how."""

    windows: Tensor  # int64 [C, context]
    device: torch.device
    progress: Progress
    rounded: bool = False  # inputs of products rounded as llama.cpp does

    @property
    def first(self) -> int:
        """The first position whose prediction is scored."""
        return self.windows.shape[1] // 2

    def finals(self, sources: Sequence[WeightSource]) -> list[Tensor]:
        """Inputs of the heads, float32 [C, scored, hidden]."""
        text = Scored(self.windows, self.first, sources[0].config.vocab)
        return final_states(sources, text, self.device, self.progress, rounded_block if self.rounded else plain_block)

    def logits(self, source: WeightSource, states: Tensor) -> Tensor:
        """Float32 logits [T, V] of normed states [T, hidden], with the head read in slices."""
        vocabulary, head = source.config.vocab, source.family.head
        states = rounded_inputs(states, _rounding(source, head)) if self.rounded else states
        slices = range(0, vocabulary, ROWS)
        return torch.cat(
            [states @ source.rows(head, start, min(start + ROWS, vocabulary)).to(states).T for start in slices], 1
        ).cpu()


def compare(
    baseline: WeightSource, artifacts: Mapping[str, WeightSource], run: Run, target: Path | None = None
) -> dict[str, dict[str, float]]:
    """Statistics of artifacts against `baseline`; the base logits are kept in `target`, if given.

    Raises:
        EnvironmentMissingError: the file would not fit.
    """
    vocabulary, windows = baseline.config.vocab, run.windows
    if target is not None:
        _require_room(target, windows, vocabulary)
    finals = run.finals([baseline, *artifacts.values()])
    by_name = {name: Statistics() for name in artifacts}
    run.progress.advance("logits", 0, len(windows))
    partial = target.with_name(f"{target.name}.part") if target else None
    with partial.open("wb") if partial else contextlib.nullcontext() as file:
        if file:
            file.write(MAGIC + struct.pack("<3i", windows.shape[1], vocabulary, len(windows)))
            file.write(windows.numpy().astype("<i4").tobytes())
        for chunk in range(len(windows)):
            coded = encode(run.logits(baseline, finals[0][chunk]))
            if file:
                file.write(coded.astype("<u2").tobytes())
            base, next_tokens = decode(coded, vocabulary), windows[chunk, run.first + 1 :]
            for states, (name, source) in zip(finals[1:], artifacts.items(), strict=True):
                by_name[name].add(base, run.logits(source, states[chunk]), next_tokens)
            run.progress.advance("logits", chunk + 1, len(windows))
    if partial and target:
        partial.rename(target)
    return {name: statistics.summary() for name, statistics in by_name.items()}


def _require_room(target: Path, windows: Tensor, vocabulary: int) -> None:
    chunks, context = windows.shape
    needed = len(MAGIC) + 12 + 4 * windows.numel() + 2 * chunks * _scored(context) * _width(vocabulary)
    free = shutil.disk_usage(target.absolute().parent).free
    if needed > free:
        raise EnvironmentMissingError(
            f"{target}: {chunks} windows need {needed:,} bytes, {free:,} are free. Ask for fewer windows"
        )


def compare_with_file(
    base: BaseLogits,
    artifacts: Mapping[str, WeightSource],
    device: torch.device,
    progress: Progress,
    rounded: bool = False,
) -> dict[str, dict[str, float]]:
    """Statistics of artifacts against a file of base logits, on the windows that the file names.

    Raises:
        InputError: an artifact has another vocabulary than the file.
    """
    for name, source in artifacts.items():
        if source.config.vocab != base.vocabulary:
            raise InputError(f"{base.path}: has {base.vocabulary} tokens, {name} has {source.config.vocab}")
    run = Run(torch.from_numpy(base.windows.astype(np.int64)), device, progress, rounded)
    finals = run.finals(list(artifacts.values()))
    by_name = {name: Statistics() for name in artifacts}
    progress.advance("logits", 0, len(run.windows))
    for chunk, rows in enumerate(base.rows()):
        log_p = decode(rows, base.vocabulary)
        for states, (name, source) in zip(finals, artifacts.items(), strict=True):
            by_name[name].add(log_p, run.logits(source, states[chunk]), run.windows[chunk, run.first + 1 :])
        progress.advance("logits", chunk + 1, len(run.windows))
    return {name: statistics.summary() for name, statistics in by_name.items()}
