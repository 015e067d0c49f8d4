"""What a plan says of bytes between ranks, against those that ranks of a build sent."""

import pytest

from qquant import recipe
from qquant.plan import handed
from qquant.plan.plan import Plan
from qquant.solve import backward, drift
from qquant.source.checkpoint import Checkpoint
from tests.bench import memory as bench

SENT = {
    2: 575_351_296,
    3: 1_070_070_272,
    4: 1_541_402_624,
    8: 3_334_871_040,
}  # `python -m tests.bench.ranks --shape 0.5B --layers 1 --samples 8 --length 256`


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = bench.write_hollow(tmp_path_factory.mktemp("handed") / "model", "0.5B", layers=1)
    asked = recipe.parse(bench.RECIPE.format(samples=8, length=256) + f"  - {bench.ENTRIES['gptq-int4']}\n")
    checkpoint = Checkpoint.open(folder)
    return asked, checkpoint, Plan.of(asked, checkpoint)


@pytest.mark.parametrize("world", SENT)
def test_ranks_send_what_their_plan_says(planned, world):
    assert handed.handed(*planned, "cpu", world, True) == pytest.approx(SENT[world], rel=0.02)


def test_who_makes_artifacts_apart_sends_what_is_measured_together(planned):
    apart = handed.handed(*planned, "cpu", 2, False)
    assert 0 < apart < 0.1 * SENT[2]
    assert handed.handed(*planned, "cpu", 1, True) == 0


def test_constants_are_those_of_the_code():
    assert handed.TILE == drift.TILE
    assert handed.ROWS == backward.ROWS
