"""What is wrong in a recipe: one line for each problem, at its place, with what is allowed; all problems at once."""

import re
import textwrap

import pytest
from pydantic import ValidationError

from qquant import formats, recipe
from qquant.recipe import (
    AwqArtifact,
    Calibration,
    Recipe,
    Source,
)
from qquant.recipe.tensors import TENSOR_TYPES
from tests.worlds.recipe_text import GOOD, changed, problems

# One problem, one line.

FORMATS = ", ".join(sorted(formats.FORMATS))
NAME = "1 to 100 of a-z 0-9 . _ - that begin with a letter or digit"
RECIPE_KEYS = (
    "version, name, description, checkpoint, revision, effort, dtype, pad_intermediate, calibration, artifacts, checks, shard_size, "
    "gguf_split_size"
)
GATES_KEYS = "perplexity_ratio, kl_divergence, top1_agreement, regression_vs, regression_tolerance, worst_slice, behaviour, defaults, waiver"
CALIBRATION_KEYS = "sources, samples, length, seed, default_system_share, objective, curvature_tokens, background"
SOURCE_KEYS = "bundled, dataset, path, generated, openings, config, split, revision, field, kind, weight"
AWQ_KEYS = "name, gates, keep, format, bits, group_size, zero_point, damping, solver, scale_search, sweeps, transform, ratios, propagate"


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
        # a key of earlier versions
        (
            "format: awq",
            "format: awq\n    rounding: rtn",
            f"16:5: artifacts[1].rounding: is called solver now; allowed: {AWQ_KEYS}; did you mean 'solver'?",
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
            "6:7: calibration.sources[0]: needs one origin, got none; allowed: exactly one of bundled, dataset, path, generated",
        ),
        (
            "- bundled: docs-en",
            "- {bundled: docs-en, path: a.txt}",
            "6:7: calibration.sources[0]: needs one origin, got bundled and path; allowed: exactly one of bundled, dataset, path, generated",
        ),
        (
            "- bundled: docs-en",
            "- {bundled: docs-en, generated: true}",
            "6:7: calibration.sources[0]: needs one origin, got bundled and generated; allowed: exactly one of bundled, dataset, path, generated",
        ),
        (
            "- bundled: docs-en",
            "- {bundled: docs-en, openings: a.txt}",
            '6:36: calibration.sources[0].openings: belongs to `generated: true`, got "a.txt"; allowed: null',
        ),
        (
            "- bundled: docs-en",
            "- {generated: true, openings: a.pdf}",
            '6:35: calibration.sources[0].openings: not a .jsonl or .txt file, got "a.pdf"; allowed: one of these',
        ),
        (
            "- bundled: docs-en",
            "- {generated: true, openings: a.txt, field: x}",
            '6:49: calibration.sources[0].field: only openings in a .jsonl file have columns, got "x"; allowed: null',
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
        (
            "type: q4_k_m",
            "type: q4_k_m\n    size: 4GB",
            "16:5: artifacts[2]: needs a type or a size, got type and size; allowed: exactly one of type, size, bits_per_weight",
        ),
        (
            "type: q4_k_m",
            "imatrix: true",
            "16:5: artifacts[2]: needs a type or a size, got none; allowed: exactly one of type, size, bits_per_weight",
        ),
        (
            "type: q4_k_m",
            "size: 4.4 gigabytes",
            '18:11: artifacts[2].size: not a size, got "4.4 gigabytes"; allowed: a number and one of B, KB, MB, GB, TB, KiB, MiB, GiB, TiB',
        ),
        (
            "type: q4_k_m",
            "type: q4_k_m\n    types: {output: q4_k_m}",
            f"19:21: artifacts[2].types.output: not a type of a tensor, got \"q4_k_m\"; allowed: {', '.join(TENSOR_TYPES)}; did you mean 'q4_k'?",
        ),
        (
            "type: q4_k_m",
            'size: 4GB\n    types: {output: [q8_0, 6], "*": []}',
            [
                f"19:21: artifacts[2].types.output: not a type of a tensor, got 6; allowed: {', '.join(TENSOR_TYPES)}",
                f'19:37: artifacts[2].types."*": not a type of a tensor, got a list; allowed: {", ".join(TENSOR_TYPES)}',
            ],
        ),
        (
            "type: q4_k_m",
            "type: q4_k_m\n    types: {output: [q8_0, q6_k]}",
            "19:21: artifacts[2].types.output: a list is what a size chooses from, and `type` is given; allowed: one type",
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
    lines = line if isinstance(line, list) else [line]
    assert problems(changed(old, new)) == [f"r.yaml:{one}" for one in lines]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("type: q4_k_m", "size: 4.4GB"),
        ("type: q4_k_m", 'bits_per_weight: 4.85\n    types: {"blk.*.attn_v": [q6_k, q8_0], output: q8_0}'),
        ("type: q4_k_m", "type: q4_k_m\n    types: {output: q8_0}"),
        ("docs-en", '"None"'),
        ("windows: 8", "text: bundled:None"),
        ("format: awq", "format: awq\n    solver: rtn\n    damping: 0.5"),
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


@pytest.mark.parametrize("name", ["lock", "lock-1", "threads.json", "joined", "replaced", "four.journal", "moments-0"])
def test_names_of_what_a_build_keeps_are_no_names_of_artifacts(name):
    (line,) = problems(changed("name: four", f"name: {name}"))
    assert "artifacts[0].name: a build keeps a file of that name" in line


def test_long_values_are_cut():
    (line,) = problems(changed("bits: 4", f"bits: {'x' * 5000}"))
    assert line == f'r.yaml:12:11: artifacts[0].bits: wrong type, got "{"x" * 75} ...; allowed: 4, 8'
    (line,) = problems(changed("checks:", "x" * 900 + ":"))
    assert line == f'r.yaml:19:1: "{"x" * 75} ...: unknown key; allowed: {RECIPE_KEYS}'


def test_a_flood_of_problems_is_cut():
    lines = problems(GOOD + "".join(f"unknown{index}: 1\n" for index in range(250)))
    assert len(lines) == 101
    assert lines[-1] == "r.yaml: and 150 more problems"
