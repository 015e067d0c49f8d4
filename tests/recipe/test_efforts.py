"""`effort`: one word fills in what a recipe leaves open, and never what it says."""

import pytest

from qquant import recipe
from qquant.recipe import efforts
from qquant.recipe.changes import Flags, changed

TEXT = """
version: 1
name: x
%s
calibration: {sources: [{bundled: docs-en}]%s}
artifacts:
  - {name: int4, format: gptq, bits: 4%s}
  - {name: near, format: awq, solver: rtn}
  - {name: wide, format: gguf, type: q6_k, solver: gptq}
  - {name: narrow, format: gguf, type: q4_k_m, solver: gptq}
  - {name: theirs, format: gguf, type: q4_0}
"""


def read(effort, calibration="", int4=""):
    return recipe.parse(TEXT % (f"effort: {effort}" if effort else "", calibration, int4))


def solving(found):
    return {spec.name: (spec.sweeps, spec.propagate) for spec in found.artifacts}


def test_each_effort_fills_in_what_its_table_says():
    assert solving(read(None)) == {"int4": (2, True), "near": (2, True), "wide": (3, False), "narrow": (3, False), "theirs": (3, False)}  # fmt: skip
    fast, default, best = map(read, efforts.EFFORTS)
    assert solving(fast) == {"int4": (0, False), "near": (2, True), "wide": (0, False), "narrow": (0, False), "theirs": (3, False)}  # fmt: skip
    assert solving(default) == {"int4": (2, True), "near": (2, True), "wide": (3, False), "narrow": (3, True), "theirs": (3, False)}  # fmt: skip
    assert [fast.calibration.objective, default.calibration.objective] == ["output", "kl"]
    assert best.calibration.samples > default.calibration.samples == 128
    assert all(mine[0] >= theirs[0] for mine, theirs in zip(solving(best).values(), solving(default).values()))


@pytest.mark.parametrize("effort", efforts.EFFORTS)
def test_what_is_written_down_wins(effort):
    found = read(effort, ", objective: kl, samples: 7", ", sweeps: 5, propagate: true")
    assert solving(found)["int4"] == (5, True)
    assert (found.calibration.objective, found.calibration.samples) == ("kl", 7)
    assert solving(found)["wide"] == solving(read(effort))["wide"]


@pytest.mark.parametrize("name", recipe.names())
@pytest.mark.parametrize("effort", efforts.EFFORTS)
def test_the_command_line_changes_the_effort_and_nothing_else(name, effort):
    known = recipe.load(name)
    found = changed(known, Flags(effort=effort))
    assert found.effort == effort
    assert found.name == (name if effort == known.effort else f"{name}-{effort}")
    for mine, theirs in zip(found.artifacts, known.artifacts, strict=True):
        left = {"sweeps", "propagate"}
        assert mine.model_dump(exclude=left) == theirs.model_dump(exclude=left)
    assert changed(found, Flags(effort=known.effort)).artifacts == known.artifacts
    assert recipe.parse(recipe.dump(found)) == found
    assert recipe.parse(recipe.dump(found, brief=True)) == found


def test_a_setting_beside_the_effort_wins_and_stays():
    found = changed(recipe.load("demo"), Flags(effort="fast", settings=("artifacts.awq.sweeps=2",)))
    assert solving(found)["awq"] == (2, False)
    assert solving(found)["gptq-int4"] == (0, False)
    again = recipe.parse(recipe.dump(found, brief=True))
    assert again == found
    assert "propagate: true" not in recipe.dump(found, brief=True)


def test_bundled_recipes_leave_the_solvers_to_their_effort():
    """One literal setting is left: eight bits of the demo, which would walk twice in float32."""
    for name in recipe.names():
        known = recipe.load(name)
        assert known.effort == ("fast" if name == "laptop" else "default")
        assert {spec.name for spec in known.artifacts if spec.model_fields_set & efforts.SOLVING} <= {"gptq-int8"}


def test_efforts_name_settings_that_there_are():
    for effort in efforts.EFFORTS.values():
        assert effort.calibration.keys() <= recipe.Calibration.model_fields.keys()
        assert effort.folder.keys() <= recipe.GptqArtifact.model_fields.keys() & recipe.AwqArtifact.model_fields.keys()
        for part in (effort.gguf, effort.narrow):
            assert part.keys() <= recipe.GgufArtifact.model_fields.keys()
