"""Other tools' artifacts of a checkpoint, where somebody measured them: crosses in the chart of report.html.

A point stands beside a report only if it is of the same checkpoint, calibrated on the same tokens, and measured on the first windows of
the same tokens; how many windows is said. `recipes/demo/peers.json` holds those of the demo checkpoint, as `tests/bench/quality.py`
printed them. Left out: other people's perplexities of Qwen1.5, which are of other text; what one measures with `qquant check --out` comes
beside a release by `qquant report RELEASE MEASURED`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qquant.resources import data_dir

if TYPE_CHECKING:
    from qquant.report.record import Report


@dataclass(frozen=True)
class Peer:
    """An artifact of another tool."""

    tool: str
    made: str  # version and settings
    kind: str  # int4, q4_k_m, ...
    bytes: int  # of all files, with the tokenizer and configs of ours
    kl_divergence: float
    windows: int

    @property
    def name(self) -> str:
        """Its name in a picture."""
        return f"{self.tool} {self.kind}"


def known(report: Report) -> list[Peer]:
    """What is known of the checkpoint, calibration and text of `report`."""
    inputs, text = report.conditions.inputs, report.conditions.text
    asked = (inputs.get("checkpoint"), inputs.get("calibration"), text.tokens_sha256, text.length)
    peers: list[Peer] = []
    for path in sorted(data_dir("recipes").glob("*/peers.json")):
        content = json.loads(path.read_text("utf-8"))
        if asked == tuple(content[key] for key in ("checkpoint", "calibration", "tokens", "length")):
            peers += [Peer(**point) for point in content["points"]]
    return peers
