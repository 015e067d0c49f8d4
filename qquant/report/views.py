"""A report as the files of an output folder: report.md, report.html and the record, report.json."""

from __future__ import annotations

from pathlib import Path

from qquant.disk.writes import write_synced
from qquant.report import html
from qquant.report.record import Report


def write(report: Report, out: Path) -> None:
    """Write the views first, the record last: where there is a report.json, everything else is there."""
    write_synced(out / "report.md", report.to_markdown().encode())
    write_synced(out / "report.html", html.render(report).encode())
    write_synced(out / "report.json", report.to_json().encode())
