"""Efforts side by side: the same plan with other settings, at what it would cost."""

import pytest

from qquant.cli import main
from qquant.plan.asked import Asked
from qquant.plan.beside import beside
from qquant.plan.plan import Plan
from qquant.recipe.changes import Flags
from tests.bench.memory import write_hollow


def costs(folder, effort=None, clock=None, recipe="demo"):
    known, checkpoint = Asked(str(folder), recipe, flags=Flags(effort=effort)).open()
    return beside(known, checkpoint, Plan.of(known, checkpoint, only=("gptq-int4",)), clock)


def test_more_effort_costs_more_and_the_chosen_one_is_marked(demo):
    found = costs(demo, "best")
    assert [(cost.effort, cost.asked) for cost in found] == [("fast", False), ("default", False), ("best", True)]
    assert found[0].memory < found[1].memory <= found[2].memory
    assert {cost.seconds for cost in found} == {None}


def test_the_chosen_one_takes_the_memory_that_the_plan_says(tmp_path):
    """Of the artifacts that were asked for, not of the whole recipe."""
    folder = write_hollow(tmp_path / "model", "0.5B-8k", layers=1)
    known, checkpoint = Asked(str(folder), "demo", flags=Flags(effort="default")).open()
    plan = Plan.of(known, checkpoint, only=("gguf-q8_0",))
    (chosen,) = [cost for cost in beside(known, checkpoint, plan, None) if cost.asked]
    assert chosen.memory == plan.memory
    assert chosen.memory < Plan.of(known, checkpoint).memory


def test_the_clock_is_asked_about_each(demo):
    seen = {}

    def clock(recipe, plan):
        seen[recipe.effort] = (recipe.calibration.objective, [one.spec.sweeps for one in plan.artifacts], plan.tokens)
        return float(len(seen))

    assert [cost.seconds for cost in costs(demo, clock=clock)] == [1.0, 2.0, 3.0]
    assert seen == {"fast": ("output", [0], 24576), "default": ("kl", [2], 24576), "best": ("kl", [6], 24576)}


def test_a_recipe_without_an_effort_stands_before_them(demo, tmp_path):
    text = "{version: 1, name: x, calibration: {sources: [{bundled: docs-en}]}, artifacts: [{name: gptq-int4, format: gptq, bits: 4, sweeps: 9}]}"
    (tmp_path / "x.yaml").write_text(text)
    found = costs(demo, recipe=str(tmp_path / "x.yaml"))
    assert [(cost.effort, cost.asked) for cost in found] == [
        ("as it is", True), ("fast", False), ("default", False), ("best", False),
    ]  # fmt: skip


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_plan_prints_them(demo, capsys, effort):
    with pytest.raises(SystemExit, match="0"):
        main(["plan", str(demo), "--recipe", "demo", "--effort", effort, "--time"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("effort:")]
    assert [line.split()[1] for line in lines] == ["fast", "default", "best"]
    assert [line.split()[1] for line in lines if line.endswith("(chosen)")] == [effort]
    assert all("about" in line and "GB" in line for line in lines)
