"""A recipe that is right, and what is said about one that is not."""

import pytest

from qquant import recipe
from qquant.disk.digest import sha256_of_data
from qquant.errors import UsageError

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


def fingerprint(made):
    """The sha256 of all that a recipe says, as builds know their work by."""
    return sha256_of_data(made.model_dump(mode="json"))
