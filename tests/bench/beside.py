"""A build on a machine that others use: seconds with threads that spin as OpenMP comes, and with those of `qquant.cli.spinning`, in turns.

    python -m tests.bench.beside [--pairs 2] [--loops 1] [--samples 32]

Beside so many endless loops (0: alone), the demo checkpoint's GPTQ-Int4 without answers: seconds by the clock and of the processor, and their ratio.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from qquant.cli import spinning

BUILD = ["build", "--recipe", "demo", "--only", "gptq-int4", "--set", "checks.answer_length=0"]


def took(spins, samples):
    """(seconds by the clock, of the processor) of one build."""
    environment = {name: value for name, value in os.environ.items() if name not in (*spinning.OWN, "OMP_NUM_THREADS")}
    environment["GOMP_SPINCOUNT"] = str(spins)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qquant-") as place:
        words = [*BUILD, "--set", f"calibration.samples={samples}", "--out", f"{place}/out"]
        done = subprocess.run(
            [sys.executable, "-m", "qquant", *words], env=environment, capture_output=True, check=False
        )
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    """Build in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--loops", type=int, default=1)
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args()
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.loops)]
    try:
        rows = {300_000: [], spinning.SPINS: []}
        for _ in range(options.pairs):
            for spins, row in rows.items():
                row.append(took(spins, options.samples))
                print(f"{spins:>7} turns: {row[-1][0]:6.1f} s, {row[-1][1]:6.1f} s of the processor", flush=True)
    finally:
        for loop in loops:
            loop.kill()
    clock, processor = ([statistics.median(pair[place] for pair in row) for row in rows.values()] for place in (0, 1))
    print(
        f"beside {options.loops} loops: {clock[1] / clock[0]:.2f} of the clock, {processor[1] / processor[0]:.2f} of the processor"
    )


if __name__ == "__main__":
    main()
