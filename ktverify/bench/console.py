"""The bench on a terminal: progress while it measures, tables when a shape is done.

Comes in: what measure.py tells, and summaries. Goes out: text on rich consoles.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ktverify.bench import tables
from ktverify.bench.summary import ShapeSummary
from ktverify.report.console import STYLES


class Watch:
    """Shows what the bench is at, on stderr: a bar on a terminal, a line per stage where the output is kept."""

    def __init__(self, console: Console, shapes: int) -> None:
        self.console = console
        self.shapes = shapes
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[stage]}", style="dim"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None

    def begin(self, text: str, steps: int) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(text, total=steps or None, stage="")
        if not self.console.is_terminal:
            self.console.print(Text(text, style="dim"))

    def say(self, text: str) -> None:
        if self.task is not None:
            self.progress.update(self.task, stage=text)

    def advance(self) -> None:
        if self.task is not None:
            self.progress.advance(self.task)


def print_grid(console: Console, grid: tables.Grid) -> None:
    """Title, notes, table; verdicts in their colours."""
    console.print(Text(grid.title, style="bold"))
    for note in grid.notes:
        console.print(Text(note, style="yellow" if note.startswith("other programs") else "dim"))
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for place, heading in enumerate(grid.headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    console.print(table)


def print_shape(console: Console, summary: ShapeSummary, *, stages: bool = False) -> None:
    """The table of one shape, and what kept engines out of it; with `stages`, where the native engine's time goes."""
    print_grid(console, tables.shape_grid(summary))
    for line in tables.problems(summary):
        word = line.partition(" ")[0]
        console.print(Text.assemble((word, STYLES[word]), line.removeprefix(word)))
    console.print()
    for grid in tables.stage_grids(summary) if stages else ():
        print_grid(console, grid)
        console.print()


def print_overview(console: Console, summaries: list[ShapeSummary]) -> None:
    """Both overviews, where there is more than one table to look over."""
    for what in ("forward", "backward"):
        print_grid(console, tables.overview_grid(summaries, what))
        console.print()
    console.print(Text(tables.LEGEND, style="dim"))
