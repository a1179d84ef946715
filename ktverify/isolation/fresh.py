"""Measurements in a fresh process: nothing of an earlier one is left in its caches, allocators or threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator

from pydantic import BaseModel

from ktverify.isolation.process import Program, own_environment


def lines_of(module: str, request: BaseModel) -> Generator[str, None, None]:
    """The lines that `python -m module REQUEST` prints, as they come; REQUEST is `request` as JSON.

    RuntimeError, with the last line of its stderr, where it ends with another code than 0. It ends with the caller.
    """
    command = [sys.executable, "-m", module, request.model_dump_json()]
    program = Program(command, own_environment(), stdout=subprocess.PIPE)
    try:
        for line in program.stdout:
            yield line.decode()
        if code := program.wait():
            last = program.log.lines()[-1:] or ["no output"]
            raise RuntimeError(f"the measuring process ended with {code}: {last[0]}")
    finally:
        program.close()
