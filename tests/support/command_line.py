"""Call the command line, in this process or in a new one, and check how it ended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner, Result

from ktverify.cli.main import app
from ktverify.system.files import ROOT
from tests.support import warm

# words of a command line: an engine that is right and small, and a case of a second
TORCH = "--engine torch_bf16"
TINY = "E=4,k=2,H=64,I=32,T=17,r=8,alpha=16@seed=1"


def call(*arguments: object) -> Result:
    """`python -m ktverify` with `arguments`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def every_command(group: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The words of each command and group of commands, () for the program itself, with click's object."""
    group = typer.main.get_command(app) if group is None else group
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from every_command(command, (*words, name))


def python(*arguments: object, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new process of Python with `arguments`, in `folder`, `environment` added to this one's; no worker of xdist.

    It has imported torch already; see warm.py. The first argument is -m or -c.
    """
    return warm.run([str(argument) for argument in arguments], folder, _variables() | environment, timeout=300)


def started(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same in a new interpreter, which has imported nothing yet."""
    command = [sys.executable, *map(str, arguments)]
    variables = _variables() | environment
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False)


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def run_pytest(
    run_dir: Path, *arguments: str, folder: Path = ROOT, path: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """A pytest run started in `folder`, with its records in `run_dir` and `path` on PYTHONPATH."""
    # the plug-in of hypothesis imports it at the end of each run
    options = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--run-dir", run_dir, *arguments)
    return python("-m", "pytest", *options, folder=folder, PYTHONPATH=str(path))


def loaded_modules(statement: str) -> list[str]:
    """Top-level modules that a new interpreter has loaded after `statement`."""
    done = started("-c", f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def ends(result: Result, code: int) -> str:
    """The output of a call that must have ended with `code`, and without a traceback."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def refused(result: Result, pattern: str) -> None:
    """AssertionError unless the call ended with exit code 2 and one line that matches `pattern`."""
    ends(result, 2)
    # on a busy machine a line says after ten seconds what takes so long
    lines = [line for line in result.stderr.splitlines() if line.strip() and not re.search(r", \d+ s$", line)]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert re.search(pattern, lines[0]), lines[0]
