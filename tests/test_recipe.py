"""Recipes: the bundled ones load, the language is strict and literal, every problem is reported at once and at its place."""

import json
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from qquant import recipe
from qquant.errors import UsageError
from qquant.recipe import (
    AwqArtifact,
    Calibration,
    Checks,
    Gates,
    GgufArtifact,
    GptqArtifact,
    Recipe,
    Source,
    Waiver,
)
from qquant.resources import data_dir

OFFICIAL = ["gptq-int4", "gptq-int8", "awq"] + [
    f"gguf-{kind}" for kind in ("q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_0", "q5_k_m", "q6_k", "q8_0")
]
MODELS = (Recipe, Calibration, Source, GptqArtifact, AwqArtifact, GgufArtifact, Gates, Waiver, Checks)

GOOD = """\
version: 1
name: good
checkpoint: some/model
calibration:
  sources:
    - bundled: docs-en
    - {path: chats.jsonl, kind: chat, weight: 3}
  samples: 64
artifacts:
  - name: four
    format: gptq
    bits: 4
    gates: {kl_divergence: 0.1}
  - name: awq
    format: awq
  - name: small
    format: gguf
    type: q4_k_m
checks:
  windows: 8
"""


def problems(text):
    with pytest.raises(UsageError) as caught:
        recipe.parse(text, "r.yaml")
    return str(caught.value).splitlines()


def changed(old, new):
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


# The bundled recipes.


def test_bundled_names():
    assert recipe.names() == ["demo", "qwen1.5-base", "qwen1.5-chat"]


@pytest.mark.parametrize("name", recipe.names())
def test_bundled_recipe_loads_under_its_name(name):
    loaded = recipe.load(name)
    assert loaded.name == name
    assert loaded.description
    assert recipe.parse(recipe.dump(loaded)) == loaded
    assert all(artifact.gates.defaults for artifact in loaded.artifacts)


@pytest.mark.parametrize("name", ["qwen1.5-chat", "qwen1.5-base"])
def test_official_artifacts_and_settings(name):
    loaded = recipe.load(name)
    assert [artifact.name for artifact in loaded.artifacts] == OFFICIAL
    for artifact in loaded.artifacts:
        match artifact:
            case GptqArtifact():
                assert artifact.name == f"gptq-int{artifact.bits}"
                assert (artifact.group_size, artifact.symmetric, artifact.desc_act, artifact.damping) == (
                    128,
                    True,
                    False,
                    0.01,
                )
            case AwqArtifact():
                assert (artifact.bits, artifact.group_size, artifact.zero_point) == (4, 128, True)
            case GgufArtifact():
                assert artifact.name == f"gguf-{artifact.type}"
    assert (loaded.calibration.samples, loaded.calibration.length) == (128, 2048)


def test_base_and_demo_recipes_are_plain_text_and_the_chat_recipe_is_mostly_chat():
    def share_of_chats(name):
        sources = recipe.load(name).calibration.sources
        return sum(source.weight for source in sources if source.kind == "chat") / sum(
            source.weight for source in sources
        )

    assert share_of_chats("qwen1.5-base") == share_of_chats("demo") == 0
    assert share_of_chats("qwen1.5-chat") > 0.5
    assert recipe.load("qwen1.5-chat").calibration.default_system_share == 0.25


def test_demo_builds_the_bundled_checkpoint():
    demo = recipe.load("demo")
    assert [artifact.name for artifact in demo.artifacts] == ["gptq-int4", "gptq-int8", "awq", "gguf-q8_0", "gguf-q4_0"]
    assert demo.checkpoint == "bundled:tiny-qwen1.5"
    assert (data_dir("recipes") / "demo" / "tiny-qwen1.5" / "config.json").is_file()


@pytest.mark.parametrize("name", recipe.names())
def test_every_bundled_text_exists_and_is_of_the_kind_named(name):
    loaded = recipe.load(name)
    corpora, heldout = (
        {entry["name"]: entry["kind"] for entry in YAML(typ="safe", pure=True).load(data_dir("calibration") / file)}
        for file in ("corpora.yaml", "heldout.yaml")
    )
    for source in loaded.calibration.sources:
        assert corpora[source.bundled] == source.kind
    assert loaded.checks.text.removeprefix("bundled:") in heldout


# Finding the file.


