"""The console's view of a run: the verdict first, then what did not pass, then the overview.

Comes in: a run. Goes out: text on a rich console. Everything longer stands in the run's files, whose paths are printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ktverify.report import tables
from ktverify.report.problems import group_text, problems
from ktverify.runs.record import AccuracyRecord
from ktverify.runs.store import Run

STYLES = {
    "PASS": "green",
    "FAIL": "bold red",
    "CRASH": "bold red",
    "TIMEOUT": "bold red",
    "OOM": "bold red",
    "MISTRUSTED": "yellow",
    "SKIP": "dim",
    "UNSUPPORTED": "dim",
}
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


def print_run(run: Run, console: Console | None = None, *, header: bool = True) -> bool:
    """Print the summary of `run`; returns whether it passed."""
    console = console or make_console()
    passed, sentence = tables.run_verdict(run)
    word = "PASS" if passed else "FAIL"
    console.print(Text.assemble((f"{word} ", STYLES[word]), (sentence, "bold")))
    if header:
        console.print()
        print_pairs(console, tables.head_lines(run))
    found = problems(run)
    if found:
        console.print()
        for problem in found[:PROBLEMS_SHOWN]:
            console.print(Text(group_text(problem, LINES_OF_A_PROBLEM)))
        if len(found) > PROBLEMS_SHOWN:
            console.print(Text(f"and {len(found) - PROBLEMS_SHOWN} more, see accuracy.md"))
    overview = tables.overview(run.records)
    if overview:
        console.print()
        console.print(_table(tables.overview_columns(overview), overview))
    strict = tables.strict_rows(run.records)
    if strict:
        console.print()
        console.print(_table(tables.STRICT_COLUMNS, strict))
    if run.latency:
        console.print()
        wanted = ("case", "what", "ISA", "TP", "mean ± std ms", "median ms", "tokens/s", "GFLOP/s", "GB/s")
        columns = [column for column in tables.LATENCY_COLUMNS if column.heading in wanted]
        console.print(_table(columns, tables.latency_rows(run)))
    console.print()
    for name in ("report.html", "accuracy.md", "latency.md"):
        if (run.directory / name).is_file():
            console.print(Text(str(run.directory / name), style="dim"))
    return passed


def print_accuracy(records: Sequence[AccuracyRecord], console: Console | None = None) -> None:
    """Print the accuracy table of a few records, in the order given."""
    console = console or make_console()
    wanted = ["verdict", "tensor", "ISA", "TP", "mean-rel", "rel-L2", "cosine", "max abs", "gate", "budget", "used"]
    for heading, values in (("family", {r.family for r in records}), ("case", {r.case for r in records})):
        if len(values) > 1:
            wanted.append(heading)
    console.print(_table([c for c in tables.ACCURACY_COLUMNS if c.heading in wanted], records))


def print_pairs(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    """Print (name, value) lines, values under one another."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        console.print(Text.assemble((name.ljust(width + 2), "dim"), value))


def _table(columns: Sequence[tables.Column], rows: Iterable[object]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.heading, justify="right" if column.numeric else "left", no_wrap=True)
    for row in rows:
        cells = []
        for column in columns:
            text = column.cell(row)
            style = STYLES.get(text, "") if column.heading == "verdict" else ""
            cells.append(Text(text, style=style))
        table.add_row(*cells)
    return table
