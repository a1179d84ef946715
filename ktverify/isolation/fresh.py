"""Measurements in a fresh process: nothing of an earlier one is left in its caches, allocators or threads.

Comes in: a module and a request. Goes out: the lines that the module prints, one JSON object each, as they come.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Generator

from pydantic import BaseModel

from ktverify.system.paths import ROOT


def lines_of(module: str, request: BaseModel) -> Generator[str, None, None]:
    """The lines of `python -m module`, which gets `request` as JSON in its first argument. RuntimeError, with the last
    line of its stderr, where it ends with another code than 0. It ends with the caller."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, request.model_dump_json()],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None  # a pipe was asked for
            yield from process.stdout
            process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"the measuring process ended with {process.returncode}: {said[-1]}")