def test_a_bare_name_is_bundled_and_the_rest_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text(GOOD)
    Path("demo.yaml").write_text(GOOD)
    Path("demo.yml").write_text(GOOD)
    assert recipe.load("demo").name == "demo"
    for file in ("./demo", "demo.yaml", "demo.yml", Path("demo"), tmp_path / "demo"):
        assert recipe.load(file).name == "good"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError) as caught:
        recipe.load("qwen15-chat")
    assert str(caught.value) == (
        'no bundled recipe has this name, got "qwen15-chat"; allowed: demo, qwen1.5-base, qwen1.5-chat,'
        " or the path of a .yaml file; did you mean 'qwen1.5-chat'?"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.yaml", "No such file or directory"),
        ("folder.yaml", "Is a directory"),
        ("a\0.yaml", "embedded null byte"),
    ],
)
def test_unreadable_file(tmp_path, name, reason):
    (tmp_path / "folder.yaml").mkdir()
    file = f"{tmp_path}/{name}"
    with pytest.raises(UsageError) as caught:
        recipe.load(file)
    assert str(caught.value) == f"{file}: cannot read the recipe: {reason}"


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(b"version: 1\nname: caf\xe9\n")
    with pytest.raises(UsageError, match=re.escape(f"{file}:2:10: a recipe is UTF-8 text, got the byte 0xe9")):
        recipe.load(file)
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode().replace(b"\n", b"\r\n"))
    assert recipe.load(file) == recipe.parse(GOOD)


def test_messages_carry_the_path_of_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(changed("samples: 64", "samples: 0"))
    with pytest.raises(UsageError) as caught:
        recipe.load(str(file))
    assert str(caught.value).startswith(f"{file}:8:12: calibration.samples: out of range, got 0; ")
    assert caught.value.exit_code == 2


# One problem, one line.

