"""Ctrl-C: one line that says what is kept and how to go on, and the exit code. Imports typer only when needed.

A command with more to say than the usual line raises KeyboardInterrupt again, with its own text.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
USUAL = "stopped; no file is half-written, and what was not yet written is lost"
NOTHING_WRITTEN = "stopped; nothing was written"


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


@contextlib.contextmanager
def nothing_written(so_far: Callable[[], str] = str) -> Iterator[None]:
    """Make Ctrl-C in the body report NOTHING_WRITTEN. For commands that write their file last, or none.

    so_far: returns what the command has found until then, as "3 of 200 runs"; "" where that is nothing.
    """
    try:
        yield
    except KeyboardInterrupt:
        done = so_far()
        raise KeyboardInterrupt(f"stopped after {done}; nothing was written" if done else NOTHING_WRITTEN) from None


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """End this process at once, with NOTHING_WRITTEN and the exit code, on Ctrl-C in the body.

    For heavy imports: a module that is being imported may swallow KeyboardInterrupt, and nothing needs cleanup yet. An
    ignored Ctrl-C stays ignored: a shell does that for the background commands of a script.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield
        return

    def end(*_: object) -> None:
        print(NOTHING_WRITTEN, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
