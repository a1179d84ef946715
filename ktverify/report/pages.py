"""One run, many views: Markdown, HTML with its picture inside, TSV, the console.

Comes in: a `View`: text that is ready to be shown. Goes out: files named after the run's kind, whole or not at all.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from ktverify.bench.tables import Grid, grid_markdown
from ktverify.system.clock import PERCENTILES, Statistics
from ktverify.system.files import write_whole

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class View:
    """name: of the files, without ending; verdict: one line that stands first; rows: of the TSV, a dict each, with the
    same keys; picture: a PNG."""

    name: str
    verdict: str
    facts: Sequence[tuple[str, str]]
    grids: Sequence[Grid]
    rows: Sequence[dict[str, object]]
    picture: bytes | None = None


def statistics_row(values: Statistics) -> dict[str, object]:
    """The columns that every TSV has for a row of times."""
    row: dict[str, object] = {name: getattr(values, name) for name in ("count", "mean", "std", "median", "min", "max")}
    return row | {f"p{share}": values.percentiles[share] for share in PERCENTILES}


def write(view: View, directory: Path) -> list[str]:
    """Write NAME.md, NAME.html, NAME.tsv and NAME.png; returns the names of what was written."""
    found: dict[str, str | bytes] = {
        "md": markdown(view),
        "html": page(view),
        "tsv": tsv(view.rows),
        **({"png": view.picture} if view.picture is not None else {}),
    }
    for ending, content in found.items():
        write_whole(directory / f"{view.name}.{ending}", content)
    return [f"{view.name}.{ending}" for ending in found]


def conclude(view: View, lines: Sequence[BaseModel], journal: Path, as_json: bool, extra: Sequence[str] = ()) -> None:
    """Write the views beside the run's lines, then print them, or the lines. extra: names of files already written."""
    # the files first: a terminal or a pipe may be gone by now
    names = [journal.name, *write(view, journal.parent), *extra]
    if not as_json:
        show(view, names, journal.parent)
        return
    for line in lines:
        print(line.model_dump_json())


def show(view: View, names: Sequence[str], directory: Path) -> None:
    """On the console: the verdict, the tables, the facts, the files."""
    from ktverify.bench.console import print_grid
    from ktverify.report.console import make_console, print_pairs

    console = make_console()
    console.print(view.verdict, style="bold")
    for grid in view.grids:
        console.print()
        print_grid(console, grid)
    console.print()
    print_pairs(console, list(view.facts))
    for name in names:
        print(directory / name)


def markdown(view: View) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in view.facts)
    pictures = [f"![{view.name}]({view.name}.png)"] if view.picture is not None else []
    parts = [f"# {view.name.capitalize()}", view.verdict, facts, *pictures, *map(grid_markdown, view.grids)]
    return "\n\n".join(parts) + "\n"


def page(view: View) -> str:
    """The page as text; the picture is in it, and its content policy forbids the browser to load anything."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    picture = base64.b64encode(view.picture).decode("ascii") if view.picture is not None else ""
    return environment.get_template("view.html.j2").render(view=view, picture=picture)


def tsv(rows: Sequence[dict[str, object]]) -> str:
    """A heading and a line a row, tabs between."""
    if not rows:
        return ""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    return buffer.getvalue()
