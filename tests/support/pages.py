"""Reads pages back: the cells of the tables of HTML and Markdown."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """The cells of every table, by the table's headings; all attributes; all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._cell: list[str] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell).strip())
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None:
            self._cell.append(data)

    def rows(self, *headings: str) -> list[dict[str, str]]:
        """Rows of the last table that has these headings."""
        for table in reversed(self.tables):
            if set(headings) <= set(table[0]):
                return [dict(zip(table[0], row, strict=True)) for row in table[1:]]
        raise AssertionError(f"no table with {headings}")


def markdown_rows(text: str, heading: str) -> list[dict[str, str]]:
    """Rows of the Markdown table whose head has the cell `heading`."""
    found: list[list[str]] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
        if found and not cells:
            break
        if cells and (found or heading in cells):
            found.append(cells)
    return [dict(zip(found[0], row, strict=True)) for row in found[2:]]
