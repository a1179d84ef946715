"""Call the command line in this process and check how it ended; which modules a statement imports in a new one."""

from __future__ import annotations

import re
import subprocess
import sys

from typer.testing import CliRunner, Result

from ktverify.cli.main import app
from ktverify.system.files import ROOT


def call(*arguments: object) -> Result:
    """`python -m ktverify` with `arguments`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ends(result: Result, code: int) -> str:
    """The output of a call that must have ended with `code`, and without a traceback."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def refused(result: Result, pattern: str) -> None:
    """AssertionError unless the call ended with exit code 2 and one line that matches `pattern`."""
    ends(result, 2)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert re.search(pattern, lines[0]), lines[0]


def loaded_modules(statement: str) -> list[str]:
    """Top-level modules that a new interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()
