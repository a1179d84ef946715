"""Show on stderr what a command does and for how long. Light: rich is imported where it is shown."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

# seconds after which a command that writes to no terminal says for the first, second, … time what it does
_AFTER = (10.0, 30.0, 60.0)


@contextlib.contextmanager
def progress(text: str, *, lines: bool = False) -> Iterator[Callable[[str], None]]:
    """Show `text` and the seconds while the body runs; the body says what it does next by calling what it gets.

    On a terminal: one line, overwritten, and gone at the end. Elsewhere: nothing for the first ten seconds, then a line
    after 10, 30, 60 s and every further minute; so also with `lines`, where the body writes lines of its own.
    """
    from ktverify.report.console import make_console

    console = make_console(stderr=True)
    if console.is_terminal and not lines:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as shown:
            task = shown.add_task(text, total=None)
            yield lambda more: shown.update(task, description=f"{text}: {more}" if more else text)
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

    def say(self, more: str) -> None:
        self.more = more

    def write(self) -> None:
        started = time.monotonic()
        due = list(_AFTER)
        while not self.over.wait(max(0.0, started + due[0] - time.monotonic())):
            seconds = due.pop(0)
            due = due or [seconds + 60.0]
            print(f"{self.text}{self.more and f': {self.more}'}, {seconds:.0f} s", file=sys.stderr, flush=True)