FORMATS = "awq, gguf, gptq"
NAME = "1 to 100 of a-z 0-9 . _ - that begin with a letter or digit"
RECIPE_KEYS = (
    "version, name, description, checkpoint, revision, pad_intermediate, calibration, artifacts, checks, shard_size, "
    "gguf_split_size"
)
GATES_KEYS = "perplexity_ratio, kl_divergence, top1_agreement, regression_vs, regression_tolerance, defaults, waiver"
CALIBRATION_KEYS = "sources, samples, length, seed, default_system_share, objective, curvature_tokens"
SOURCE_KEYS = "bundled, dataset, path, config, split, revision, field, kind, weight"
AWQ_KEYS = "name, gates, format, bits, group_size, zero_point, damping, rounding, scale_search, sweeps, transform, ratios, propagate"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        # unknown keys
        ("checks:", "cheks:", f"19:1: cheks: unknown key; allowed: {RECIPE_KEYS}; did you mean 'checks'?"),
        ("checks:", "colour:", f"19:1: colour: unknown key; allowed: {RECIPE_KEYS}"),
        ("checks:", '"a b\\n\\u2028": 1\nchecks:', f'19:1: "a b\\n\\u2028": unknown key; allowed: {RECIPE_KEYS}'),
        (
            "- bundled:",
            "- bundeld:",
            f"6:7: calibration.sources[0].bundeld: unknown key; allowed: {SOURCE_KEYS}; did you mean 'bundled'?",
        ),
        (
            "{kl_divergence: 0.1}",
            "{kl: 0.1}",
            f"13:13: artifacts[0].gates.kl: unknown key; allowed: {GATES_KEYS}; did you mean 'kl_divergence'?",
        ),
        # a key of another format
        (
            "format: awq",
            "format: awq\n    desc_act: false",
            f"16:5: artifacts[1].desc_act: unknown key; allowed: {AWQ_KEYS}",
        ),
        # missing keys: the place is the mapping that lacks them
        ("version: 1\n", "", "1:1: version: missing key; allowed: 1"),
        ("    bits: 4\n", "", "10:5: artifacts[0].bits: missing key; allowed: 4, 8"),
        ("  - name: awq\n    ", "  - ", f"14:5: artifacts[1].name: missing key; allowed: {NAME}"),
        # formats
        (
            "format: awq",
            "format: aqw",
            f"15:13: artifacts[1].format: unknown format, got \"aqw\"; allowed: {FORMATS}; did you mean 'awq'?",
        ),
        ("format: awq", "format: exl2", f'15:13: artifacts[1].format: unknown format, got "exl2"; allowed: {FORMATS}'),
        ("format: awq", "format: 4", f"15:13: artifacts[1].format: wrong type, got 4; allowed: {FORMATS}"),
        ("format: awq", "format: [awq]", f"15:13: artifacts[1].format: wrong type, got a list; allowed: {FORMATS}"),
        ("\n    format: awq", "", f"14:5: artifacts[1].format: missing key; allowed: {FORMATS}"),
        # wrong types
        (
            "samples: 64",
            'samples: "64"',
            '8:12: calibration.samples: wrong type, got "64"; allowed: whole number from 1 to 65536; did you mean 64?',
        ),
        (
            "samples: 64",
            "samples: 64.0",
            "8:12: calibration.samples: wrong type, got 64.0; allowed: whole number from 1 to 65536; did you mean 64?",
        ),
        (
            "samples: 64",
            "samples: 4_000",
            '8:12: calibration.samples: wrong type, got "4_000"; allowed: whole number from 1 to 65536; did you mean 4000?',
        ),
        (
            "samples: 64",
            'samples: "0"',
            '8:12: calibration.samples: wrong type, got "0"; allowed: whole number from 1 to 65536',
        ),
        ("bits: 4", 'bits: "4"', '12:11: artifacts[0].bits: wrong type, got "4"; allowed: 4, 8; did you mean 4?'),
        ("bits: 4", "bits: 4.0", "12:11: artifacts[0].bits: wrong type, got 4.0; allowed: 4, 8; did you mean 4?"),
        ("bits: 4", "bits: '5'", '12:11: artifacts[0].bits: wrong type, got "5"; allowed: 4, 8'),
        ("version: 1", "version: true", "1:10: version: wrong type, got true; allowed: 1"),
        ("version: 1", "version:", "1:1: version: wrong type, got null; allowed: 1"),
        (
            "bits: 4",
            "bits: 4\n    propagate: yes",
            '13:16: artifacts[0].propagate: wrong type, got "yes"; allowed: true, false; did you mean true?',
        ),
        (
            "bits: 4",
            "bits: 4\n    desc_act: no",
            '13:15: artifacts[0].desc_act: wrong type, got "no"; allowed: false; did you mean false?',
        ),
        ("bits: 4", "bits: 4\n    symmetric: 1", "13:16: artifacts[0].symmetric: wrong type, got 1; allowed: true"),
        (
            "some/model",
            "7",
            "3:13: checkpoint: wrong type, got 7; allowed: text of 1 to 1024 characters or null; did you mean it in quotes?",
        ),
        ("\n  windows: 8", " fast", '19:9: checks: wrong type, got "fast"; allowed: mapping'),
        ("{kl_divergence: 0.1}", "", "13:5: artifacts[0].gates: wrong type, got null; allowed: mapping"),
        (
            "    - bundled: docs-en",
            "    - docs-en",
            '6:7: calibration.sources[0]: wrong type, got "docs-en"; allowed: mapping',
        ),
        # values
        ("bits: 4", "bits: 5", "12:11: artifacts[0].bits: not an allowed value, got 5; allowed: 4, 8"),
        ("version: 1", "version: 2", "1:10: version: not an allowed value, got 2; allowed: 1"),
        (
            "kind: chat",
            "kind: chats",
            "7:33: calibration.sources[1].kind: not an allowed value, got \"chats\"; allowed: chat, text; did you mean 'chat'?",
        ),
        ("name: good", "name: Good", f'2:7: name: not a name, got "Good"; allowed: {NAME}'),
        ("some/model", '""', '3:13: checkpoint: empty text, got ""; allowed: text of 1 to 1024 characters or null'),
        (
            "samples: 64",
            "samples: 0",
            "8:12: calibration.samples: out of range, got 0; allowed: whole number from 1 to 65536",
        ),
        (
            "weight: 3",
            "weight: .inf",
            "7:47: calibration.sources[1].weight: out of range, got .inf; allowed: number above 0 to 1000",
        ),
        (
            "weight: 3",
            "weight: .nan",
            "7:47: calibration.sources[1].weight: out of range, got .nan; allowed: number above 0 to 1000",
        ),
        (
            "bits: 4",
            "bits: 4\n    damping: 1",
            "13:14: artifacts[0].damping: out of range, got 1; allowed: number above 0 and below 1",
        ),
        (
            "kl_divergence: 0.1",
            "kl_divergence: -1",
            "13:28: artifacts[0].gates.kl_divergence: out of range, got -1; allowed: number, 0 or more or null",
        ),
        # repeated and odd keys
        ("name: good", "name: good\nname: other", "3:1: name: repeated key, first on line 2"),
        ("windows: 8", "windows: 8\n  windows: 9", "21:3: checks.windows: repeated key, first on line 20"),
        ("windows: 8", "5: 8", "20:3: checks: a key must be text, got 5"),
        ("windows: 8", "? [a, {b: c}]\n  : 8", "20:5: checks: a key must be text, got something else"),
        ("windows: 8", "!!str windows: 8", "20:3: checks: a key must be text, got something else"),
        # what YAML has and a recipe has not
        (
            "docs-en",
            "&x docs-en",
            '6:16: calibration.sources[0].bundled: anchors and aliases are not supported, got "x"; write the value out',
        ),
        (
            "docs-en",
            "*x",
            '6:16: calibration.sources[0].bundled: anchors and aliases are not supported, got "x"; write the value out',
        ),
        (
            "bits: 4",
            "bits: !!int '4'",
            '12:11: artifacts[0].bits: tags are not supported, got "tag:yaml.org,2002:int"; write the value alone',
        ),
        ("checks:", "<<: {name: x}\nchecks:", f'19:1: "<<": unknown key; allowed: {RECIPE_KEYS}'),
        ("docs-en", '"a\\x00"', '6:16: calibration.sources[0].bundled: control character in text, got "a\\u0000"'),
        ("docs-en", '"\\ud800"', '6:16: calibration.sources[0].bundled: control character in text, got "\\ud800"'),
    ],
)
def test_one_problem_one_line(old, new, line):
    assert problems(changed(old, new)) == [f"r.yaml:{line}"]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "- bundled: docs-en",
            "- weight: 1",
            "6:7: calibration.sources[0]: needs one origin, got none; allowed: exactly one of bundled, dataset, path",
        ),
        (
            "- bundled: docs-en",
            "- {bundled: docs-en, path: a.txt}",
            "6:7: calibration.sources[0]: needs one origin, got bundled and path; allowed: exactly one of bundled, dataset, path",
        ),
        (
            "- bundled: docs-en",
            "- {bundled: docs-en, config: x}",
            '6:34: calibration.sources[0].config: belongs to a dataset, got "x"; allowed: null',
        ),
        (
            "- bundled: docs-en",
            "- {path: a.jsonl, split: test}",
            '6:30: calibration.sources[0].split: belongs to a dataset, got "test"; allowed: train',
        ),
        (
            "- bundled: docs-en",
            "- {path: a.jsonl, revision: abc}",
            '6:33: calibration.sources[0].revision: belongs to a dataset, got "abc"; allowed: null',
        ),
        (
            "chats.jsonl",
            "chats.TXT",
            '7:31: calibration.sources[1].kind: a .txt file has no turns, got "chat"; allowed: text',
        ),
        (
            "- bundled: docs-en",
            "- {path: a.txt, field: x}",
            '6:28: calibration.sources[0].field: a .txt file has no columns, got "x"; allowed: null',
        ),
        ("samples: 64", "samples: 1", "8:12: calibration.samples: fewer than sources, got 1; allowed: 2 or more"),
        (
            "samples: 64",
            "samples: 65536\n  length: 65536",
            "8:12: calibration.samples: too many tokens, got 65536 x length 65536; allowed: 2147483648 in all",
        ),
        (
            "windows: 8",
            "windows: 65536\n  length: 131072",
            "20:12: checks.windows: too many tokens, got 65536 x length 131072; allowed: 2147483648 in all",
        ),
        (
            "name: small",
            "name: four",
            '16:11: artifacts[2].name: repeated name, got "four"; allowed: any but that of artifacts[0]',
        ),
        (
            "type: q4_k_m",
            "type: q4_k_m\n    propagate: true",
            "19:16: artifacts[2].propagate: solver: ggml does not look at the stream, got true; allowed: false",
        ),
        (
            "type: q4_k_m",
            "type: bf16\n    solver: gptq",
            '19:13: artifacts[2].solver: bf16 has no codes to solve for, got "gptq"; allowed: ggml',
        ),
        ("some/model", '"bundled:"', '3:13: checkpoint: no name, got "bundled:"; allowed: bundled:NAME'),
        (
            "some/model",
            "bundled:tiny\nrevision: main",
            '4:11: revision: a bundled checkpoint has none, got "main"; allowed: null',
        ),
        (
            "windows: 8",
            "text: bundled:docs-en",
            '20:9: checks.text: held-out text must not calibrate, got "bundled:docs-en", which is calibration.sources[0] too',
        ),
        (
            "windows: 8",
            "text: chats.jsonl",
            '20:9: checks.text: held-out text must not calibrate, got "chats.jsonl", which is calibration.sources[1] too',
        ),
        (
            "windows: 8",
            "texts: [bundled:zh-test, bundled:docs-en]",
            '20:28: checks.texts[1]: held-out text must not calibrate, got "bundled:docs-en", which is calibration.sources[0] too',
        ),
        (
            "windows: 8",
            "texts: [a.txt, a.txt]",
            '20:18: checks.texts[1]: repeated text, got "a.txt"; allowed: each text once',
        ),
        (
            "windows: 8",
            "windows: 8\n  max_windows: 7",
            "21:16: checks.max_windows: less than windows, got 7; allowed: 8 or more",
        ),
        (
            "{kl_divergence: 0.1}",
            "{waiver: {reason: known}}",
            "13:21: artifacts[0].gates.waiver: incomplete, got no who, until; allowed: reason, who and until, or none of them",
        ),
        (
            "{kl_divergence: 0.1}",
            '{waiver: {reason: known, who: me, until: "2026-02-30"}}',
            '13:53: artifacts[0].gates.waiver.until: not a day, got "2026-02-30"; allowed: YYYY-MM-DD',
        ),
    ],
)
def test_impossible_combinations(old, new, line):
    assert problems(changed(old, new)) == [f"r.yaml:{line}"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("docs-en", '"None"'),
        ("windows: 8", "text: bundled:None"),
        ("format: awq", "format: awq\n    rounding: rtn\n    damping: 0.5"),
        ("type: q4_k_m", "type: q4_k_m\n    imatrix: false\n    solver: gptq"),
        ("samples: 64", "samples: 2"),
        ("samples: 64", "samples: 65536\n  length: 32768"),
        ("- bundled: docs-en", "- {dataset: a/b, config: x, split: test, revision: '0e1', field: text}"),
        ("some/model", "null\nrevision: main"),
    ],
)
def test_possible_combinations(old, new):
    recipe.parse(changed(old, new))


