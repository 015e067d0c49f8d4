"""A solver is a sequence of steps: those of the table exist, a new one is a module and two lines, and each is held to what it must beat."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qquant import pipeline, recipe
from qquant.algorithms.gram import Gram
from qquant.algorithms.grid import UniformGrid
from qquant.algorithms.problem import Problem, solve
from qquant.errors import UsageError
from qquant.plan.plan import Plan
from qquant.recipe import GptqArtifact
from qquant.recipe.solvers import SOLVERS, STEPS
from qquant.source.checkpoint import Checkpoint
from tests.algorithms.test_gptq import problem as random_problem
from tests.worlds import toy_format, toy_solver
from tests.worlds.every_format import SAMPLES, recipe_of
from tests.worlds.toy_solver import FlippedArtifact
from tests.worlds.watched import Quiet

TEXT = """
version: 1
name: t
calibration: {sources: [{bundled: books-en}], samples: 4, length: 48, default_system_share: 0}
checks: {windows: 2, length: 64}
artifacts: [{name: a, format: gptq, bits: 4, group_size: 32, solver: SOLVER, gates: {defaults: false}}]
"""


def entry(solver="gptq", **fields):
    kind = FlippedArtifact if solver == "flipped" else GptqArtifact
    return kind(name="a", format="gptq", bits=4, group_size=32, solver=solver, **fields)


def problem(settings, linears=2):
    weight, gram = random_problem(24, 128, 500)
    grid = UniformGrid(4, 32, symmetric=True, search="importance")
    return Problem(dict(zip("ab", weight.chunk(linears), strict=False)), gram, grid, settings)


def test_every_step_of_every_solver_has_a_title_and_a_module():
    assert {name for solver in SOLVERS.values() for name in solver.steps} == set(STEPS)
    for known in STEPS.values():
        assert known.title
        assert callable(importlib.import_module(known.module).step)


@pytest.mark.parametrize("format", SAMPLES)
@pytest.mark.parametrize("solver", [name for name, known in SOLVERS.items() if known.steps])
def test_every_solver_finds_values_of_the_grid_that_are_near_and_the_same_again(solver, format, tmp_path):
    """With the settings of any format's entry, whose solver a recipe may choose."""
    with toy_format.registered():
        (settings,) = recipe_of(format, tmp_path).artifacts
    given = problem(settings.model_copy(update={"solver": solver}))
    found, again = (solve(given, SOLVERS[solver].steps) for _ in range(2))
    nearest = solve(given, SOLVERS["rtn"].steps)
    assert found.codes.dtype == torch.uint8
    assert found.codes.shape == given.weight.shape
    assert int(found.codes.max()) < given.grid.levels
    assert torch.equal(found.codes, again.codes)
    for linear, part in found.quantized(given).items():
        assert torch.equal(part.dequantize(), again.quantized(given)[linear].dequantize())
        assert 0 < found.facts(linear)["error"] < 3 * nearest.facts(linear)["error"]
        assert found.facts(linear)["fallback"] is None


def test_the_table_costs_a_plan_no_torch():
    code = "import sys, qquant.recipe, qquant.plan.plan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_each_step_is_noted_by_its_name_and_none_that_had_nothing_to_do():
    assert list(solve(problem(entry()), entry().steps).steps) == ["rtn", "gptq", "sweeps"]  # no curvature of rows
    plain = entry(sweeps=0)
    assert list(solve(problem(plain), plain.steps).steps) == ["rtn", "gptq"]
    nearest = entry("rtn")
    assert list(solve(problem(nearest), nearest.steps).steps) == ["rtn"]


def test_noted_errors_are_those_of_the_codes():
    given = problem(entry())
    found = solve(given, entry().steps)
    for linear, part in found.quantized(given).items():
        difference = (part.dequantize() - given.linears[linear]).double()
        energy = ((given.linears[linear].double() @ given.gram.matrix.double()) * given.linears[linear]).sum()
        error = float(((difference @ given.gram.matrix.double()) * difference).sum() / energy)
        assert found.facts(linear)["error"] == found.steps["sweeps"][linear] == pytest.approx(error, rel=1e-3)


def test_a_linear_that_ends_worse_keeps_what_the_first_step_found(monkeypatch):
    """Only that linear: the others of the stack keep what the last step found."""
    given = problem(entry())
    first, last = solve(given, ("rtn",)), solve(given, entry().steps)
    toy_solver.register(monkeypatch)

    def spoil(problem, found):
        codes = found.codes.clone()
        codes[: len(problem.linears["a"])] ^= 8
        return type(found)(codes, found.params, found.damping, found.steps)

    monkeypatch.setattr(toy_solver, "step", spoil)
    kept = solve(given, SOLVERS["flipped"].steps)
    a, b = kept.quantized(given).values()
    assert torch.equal(a.dequantize(), first.quantized(given)["a"].dequantize())
    assert torch.equal(b.dequantize(), last.quantized(given)["b"].dequantize())
    assert kept.facts("a")["fallback"].startswith("rtn: solved error ")
    assert kept.facts("a")["error"] == first.facts("a")["error"]
    assert kept.facts("b")["fallback"] is None


def test_what_cannot_be_factorised_is_rounded_to_nearest():
    given = problem(entry())
    broken = -torch.eye(128) + torch.full((128, 128), 2.0)
    given.gram = Gram(broken, given.gram.absolute, given.gram.squares, given.gram.tokens)
    found = solve(given, entry().steps)
    assert torch.equal(found.codes, solve(given, ("rtn",)).codes)
    assert found.facts("b")["fallback"].startswith("rtn: not positive definite")
    assert found.facts("b")["damping"] is None


def test_a_new_step_is_one_module_and_lowers_what_it_says_it_lowers(monkeypatch):
    toy_solver.register(monkeypatch)
    few, many = entry("flipped", flips=1), entry("flipped", flips=12)
    before = solve(problem(entry()), entry().steps)
    errors = [solve(problem(each), each.steps).steps["flips"] for each in (few, many)]
    for linear in "ab":
        assert errors[1][linear] < errors[0][linear] < before.steps["sweeps"][linear]


def test_a_new_solver_runs_through_plan_build_check_and_report(make_checkpoint, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match='solver: not an allowed value, got "flipped"'):
        recipe.parse(TEXT.replace("SOLVER", "flipped"))
    toy_solver.register(monkeypatch)
    loaded = recipe.parse(TEXT.replace("SOLVER", "flipped"))
    loaded = loaded.model_copy(update={"artifacts": (entry("flipped", flips=3, gates=loaded.artifacts[0].gates),)})
    checkpoint = Checkpoint.open(make_checkpoint("Toy"))
    plan = Plan.of(loaded, checkpoint)
    report = pipeline.build(loaded, checkpoint, plan, tmp_path / "out", torch.device("cpu"), Quiet())
    manifest = json.loads((tmp_path / "out" / "Toy-GPTQ-Int4" / "qquant-manifest.json").read_text())
    records = [entry for entry in manifest["artifacts"]["a"]["layers"] if entry.get("steps")]
    assert len(records) == 14
    for record in records:
        assert list(record["steps"]) == ["rtn", "gptq", "sweeps", "coupled", "flips"]
        assert record["steps"]["flips"] <= record["steps"]["coupled"]
    assert report.passed
    assert "after best single flips" in (tmp_path / "out" / "report.html").read_text()
