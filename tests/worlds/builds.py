"""Builds of small artifacts: recipes by the names of their artifacts, and what a build leaves behind."""

import json

import torch

from qquant import recipe
from qquant.progress import Quiet

quiet = Quiet()
CPU = torch.device("cpu")
HEAD = """
version: 1
name: test
calibration:
  sources: [{bundled: books-en}]
  samples: 6
  length: 48
  default_system_share: 0
checks: {text: "bundled:wikitext-2-test", windows: 3, length: 64}
artifacts:
"""
BASE = recipe.parse(  # which commands change, and plans are made of
    "version: 1\nname: small\ncalibration: {sources: [{bundled: books-en}], samples: 2, length: 32}\n"
    "checks: {windows: 2, length: 32}\nartifacts: [{name: gptq, format: gptq, bits: 4, group_size: 32}]\n"
)
# Too little text is read to decide a gate, so none is asked.
ARTIFACTS = {
    "gptq-int4": "{name: gptq-int4, format: gptq, bits: 4, group_size: 32, gates: {defaults: false}}",
    "gptq-128": "{name: gptq-128, format: gptq, bits: 4}",
    "gptq-int8": "{name: gptq-int8, format: gptq, bits: 8, group_size: 64, gates: {defaults: false}}",
    "gptq-row": "{name: gptq-row, format: gptq, bits: 8, group_size: -1, scale_search: minmax, gates: {defaults: false}}",
    "gptq-shared": "{name: gptq-shared, format: gptq, bits: 4, group_size: 32, propagate: false, gates: {defaults: false}}",
    "gptq-own": "{name: gptq-own, format: gptq, bits: 4, group_size: 32, propagate: true, gates: {defaults: false}}",
    "gptq-once": "{name: gptq-once, format: gptq, bits: 4, group_size: 32, propagate: false, sweeps: 0, gates: {defaults: false}}",
    "rtn": "{name: rtn, format: gptq, bits: 4, group_size: 32, solver: rtn, scale_search: minmax, gates: {defaults: false}}",
    "awq": "{name: awq, format: awq, group_size: 64, ratios: 4, gates: {defaults: false}}",
    "awq-unscaled": "{name: awq, format: awq, transform: none, group_size: 64, ratios: 4, gates: {defaults: false}}",
    "gguf-q8_0": "{name: gguf-q8_0, format: gguf, type: q8_0, gates: {defaults: false}}",
    "gguf-q4_0": "{name: gguf-q4_0, format: gguf, type: q4_0, gates: {defaults: false}}",
    "gguf-f16": "{name: gguf-f16, format: gguf, type: f16, gates: {defaults: false}}",
}


def load_recipe(tmp_path, names, text=HEAD):
    path = tmp_path / "test.yaml"
    path.write_text(text + "".join(f"  - {ARTIFACTS[name]}\n" for name in names))
    return recipe.load(str(path))


def contents(folder):
    """Every file below `folder` and its bytes, but for seconds, reports, and manifests, which hold the whole recipe."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(("report.", "timings.", "qquant-manifest"))
    }


def seconds(folder):
    """What took how long, by artifact."""
    return json.loads((folder / "timings.json").read_text())["artifacts"]