def test_conflicts_are_refused_in_python_too():
    with pytest.raises(ValidationError, match="needs one origin, got none"):
        Source()
    with pytest.raises(ValidationError, match="samples: fewer than sources"):
        Calibration(sources=(Source(bundled="a"), Source(bundled="b")), samples=1)
    with pytest.raises(ValidationError, match=r"checks.text: held-out text must not calibrate"):
        Recipe(
            version=1,
            name="x",
            calibration=Calibration(sources=(Source(bundled="wikitext-2-test"),)),
            artifacts=(AwqArtifact(name="a", format="awq"),),
        )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "1:1: recipe: the file is empty; allowed: mapping"),
        ("# nothing\n", "1:1: recipe: the file is empty; allowed: mapping"),
        ("- a\n", "1:1: recipe: wrong type, got a list; allowed: mapping"),
        ("demo\n", '1:1: recipe: wrong type, got "demo"; allowed: mapping'),
        (
            "version: [\n",
            "2:1: recipe: not valid YAML: while parsing a flow node, expected the node content, but found '<stream end>'",
        ),
        ("version: 1\nname: a: b\n", "2:8: recipe: not valid YAML: mapping values are not allowed here"),
        ("a: |\n \n   b\n", "3:4: recipe: not valid YAML: more indented follow up line than first in a block scalar"),
        ("version: 1\nname: a\x00b\n", "2:8: recipe: not valid YAML: character U+0000"),
        ("version: 1\n---\nversion: 1\n", "2:1: recipe: a second document begins; allowed: one"),
        ("%YAML 1.1\n---\nversion: 1\n", "2:1: recipe: wrong version of YAML, got %YAML 1.1; allowed: 1.2"),
        ("[" * 5000, "1:21: recipe: nested too deep; allowed: 20 levels"),
        ("? " + "[" * 5000, "1:22: recipe: nested too deep; allowed: 20 levels"),
        ("a: [" + "b,\n" * 20_000 + "]", "19996:1: recipe: too long; allowed: 20000 keys, values and brackets"),
        ("a: " + "b" * 10_000, "1:10001: recipe: line too long; allowed: 10000 characters"),
    ],
)
def test_what_cannot_be_read_further(text, line):
    assert problems(text)[-1] == f"r.yaml:{line}"


