"""Recipes as YAML 1.2: what a plain scalar means, and a dump that every reader takes for the same."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from qquant import recipe
from qquant.recipe import (
    AwqArtifact,
    Calibration,
    Checks,
    Gates,
    GgufArtifact,
    GptqArtifact,
    Recipe,
    Source,
)
from tests.worlds.recipe_text import GOOD, changed, fingerprint, problems

# YAML 1.2.


def described(scalar):
    return recipe.parse(GOOD + f"description: {scalar}\n").description


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "yes",
        "on",
        "off",
        "y",
        "n",
        "12:30",
        "1:20:30",
        "2024-02-05",
        "1_000",
        "0b11",
        "1e",
        "0o8",
        "0xg",
        "1.2.3",
        ".",
        "+",
        "=",
        "NO",
        "nan",
        "0.1e",
    ],
)
def test_what_yaml_1_2_takes_for_text(text):
    assert described(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("1e-3", "0.001"), ("017", "17"), ("0o17", "15"), ("0x1F", "31"), ("+5", "5"), (".5", "0.5"), ("1.", "1.0"), (".5e3", "500.0"),
        ("-0", "0"), ("True", "true"), ("FALSE", "false"), ("~", "null"), ("Null", "null"), ("", "null"), (".NaN", ".nan"), ("-.inf", "-.inf"), ("+.inf", ".inf"),
        ("9" * 301, ".inf"), ("-" + "9" * 5000, "-.inf"), ("1e999", ".inf"),
    ],
)  # fmt: skip
def test_what_yaml_1_2_takes_for_something_else(text, shown):
    (line,) = problems(GOOD + f"description: {text}\n")
    assert f"description: wrong type, got {shown}; allowed: text of 0 to 4000 characters" in line


def test_numbers_in_every_notation():
    def damping(text):
        return recipe.parse(changed("bits: 4", f"bits: 4\n    damping: {text}")).artifacts[0].damping

    assert damping("1e-3") == damping("1E-03") == damping(".001") == damping("0.0010") == 0.001
    assert recipe.parse(changed("samples: 64", "samples: 0x40")) == recipe.parse(GOOD)
    assert recipe.parse(changed("weight: 3", "weight: 3.0")) == recipe.parse(GOOD)


# Writing.

TRICKY = [
    "no", "Yes", "null", "~", "12:30", "1e5", ".5e3", "0x1F", "1_000", "2024-01-01", "- a", "a: b", "a #b", "#", "'", '"', "\\", "a:", ":a", "%x", "@", "`",
    "---", "...", "=", "<<", "&a", "*a", "!t", "[", "{", "| x", "> y", " lead", "trail ", "\ttab", "two  spaces", "line\nbreak", "\n", "\n\n x\n ", "\u2028",
    "\ufeff", "\ufffe", "\u3000", "语言", "\U0001f600", "\u200b", "x" * 1000, "a b " * 200, "\u2028" * 900,
]  # fmt: skip
texts = st.sampled_from(TRICKY) | st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40)
artifact_names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
shares = st.floats(0, 1)
dampings = st.floats(0, 1, exclude_min=True, exclude_max=True)
gates = st.builds(
    Gates,
    perplexity_ratio=st.none() | st.floats(1, 1e6) | st.integers(1, 9),
    kl_divergence=st.none() | st.floats(0, 1e300),
    top1_agreement=st.none() | shares,
)
local = {"weight": st.floats(1e-9, 1000) | st.integers(1, 1000)}
sources = st.one_of(
    st.builds(Source, bundled=texts, kind=st.sampled_from(["chat", "text"]), **local),
    st.builds(
        Source,
        path=texts.map(lambda text: text + ".jsonl"),
        field=st.none() | texts,
        kind=st.sampled_from(["chat", "text"]),
        **local,
    ),
    st.builds(
        Source,
        generated=st.just(True),
        openings=st.none() | texts.map(lambda text: text + ".txt"),
        kind=st.sampled_from(["chat", "text"]),
        **local,
    ),
    st.builds(Source, dataset=texts, config=st.none() | texts, split=texts, revision=st.none() | texts, **local),
)
specs = st.one_of(
    st.builds(
        GptqArtifact,
        name=artifact_names,
        gates=gates,
        format=st.just("gptq"),
        bits=st.sampled_from([4, 8]),
        group_size=st.sampled_from([32, 64, 128, -1]),
        damping=dampings,
        propagate=st.booleans(),
    ),
    st.builds(
        AwqArtifact,
        name=artifact_names,
        gates=gates,
        format=st.just("awq"),
        damping=dampings,
        ratios=st.integers(1, 100),
    ),
    st.builds(
        GgufArtifact,
        name=artifact_names,
        gates=gates,
        format=st.just("gguf"),
        type=st.sampled_from(["q8_0", "q4_k_m", "iq4_xs"]),
        solver=st.sampled_from(["ggml", "gptq"]),
    ),
)
recipes = st.builds(
    Recipe,
    version=st.just(1),
    name=artifact_names,
    description=texts | st.just(""),
    checkpoint=st.none() | texts,
    revision=st.none() | texts,
    calibration=st.builds(
        Calibration,
        sources=st.lists(sources, min_size=1, max_size=3).map(tuple),
        samples=st.integers(3, 1000),
        length=st.integers(16, 131072),
        seed=st.integers(0, 2**63 - 1),
        default_system_share=shares,
    ),
    artifacts=st.lists(specs, min_size=1, max_size=3, unique_by=lambda spec: spec.name).map(tuple),
    checks=st.builds(Checks, text=texts.map(lambda text: text + ".held-out"), windows=st.integers(1, 1000)),
    shard_size=st.integers(10**6, 10**15),
)


@given(recipes)
@settings(max_examples=40, deadline=None)
def test_a_dumped_recipe_loads_back_equal(made):
    text = recipe.dump(made)
    back = recipe.parse(text)
    assert back == made
    assert fingerprint(back) == fingerprint(made)
    assert YAML(typ="safe", pure=True).load(text) == made.model_dump(mode="json")  # not only for our reader


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text_survives(text):
    made = recipe.parse(GOOD).model_copy(update={"description": text})
    assert recipe.parse(recipe.dump(made)).description == text


def test_dump_is_text_for_readers_of_yaml_1_1_too():
    made = recipe.parse(GOOD)
    for word in ("no", "Yes", "ON", "off", "y", "null", "True", "12:30", "0o17"):
        assert f'description: "{word}"\n' in recipe.dump(made.model_copy(update={"description": word}))
    assert "bundled: docs-en\n" in recipe.dump(made)


def test_dump_keeps_the_order_of_the_fields_with_lists_last():
    text = recipe.dump(recipe.parse(GOOD))
    assert text.startswith(
        'version: 1\nname: good\ndescription: ""\ncheckpoint: some/model\nrevision: null\neffort: null\ndtype: null\npad_intermediate: none\n'
    )
    assert re.findall(r"^\w+:$", text, re.MULTILINE) == ["calibration:", "artifacts:", "checks:"]


def test_dump_shows_every_default():
    shown = YAML(typ="safe", pure=True).load(recipe.dump(recipe.parse(GOOD)))
    assert shown.keys() == Recipe.model_fields.keys()
    assert shown["checks"].keys() == Checks.model_fields.keys()
    assert shown["calibration"]["sources"][0].keys() == Source.model_fields.keys()
    for entry, model in zip(shown["artifacts"], (GptqArtifact, AwqArtifact, GgufArtifact), strict=True):
        assert entry.keys() == model.model_fields.keys()
        assert entry["gates"].keys() == Gates.model_fields.keys()
