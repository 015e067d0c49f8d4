"""`wq_mm` beside the 4-bit products of other libraries: the same weights, the same rows, one GPU, taking turns.

    python -m tests.bench.kernel_peers --out FOLDER [--marlin SOURCES] [--shapes 4096x22016 ...] [--rows 1 16 64] [--only ours marlin]

Of every shape (K x N) and number of rows, for ours, cuBLAS in bf16, torch's int4, Marlin, humming and gemlite: microseconds in a captured
graph, what that is of ours, relative error against the exact product of the same weights (`peer_products`), and microseconds of the host
for a call outside a graph. What makes the numbers comparable:

* A graph goes round copies of the packed weights that are together larger than the L2 cache, as the layers of a model are.
* The host's clock runs over what a model would call: ours is `direct.Call`, the others their operator with everything prepared.
* Everything is compiled first, by children side by side (gemlite's twenty candidates a product too, which this process then times for
  it); nothing runs beside the measurement.

Peers that are not installed are named with what installs them, a peer that fails at a shape with its error, and the rest goes on:
tracebacks are in FOLDER/failures.log, numbers in kernel_peers.json, tables in kernel_peers.md. SOURCES is an unpacked source archive of
gptqmodel, or the library that was compiled of it.
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

from qquant.kernels import wq_mm
from tests.bench.kernels_gpu import contest, machine, relative
from tests.bench.peer_products import PEERS, Layer
from tests.bench.tune import copies_for, host_us, timed_graph
from tests.worlds import importing

SHAPES = ("4096x4096", "4096x22016", "11008x4096", "4096x12288")
CALLS = 24  # in a graph, at least
WRONG = 0.05  # relative error from which on a product is another one


def missing(options):
    """name -> what installs it, of the peers that are asked for and not here."""
    here = lambda name: importlib.util.find_spec(PEERS[name].module) if name != "marlin" else options.marlin
    return {name: PEERS[name].install for name in options.only if not here(name)}


# -- compiling


def jobs(names, options):
    """What each child compiles: (peer, shapes, rows)."""
    for name in names:
        if name == "marlin" and options.marlin.is_dir():
            yield name, options.shapes[:1], options.rows[:1]
        elif name == "gemlite":
            yield from ((name, [shape], [rows]) for shape in options.shapes for rows in options.rows)
        elif name in ("ours", "humming"):
            yield from ((name, [shape], options.rows) for shape in options.shapes)


def compile_here(options):
    """One child's job: call every product once, so that caches on the disk have what it needs."""
    for name, shape in itertools.product(options.only, options.shapes):
        peer = PEERS[name].prepare(Layer.random(*shape), options)
        with torch.inference_mode():
            for rows in options.rows:
                peer.product(torch.randn(rows, shape[0], dtype=torch.bfloat16, device="cuda"), *peer.packed)
    torch.cuda.synchronize()


def compile_all(names, options):
    """(peer, shape, rows) -> the error, of what could not be compiled; Marlin's stands for all."""

    def child(job):
        name, shapes, rows = job
        words = ["--compile", "--out", options.out, "--only", name, "--rows", *rows]
        words += ["--shapes", *(f"{columns}x{outputs}" for columns, outputs in shapes)]
        words += ["--marlin", options.marlin] if name == "marlin" else []
        command = [sys.executable, "-m", "tests.bench.kernel_peers", *map(str, words)]
        began = time.monotonic()
        run = {"capture_output": True, "text": True, "env": importing(), "timeout": options.patience}
        done = subprocess.run(command, check=False, **run)
        if done.returncode:
            raise RuntimeError(f"{done.stdout}\n{done.stderr}\nexit {done.returncode}")
        return time.monotonic() - began

    failed, longest, began = {}, {}, time.monotonic()
    with ThreadPoolExecutor(options.workers) as pool:
        running = {pool.submit(child, job): job for job in jobs(names, options)}
        print(f"{len(running)} children compile", flush=True)
        for future in as_completed(running):
            name, shapes, rows = running[future]
            seconds, problem = attempt(options, f"compiling {name} {shapes} {rows}", future.result)
            longest[name] = max(longest.get(name, 0), seconds or 0)
            if problem:
                of = (options.shapes, options.rows) if name == "marlin" else (shapes, rows)
                failed |= {(name, *product): problem for product in itertools.product(*of)}
    told = ", ".join(f"{name} {seconds:.0f}" for name, seconds in longest.items())
    print(f"compiled in {time.monotonic() - began:.0f} s (longest child, s: {told})", flush=True)
    return failed


def attempt(options, what, work, *arguments):
    """(the result, None), or (None, the error in one line, which is printed)."""
    try:
        return work(*arguments), None
    except Exception as problem:  # noqa: BLE001 other people's code in any state: one peer must not cost the others their turn
        with (options.out / "failures.log").open("a") as log:
            log.write(f"== {what}\n{traceback.format_exc()}\n")
        line = in_one_line(problem)
        print(f"{what} FAILED: {line}", flush=True)
        return None, line


