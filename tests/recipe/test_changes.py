"""A recipe changed by flags: the same words, the same refusals, and nothing changed that was not named."""

import pytest

from qquant import recipe
from qquant.errors import UsageError
from qquant.recipe.changes import Flags, changed

CHAT = recipe.load("qwen1.5-chat")


def test_nothing_said_changes_nothing():
    assert changed(CHAT, Flags()) is CHAT


@pytest.mark.parametrize(
    ("setting", "found", "expected"),
    [
        ("calibration.samples=64", lambda r: r.calibration.samples, 64),
        ("calibration.objective=output", lambda r: r.calibration.objective, "output"),
        ("calibration.sources.0.weight=2", lambda r: r.calibration.sources[0].weight, 2),
        ("artifacts.awq.group_size=64", lambda r: r.artifacts[2].group_size, 64),
        ("artifacts.gguf-q8_0.sweeps=0", lambda r: r.artifacts[-1].sweeps, 0),
        ("artifacts.0.bits=8", lambda r: r.artifacts[0].bits, 8),
        ("artifacts.*.sweeps=1", lambda r: {a.sweeps for a in r.artifacts}, {1}),
        ("checks.texts=[bundled:code-test]", lambda r: r.checks.texts, ("bundled:code-test",)),
        ("artifacts.awq.gates={kl_divergence: 0.5}", lambda r: r.artifacts[2].gates.kl_divergence, 0.5),
        ("description=", lambda r: r.description, ""),
        ("pad_intermediate=256", lambda r: r.pad_intermediate, 256),
    ],
)
def test_a_dotted_key_sets_one_value(setting, found, expected):
    after = changed(CHAT, Flags(settings=(setting,)))
    assert found(after) == expected
    assert found(CHAT) != expected
    assert after.name == "qwen1.5-chat-changed"
    assert recipe.parse(recipe.dump(after)) == after
    assert recipe.parse(recipe.dump(after, brief=True)) == after


def test_an_artifact_whose_name_has_dots():
    base = changed(CHAT, Flags(settings=("artifacts.0.name=int4.v2", "artifacts.int4.v2.bits=8")))
    assert (base.artifacts[0].name, base.artifacts[0].bits) == ("int4.v2", 8)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (Flags(format="gptq", bits=4), {"name": "gptq-int4", "bits": 4, "group_size": 128}),
        (Flags(format="gptq", bits=8, group_size=32), {"name": "gptq-int8", "bits": 8, "group_size": 32}),
        (Flags(format="awq"), {"name": "awq", "bits": 4}),
        (Flags(types=("q4_k_m",)), {"name": "gguf-q4_k_m", "solver": "gptq", "propagate": True}),
        (Flags(format="gguf", types=("q5_1",)), {"name": "gguf-q5_1", "solver": "gptq", "propagate": False}),
        (Flags(types=("bf16",)), {"name": "gguf-bf16", "solver": "ggml"}),
        (Flags(size="4.4 GB"), {"name": "gguf-4.4gb", "type": None, "size": "4.4 GB", "solver": "gptq"}),
    ],
)
def test_flags_name_an_artifact_with_the_settings_of_the_recipe(flags, expected):
    (artifact,) = changed(CHAT, flags).artifacts
    assert artifact.model_dump().items() >= expected.items()


def test_several_types_are_several_files():
    assert [a.type for a in changed(CHAT, Flags(types=("q4_k_m", "q8_0"))).artifacts] == ["q4_k_m", "q8_0"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (Flags(settings=("calibration.sample=1",)), "calibration.sample: unknown key; allowed: sources"),
        (Flags(settings=("calibration.samples=many",)), 'calibration.samples: wrong type, got "many"'),
        (Flags(settings=("calibration.samples",)), "expected KEY=VALUE"),
        (Flags(settings=("calib.samples=1",)), "unknown key `calib`"),
        (Flags(settings=("artifacts.qwa.bits=4",)), "there are gptq-int4, gptq-int8, awq"),
        (Flags(settings=("artifacts.11.bits=4",)), "no entry `11`"),
        (Flags(settings=("name.first=x",)), "too far"),
        (Flags(settings=("checks.text=bundled:a", "checks.texts=[bundled:a]")), "repeated text"),
        (Flags(settings=("artifacts=[",)), "not valid YAML"),
        (Flags(bits=4), "need --format"),
        (Flags(format="gptq"), "needs --bits"),
        (Flags(format="gptq", bits=3), "artifacts[0].bits: not an allowed value, got 3; allowed: 4, 8"),
        (Flags(format="gguf"), "takes --type"),
        (Flags(size="4.4 gigs"), 'not a size, got "4.4 gigs"; allowed: a number and one of B, KB'),
        (Flags(format="awq", size="4GB"), "--size belongs to --format gguf, got --format awq"),
        (Flags(types=("Q4_K_M",)), "did you mean 'q4_k_m'?"),
        (Flags(format="awq", types=("q4_0",)), "--type belongs to --format gguf"),
    ],
)
def test_what_a_recipe_would_refuse_is_refused(flags, message):
    with pytest.raises(UsageError) as caught:
        changed(CHAT, flags)
    assert message in str(caught.value)
