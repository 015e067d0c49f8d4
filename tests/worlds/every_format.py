"""An artifact of every format that the program has, and of a toy one: what tests are parametrised over."""

from dataclasses import dataclass

from qquant import recipe
from qquant.formats import FORMATS
from tests.worlds import toy_format

HEAD = """
version: 1
name: every
calibration: {sources: [{bundled: books-en}], samples: 3, length: 48, default_system_share: 0, objective: output}
checks: {text: "TEXT", windows: 2, length: 64}
artifacts:
"""


@dataclass(frozen=True)
class Sample:
    """What to ask of a format on the small checkpoint, and on a checkpoint whose shape does not suit it."""

    entry: str  # fields besides name, format and gates
    odd: dict[str, int]  # changes of config.json
    said: (
        str | None
    )  # of the shape then, by an error, or as a fallback where the format has one (a regular expression); None: nothing, any shape fits


SAMPLES = {
    "gptq": Sample(
        "bits: 4, group_size: 32",
        {"intermediate_size": 144},
        r"mlp\.gate_proj \[144, 64\] needs rows and columns divisible by 32 .* No group_size fits",
    ),
    "awq": Sample(
        "group_size: 32, ratios: 3",
        {"intermediate_size": 144},
        r"mlp\.down_proj \[64, 144\] needs rows divisible by 8 and columns by the group size 32\. No group_size fits",
    ),
    "gguf": Sample(
        "type: q4_0, solver: gptq, sweeps: 1",
        {"intermediate_size": 144},
        r"blk\.0\.ffn_down\.weight: q4_0 -> f16",
    ),
    "toy": Sample(
        "group_size: 16",
        {"intermediate_size": 136},
        r"mlp\.down_proj \[64, 136\] needs columns divisible by 16\. No group_size fits",
    ),
}
EVERY = [*FORMATS, toy_format.NAME]


def recipe_of(name, text, entry=None):
    """A recipe of one artifact of a format, checked on the file `text` and held to no gate: too little is read to decide one."""
    fields = f"name: one, format: {name}, {entry or SAMPLES[name].entry}, gates: {{defaults: false}}"
    return recipe.parse(f"{HEAD.replace('TEXT', str(text))}  - {{{fields}}}\n")
