"""A second trained checkpoint: Qwen1.5's architecture with grouped-query attention and a tied head, fourteen languages, 32,768 positions.

    python tests/bench/train_checkpoint.py train --data DATA/0 --out OUT --seconds 330     on a GPU; DATA as `training_texts.py tokens` writes it
    python tests/bench/train_checkpoint.py export --data DATA/0 --weights OUT CHECKPOINT   a folder that transformers and qquant read

29.4 M parameters: 8 blocks of 512 columns, 8 heads of 64 over 2 key/value heads, an MLP of 1,280, 16,384 words. The model is written here in plain
functions over tensors by their transformers names: float32 weights, bfloat16 arithmetic, AdamW. Everything happens by the share of the time that
is spent: the learning rate (up, level, straight down), and the length of the rows, 2,048, then 8,192, at last 32,768 tokens (`PHASES`).

A row is a stretch of one kind of text, drawn in proportion to the root of how much there is, or a stretch with facts hidden in it, then asked in
another order (`Facts`); their answers weigh `ANSWER` times. Names and numbers are drawn from syllables and digits, not from the held-out ones.

OUT gets the weights as bfloat16 safetensors, cut into `weights.N` of 15 MB, every minute and at the end, and log.json with what was measured.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import lzma
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.bench.hidden_facts import Facts, heldout, read_tokenizer
from tests.bench.small_qwen import Model, Shape, Weights, begin, export

# from which share of the time, tokens of a row, share of the rows that hide facts
PHASES = ((0.0, 2_048, 0.15), (0.6, 8_192, 0.25), (0.82, 32_768, 0.4))
Phases = tuple[tuple[float, int, float], ...]
ANSWER = 5.0
PEAK, WARM, LEVEL, END = 1.5e-3, 0.04, 0.4, 0.02  # learning rate; shares of the time; the last as a share of the peak
STEP, MICRO = 262_144, 131_072  # tokens of a step, of a pass
PIECE = 15_000_000
RESERVE = 25.0  # seconds for measuring and saving at the end


# Rows, made by processes beside the one that trains.


@dataclass
class Rows:
    """Draws rows of any length from the texts."""

    streams: dict[str, np.ndarray]
    facts: Facts
    hiding: dict[int, float]  # by tokens of a row, the share that hides facts
    seed: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.kinds = list(self.streams)
        self.shares = [len(self.streams[kind]) ** 0.5 for kind in self.kinds]

    def stretch(self, kind: str, length: int) -> np.ndarray:
        """`length` ids of a kind of text from anywhere in it; from its beginning again where it ends."""
        stream = self.streams[kind]
        start = self.draw.randrange(len(stream))
        return np.take(stream, range(start, start + length), mode="wrap")

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, what each weighs), both [length + 1]."""
        if self.draw.random() >= self.hiding[length]:
            kind = self.draw.choices(self.kinds, self.shares)[0]
            return self.stretch(kind, length + 1), np.ones(length + 1, np.float32)
        language = self.draw.choice(("en", "en", "zh"))
        hay = [
            kind
            for kind in ({"en": ("en", "bundled", "code"), "zh": ("zh", "zh", "bundled")}[language])
            if kind in self.streams
        ]
        text = self.stretch(self.draw.choice(hay or self.kinds), length)
        ids, spans = self.facts.document(language, text, length + 1, self.draw)
        weights = np.ones(length + 1, np.float32)
        for first, end in spans:
            weights[first:end] = ANSWER
        return ids, weights

    def passes(self, tokens: int, length: Any, queue: Any) -> None:
        """Puts (ids, weights) of `tokens` tokens into a queue for ever, in rows as long as `length` says at the moment."""
        while True:
            now = length.value
            rows = [self.row(now) for _ in range(tokens // now)]
            queue.put((np.stack([ids for ids, _ in rows]).astype(np.uint16), np.stack([w for _, w in rows])))


def streams(folders: list[Path]) -> dict[str, np.ndarray]:
    """The ids of each kind of text, of all folders; raises SystemExit where they are not those that data.json tells of."""
    found: dict[str, list[np.ndarray]] = {}
    for folder in folders:
        about = json.loads((folder / "data.json").read_text())
        content = lzma.decompress((folder / "tokens.xz").read_bytes())
        if hashlib.sha256(content).hexdigest() != about["sha256"]:
            raise SystemExit(f"{folder}/tokens.xz: another sha256 than in data.json")
        ends = np.cumsum(list(about["tokens"].values()))
        for kind, ids in zip(about["tokens"], np.split(np.frombuffer(content, np.uint16), ends[:-1]), strict=True):
            found.setdefault(kind, []).append(ids)
    return {kind: np.concatenate(parts) for kind, parts in found.items()}


# Training.


def rate(share: float) -> float:
    """The learning rate when `share` of the time is spent."""
    if share < WARM:
        return PEAK * share / WARM
    return PEAK * (1 if share < LEVEL else max(END, 1 - (1 - END) * (share - LEVEL) / (1 - LEVEL)))


def save(weights: Weights, out: Path, log: dict[str, Any]) -> None:
    """The weights in pieces, each renamed into place, and the log with their sha256."""
    content = safetensors.torch.save({name: value.detach().bfloat16().cpu() for name, value in weights.items()})
    log = {**log, "sha256": hashlib.sha256(content).hexdigest()}
    pieces = {f"weights.{i}": content[at : at + PIECE] for i, at in enumerate(range(0, len(content), PIECE))}
    for name, piece in {**pieces, "log.json": json.dumps(log, indent=1).encode()}.items():
        (out / f".{name}").write_bytes(piece)
        (out / f".{name}").rename(out / name)


def fastest(shape: Shape, length: int, tokens: int) -> contextlib.AbstractContextManager[Any]:
    """The attention that is fastest forth and back at a length of row, on a GPU."""
    seconds = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        size = (tokens // length, length, shape.heads, shape.head)
        q, k, v = (
            torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True).transpose(1, 2) for _ in "qkv"
        )
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            for _ in range(2):  # the first makes plans
                torch.cuda.synchronize()
                start = time.perf_counter()
                functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
                torch.cuda.synchronize()
                seconds[backend] = time.perf_counter() - start
    sys.stderr.write(f"attention at {length}: { {one.name: round(taken, 4) for one, taken in seconds.items()} }\n")
    return sdpa_kernel(min(seconds, key=lambda one: seconds[one])) if seconds else contextlib.nullcontext()


def step(model: Model, passes: list[tuple[np.ndarray, np.ndarray]], device: torch.device) -> float:
    """Adds up the gradients of the passes of a step; their mean loss."""
    total, whole = torch.zeros((), device=device), sum(float(w[:, 1:].sum()) for _, w in passes)
    for ids, weights in passes:
        there = torch.from_numpy(ids.astype(np.int32)).to(device, non_blocking=True).long()
        loss = model.loss(there)
        (loss * torch.from_numpy(weights[:, 1:]).to(device)).sum().div(whole).backward()
        total += loss.detach().mean() / len(passes)
    return float(total)


@torch.no_grad()
def measured(model: Model, data: Path, lengths: tuple[int, ...], most: int = 8) -> dict[str, Any]:
    """Held-out losses by text, by stretch of positions, and shares of hidden facts found, by length of the document."""
    tokenizer, device = read_tokenizer(data), model.weights["model.norm.weight"].device
    texts = heldout(tokenizer)
    found: dict[str, Any] = {"loss": {}, "positions": {}, "facts": {}}
    for name, ids in texts.items():
        length = min(2_048, lengths[-1], len(ids) - 1)
        rows = [ids[at : at + length + 1] for at in range(0, len(ids) - length, length)][:most]
        found["loss"][name] = round(float(model.loss(torch.tensor(rows, device=device)).mean()), 4)
    for name in ("long-test", "long-zh-test"):
        loss = model.loss(torch.tensor([texts[name][: lengths[-1] + 1]], device=device))[0]
        edges = [0, *(n for n in (1_024, 2_048, 4_096, 8_192, 16_384) if n < len(loss)), len(loss)]
        stretches = itertools.pairwise(edges)
        found["positions"][name] = {f"{a}-{b}": round(float(loss[a:b].mean()), 4) for a, b in stretches}
    facts, draw = Facts(tokenizer), random.Random("held out")
    for length in lengths:
        for language, name in (("en", "long-test"), ("zh", "long-zh-test")):
            right = []
            for _ in range(4):
                ids, spans = facts.document(language, np.resize(texts[name], length), length, draw)
                first = model.right(torch.from_numpy(ids)[None].to(device))
                right += [bool(first[a - 1 : b - 1].all()) for a, b in spans]
            found["facts"][f"{language} {length}"] = [sum(right), len(right)]
    return found


@dataclass(frozen=True)
class Plan:
    """How long is trained with which rows: seconds since `start`, tokens of a step and of a pass, the phases."""

    start: float
    seconds: float
    step: int = STEP
    micro: int = MICRO
    phases: Phases = PHASES

    def length(self, share: float) -> int:
        """Tokens of a row when `share` of the time is spent."""
        return next(length for first, length, _ in reversed(self.phases) if share >= first)


def chosen(model: Model, plan: Plan, device: torch.device) -> Model:
    """The compiled functions if they compile on this machine."""
    if device.type != "cuda":
        return model
    try:
        fast = model.compiled()
        ids = torch.zeros((plan.micro // plan.phases[0][1], plan.phases[0][1] + 1), dtype=torch.long, device=device)
        fast.loss(ids).mean().backward()
    except (RuntimeError, OSError, ImportError) as error:
        sys.stderr.write(f"not compiled: {error}\n")
        return model
    finally:
        for weight in model.weights.values():
            weight.grad = None
    return fast


def train(model: Model, rows: Rows, plan: Plan, out: Path) -> dict[str, Any]:
    """Trains until the time is spent; the log. A checkpoint every minute."""
    device, context = model.weights["model.norm.weight"].device, multiprocessing.get_context("fork")
    length, queue = context.Value("i", plan.phases[0][1]), context.Queue(12)
    drawers = [
        context.Process(target=replace(rows, seed=seed).passes, args=(plan.micro, length, queue), daemon=True)
        for seed in range(1 if device.type == "cpu" else min(10, os.cpu_count() or 1))
    ]  # fmt: skip
    for drawer in drawers:
        drawer.start()
    fast = chosen(model, plan, device)
    wide = [w for w in model.weights.values() if w.ndim > 1]
    thin = [w for w in model.weights.values() if w.ndim == 1]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": thin, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=device.type == "cuda")
    log: dict[str, Any] = {"shape": asdict(model.shape), "tokens": 0, "steps": []}
    ready = said = saved = time.monotonic()
    end, now, attention = plan.start + plan.seconds, 0, contextlib.ExitStack()
    while (at := time.monotonic()) < end:
        share = (at - ready) / (end - ready)
        if plan.length(share) != now:
            now = length.value = plan.length(share)
            attention.close()
            if device.type == "cuda":
                attention.enter_context(fastest(model.shape, now, plan.micro))
        passes = list(drawn(queue, now, plan.step // plan.micro))
        loss = step(fast, passes, device)
        norm = float(torch.nn.utils.clip_grad_norm_(list(model.weights.values()), 1.0))
        for group in optimizer.param_groups:
            group["lr"] = rate(share)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log["tokens"] += plan.step
        if time.monotonic() - said > 4 or not log["steps"]:
            said = time.monotonic()
            log["steps"].append([round(said - plan.start, 1), log["tokens"], now, round(loss, 4), round(norm, 3)])
            sys.stderr.write("{}s {:,} tokens, rows of {}: loss {}, norm {}\n".format(*log["steps"][-1]))
        if time.monotonic() - saved > 60:
            saved = time.monotonic()
            save(model.weights, out, log)
    attention.close()
    for drawer in drawers:
        drawer.terminate()
    save(model.weights, out, log)
    return log


def drawn(queue: Any, length: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`count` passes with rows of `length`; what was drawn for the phase before is left out."""
    while count:
        ids, weights = queue.get(timeout=300)
        if ids.shape[1] == length + 1:
            count -= 1
            yield ids, weights


MINIATURE = Shape(hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, positions=512)


def main() -> None:
    """Train, or export."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training, exporting = commands.add_parser("train"), commands.add_parser("export")
    for command in (training, exporting):
        command.add_argument("--data", type=Path, required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--more", type=Path, nargs="*", default=[], help="further parts of the tokens")
    training.add_argument("--seconds", type=float, default=330, help="from the start to the end of everything")
    training.add_argument("--miniature", action="store_true", help="a model of two narrow blocks, rows of 512 at most")
    exporting.add_argument("--weights", type=Path, required=True)
    exporting.add_argument("checkpoint", type=Path)
    options = parser.parse_args()
    if options.command == "export":
        export(options.weights, options.data, options.checkpoint)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, plan = Shape(), Plan(start, options.seconds - RESERVE)
    if options.miniature:
        phases: Phases = ((0.0, 128, 0.5), (0.5, 256, 0.5), (0.8, 512, 0.5))
        shape, plan = MINIATURE, Plan(start, options.seconds, 2_048, 1_024, phases)
    shape = replace(shape, words=read_tokenizer(options.data).get_vocab_size())
    hiding = {length: share for _, length, share in plan.phases}
    rows = Rows(streams([options.data, *options.more]), Facts(read_tokenizer(options.data)), hiding)
    model = Model(shape, begin(shape, device))
    log = train(model, rows, plan, options.out)
    lengths = (512,) if options.miniature else (4_096, 8_192, 16_384, 32_768)
    log["measured"] = measured(model, options.data, lengths, 1 if options.miniature else 8)
    save(model.weights, options.out, log)
    print(json.dumps(log["measured"], indent=1))


if __name__ == "__main__":
    main()
