"""What an entry of a recipe says of the artifact it asks for, in the words that hold for every format."""

import pytest

from qquant import recipe
from qquant.plan.memory import build_memory
from qquant.source.checkpoint import Checkpoint

HEAD = "version: 1\nname: t\ncalibration: {sources: [{bundled: books-en}]}\nartifacts: [{name: a, %s}]\n"
SAID = {  # fields -> kind, group, feedback, own_stream, fold_points, eight_bit
    "format: gptq, bits: 4": ("int4", 128, True, True, 0, False),
    "format: gptq, bits: 8, group_size: -1": ("int8", 1, True, True, 0, True),
    "format: gptq, bits: 4, solver: rtn": ("int4", 128, False, False, 0, False),
    "format: gptq, bits: 4, transform: awq, ratios: 7": ("int4", 128, True, True, 7, False),
    "format: gptq, bits: 4, propagate: false": ("int4", 128, True, False, 0, False),
    "format: awq, group_size: 32": ("int4", 32, True, True, 20, False),
    "format: awq, transform: none": ("int4", 128, True, True, 0, False),
    "format: gguf, type: q4_k_m": ("q4_k_m", 256, False, False, 0, False),
    "format: gguf, type: q8_0": ("q8_0", 32, False, False, 0, True),
    "format: gguf, type: iq4_xs, solver: gptq": ("iq4_xs", 256, True, False, 0, False),
    "format: gguf, type: q4_0, solver: gptq, propagate: true": ("q4_0", 32, True, True, 0, False),
    "format: gguf, type: bf16": ("bf16", 32, False, False, 0, True),
}


def entry(fields):
    return recipe.parse(HEAD % fields).artifacts[0]


@pytest.mark.parametrize("fields", SAID)
def test_an_entry_says_what_its_artifact_wants(fields):
    spec = entry(fields)
    said = spec.kind, spec.group, spec.feedback, spec.own_stream, spec.fold_points, spec.eight_bit
    assert said == SAID[fields]
    assert spec.transforms == (spec.fold_points > 0)


def test_no_memory_is_planned_for_a_stream_that_is_not_walked(demo):
    """`propagate` is true by default and idle with `solver: rtn`."""
    checkpoint = Checkpoint.open(demo)
    asked, declined, walked = (
        build_memory(recipe.parse(HEAD % fields), checkpoint).device
        for fields in (
            "format: gptq, bits: 8, solver: rtn",
            "format: gptq, bits: 8, solver: rtn, propagate: false",
            "format: gptq, bits: 8",
        )
    )
    assert asked == declined < walked
