"""Options that several commands take. Light: nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ktverify.engines import registry

EngineName = Annotated[
    str, typer.Option(help=f"engine name, {registry.OWN}", callback=lambda name: registry.absolute(name))
]
CaseText = Annotated[str, typer.Argument(metavar="CASE", help="a name, name@seed=5, name,T=1, or E=8,k=2,H=64,…")]
SomeCase = Annotated[str, typer.Argument(metavar="CASE", help="a case as repro takes it")]
CaseOrMutants = Annotated[
    list[str] | None, typer.Argument(metavar="CASE", help="a case as repro takes it; with --mutants their names")
]
Tensors = Annotated[list[str] | None, typer.Option(help="only this tensor; may be given again")]
Isa = Annotated[str | None, typer.Option(help="force an instruction set; refused where it cannot run")]
Tp = Annotated[int, typer.Option(help="tensor-parallel degree", min=1)]
Threads = Annotated[int | None, typer.Option(help="at most so many threads", min=1)]
Method = Annotated[str, typer.Option(help="AMXBF16_SFT or AMXBF16_SFT_SkipLoRA")]
TimeLimit = Annotated[
    float, typer.Option(metavar="SECONDS", help="for one call of the engine; then say where it hangs", min=1)
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="latest, a stamp or its beginning, or a directory")]
ReportsDir = Annotated[Path | None, typer.Option(help="where the runs are (default: reports/ of the checkout)")]


class OwnProgram:
    """The context object of a command that is a program by itself, so that it may fork; see isolation/forked.py."""


def check_choice(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """ValueError where `value` is given and is not one of `allowed`."""
    if value is not None and value not in allowed:
        raise ValueError(f"{option} is {value!r}, it takes one of {', '.join(allowed)}")
