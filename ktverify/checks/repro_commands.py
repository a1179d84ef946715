"""The command lines that repeat a comparison, as failing lines print them."""

from __future__ import annotations

import os
import shlex

from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.engines.run import METHOD
from ktverify.spec.cases import Case


def isa_name(label: str) -> str:
    """Return "amx_bf16" for the label "amx_bf16 (emulated)"."""
    return label.partition(" ")[0]


def repro_command(target: Target, case: Case, *, tensor: str = "", fresh: bool = False) -> str:
    """The command line that repeats one comparison; one on emulated tiles sets the environment."""
    words = [*_command(target, f"repro '{case.id}'"), *([f"--tp {target.tp}"] if target.tp != 1 else [])]
    words += [f"--method {target.method}"] if target.method != METHOD else []
    words += ["--fresh"] if fresh else []
    words += [f"--tensor {tensor}"] if tensor else []
    return " ".join(words)


def replay_command(target: Target, path: str | os.PathLike[str]) -> str:
    """The command line that repeats the comparison of a captured call."""
    words = _command(target, f"replay {shlex.quote(os.fspath(path))}")
    return " ".join([*words, *([f"--tp {target.tp}"] if target.tp != 1 else [])])


def verify_command(target: Target, case: Case) -> str:
    """The command line that repeats a training check."""
    words = _command(target, f"verify --mode training --case '{case.id}'")
    return " ".join([*words, *(["--tp tp"] if target.tp != 1 else [])])


def _command(target: Target, what: str) -> list[str]:
    environment = "KTVERIFY_EMULATE_AMX=1 " if target.label.endswith("(emulated)") else ""
    isa = [f"--isa {isa_name(target.label)}"] if target.label else []
    return [f"{environment}python -m ktverify {what}{registry.option(target.engine)}", *isa]
