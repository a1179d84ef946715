"""The pipeline's timing on a terminal: progress while it runs, tables when it is done.

Comes in: records and grids. Goes out: text on rich consoles. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ktverify.bench.c2c.record import PromptRecord
from ktverify.bench.c2c.tables import figure, short
from ktverify.bench.console import print_grid
from ktverify.bench.tables import Grid
from ktverify.report.console import make_console


class Watch:
    """A bar on a terminal; a line a prompt where the output is kept."""

    def __init__(self, prompts: int, done: int) -> None:
        self.prompts, self.done = prompts, done
        self._console = make_console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
        self._progress = Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("prompts", total=prompts, completed=done)
        if done:
            self._console.print(Text(f"{done} of {prompts} are there already", style="dim"))

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, record: PromptRecord) -> None:
        self.done += 1
        self._progress.update(self._task, completed=self.done, description=short(record.prompt, 32))
        if not self._console.is_terminal:
            timing = record.timing
            text = f"{timing.num_generated_tokens} tokens, {figure(timing.total_ms)} ms"
            self._console.print(Text(f"{self.done}/{self.prompts}  id {record.id}: {text}", style="dim"))


def print_grids(grids: Sequence[Grid], written: Sequence[Path]) -> None:
    """The tables, then where the files are."""
    console = make_console()
    for grid in grids:
        print_grid(console, grid)
        console.print()
    for path in written:
        console.print(Text(str(path)))
