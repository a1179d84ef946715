"""Show on stderr what a command does and for how long. Light: rich is imported where it is shown."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol

# seconds after which a command that writes to no terminal says for the first, second, … time what it does
_AFTER = (10.0, 30.0, 60.0)


class Say(Protocol):
    """What the body of `progress` calls: what it does now, and how many of `total` steps are done."""

    def __call__(self, more: str, done: float | None = None) -> None: ...


@contextlib.contextmanager
def progress(text: str, *, total: float | None = None, lines: bool = False) -> Iterator[Say]:
    """Show `text` and the seconds while the body runs; the body says what it does next by calling what it gets.

    On a terminal: one line, overwritten, and gone at the end; with `total`, the number of steps, also a bar and the
    time that is left. Elsewhere: nothing for the first ten seconds, then a line after 10, 30, 60 s and every further
    minute; so also with `lines`, where the body writes lines of its own.
    """
    from ktverify.report.console import make_console

    console = make_console(stderr=True)
    if console.is_terminal and not lines:
        from rich import progress as bars

        said = bars.TextColumn("{task.description}", markup=False)
        bar = (bars.BarColumn(), bars.TimeElapsedColumn(), bars.TimeRemainingColumn())
        columns = (bars.SpinnerColumn(), said, *(bar if total else bar[1:2]))
        with bars.Progress(*columns, console=console, transient=True) as shown:
            task = shown.add_task(text, total=total)
            yield lambda more, done=None: shown.update(
                task, description=f"{text}: {more}" if more else text, completed=done
            )
        return
    shown_lines = _Lines(text)
    thread = threading.Thread(target=shown_lines.write, daemon=True)
    thread.start()
    try:
        yield shown_lines.say
    finally:
        shown_lines.over.set()
        thread.join()


class _Lines:
    """Lines for a stderr that is no terminal."""

    def __init__(self, text: str) -> None:
        self.text, self.more = text, ""
        self.over = threading.Event()

    def say(self, more: str, done: float | None = None) -> None:
        self.more = more

    def write(self) -> None:
        started = time.monotonic()
        due = list(_AFTER)
        while not self.over.wait(max(0.0, started + due[0] - time.monotonic())):
            seconds = due.pop(0)
            due = due or [seconds + 60.0]
            print(f"{self.text}{self.more and f': {self.more}'}, {seconds:.0f} s", file=sys.stderr, flush=True)
