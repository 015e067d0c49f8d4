"""Speed of the GGUF block quantizers, in million weights per second, against ggml's own on the same weights and threads.

    python tests/bench/gguf_speed.py --ggml .oracles/llama/lib/python3.11/site-packages/llama_cpp/lib/libggml-base.so

Weights are normal with outlier columns, importance is log-normal. Both sides are timed in turns and the best of each counts;
with `--clock cpu` (one thread only) the processor time of the process, which other programs disturb less. Where both are
there, their bytes are compared too. Without --ggml only our own speed is shown.
"""

import argparse
import ctypes
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from qquant.formats.gguf.quantize import quantize
from qquant.formats.gguf.types import TYPES


def weights(rows, columns):
    """(weight float32 [rows, columns], importance float32 [columns])."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((rows, columns), np.float32) * 0.02
    weight[:, random.integers(0, columns, columns // 64)] *= 8
    return weight, np.exp(random.standard_normal(columns, np.float32))


class Ggml:
    """ggml_quantize_chunk of a libggml-base shared library."""

    def __init__(self, path, threads):
        self.chunk = ctypes.CDLL(str(path)).ggml_quantize_chunk
        self.chunk.restype = ctypes.c_size_t
        self.chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        self.threads = threads

    def quantize(self, weight, kind, importance):
        """Rows split evenly over the threads, as llama-quantize does."""
        rows, columns = weight.shape
        out = np.empty((rows, kind.row_bytes(columns)), np.uint8)
        pointer = None if importance is None else importance.ctypes.data
        step = -(-rows // self.threads)

        def some(first):
            count = min(step, rows - first)
            size = self.chunk(
                kind.ggml_id, weight.ctypes.data, out.ctypes.data, first * columns, count, columns, pointer
            )
            if size != count * out.shape[1]:
                raise SystemExit(f"ggml_quantize_chunk wrote {size} bytes, not {count * out.shape[1]}")

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(some, range(0, rows, step)))
        return out


def measure(functions, seconds, clock):
    """Best time of each function, called in turns for about `seconds` each."""
    best = [float("inf")] * len(functions)
    for function in functions:
        function()
    end = time.perf_counter() + seconds * len(functions)
    while True:
        for index, function in enumerate(functions):
            start = clock()
            function()
            best[index] = min(best[index], clock() - start)
        if time.perf_counter() > end:
            return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", type=Path, metavar="LIBGGML_BASE", help="shared library with ggml_quantize_chunk")
    parser.add_argument("--types", default=",".join(name for name in TYPES if name != "f32"))
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="per type and side")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--plain", action="store_true", help="without importance weights")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu sums over threads: use it with --threads 1")
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    weight, importance = weights(options.rows, options.columns)
    ggml = Ggml(options.ggml, options.threads) if options.ggml else None
    results = []
    print(
        f"{options.threads} thread(s), {options.rows} x {options.columns}, best of {options.seconds} s, {options.clock} time"
    )
    print(f"{'type':8}{'qquant':>9}{'ggml':>9}{'ratio':>7}  bytes      (million weights per second)")
    for name in options.types.split(","):
        given = None if options.plain or name in ("f16", "bf16") else importance
        tensors = torch.from_numpy(weight), None if given is None else torch.from_numpy(given)
        functions = [lambda name=name, tensors=tensors: quantize(tensors[0], name, tensors[1])]
        if ggml:
            functions.append(lambda name=name, given=given: ggml.quantize(weight, TYPES[name], given))
        speeds = [weight.size / elapsed / 1e6 for elapsed in measure(functions, options.seconds, clock)]
        result = {"type": name, "importance": given is not None, "qquant": round(speeds[0], 2)}
        line = f"{name:8}{speeds[0]:9.1f}"
        if ggml:
            equal = np.array_equal(functions[0]().numpy(), functions[1]())
            result |= {"ggml": round(speeds[1], 2), "ratio": round(speeds[0] / speeds[1], 3), "identical": equal}
            line += f"{speeds[1]:9.1f}{speeds[0] / speeds[1]:7.2f}  {'identical' if equal else 'DIFFERENT'}"
        print(line, flush=True)
        results.append(result)
    if options.json:
        options.json.write_text(
            json.dumps({"threads": options.threads, "clock": options.clock, "results": results}, indent=1)
        )
    return 1 if any(not result.get("identical", True) for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