def test_yaml_1_2_directive_is_fine():
    assert recipe.parse("%YAML 1.2\n---\n" + GOOD) == recipe.parse(GOOD)


def test_the_largest_file(tmp_path):
    file = tmp_path / "r.yaml"
    comment = "#" * 999 + "\n"
    file.write_text(GOOD + comment * 990)
    assert recipe.load(file).name == "good"
    file.write_text(GOOD + comment * 1001)
    with pytest.raises(UsageError, match="a recipe has at most 1000000 bytes, this file has more"):
        recipe.load(file)


# Many problems, all of them.


def test_all_problems_at_once_in_the_order_of_the_file():
    lines = problems(
        textwrap.dedent("""\
        version: "1"
        calibraton:
          sources:
            - {bundeld: docs-en, kind: chats}
            - {path: a.txt, kind: chat}
            - *gone
          sampels: '12'
        artifacts:
          - {name: a, format: gtpq, bits: "4", bits: 8, desc_act: no}
          - {name: a, fromat: awq, group_size: 127}
          - {name: b, format: exl2, sym: true, bits: 5}
          - {name: c, format: gguf, type: Q4_K_M, gates: {top1: 2}}
        checks: {text: "bundled:docs-en", windows: 0}
        """)
    )
    found = [re.fullmatch(r"r\.yaml:(\d+):\d+: (\S+): ([^,;]+)[,;].*", line).groups() for line in lines]
    assert found == [
        ("1", "name", "missing key"),
        ("1", "version", "wrong type"),
        ("2", "calibraton", "unknown key"),
        ("4", "calibraton.sources[0].bundeld", "unknown key"),
        ("4", "calibraton.sources[0].kind", "not an allowed value"),
        ("5", "calibraton.sources[1].kind", "a .txt file has no turns"),
        ("6", "calibraton.sources[2]", "anchors and aliases are not supported"),
        ("7", "calibraton.sampels", "unknown key"),
        ("7", "calibraton.sampels", "wrong type"),
        ("9", "artifacts[0].format", "unknown format"),
        ("9", "artifacts[0].bits", "wrong type"),
        ("9", "artifacts[0].bits", "repeated key"),
        ("9", "artifacts[0].desc_act", "wrong type"),
        ("10", "artifacts[1].name", "repeated name"),
        ("10", "artifacts[1].fromat", "unknown key"),
        ("10", "artifacts[1].group_size", "not an allowed value"),
        ("11", "artifacts[2].format", "unknown format"),
        ("11", "artifacts[2].sym", "unknown key"),
        ("12", "artifacts[3].type", "not an allowed value"),
        ("12", "artifacts[3].gates.top1", "unknown key"),
        ("12", "artifacts[3].gates.top1", "out of range"),
        ("13", "checks.text", "held-out text must not calibrate"),
        ("13", "checks.windows", "out of range"),
    ]


