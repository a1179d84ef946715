"""The one model of a table, and its Markdown, TSV and CSV. The console and the HTML pages print it as well."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ktverify.runs.record import VERDICT_ORDER


@dataclass(frozen=True)
class Grid:
    """A table: title, notes below it, headings and rows of text.

    left: headings of the columns that are text and aligned left, as the first column always is; the others are numbers.
    """

    title: str
    notes: tuple[str, ...]
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: Sequence[str] = ()

    @classmethod
    def of(
        cls, rows: Sequence[Mapping[str, str]], title: str = "", *, notes: Sequence[str] = (), left: Sequence[str] = ()
    ) -> Grid:
        """A grid of rows that each map the same headings to cells."""
        headings = tuple(rows[0]) if rows else ()
        return cls(title, tuple(notes), headings, tuple(tuple(row.values()) for row in rows), left)

    def only(self, *headings: str) -> Grid:
        """The columns with these headings, in the grid's order."""
        places = [place for place, heading in enumerate(self.headings) if heading in headings]
        rows = tuple(tuple(row[place] for place in places) for row in self.rows)
        return replace(self, headings=tuple(self.headings[place] for place in places), rows=rows)

    def is_text(self, place: int) -> bool:
        return place == 0 or self.headings[place] in self.left


def note_kind(note: str) -> str:
    """How a note is coloured: a verdict it begins with, "WARNING" for disturbed times, "" for others."""
    word = note.partition(" ")[0]
    return word if word in VERDICT_ORDER else "WARNING" if note.startswith("other programs") else ""


def markdown(grid: Grid) -> str:
    """Title as a heading, notes as a list, the table."""
    title, notes = f"## {grid.title}" if grid.title else "", "\n".join(f"- {note}" for note in grid.notes)
    return "\n\n".join(filter(None, [title, notes, markdown_table(grid) if grid.rows else "nothing was measured"]))


def markdown_table(grid: Grid) -> str:
    """A GitHub table whose columns also line up as plain text. Bars within a cell are escaped: they would end it."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (grid.headings, *grid.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    texts = [grid.is_text(place) for place in range(len(widths))]
    rule = ["-" * width if text else "-" * (width - 1) + ":" for width, text in zip(widths, texts, strict=True)]
    columns = [f"{{:{'<' if text else '>'}{width}}}" for width, text in zip(widths, texts, strict=True)]
    line = f"| {' | '.join(columns)} |"
    return "\n".join(line.format(*row) for row in (cells[0], rule, *cells[1:]))


def delimited(rows: Sequence[Mapping[str, object]], delimiter: str = "\t") -> str:
    """A heading and a line per row; cells with line breaks are quoted. All rows have the same keys.

    Floats have twelve digits: all that a clock measures, without the noise of binary fractions.
    """
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{v:.12g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    return stream.getvalue()
