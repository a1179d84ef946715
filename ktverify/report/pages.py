"""The files of a run of the suites, and of a view of a timed run: Markdown, HTML, TSV, PNG; a view on the console too.

Every HTML page is complete in itself: style, pictures and scripts are in it, and its content policy forbids the browser
to load anything.
"""

from __future__ import annotations

import base64
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ktverify.report import plots, style, tables
from ktverify.report.grid import Grid, delimited, markdown, note_kind
from ktverify.report.problems import problems
from ktverify.runs.store import Run, write_records
from ktverify.system.files import install_command, write_whole
from ktverify.system.timing import PERCENTILES, Statistics

TEMPLATES = Path(__file__).with_name("templates")
# the others are folded on the page
PROBLEMS_SHOWN = 8
ACCURACY_SHOWN = 15


@dataclass(frozen=True)
class View:
    """name: of the files, without ending; verdict: the line that comes first; facts: about the run; rows: of the TSV,
    all with the same keys; picture: a PNG; warning: why its times mean little, "" if they do not."""

    name: str
    verdict: str
    facts: Sequence[tuple[str, str]]
    grids: Sequence[Grid]
    rows: Sequence[dict[str, object]]
    picture: bytes | None = None
    warning: str = ""

    @property
    def sentence(self) -> str:
        """The verdict, marked where its times mean little."""
        return f"{self.verdict} (disturbed)" if self.warning else self.verdict

    def marked(self, grids: Sequence[Grid]) -> list[Grid]:
        """The tables, each with the warning: a reader may see one of them alone."""
        return [replace(grid, notes=(self.warning, *grid.notes)) if self.warning else grid for grid in grids]


def statistics_row(values: Statistics) -> dict[str, object]:
    """The columns that every TSV has for a row of times."""
    row: dict[str, object] = {name: getattr(values, name) for name in ("count", "mean", "std", "median", "min", "max")}
    return row | {f"p{share}": values.percentiles[share] for share in PERCENTILES}


def write(view: View, directory: Path) -> list[str]:
    """Write NAME.md, NAME.html, NAME.tsv and NAME.png; returns the names of the written files."""
    found: dict[str, str | bytes] = {"md": view_markdown(view), "html": view_page(view), "tsv": delimited(view.rows)}
    if view.picture is not None:
        found["png"] = view.picture
    for ending, content in found.items():
        write_whole(directory / f"{view.name}.{ending}", content)
    return [f"{view.name}.{ending}" for ending in found]


def conclude(
    view: View,
    lines: Sequence[BaseModel],
    journal: Path,
    as_json: bool,
    extra: Sequence[str] = (),
    shown: Sequence[Grid] | None = None,
) -> None:
    """Write the view beside the run's lines (`journal`), then print it, or the lines.

    extra: names of files that are already written; shown: the tables to print (default: all).
    """
    # the files first: the terminal or the pipe may be closed by now
    names = [journal.name, *write(view, journal.parent), *extra]
    if as_json:
        for line in lines:
            print(line.model_dump_json())
        return
    from ktverify.report.console import make_console, print_grids, print_pairs

    console = make_console()
    console.print(view.sentence, style="bold")
    console.print()
    print_grids(console, view.marked(view.grids if shown is None else shown))
    print_pairs(console, list(view.facts))
    for name in names:
        print(journal.parent / name)


def view_markdown(view: View) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in view.facts)
    pictures = [f"![{view.name}]({view.name}.png)"] if view.picture is not None else []
    parts = [f"# {view.name.capitalize()}", view.sentence, facts, *pictures, *map(markdown, view.marked(view.grids))]
    return "\n\n".join(filter(None, parts)) + "\n"


def view_page(view: View) -> str:
    picture = base64.b64encode(view.picture).decode("ascii") if view.picture is not None else ""
    shown = {"verdict": view.sentence, "grids": view.marked(view.grids), "picture": picture}
    return render("base.html.j2", **vars(view) | shown)


def render(template: str, **context: object) -> str:
    """The HTML page that `template` makes of `context`: name, verdict and facts for the base, and what its own blocks
    take."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise ImportError(f"pages need jinja2: {install_command('report')}") from None
    blocks: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, **blocks)
    environment.globals |= {"colours": style, "isa_colour": style.isa_colour, "note_kind": note_kind}
    return environment.get_template(template).render({"word": "", **context})


# ---- a run of the suites


def write_run(run: Run) -> None:
    """Write records.jsonl and every page of `run` into its directory, each file whole."""
    write_records(run)
    write_whole(run.directory / "accuracy.md", tables.accuracy_markdown(run))
    write_whole(run.directory / "latency.md", tables.latency_markdown(run))
    write_whole(run.directory / "report.html", page(run))


def page(run: Run) -> str:
    """report.html as text: the verdict first, every number on demand. Plots are inline SVG; a small script filters the
    long tables. Without matplotlib there are no plots, and the page says so."""
    drawn = {"Error per tensor": plots.rel_l2_by_tensor, "How much of the budget was used": plots.budget_used}
    facts = tables.head_lines(run)
    if importlib.util.find_spec("matplotlib") is None:
        drawn, facts = {}, [*facts, ("plots", f"none without matplotlib: {install_command('report')}")]
    passed, sentence = tables.run_verdict(run)
    overview = tables.overview(run)
    return render(
        "report.html.j2",
        name=run.directory.name,
        word="PASS" if passed else "FAIL",
        verdict=sentence,
        facts=facts,
        overview=tables.overview_grid(overview),
        meters=[_meter(row.worst.used) if row.worst is not None else None for row in overview],
        problems=problems(run),
        problems_shown=PROBLEMS_SHOWN,
        plots={title: draw(run.accuracy) for title, draw in drawn.items()},
        latency_plot=plots.latency_bars(run.latency) if drawn else "",
        latency=tables.latency_grid(run.latency),
        accuracy=tables.accuracy_grid(tables.accuracy_rows(run)),
        accuracy_shown=ACCURACY_SHOWN,
        checks=tables.checks_grid(run),
        families=sorted({record.family for record in run.checks}),
    )


def _meter(used: float) -> float:
    """Width of a meter in percent; 101 beyond the budget."""
    return 101.0 if math.isnan(used) or used > 1 else round(100 * used, 1)
