"""Tables for the width at hand: every number whole, or its column left out.

A column is as wide as its cells. Where that is too wide, columns go, the most dispensable one first, until the rest fits with titles, names
and sentences folded at their spaces, and names without spaces from NAME characters on. Where nothing is left to go, names are folded further.

A report has on 130 and more the columns of report.md; on less megabytes, short titles, and no perplexity: the ratio beside it says the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from qquant.cli.terminal import console
from qquant.report.escape import in_line
from qquant.report.record import COLUMNS

if TYPE_CHECKING:
    from qquant.report.record import Report

WIDE = 130  # columns of a terminal that hold the whole table of a report
NAME = 20  # characters of a word that stay together
COLOURS = {"pass": "green", "waived": "yellow", "inconclusive": "bold yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Column:
    """What a table knows of one of its columns."""

    title: str
    words: bool = (
        False  # names and sentences, from the left, which may be folded; numbers are not, and end at the right
    )
    spare: int = 0  # where it is too narrow for all, the highest goes first; 0 stays


SHORT = (
    Column("artifact", words=True),
    Column("MB", spare=1),
    Column("bits", spare=4),
    Column("ratio", spare=3),
    Column("KL"),
    Column("top-1", spare=2),
    Column("verdict", words=True),
)


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print rows to stdout, as wide as the terminal."""
    screen = console()
    screen.print(fitted(columns, rows, screen.width, title))


def fitted(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int, title: str = "") -> Table:
    """The rows as a table of at most `width` characters; texts are text, whatever marks they hold, and wherever they are folded."""
    rows = [[in_line(cell) for cell in row] for row in rows]
    needed = [_widths(column, [row[index] for row in rows]) for index, column in enumerate(columns)]
    kept = _kept(columns, [least for least, _ in needed], width)
    given = _folded(columns, {index: needed[index] for index in kept}, _room(kept, width))
    named = Text(in_line(title), no_wrap=True, overflow="ellipsis") if title else None
    table = Table(
        title=named, box=box.HEAVY_HEAD
    )  # an edge before each line: none begins as what a workflow's log takes for a command
    for index in kept:
        justify: Literal["left", "right"] = "left" if columns[index].words else "right"
        table.add_column(columns[index].title, justify=justify, overflow="fold", width=given[index])
    for row in rows:
        table.add_row(*(Text(row[index], COLOURS.get(row[index], "") if index else "") for index in kept))
    return table


def _room(kept: Sequence[int], width: int) -> int:
    """Characters that the cells of a row have: without a space on both sides of each, and the lines between them."""
    return width - 3 * len(kept) - 1


def _kept(columns: Sequence[Column], least: Sequence[int], width: int) -> list[int]:
    """The columns for which there is room."""
    kept = list(range(len(columns)))
    while sum(least[index] for index in kept) > _room(kept, width):
        spare = max(kept, key=lambda index: columns[index].spare)
        if not columns[spare].spare:
            break
        kept.remove(spare)
    return kept


def _folded(columns: Sequence[Column], needed: Mapping[int, tuple[int, int]], room: int) -> dict[int, int]:
    """Column -> its characters: those with most to give are folded at their spaces, and names further where that is not enough."""
    given = {index: most for index, (_, most) in needed.items()}
    floor = {index: least for index, (least, _) in needed.items()}
    for _ in range(sum(given.values()) - room):
        index = max(given, key=lambda index: given[index] - floor[index])
        if given[index] == floor[index]:
            floor |= {index: min(floor[index], NAME // 4) for index in given if columns[index].words}
            index = max(given, key=lambda index: (given[index] > floor[index], given[index]))
        given[index] -= given[index] > floor[index]
    return given


def _widths(column: Column, cells: Sequence[str]) -> tuple[int, int]:
    """Characters that a column needs at the least, and to be folded nowhere."""
    least = max(map(cell_len, column.title.split()), default=0)
    for cell in cells:
        word = max(map(cell_len, cell.split()), default=0)
        least = max(least, min(NAME, word) if column.words else cell_len(cell))
    return least, max(map(cell_len, [column.title, *cells]))


def table_of(report: Report, width: int) -> Table:
    """One row per artifact below the 16-bit model."""
    title = f"{report.model} · {report.recipe}"
    if width < WIDE:
        return fitted(SHORT, _short(report), width, title)
    return fitted(
        [Column(name, words=name in ("artifact", "verdict")) for name in COLUMNS], report.rows(), width, title
    )


def _short(report: Report) -> Sequence[tuple[str, ...]]:
    """The rows for a narrow terminal."""
    first = ("16 bit", "", f"{report.baseline_bits:.2f}", "1", "0", "100 %", "")
    return [first] + [
        (
            artifact.name,
            f"{artifact.size / 1e6:,.1f}",
            f"{artifact.bits_per_weight:.2f}",
            f"{artifact.perplexity_ratio:,.4f}",
            f"{artifact.kl_divergence:.5f}",
            f"{100 * artifact.top1_agreement:.2f} %",
            artifact.verdict.outcome,
        )
        for artifact in report.artifacts
    ]