@pytest.mark.parametrize(
    "lines", ["samples: 64\n  sampels: 0", "sampels: 0\n  samples: 64", "sampels: 9\n  smaples: 0\n  samples: 64"]
)
def test_a_known_key_is_not_replaced_by_a_misspelt_one(lines):
    for line in problems(changed("samples: 64", lines)):
        assert re.search(rf"unknown key; allowed: {CALIBRATION_KEYS}; did you mean 'samples'\?$", line)


def test_long_values_are_cut():
    (line,) = problems(changed("bits: 4", f"bits: {'x' * 5000}"))
    assert line == f'r.yaml:12:11: artifacts[0].bits: wrong type, got "{"x" * 75} ...; allowed: 4, 8'
    (line,) = problems(changed("checks:", "x" * 900 + ":"))
    assert line == f'r.yaml:19:1: "{"x" * 75} ...: unknown key; allowed: {RECIPE_KEYS}'


def test_a_flood_of_problems_is_cut():
    lines = problems(GOOD + "".join(f"unknown{index}: 1\n" for index in range(250)))
    assert len(lines) == 101
    assert lines[-1] == "r.yaml: and 150 more problems"


WRONG = {
    "integer": ['"4"', "4.5", "true", "null", "[]", "{}", "1e3", "4.0"],
    "number": ['"0.5"', "true", "null", "[]", "{}", ".nan", ".inf"],
    "boolean": ['"true"', "yes", "1", "0", "null", "[]", "{}"],
    "string": ["7", "true", "1e3", "null", "[]", "{}"],
    "array": ['"x"', "{}", "null", "[]"],
    "object": ['"x"', "[]", "null", "1"],
}


def fields():
    """(start of a recipe, title of the model, field, schema of the field) for every field of every model."""
    shapes = recipe.schema()
    for model in MODELS:
        shape = shapes if model is Recipe else shapes["$defs"][model.__name__]
        yield from ((model, name, field) for name, field in shape["properties"].items() if name != "format")


