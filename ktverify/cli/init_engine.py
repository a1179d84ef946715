"""The command `init-engine`: a working engine with its claims, known failures, gate, and a page that explains them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktverify.system.files import EXAMPLES, write_whole

ENGINE = "my_engine:Engine"
# what is written -> what it is a copy of
FILES = {
    "my_engine.py": "engine_outside/my_engine.py",
    "ktverify.toml": "engine_outside/ktverify.toml",
    "known_failures.toml": "engine_outside/known_failures.toml",
    "KTVERIFY.md": "engine_outside/README.md",
    ".github/workflows/ktverify.yml": "ci/ktverify.yml",
}


def init_engine(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="made where it is missing")],
) -> None:
    """Write the skeleton of an engine: one that works, what it claims, known failures, a CI workflow, a page.

    Nothing is overwritten: it is an error where one of the files is there.

    \b
    Example:  python -m ktverify init-engine .
              pytest --pyargs ktverify.suites --tier default -n 4 --engine my_engine:Engine
    """
    there = [name for name in FILES if (directory / name).exists()]
    if there:
        raise ValueError(f"{directory} has {', '.join(there)} already; name another folder, or remove what is there")
    for name, source in FILES.items():
        write_whole(directory / name, (EXAMPLES / source).read_bytes())
        typer.echo(directory / name)
    typer.echo(f"judge it: pytest --pyargs ktverify.suites --tier default -n 4 --engine {ENGINE}")
