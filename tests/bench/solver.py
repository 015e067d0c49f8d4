"""Seconds to solve one layer of Qwen1.5-0.5B's shape (seven linears, 4 bit, groups of 128) on the same H, against auto-gptq's solver.

    python -m tests.bench.solver [--theirs .oracles/auto-gptq/bin/python] [--pairs 3] [--threads 1]

Each contender is a process of its own that holds weights and H and solves when it is told to; they take turns, A B B A. Ours solves
q, k, v (and gate, up) as one matrix with one factor; theirs one linear at a time, as its program does, with Qwen's settings (min-max
scales, dynamic groups). `min-max` is GPTQ on such scales, the like for like; `searched` takes weighted scales; `sweeps: 2` is what a
build does by default. Seconds are of the processor (of one thread), which other programs disturb less.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STAGES = {
    "qkv": (1024, (1024, 1024, 1024)),
    "o": (1024, (1024,)),
    "gate_up": (1024, (2816, 2816)),
    "down": (2816, (1024,)),
}


def write_problem(folder):
    """Weights and Gram matrices of correlated inputs with a few large channels."""
    random = np.random.default_rng(0)
    for name, (columns, outputs) in STAGES.items():
        mix = np.eye(columns, dtype=np.float32) + random.standard_normal((columns, columns), np.float32) / columns**0.5
        x = random.standard_normal((2 * columns, columns), np.float32) @ mix
        x[:, random.integers(0, columns, 8)] *= 10
        np.save(folder / f"{name}.h.npy", x.T @ x)
        for number, rows in enumerate(outputs):
            np.save(folder / f"{name}.{number}.npy", random.standard_normal((rows, columns), np.float32) * 0.02)


def problem(folder):
    """(H, weights) of every stage."""
    import torch

    for name, (_, outputs) in STAGES.items():
        weights = [torch.from_numpy(np.load(folder / f"{name}.{number}.npy")) for number in range(len(outputs))]
        yield torch.from_numpy(np.load(folder / f"{name}.h.npy")), weights


def ours(stages, sweeps, search="importance"):
    """Solve as `walk.Solver` does, and return the loss."""
    import torch

    from qquant.algorithms import descent
    from qquant.algorithms.gptq import factorize, gptq
    from qquant.algorithms.gram import Gram, with_damping
    from qquant.algorithms.grid import UniformGrid, value_of

    grid, loss = UniformGrid(4, 128, symmetric=True, search=search), 0.0
    for h, weights in stages:
        gram = Gram.zeros(len(h), h.device)
        gram.matrix.copy_(h)
        gram.tokens = 1
        weight = torch.cat(weights)
        params = grid.fit(weight, factorize(gram, 0.01).cost(gram.tokens))
        codes = gptq(weight, factorize(gram, 0.01), params.step_and_offset(), grid)
        with with_damping(gram.matrix, 0.01) as damped:
            for count in range(sweeps):
                codes = descent.sweep(weight, damped, codes, params.step_and_offset(), grid, shift=count % 2 == 1)
                params = descent.refit(weight, damped, codes, params)
        error = value_of(codes, *params.step_and_offset(), grid) - weight
        loss += float(((error @ h) * error).sum())
    return loss


def theirs(stages):
    """Solve with auto-gptq, one linear at a time."""
    import torch
    from auto_gptq.quantization.gptq import GPTQ

    torch.cuda.synchronize = lambda: None
    loss = 0.0
    for h, weights in stages:
        for weight in weights:
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.clone()
            solver = GPTQ(linear)
            solver.quantizer.configure(4, perchannel=True, sym=True, mse=False)
            solver.H, solver.nsamples = h.clone(), 1
            solver.fasterquant(percdamp=0.01, group_size=128, actorder=False, static_groups=False)
            error = linear.weight.data - weight
            loss += float(((error @ h) * error).sum())
    return loss


def worker(kind, folder, threads):
    """Solve at every line of standard input; tell seconds and loss."""
    import torch

    torch.set_num_threads(threads)
    stages = list(problem(folder))
    solve = {
        "min-max": lambda: ours(stages, 0, "minmax"),
        "searched": lambda: ours(stages, 0),
        "sweeps: 2": lambda: ours(stages, 2),
        "auto-gptq": lambda: theirs(stages),
    }
    for _ in sys.stdin:
        began = time.process_time()
        with torch.no_grad():
            loss = solve[kind]()
        print(f"RESULT {json.dumps([time.process_time() - began, loss])}", flush=True)


class Contender:
    """A process that solves when asked."""

    def __init__(self, kind, python, folder, threads):
        command = [python, str(Path(__file__)), "--worker", kind, str(folder), "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def solve(self):
        """(seconds, loss)."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise SystemExit("a contender stopped")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", default=".oracles/auto-gptq/bin/python")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker[0], Path(options.worker[1]), options.threads)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_problem(folder)
        pythons = {"auto-gptq": options.theirs} | dict.fromkeys(("min-max", "searched", "sweeps: 2"), sys.executable)
        contenders = {kind: Contender(kind, python, folder, options.threads) for kind, python in pythons.items()}
        times, losses = {kind: [] for kind in contenders}, {}
        for kind, contender in contenders.items():
            losses[kind] = contender.solve()[1]
        for _ in range(options.pairs):
            for kind in (*contenders, *reversed(contenders)):
                times[kind].append(contenders[kind].solve()[0])
        for contender in contenders.values():
            contender.process.stdin.close()
            contender.process.wait()
    base = times["auto-gptq"]
    for kind, seconds in times.items():
        ratios = [a / b for a, b in zip(base, seconds, strict=True)]
        print(
            f"{kind:10} {statistics.median(seconds):7.2f} s (least {min(seconds):.2f}), {statistics.median(ratios):5.2f}x as fast as auto-gptq "
            f"({min(ratios):.2f} to {max(ratios):.2f}), loss {losses[kind] / losses['auto-gptq']:.3f} of its"
        )


if __name__ == "__main__":
    main()