def example(model, name, value):
    """A recipe in flow style, right but for the field `name` of one `model`, which is the text `value`."""
    entries = {
        Recipe: {"version": "1", "name": "x"},
        Calibration: {},
        Source: {"dataset": "a/b"},
        GptqArtifact: {"name": "g", "format": "gptq", "bits": "4"},
        AwqArtifact: {"name": "a", "format": "awq"},
        GgufArtifact: {"name": "u", "format": "gguf", "type": "q8_0"},
        Gates: {},
        Waiver: {"reason": "x", "who": "y", "until": '"2030-01-01"'},
        Checks: {},
    }
    if name in ("bundled", "dataset", "path"):
        entries[model] = {}  # a source has one origin
    entries[model][name] = value

    def flow(kind, **nested):
        return "{" + ", ".join(f"{key}: {text}" for key, text in (nested | entries[kind]).items()) + "}"

    waiver = {"waiver": flow(Waiver)} if model is Waiver else {}
    artifacts = f"[{flow(GptqArtifact, gates=flow(Gates, **waiver))}, {flow(AwqArtifact)}, {flow(GgufArtifact)}]"
    calibration = flow(Calibration, sources=f"[{flow(Source)}]")
    return flow(Recipe, calibration=calibration, artifacts=artifacts, checks=flow(Checks))


@pytest.mark.parametrize(
    ("model", "name", "field"), [pytest.param(*case, id=f"{case[0].__name__}.{case[1]}") for case in fields()]
)
def test_every_field_is_strict(model, name, field):
    kinds = {option.get("type", "string" if "enum" in option else "object") for option in field.get("anyOf", [field])}
    (kind,) = kinds - {"null"}
    refused = [text for text in WRONG[kind] if not (text == "null" and "null" in kinds)]
    refused = [text for text in refused if not (text == "[]" and field.get("minItems") == 0)]
    for text in refused:
        lines = problems(example(model, name, text))
        assert len(lines) == 1, lines
        assert re.search(
            rf"[.\s]{name}: (wrong type|out of range|empty list|not an allowed value), got .*; allowed: ", lines[0]
        ), lines
        assert not re.search(r"[Ii]nput|should be|type=|valid ", lines[0]), "the words of pydantic"
    if "default" in field and name not in ("bundled", "dataset", "path") and model is not Waiver:
        recipe.parse(example(model, name, json.dumps(field["default"])))


def _messages(text):
    try:
        recipe.parse(text)
    except UsageError as error:
        return str(error).splitlines()
    return []


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
    assert recipe.fingerprint(back) == recipe.fingerprint(made)
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
        'version: 1\nname: good\ndescription: ""\ncheckpoint: some/model\nrevision: null\npad_intermediate: none\n'
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


# The fingerprint.


def test_fingerprint_is_of_the_content_not_of_the_writing():
    first = recipe.fingerprint(recipe.parse(GOOD))
    assert re.fullmatch("[0-9a-f]{64}", first)
    rewritten = "# a comment\n" + changed("weight: 3", "weight: 3.00").replace(
        "version: 1\nname: good", "name: 'good'\nversion: 1"
    )
    assert recipe.fingerprint(recipe.parse(rewritten + "shard_size: 4000000000\n")) == first
    zero, negative_zero = (
        recipe.parse(changed("samples: 64", f"samples: 64\n  default_system_share: {text}")) for text in ("0", "-0.0")
    )
    assert zero == negative_zero
    assert recipe.fingerprint(zero) == recipe.fingerprint(negative_zero)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: good", "name: better"),
        ("weight: 3", "weight: 4"),
        ("bits: 4", "bits: 8"),
        ("0.1}", "0.2}"),
        ("windows: 8", "windows: 9"),
    ],
)
def test_fingerprint_changes_with_the_content(old, new):
    assert recipe.fingerprint(recipe.parse(changed(old, new))) != recipe.fingerprint(recipe.parse(GOOD))


def test_fingerprint_stays_what_it_was():
    made = Recipe(
        version=1,
        name="语".encode().hex(),
        description="语",
        calibration=Calibration(sources=(Source(bundled="a"),)),
        artifacts=(AwqArtifact(name="a", format="awq"),),
    )
    assert recipe.fingerprint(made) == "54fc894a8271b86dd5fcb0302686b60c2a831feec19b42f5270001bf619814fe"


# The schema and the documentation.


def objects(shape):
    if isinstance(shape, dict):
        if shape.get("type") == "object":
            yield shape
        for value in shape.values():
            yield from objects(value)


