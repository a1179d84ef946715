"""Ctrl-C: one line that says what is kept and how to go on, and the exit code. Imports typer only when needed.

A command with more to say than the usual line raises KeyboardInterrupt again, with its own text.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
USUAL = "stopped; no file is half-written, and what was not yet written is lost"


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Delay Ctrl-C until the body has ended. A process started in it inherits SIGINT blocked. For the main thread."""
    came: list[int] = []
    # the mask is this thread's: a thread that a library started may still take the signal
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Turn Ctrl-C into a line on stderr and the exit code."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        import typer

        typer.echo(str(stopped) or USUAL, err=True)
        raise typer.Exit(INTERRUPTED) from None
