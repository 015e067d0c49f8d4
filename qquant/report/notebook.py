"""A report at a prompt, in a notebook, and as a frame of pandas: three more views of the record."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from qquant.errors import EnvironmentMissingError
from qquant.report.facts import facts
from qquant.report.record import COLUMNS, TITLES

if TYPE_CHECKING:
    import pandas

    from qquant.report.record import Report

FIELDS = ("size", "bits_per_weight", "perplexity", "perplexity_ratio", "kl_divergence", "kl_99", "top1_agreement")


def as_text(report: Report) -> str:
    """The verdict and the table in lines."""
    rows = [COLUMNS, *report.rows()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{report.model}: {TITLES[report.outcome]}", *lines])


def as_html(report: Report) -> str:
    """The verdict, what it costs, the table and the warnings; texts of the report are text, whatever marks they hold."""
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in report.rows())
    short = "".join(f"<li><strong>{fact.question}</strong> {html.escape(fact.answer)}</li>" for fact in facts(report))
    notes = "".join(f"<li>{html.escape(warning)}</li>" for warning in report.warnings)
    title = f"{html.escape(report.model)}: {TITLES[report.outcome]}"
    warnings = f"<ul>{notes}</ul>" if notes else ""
    return f"<p>{title}</p><ul>{short}</ul><table><tr>{head}</tr>{body}</table>{warnings}"


def as_frame(report: Report) -> pandas.DataFrame:
    """One row per artifact, by name, the 16-bit baseline first; numbers as they were measured, sizes in bytes.

    Raises:
        EnvironmentMissingError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise EnvironmentMissingError("a frame needs pandas: pip install pandas") from None
    first = (None, report.baseline_bits, report.baseline_perplexity, 1.0, 0.0, 0.0, 1.0, "")
    rows = [(*(getattr(row, field) for field in FIELDS), row.verdict.outcome) for row in report.artifacts]
    index = pandas.Index(["16 bit", *(row.name for row in report.artifacts)], name="artifact")
    return pandas.DataFrame([first, *rows], index=index, columns=[*FIELDS, "verdict"])
