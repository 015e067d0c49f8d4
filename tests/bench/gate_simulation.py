"""How often a gate errs: resamples windows of real per-token evidence and asks it again and again.

    python tests/bench/gate_simulation.py OUT [--runs 1000] [--windows 40]

OUT is the output of a build (report.json with evidence/). For every artifact, d are its window means of a loss. A population with mean
`limit` is made by shifting d; draws of `--windows` windows from it are judged:

    false fail   a harmless artifact (its loss is the limit: no effect beyond the margin) is failed       at most 5 %
    false pass   one that is worse by twice the margin (effect = 2 x margin) is passed                    at most 5 %

The margin is `--margin` of the mean loss for KL divergence, and --nll nats for perplexity. Beside it the unpaired rule of habit: fail if
the perplexity of the artifact on its own draw of text exceeds that of the checkpoint on another by more than the margin.
"""

import argparse
from pathlib import Path

import numpy as np

from qquant.checks import evidence, statistics


def rates(population, limit, windows, runs, rng):
    """(share failed, share passed) of draws from window means `population` judged against `limit`."""
    outcomes = [
        statistics.decide({"": statistics.measure_loss(rng.choice(population, windows), limit)})[0] for _ in range(runs)
    ]
    return outcomes.count("fail") / runs, outcomes.count("pass") / runs


def unpaired(population, spread, margin, windows, runs, rng):
    """Share failed when artifact and checkpoint read different windows, whose own NLL varies by `spread`."""
    own = rng.choice(population, (runs, windows)).mean(1)
    texts = rng.normal(0, spread, (2, runs, windows)).mean(2)
    return float((own + texts[0] - texts[1] > margin).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--margin", type=float, default=0.1, help="of the mean KL divergence")
    parser.add_argument("--nll", type=float, default=0.002, help="margin of the mean NLL difference, nats")
    parser.add_argument("--spread", type=float, default=0.35, help="standard deviation of a window's own NLL, nats")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"{'artifact':<24}{'loss':<6}{'false fail':>11}{'false pass':>11}{'unpaired rule, false fail':>27}")
    for name, found in evidence.of_report(options.out).items():
        name = name.rpartition("/")[2]
        for loss in ("kl", "nll"):
            means = found.means[loss]
            margin = options.margin * means.mean() if loss == "kl" else options.nll
            at_limit = means - means.mean() + margin
            failed, _ = rates(at_limit, margin, options.windows, options.runs, rng)
            _, passed = rates(at_limit + margin, margin, options.windows, options.runs, rng)
            habit = ""
            if loss == "nll":
                harmless = means - means.mean()
                habit = f"{unpaired(harmless, options.spread, margin, options.windows, options.runs, rng):.1%}"
            print(f"{name:<24}{loss:<6}{failed:>11.1%}{passed:>11.1%}{habit:>27}")


if __name__ == "__main__":
    main()
