"""How often a verdict errs: draws windows of real per-token evidence and asks the gates again and again.

    python tests/bench/gate_simulation.py OUT [--runs 10000] [--windows 40]
    python tests/bench/gate_simulation.py --slices [--runs 1000]
    python tests/bench/gate_simulation.py --profile [--runs 1000]

OUT has a report.json with evidence/ of many windows (`qquant check ... --windows 360 --no-defaults --out OUT`). For every artifact, d are its
window means of a loss; shifted to have a mean of our choice, they are a population, and draws of `--windows` from it are judged:

    false fail   its loss is the limit: no effect beyond it                          at most 5 %
    false pass   worse by twice the margin, effect = 2 x margin                      at most 5 %
    unpaired     the rule of habit, "fail if the perplexity is above the limit", on texts of their own: false fails
    "all"        three gates at their limits at once, with up to three looks (w, 2 w, 4 w windows): the artifact fails

The margin is `--margin` of the mean for KL divergence and disagreement, and --nll nats for perplexity. It also prints the factors with
which window means spread, which `qquant/recipe/limits.py` plans with.

`--slices` draws window means of 18 slices from three distributions, two as skewed as real ones and one more so, and asks the gate on the worst:
"at the limit" (every slice's true ratio is the limit: the worst case of a harmless artifact) and "no effect" (every ratio is 1); "lost" is one
slice at three times the limit. English always has 24 windows, the others as many as said.

`--profile` judges an artifact by everything at once: three gates on 40 windows, 18 slices of 24, and the kinds of questions of `KINDS`. "At the limit"
is the worst case of a harmless artifact: each loss, each slice and each kind of question is at its own limit. "No effect": losses are half of their
limits, slices are as English, and answers change both ways alike. "Lost": as that, but six tenths of what the checkpoint had right in tool calls is wrong.
"""

import argparse
import math
from pathlib import Path

import numpy as np

from qquant.checks import behaviour, evidence, gate, slices, statistics
from qquant.checks.behaviour import AnswerPairs
from qquant.checks.ratios import ratio
from qquant.recipe.limits import LOST

LOSSES = ("kl", "top1", "nll")
SLICES = 18
MEANS = {  # window means with a mean of 1
    "lognormal 0.35": lambda rng, count: np.exp(rng.normal(0, 0.35, count) - 0.35**2 / 2),
    "gamma 3": lambda rng, count: rng.gamma(3, 1 / 3, count),
    "lognormal 0.7": lambda rng, count: np.exp(rng.normal(0, 0.7, count) - 0.7**2 / 2),
}


def decided(draws, limits, looks=1):
    losses = {name: statistics.measure_loss(draw, limits[name]) for name, draw in draws.items()}
    return statistics.decide(losses, looks)[0]


def rates(population, limit, windows, runs, rng):
    """(share failed, share passed) of draws from window means `population` judged against `limit`."""
    outcomes = [decided({"": rng.choice(population, windows)}, {"": limit}) for _ in range(runs)]
    return outcomes.count("fail") / runs, outcomes.count("pass") / runs


def looking_again(populations, limits, windows, runs, rng):
    """Share failed of artifacts whose three losses are at their limits, judged together, with more text while undecided."""
    failed = 0
    count = len(next(iter(populations.values())))
    for _ in range(runs):
        picks = rng.integers(0, count, 4 * windows)
        for stop in (windows, 2 * windows, 4 * windows):
            outcome = decided({name: values[picks[:stop]] for name, values in populations.items()}, limits, looks=3)
            if outcome != "inconclusive":
                break
        failed += outcome == "fail"
    return failed / runs


def unpaired(population, spread, margin, windows, runs, rng):
    """Share failed when artifact and checkpoint read different windows, whose own NLL varies by `spread`."""
    own = rng.choice(population, (runs, windows)).mean(1)
    texts = rng.normal(0, spread, (2, runs, windows)).mean(2)
    return float((own + texts[0] - texts[1] > margin).mean())


def spreads(found):
    """The factors of the planned spread: see gates.py."""
    scored, kl, share = found.nll.shape[1], found.means["kl"].mean(), found.means["top1"].mean()
    sd = {name: found.means[name].std(ddof=1) for name in LOSSES}
    nll = sd["nll"] / math.sqrt(2 * kl / scored)
    top1 = sd["top1"] / math.sqrt(share * (1 - share) / scored)
    return f"nll {nll:.2f} sqrt(2 k / S), kl {sd['kl'] / kl * (scored / 255) ** 0.25:.2f} k (255 / S)^(1/4), top-1 {top1:.2f} binomial"


def judged(rng, draw, windows, factors):
    """Outcome of the gate on the worst of slices whose true ratios to English are `factors`, for a limit of 3."""
    english = 0.02 * draw(rng, 24)
    asked = {place: (ratio(0.02 * factor * draw(rng, windows), english), 3.0) for place, factor in enumerate(factors)}
    standings = slices.standings(asked).values()
    return next((bad for bad in ("fail", "inconclusive") if bad in standings), "pass")


