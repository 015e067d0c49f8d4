"""How fast an artifact runs against its 16-bit model, judged fairly: prefill and decode apart, taking turns in one process.

Both are the same module (`checks.stepping`), only its linears differ; on CUDA a step is one captured graph over a static cache. A
window is one prefill, or `steps` steps from the same place in the sequence. Windows come as baseline, artifact, artifact, baseline,
which cancels a drift of the clock; a pair's ratio is the time of its two baseline windows over that of the two others. Reported are
medians over pairs and a 95 % bootstrap interval of the median ratio. The first windows of each are not counted.

First the baseline runs against itself by the same protocol. If that is further from 1 than `margin`, the machine is too noisy for
the question, and the outcome is "inconclusive". Weights that fit into a cache are copied and the copies take turns, since in a model
that serves no cache answers.

The ceiling says what to hope for: decoding reads every weight and the cache of keys and values once, so at best it is as much faster
as it reads less; prefill multiplies as much as before, so at best it is as fast. "Slower than 16 bits" alone is no regression: at
0.5B and batch 1, where launches count, vLLM's int4 kernels are slower than its bf16.

GGUF files run in llama.cpp, if llama-cpp-python is installed, by llama-bench's protocol: a prompt of random tokens in batches, then
one token at a time, mean over repetitions after a warm-up; the cache is cleared in between. Without it, in this runtime.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qquant.artifact.opening import open_weights
from qquant.errors import UsageError
from qquant.families import ModelConfig
from qquant.families.weights import WeightSource
from qquant.formats.gguf.shards import shard_paths
from qquant.formats.gguf.source import GgufSource
from qquant.kernels.replay import Work, recorded
from qquant.progress import Progress
from qquant.report.record import Pace, Proof, SpeedReport
from qquant.runtime import linears
from qquant.runtime.stepping import ModelWeights, Stepper, read_weights
from qquant.source.checkpoint import Checkpoint

RESAMPLES = 4000
SEED = 20240204
LEAST = 0.02  # seconds of a window: shorter ones are repeated inside it
CACHES = 4  # times the last cache that weights must fill
COPIES = 16  # at most
L3 = 64 << 20  # bytes, where the system does not say


@dataclass(frozen=True)
class SpeedSettings:
    """What is run, and when to believe it."""

    prompt: int = 512  # tokens: of a prefill, and in the cache when decoding begins
    steps: int = 16  # decoded in a window
    pairs: int = 10
    margin: float = 0.05  # noise of the baseline against itself that still allows a verdict
    min_decode: float | None = None  # fail below this ratio to the baseline; None: not judged
    min_prefill: float | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for numbers that make no measurement."""
        for name, least in (("prompt", 1), ("steps", 1), ("pairs", 3)):
            if getattr(self, name) < least:
                raise UsageError(f"speed: {name} must be {least} or more, got {getattr(self, name)}")
        if not 0 < self.margin < 1:
            raise UsageError(f"speed: margin must lie between 0 and 1, got {self.margin}")


class Contender(Protocol):
    """A model whose windows are timed."""

    runtime: str
    weights: int  # bytes in memory
    read: int  # bytes that a step reads, weights and cache
    cache: int  # bytes of keys and values
    peak: int  # bytes at the worst moment, by itself

    def prefill(self) -> None:
        """Read the prompt; done when it returns."""
        ...

    def decode(self) -> None:
        """Take the window's steps from after the prompt; done when it returns."""
        ...


# -- contenders


class Stepped:
    """A model in this runtime."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        settings: SpeedSettings,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.settings, self.device = settings, device
        before = _allocated(device) - weights.bytes_held()
        self.stepper = Stepper(config, weights, settings.prompt + settings.steps + 1, device, dtype)
        generator = torch.Generator().manual_seed(SEED)
        self.ids = torch.randint(0, config.vocab, (settings.prompt,), generator=generator).to(device)
        self.weights, self.cache = weights.bytes_held(), self.stepper.cache_bytes()
        context = (settings.prompt + settings.steps / 2) / self.stepper.capacity
        self.read = weights.bytes_read() + int(self.cache * context)
        self.peak = self._worst_moment(before)
        steppers = [self.stepper]
        for _ in range(1, _copies(weights.bytes_read(), device)):
            steppers.append(self.stepper.with_copied_weights())
        self.steps = [_captured(stepper.step, device) for stepper in steppers]
        self.prefills = [_captured(partial(stepper.prefill, self.ids), device) for stepper in steppers]
        self.turn = 0
        name = str(dtype).removeprefix("torch.")
        first = next(module for module in weights.modules() if isinstance(module, linears.RuntimeLinear))
        self.runtime = f"{first.path}; {'captured graph' if device.type == 'cuda' else 'eager'}, {name}"

    def _worst_moment(self, before: int) -> int:
        """Bytes at the worst moment of one prefill and one step."""

        def run() -> None:
            self.stepper.prefill(self.ids)
            self.stepper.step()

        with torch.inference_mode():
            if self.device.type != "cuda":
                return self.weights + self.cache + most_alive(run)
            run()  # compiles kernels; libraries take their workspaces
            torch.cuda.reset_peak_memory_stats(self.device)
            run()
            return torch.cuda.max_memory_allocated(self.device) - before

    def prefill(self) -> None:
        """Read the prompt."""
        self.turn += 1
        with torch.inference_mode():
            self.prefills[self.turn % len(self.prefills)]()
        self._wait()

    def decode(self) -> None:
        """Take the steps of a window."""
        with torch.inference_mode():
            self.stepper.rewind(self.settings.prompt)
            for _ in range(self.settings.steps):
                self.turn += 1
                self.steps[self.turn % len(self.steps)]()
        self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _captured(work: Work, device: torch.device) -> Work:
    if device.type != "cuda":
        return work
    with torch.inference_mode():
        for _ in range(2):  # compiles kernels and fills caches of the libraries
            work()
        return recorded(work)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def last_cache(device: torch.device) -> int:
    """Bytes of the largest cache between the processor and its memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    name = "SC_LEVEL3_CACHE_SIZE"
    return max(0, os.sysconf(name)) or L3 if name in os.sysconf_names else L3