def test_schema_is_closed_and_complete():
    schema = recipe.schema()
    assert schema["$id"] == "urn:qquant:recipe:1"
    assert schema["title"] == "Recipe"
    found = {shape["title"]: shape for shape in objects(schema)}
    assert found.keys() == {model.__name__ for model in MODELS}
    for model in MODELS:
        shape = found[model.__name__]
        assert shape["additionalProperties"] is False
        assert shape["properties"].keys() == model.model_fields.keys()
        assert set(shape.get("required", [])) == {
            name for name, field in model.model_fields.items() if field.is_required()
        }
        assert all(field["description"] for field in shape["properties"].values())
    json.dumps(schema)


def test_schema_is_a_fresh_copy():
    recipe.schema()["properties"].clear()
    assert recipe.schema()["properties"]
    assert problems("{}")  # the messages come from the schema too


def test_readme_documents_every_field():
    readme = (data_dir("recipes") / "README.md").read_text("utf-8")
    assert readme.endswith("\n" + recipe.reference())
    for model in MODELS:
        section = readme.split(f"\n### {model.__name__}\n")[1].split("\n### ")[0]
        for name, field in model.model_fields.items():
            (row,) = re.findall(rf"^\| `{name}` \|.*$", section, re.MULTILINE)
            assert row.endswith(f"| {field.description} |")
            assert "| required |" in row if field.is_required() else "| required |" not in row
    assert all(f"`{name}`" in readme for name in recipe.names())


def test_readme_example_and_its_messages_are_true():
    readme = (data_dir("recipes") / "README.md").read_text("utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert [artifact.name for artifact in recipe.parse(example).artifacts] == ["server", "laptop"]
    wrong = (
        example.replace("- bundled:", "- bundeld:")
        .replace("length: 1024", 'length: "1024"')
        .replace("q4_k_m", "Q4_K_M")
    )
    with pytest.raises(UsageError) as caught:
        recipe.parse(wrong, "support.yaml")
    assert f"```\n{caught.value}\n```" in readme


# Distrust.

FRAGMENTS = [
    "[", "]", "{", "}", ":", "- ", "? ", '"', "'", "|", ">", "&a ", "*a", "!x ", "!<", "%", "@", "#", "\n", "  ", "\t", "---\n", "...\n", "%YAML 9\n",
    "%TAG ! x\n", "\\", "\\ud800", "\0", "\u2028", "\ufeff", "<<: ", "1", ".nan", "null", "\x85", "\r", "|2\n", "0x", "-", ".", "\U0001f600", "format: awq",
    "bits", "calibration: 5", "artifacts: x", "sources: {}", ",", "\ud800",
]  # fmt: skip


@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 10), st.sampled_from(FRAGMENTS)), min_size=1, max_size=5
    )
)
@settings(max_examples=100, deadline=None)
def test_any_damage_is_a_usage_error_with_a_place(edits):
    text = GOOD
    for start, length, fragment in edits:
        text = text[:start] + fragment + text[start + length :]
    for line in _messages(text):
        assert re.match(r"<recipe>:\d+:\d+: \S", line)


@pytest.mark.parametrize(
    "text",
    [
        "[{" * 4990 + "\n" + "[{" * 4990, "[\n" + (" !" + "!" * 9000 + ",\n") * 100, "a: '" + "\n\n" * 400_000, "a: >\n" + " x\n\n" * 200_000,
        "{" + ",\n".join(f"k{index}: 1" for index in range(9990)) + "}", "? a\n" * 200_000, " " * 9999 + ("\n" + " " * 9999) * 90,
        "version: 1\nartifacts: [" + ",\n".join(["{format: x}"] * 3000) + "]", "%TAG !e! x\n" * 80_000,
    ],
    ids=["brackets", "tags", "quoted", "folded", "keys", "repeated", "spaces", "artifacts", "directives"],
)  # fmt: skip
def test_hostile_text_is_refused_soon(text):
    start = time.process_time()
    lines = problems(text)
    assert time.process_time() - start < 5
    assert sum(map(len, lines)) < 100_000


def test_import_and_load_stay_light():
    heavy = {
        "torch",
        "numpy",
        "transformers",
        "datasets",
        "huggingface_hub",
        "gguf",
        "safetensors",
        "jinja2",
        "click",
        "rich",
    }
    program = "import sys, qquant.recipe; print('ruamel.yaml' in sys.modules); qquant.recipe.load('demo'); print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    lazily, loaded = output.splitlines()
    assert lazily == "False"
    assert not heavy & set(loaded.split())