def slice_rates(runs, rng):
    """Print, by distribution and windows, how often the gate fails harmless artifacts and a lost language."""
    cases = {"at the limit": [3.0] * SLICES, "no effect": [1.0] * SLICES, "lost": [9.0] + [1.0] * (SLICES - 1)}
    print(f"{runs} runs; {'means':<16}{'windows':>8}" + "".join(f"{case:>26}" for case in cases))
    for name, draw in MEANS.items():
        for windows in (11, 12, 24):
            found = [[judged(rng, draw, windows, factors) for _ in range(runs)] for factors in cases.values()]
            told = (f"{one.count('fail') / runs:.2%} fail, {one.count('pass') / runs:.1%} pass" for one in found)
            print(f"{name:<24}{windows:>8}" + "".join(f"{text:>26}" for text in told), flush=True)


KINDS = {  # questions, share that the checkpoint has right, share of all that changes both ways alike
    **{f"retrieval, {length:,} tokens": (40, 0.9, 0.02) for length in (4096, 8192, 16384, 32768)},
    behaviour.CALLS: (64, 0.7, 0.06),
    behaviour.CODE: (48, 0.8, 0.05),
    behaviour.ENDLESS: (164, 0.9, 0.03),
    behaviour.SCRIPT: (52, 0.95, 0.01),
}


def answered(rng, name, lost):
    """Answers of a kind of question: `lost` of what the checkpoint has right goes wrong beyond what changes both ways."""
    count, share, both = KINDS[name]
    theirs = rng.random(count) < share
    wrong = rng.random(count) < lost + both / share
    right = rng.random(count) < both / (1 - share)
    return AnswerPairs(name, np.where(theirs, ~wrong, right).tolist(), theirs.tolist())


def limit_of(name):
    """Share of the right answers that may be lost of a kind of question."""
    return LOST * (behaviour.BROKEN if name in (behaviour.ENDLESS, behaviour.SCRIPT) else 1)


def whole_profile(rng, draw, losses, factor, lost):
    """(outcome of everything, of the questions alone)."""
    draws = {name: losses * draw(rng, 40) for name in LOSSES}
    outcome = decided(draws, dict.fromkeys(LOSSES, 1.0))
    sliced = judged(rng, draw, 24, [factor] * SLICES)
    _, asked = behaviour.judge([answered(rng, name, lost(name)) for name in KINDS], LOST)
    both = gate.with_gates(gate.Verdict(outcome), gate.Verdict(sliced), asked)
    return both.outcome, asked.outcome


def profile_rates(runs, rng):
    """Print, by distribution, how often the whole profile and its questions alone fail and pass."""
    cases = {
        "at the limit": (1.0, 3.0, limit_of),
        "no effect": (0.5, 1.0, lambda name: 0.0),
        "lost": (0.5, 1.0, lambda name: 0.6 if name == behaviour.CALLS else 0.0),
    }
    for name, draw in MEANS.items():
        for case, settings in cases.items():
            found = [whole_profile(rng, draw, *settings) for _ in range(runs)]
            told = [
                f"{[one[part] for one in found].count('fail') / runs:.2%} fail, {[one[part] for one in found].count('pass') / runs:.1%} pass"
                for part in (0, 1)
            ]
            print(f"{name:<18}{case:<14} all: {told[0]:<28} questions: {told[1]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--slices", action="store_true", help="simulate the gate on the worst slice; needs no OUT")
    parser.add_argument(
        "--profile", action="store_true", help="simulate all that the release profile judges; needs no OUT"
    )
    parser.add_argument("--runs", type=int, default=10000)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--margin", type=float, default=0.1, help="of the mean KL divergence and disagreement")
    parser.add_argument("--nll", type=float, default=0.002, help="margin of the mean NLL difference, nats")
    parser.add_argument("--spread", type=float, default=0.35, help="standard deviation of a window's own NLL, nats")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    if options.profile:
        profile_rates(options.runs, rng)
        return
    if options.slices:
        slice_rates(options.runs, rng)
        return
    print(
        f"{options.runs} runs, {options.windows} windows; one standard error of 5 % is {math.sqrt(0.0475 / options.runs):.2%}"
    )
    print(f"{'artifact':<24}{'loss':<6}{'false fail':>11}{'false pass':>11}{'unpaired':>10}")
    for name, found in evidence.of_report(options.out).items():
        name = name.rpartition("/")[2]
        populations, limits = {}, {}
        for loss in LOSSES:
            means = found.means[loss]
            margin = options.nll if loss == "nll" else options.margin * means.mean()
            populations[loss], limits[loss] = means - means.mean() + margin, margin
            failed, _ = rates(populations[loss], margin, options.windows, options.runs, rng)
            _, passed = rates(populations[loss] + margin, margin, options.windows, options.runs // 10, rng)
            habit = ""
            if loss == "nll":
                harmless = means - means.mean()
                habit = f"{unpaired(harmless, options.spread, margin, options.windows, options.runs, rng):.1%}"
            print(f"{name:<24}{loss:<6}{failed:>11.2%}{passed:>11.2%}{habit:>10}", flush=True)
        failed = looking_again(populations, limits, options.windows, options.runs // 10, rng)
        print(f"{name:<24}{'all':<6}{failed:>11.2%}   spread: {spreads(found)}", flush=True)


if __name__ == "__main__":
    main()