def in_one_line(problem):
    """A compiler's first error if there is one, else the last exception that is named, else how the text begins."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    compilers = [line for line in lines if " error: " in line]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    told = compilers[0] if compilers else named[-1] if named else " ".join(lines[:1])
    return f"{type(problem).__name__}: {told}"[:240]


# -- measuring


def trial(peer, copies, x, exact):
    """(calls for a graph, error and host time) of one peer: that it can be captured is seen before its turn comes."""
    truth = exact if peer.weight is None else x.double() @ peer.weight.double().T
    error = relative(peer.product(x, *copies[0]), truth)
    calls = [partial(peer.product, x, *copy) for copy in copies]
    calls *= -(-CALLS // len(calls))
    timed_graph(calls, windows=1)
    host = host_us(peer.again(x, *copies[0]) if peer.again else calls[0])
    return calls, {"error": error, "host_us": host}


def prepared(name, layer, options):
    """(the peer, copies of what it packed that are together more than the L2 cache holds)."""
    peer = PEERS[name].prepare(layer, options)
    count = copies_for(sum(tensor.nbytes for tensor in peer.packed))
    return peer, [peer.packed, *(tuple(tensor.clone() for tensor in peer.packed) for _ in range(count - 1))]


def measured(shape, names, options, failed):
    """The cells of one shape; `failed`: (peer, shape, rows) -> why it could not be compiled."""
    layer, peers, cells = Layer.random(*shape), {}, []
    wq_mm.counters_of.cache_clear()  # every captured call takes counters for good
    for name in names:
        if any((name, shape, rows) not in failed for rows in options.rows):
            made, problem = attempt(options, f"{shape[0]}x{shape[1]} {name}", prepared, name, layer, options)
            if problem:
                failed |= {(name, shape, rows): problem for rows in options.rows}
            else:
                peers[name] = made
    for rows in options.rows:
        reasons = {name: failed[name, shape, rows] for name in names if (name, shape, rows) in failed}
        found = turns(rows, layer, peers, options, reasons)
        for name in names:
            cells.append({"columns": shape[0], "outputs": shape[1], "rows": rows, "peer": name} | found[name])
            print(told(cells[-1]), flush=True)
    return cells


@torch.inference_mode()
def turns(rows, layer, peers, options, reasons):
    """What was found of every peer at one number of rows; `reasons`: why some cannot be asked."""
    columns, outputs = layer.shape
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device=layer.codes.device)
    exact = x.double() @ layer.weight.double().T
    found, contenders = {name: {"failed": reason} for name, reason in reasons.items()}, {}
    for name, (peer, copies) in peers.items():
        if name in reasons:
            continue
        label = f"{columns}x{outputs} M={rows} {name}"
        result, problem = attempt(options, label, trial, peer, copies, x, exact)
        if problem:
            found[name] = {"failed": problem}
        else:
            contenders[name], found[name] = result
    times, _ = attempt(options, f"{columns}x{outputs} M={rows}", contest, contenders)
    for name, (us, spread) in (times or {}).items():
        of_ours = {"of_ours": us / times["ours"][0]} if "ours" in times else {}
        found[name] |= {"us": us, "spread": spread} | of_ours
    return found


def right(cell):
    """Whether a cell has a time, and of the product that was asked for."""
    return "us" in cell and cell["error"] <= WRONG


def told(cell):
    """A cell in one line."""
    head = f"{cell['columns']:>6} x {cell['outputs']:<6} M={cell['rows']:<3} {cell['peer']:8}"
    if "us" not in cell:
        return f"{head} {cell.get('failed', 'not timed')}"
    wrong = "" if right(cell) else " WRONG"
    times = f"{cell['us']:8.2f} us, {cell.get('of_ours', float('nan')):5.2f} of ours, spread {cell['spread']:4.0%}"
    return f"{head} {times}; error {cell['error']:.1e}{wrong}; host {cell['host_us']:6.1f} us"


def tables(cells):
    """Markdown: microseconds and what they are of ours, by product; errors and host times, by peer."""
    names = list(dict.fromkeys(cell["peer"] for cell in cells))
    lines = [f"| us (of ours) | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for (columns, outputs, rows), group in itertools.groupby(
        cells, key=lambda cell: (cell["columns"], cell["outputs"], cell["rows"])
    ):
        row = {cell["peer"]: f"{cell['us']:.1f} ({cell.get('of_ours', 0):.2f})" for cell in group if right(cell)}
        texts = " | ".join(row.get(name, "") for name in names)
        lines.append(f"| {columns} x {outputs}, M = {rows} | {texts} |")
    lines += ["", "| peer | relative error | us of the host for a call, median |", "|---|---:|---:|"]
    for name in names:
        timed = [cell for cell in cells if cell["peer"] == name and right(cell)]
        if timed:
            errors, host = [cell["error"] for cell in timed], [cell["host_us"] for cell in timed]
            lines.append(f"| {name} | {min(errors):.1e} to {max(errors):.1e} | {statistics.median(host):.0f} |")
    return "\n".join(lines) + "\n"


def parsed(text):
    """(columns, outputs) of KxN."""
    columns, outputs = map(int, text.split("x"))
    return columns, outputs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", type=parsed, default=[parsed(text) for text in SHAPES], metavar="KxN")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), help="ratios need ours")
    parser.add_argument("--marlin", type=Path, metavar="SOURCES", help="unpacked sources of gptqmodel, or the library")
    parser.add_argument("--workers", type=int, default=2 * (os.cpu_count() or 1), help="children that compile at once")
    parser.add_argument("--patience", type=float, default=170, help="seconds after which a child's job has failed")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    absent = missing(options)
    if not torch.cuda.is_available():
        sys.exit(f"no CUDA device, so there is nothing to time; not installed: {', '.join(absent) or 'nothing'}")
    if options.compile:
        compile_here(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for name, install in absent.items():
        print(f"{name}: not installed ({install})", flush=True)
    names = [name for name in options.only if name not in absent]
    began, about, cells = time.monotonic(), machine(), []
    print(json.dumps(about), flush=True)
    failed = compile_all(names, options)
    for shape in options.shapes:
        cells += measured(shape, names, options, failed)
        (options.out / "kernel_peers.json").write_text(json.dumps({"machine": about, "cells": cells}, indent=1))
        (options.out / "kernel_peers.md").write_text(tables(cells))
        torch.cuda.empty_cache()
    print(f"\n{tables(cells)}\n{time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
