"""The console: tables, a run of the suites (verdict, what did not pass, overview), progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ktverify.report import tables
from ktverify.report.grid import Grid, note_kind
from ktverify.report.problems import group_text, problems
from ktverify.report.style import CONSOLE_STYLES
from ktverify.runs.record import AccuracyRecord
from ktverify.runs.store import Run

PROBLEMS_SHOWN = 10
LINES_OF_A_PROBLEM = 14
# columns: what the widest table of numbers needs; and more than any line has
NARROWEST = 160
UNBOUNDED = 1000


def make_console(*, stderr: bool = False) -> Console:
    """A console that never cuts a number: a narrow terminal wraps lines, a file or a pipe gets them whole."""
    # no markup: cases and indices have brackets of their own
    console = Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False)
    width = max(console.width, NARROWEST) if console.is_terminal else UNBOUNDED
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, width=width)


def print_grid(console: Console, grid: Grid) -> None:
    """Print title, notes and table; verdicts in their colours."""
    if grid.title:
        console.print(Text(grid.title, style="bold"))
    for note in grid.notes:
        console.print(Text(note, style=CONSOLE_STYLES.get(note_kind(note), "dim")))
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for place, heading in enumerate(grid.headings):
        text = grid.is_text(place)
        table.add_column(heading, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in grid.rows:
        table.add_row(*(Text(cell, style=CONSOLE_STYLES.get(cell, "")) for cell in row))
    console.print(table)


def print_grids(console: Console, grids: Iterable[Grid], written: Iterable[Path] = ()) -> None:
    """Print tables, each with an empty line after it, then the paths of the files that were written."""
    for grid in grids:
        print_grid(console, grid)
        console.print()
    for path in written:
        console.print(Text(str(path)))


def print_pairs(console: Console, pairs: Sequence[tuple[str, str]]) -> None:
    """Print (name, value) lines, values under one another."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        console.print(Text.assemble((name.ljust(width + 2), "dim"), value))


def print_run(run: Run, console: Console | None = None, *, header: bool = True) -> bool:
    """Print the summary of `run`; returns whether it passed."""
    console = console or make_console()
    passed, sentence = tables.run_verdict(run)
    word = "PASS" if passed else "FAIL"
    console.print(Text.assemble((f"{word} ", CONSOLE_STYLES[word]), (sentence, "bold")))
    if header:
        console.print()
        print_pairs(console, tables.head_lines(run))
    console.print()
    found = problems(run)
    for problem in found[:PROBLEMS_SHOWN]:
        console.print(Text(group_text(problem, LINES_OF_A_PROBLEM)))
    if len(found) > PROBLEMS_SHOWN:
        console.print(Text(f"and {len(found) - PROBLEMS_SHOWN} more, see accuracy.md"))
    if found:
        console.print()
    times = tables.latency_grid(run.latency).only(
        "case", "what", "ISA", "TP", "min ms", "p10 ms", "median ms", "tokens/s", "GFLOP/s", "GB/s"
    )
    for grid in (tables.overview_grid(tables.overview(run)), tables.strict_grid(run.accuracy), times):
        if grid.rows:
            print_grids(console, [replace(grid, title="", notes=())])
    for name in ("report.html", "accuracy.md", "latency.md"):
        if (run.directory / name).is_file():
            console.print(Text(str(run.directory / name), style="dim"))
    return passed


def print_accuracy(records: Sequence[AccuracyRecord], console: Console | None = None) -> None:
    """Print the accuracy table of a few records, in the order given. A column that is the same for all is left out."""
    same = [name for name in ("family", "case") if len({getattr(record, name) for record in records}) < 2]
    grid = tables.accuracy_grid(records)
    wanted = [heading for heading in grid.headings if heading not in same]
    print_grid(console or make_console(), replace(grid.only(*wanted), title="", notes=()))


class ProgressBar:
    """A bar on a terminal, on stderr; a line per step where the output is kept."""

    def __init__(self) -> None:
        self._console = make_console(stderr=True)
        self._progress = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=30),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[stage]}", style="dim"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: progress.TaskID | None = None

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def begin(self, text: str, steps: int, done: int = 0, line: str | None = None) -> None:
        """Start a bar of `steps` steps, of which `done` are already done; line: printed instead of `text` where the
        output is kept, nothing for ""."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(text, total=steps or None, completed=done, stage="")
        self._line(text if line is None else line)

    def say(self, text: str) -> None:
        """Show what is being done now, on a terminal."""
        if self._task is not None:
            self._progress.update(self._task, stage=text)

    def advance(self, line: str = "") -> None:
        """One step is done; line: what to print of it where the output is kept."""
        if self._task is not None:
            self._progress.advance(self._task)
        self._line(line)

    def _line(self, text: str) -> None:
        if text and not self._console.is_terminal:
            self._console.print(Text(text, style="dim"))