def _copies(nbytes: int, device: torch.device) -> int:
    return min(COPIES, max(1, math.ceil(CACHES * last_cache(device) / max(1, nbytes))))


class _Alive(TorchDispatchMode):
    """Adds up the memory of tensors that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.now = self.most = 0
        self.seen: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_key(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and _key(value) not in inputs | self.seen:
                storage = value.untyped_storage()
                key, size = _key(value), storage.nbytes()
                self.seen.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return out


def _key(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def most_alive(work: Callable[[], None]) -> int:
    """Bytes of tensors made by `work`, at its worst moment; what one operator uses inside is not seen."""
    mode = _Alive()
    with mode:
        work()
    return mode.most


class LlamaCpp:
    """A GGUF file in llama.cpp, through llama-cpp-python."""

    def __init__(self, path: Path, source: GgufSource, settings: SpeedSettings) -> None:
        library = importlib.import_module("llama_cpp")
        self.settings = settings
        capacity = settings.prompt + settings.steps + 1
        threads = torch.get_num_threads()
        self.model: Any = library.Llama(
            str(path), n_ctx=capacity, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False
        )
        generator = np.random.default_rng(SEED)
        self.ids = generator.integers(0, source.config.vocab, settings.prompt).tolist()
        config = source.config
        self.cache = 2 * 2 * config.layers * config.kv_heads * config.head_dim * capacity
        self.weights = sum(shard.stat().st_size for shard in shard_paths(path))
        self.read = self.weights + int(self.cache * (settings.prompt + settings.steps / 2) / capacity)
        self.peak = self.weights + self.cache
        self.runtime = f"llama.cpp (llama-cpp-python {library.__version__}), {threads} threads"

    def prefill(self) -> None:
        """Read the prompt."""
        self.model.reset()
        self.model.eval(self.ids)

    def decode(self) -> None:
        """Take the steps of a window."""
        self.model.n_tokens = self.settings.prompt  # `eval` drops what comes after
        for step in range(self.settings.steps):
            self.model.eval([self.ids[step % len(self.ids)]])


# -- timing


def _seconds(window: Callable[[], None], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        window()
    return (time.perf_counter() - began) / repeats


@dataclass(frozen=True)
class Compared:
    """Seconds of a window of two contenders, by pair."""

    baseline: NDArray[np.float64]
    other: NDArray[np.float64]

    def ratio(self) -> tuple[float, float, float]:
        """(median, low, high) of baseline / other: how many times as fast the other is."""
        return median_interval(self.baseline / self.other)


def median_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """The median and its 95 % bootstrap interval (percentiles)."""
    picks = np.random.default_rng(SEED).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), (2.5, 97.5))
    return float(np.median(values)), float(low), float(high)


def take_turns(baseline: Callable[[], None], other: Callable[[], None], pairs: int) -> Compared:
    """Time windows of both in the order baseline, other, other, baseline, after a warm-up."""
    baseline()
    longest = max(_seconds(other, 1), 1e-9)
    repeats = max(1, math.ceil(LEAST / longest))
    halves = []
    for _ in range(pairs):
        times = [_seconds(window, repeats) for window in (baseline, other, other, baseline)]
        halves.append(((times[0] + times[3]) / 2, (times[1] + times[2]) / 2))
    table = np.array(halves)
    return Compared(table[:, 0], table[:, 1])


def _pace(phase: str, settings: SpeedSettings, baseline: Contender, other: Contender) -> Pace:
    windows = [getattr(contender, phase) for contender in (baseline, other)]
    _, low, high = take_turns(windows[0], windows[0], settings.pairs).ratio()
    noise = max(high - 1, 1 - low)
    compared = take_turns(windows[0], windows[1], settings.pairs)
    ratio, low, high = compared.ratio()
    tokens = settings.prompt if phase == "prefill" else settings.steps
    return Pace(
        phase=phase,
        batch=1,
        tokens=0 if phase == "prefill" else settings.prompt,
        rate=tokens / float(np.median(compared.other)),
        rate_baseline=tokens / float(np.median(compared.baseline)),
        ratio=ratio,
        low=low,
        high=high,
        noise=noise,
        ceiling=1.0 if phase == "prefill" else baseline.read / other.read,
    )


def judge(paces: Sequence[Pace], settings: SpeedSettings) -> tuple[Proof, tuple[str, ...]]:
    """(pass, fail or inconclusive; why), by the least ratios that are asked for and the noise of the machine."""
    failed, unclear = [], []
    for pace in paces:
        least = settings.min_prefill if pace.phase == "prefill" else settings.min_decode
        if pace.noise > settings.margin:
            unclear.append(
                f"{pace.phase}: the baseline differs from itself by up to {pace.noise:.1%}, more than the {settings.margin:.1%} "
                "that a verdict allows; let nothing else run"
            )
        elif least is None or pace.low >= least:
            continue
        elif pace.high < least:
            failed.append(
                f"{pace.phase}: {pace.ratio:.3f} [{pace.low:.3f}, {pace.high:.3f}] times the 16-bit model's speed, {least:g} asked"
            )
        else:
            unclear.append(
                f"{pace.phase}: {pace.low:.3f} to {pace.high:.3f} times as fast, on both sides of {least:g}; take more --pairs"
            )
    return "fail" if failed else "inconclusive" if unclear else "pass", (*failed, *unclear)


def compare(baseline: Contender, other: Contender, settings: SpeedSettings, device: torch.device) -> SpeedReport:
    """Time `other` against `baseline`, and judge it."""
    other.prefill()
    baseline.prefill()
    paces = tuple(_pace(phase, settings, baseline, other) for phase in ("decode", "prefill"))
    outcome, reasons = judge(paces, settings)
    return SpeedReport(
        outcome=outcome,
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        runtime=other.runtime
        if other.runtime == baseline.runtime
        else f"{other.runtime} | baseline: {baseline.runtime}",
        definition=f"batch 1; prefill of {settings.prompt} tokens; {settings.steps} greedy steps after them a window; "
        f"medians of {settings.pairs} pairs of windows, the baseline before and after",
        paces=paces,
        weights=other.weights,
        weights_baseline=baseline.weights,
        cache=other.cache,
        peak=other.peak,
        peak_baseline=baseline.peak,
        reasons=reasons,
    )


# -- the check


def measure(
    artifact: Path,
    baseline: Checkpoint | GgufSource,
    settings: SpeedSettings,
    device: torch.device,
    dtype: torch.dtype | None = None,
    baseline_path: Path | None = None,
) -> SpeedReport:
    """The speed of an artifact against its checkpoint (or against a GGUF file, for one); both are in memory at once.

    Raises:
        UsageError: the model's context is shorter than prompt and steps.
        InputError: either is damaged.
    """
    source = open_weights(artifact)
    longest = settings.prompt + settings.steps + 1
    if longest > source.config.positions:
        raise UsageError(f"{artifact}: reads {source.config.positions} tokens; prompt and steps take {longest}")
    number = dtype or _dtype(baseline)
    with torch.inference_mode():
        first = _contender(baseline, baseline_path, settings, device, number)
        return compare(first, _contender(source, artifact, settings, device, number), settings, device)


def measure_all(
    artifacts: Sequence[Path], baseline: Checkpoint, device: torch.device, progress: Progress
) -> list[SpeedReport]:
    """`measure` with few tokens for many artifacts of one checkpoint, whose weights are read once."""
    positions = baseline.config.positions
    settings = SpeedSettings(prompt=min(512, positions // 2), steps=min(16, positions // 4))
    reports = []
    progress.advance("speed", 0, len(artifacts))
    with torch.inference_mode():
        first = _contender(baseline, None, settings, device, _dtype(baseline))
        for number, path in enumerate(artifacts):
            other = _contender(open_weights(path), path, settings, device, _dtype(baseline))
            reports.append(compare(first, other, settings, device))
            progress.advance("speed", number + 1, len(artifacts))
            progress.check_stop()
    return reports


def _dtype(baseline: WeightSource) -> torch.dtype:
    return torch.float16 if isinstance(baseline, Checkpoint) and baseline.dtype == "F16" else torch.bfloat16


def _contender(
    source: Any, path: Path | None, settings: SpeedSettings, device: torch.device, dtype: torch.dtype
) -> Contender:
    if isinstance(source, GgufSource) and path and device.type == "cpu" and importlib.util.find_spec("llama_cpp"):
        return LlamaCpp(path, source, settings)
    return Stepped(source.config, read_weights(source, device, dtype), settings, device, dtype)
