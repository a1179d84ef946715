"""Ctrl-C: one line that says what is kept and how to go on, and the exit code. Light.

A command that can say more than the usual line raises KeyboardInterrupt again, with its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
USUAL = "stopped; no file is half-written, and what was not yet written is lost"


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn Ctrl-C into a line on stderr and the exit code."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        typer.echo(str(stopped) or USUAL, err=True)
        raise typer.Exit(INTERRUPTED) from None
