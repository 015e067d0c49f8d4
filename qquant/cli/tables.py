"""The table of a report, for the width at hand: every number whole, or its column left out.

110 and more    the columns of report.md
less            megabytes, short titles, no perplexity: the ratio beside it says the same; 80 columns hold it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from qquant.report.escape import in_line
from qquant.report.record import COLUMNS

if TYPE_CHECKING:
    from qquant.report.record import Report

WIDE = 130  # columns of a terminal that hold the whole table
SHORT = ("artifact", "MB", "bits", "ratio", "KL", "top-1", "verdict")
COLOURS = {"pass": "green", "waived": "yellow", "inconclusive": "bold yellow", "fail": "bold red"}


def table_of(report: Report, width: int) -> Table:
    """One row per artifact below the 16-bit model; texts of the report are text, whatever marks they hold."""
    wide = width >= WIDE
    table = Table(
        title=Text(in_line(f"{report.model} · {report.recipe}")), box=box.HEAVY_HEAD if wide else box.SIMPLE_HEAD
    )
    for column in COLUMNS if wide else SHORT:
        left = column in ("artifact", "verdict")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "artifact", overflow="fold")
    for row in report.rows() if wide else _short(report):
        table.add_row(*map(Text, map(in_line, row[:-1])), Text(row[-1], COLOURS.get(row[-1], "")))
    return table


def _short(report: Report) -> Sequence[tuple[str, ...]]:
    """The rows for a narrow terminal."""
    first = ("16 bit", "", f"{report.baseline_bits:.2f}", "1", "0", "100 %", "")
    return [first] + [
        (
            artifact.name,
            f"{artifact.size / 1e6:,.1f}",
            f"{artifact.bits_per_weight:.2f}",
            f"{artifact.perplexity_ratio:.4f}",
            f"{artifact.kl_divergence:.5f}",
            f"{100 * artifact.top1_agreement:.2f} %",
            artifact.verdict.outcome,
        )
        for artifact in report.artifacts
    ]
