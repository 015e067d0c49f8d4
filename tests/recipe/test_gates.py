"""Default limits by format and size, and what a text can tell before it is read."""

import math
from itertools import pairwise

import numpy as np
import pytest

from qquant import recipe
from qquant.checks import statistics
from qquant.recipe import Gates, Waiver, limits
from qquant.recipe.limits import LIMITS, reach, resolved
from tests.worlds import ROOT

SMALL, LARGE = 464_000_000, 7_720_000_000
README = ROOT / "recipes" / "README.md"


@pytest.mark.parametrize("name", recipe.names())
def test_every_bundled_artifact_has_limits(name):
    for spec in recipe.load(name).artifacts:
        held = resolved(spec.gates, spec.kind, SMALL)
        assert held.kl_divergence
        assert held.top1_agreement
        assert (held.perplexity_ratio is None) == (spec.kind in ("int8", "q8_0", "q2_k"))


def test_more_bits_and_larger_models_are_held_to_more():
    order = ["q2_k", "q3_k_s", "q3_k_m", "q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16"]
    for size in (0, 1):
        for worse, better in pairwise(order):
            one, other = LIMITS[worse][size], LIMITS[better][size]
            assert other.kl_divergence < one.kl_divergence
            assert other.top1_agreement > one.top1_agreement
    for small, large in LIMITS.values():
        assert large.kl_divergence <= small.kl_divergence
        assert large.top1_agreement >= small.top1_agreement
        assert (large.perplexity_ratio or 0) <= (small.perplexity_ratio or 0)
    assert LIMITS["int4"] == LIMITS["q4_0"]
    assert LIMITS["int8"] == LIMITS["q8_0"]


def test_every_file_type_of_recipes_has_limits():
    from typing import get_args

    assert set(get_args(recipe.GgufType)) <= LIMITS.keys()


def test_what_a_recipe_says_stays():
    waiver = Waiver(reason="r", who="w", until="2030-01-01")
    held = resolved(Gates(kl_divergence=0.07, waiver=waiver, regression_vs="x"), "int4", SMALL)
    assert (held.perplexity_ratio, held.kl_divergence, held.top1_agreement) == (1.08, 0.07, 0.85)
    assert (held.waiver, held.regression_vs) == (waiver, "x")
    assert resolved(Gates(), "int4", LARGE).perplexity_ratio == 1.04
    bare = Gates(defaults=False, kl_divergence=0.07)
    assert resolved(bare, "int4", SMALL) == bare
    assert resolved(Gates(), "int3", SMALL) == Gates()


def test_the_table_stands_in_the_readme():
    assert limits.reference() in README.read_text()


def test_reach_is_that_of_real_windows():
    """Window means as the demo model gives them: the plan's number is that of the measurement, within a third."""
    rng = np.random.default_rng(0)
    kl, scored, windows = 0.06, 255, 40
    drawn = {
        "mean KL divergence": rng.normal(kl, 0.3 * kl, windows),
        "perplexity ratio": rng.normal(math.log(1.03), 1.4 * math.sqrt(2 * kl / scored), windows),
        "top-1 agreement": rng.normal(0.12, 1.1 * math.sqrt(0.12 * 0.88 / scored), windows),
    }
    planned = reach(Gates(perplexity_ratio=1.03, kl_divergence=kl, top1_agreement=0.88), windows, scored)
    assert [gate.gate for gate in planned] == ["perplexity ratio", "mean KL divergence", "top-1 agreement"]
    for gate in planned:
        measured = statistics.measure_loss(drawn[gate.gate], 0.0).detectable
        assert gate.detectable == pytest.approx(measured, rel=0.33), gate.gate


def test_more_text_reaches_further_and_more_looks_less_far():
    held = Gates(kl_divergence=0.06)
    (few,), (many,) = reach(held, 40, 255), reach(held, 160, 255)
    assert many.detectable == pytest.approx(few.detectable / 2)
    (looked,) = reach(held, 40, 255, looks=3)
    assert looked.detectable > few.detectable
    assert reach(Gates(), 40, 255) == ()
